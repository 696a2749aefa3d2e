"""What a job takes along from the machine that submits it."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.faults import ConfigError
from cluster.jobs import upload
from cluster.jobs.upload import RUN_FILE, stage
from cluster.spec.config import RunConfig, load_config
from tests.fakes.run_files import config
from tests.places import REPOSITORY


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to submit from, with models, prompts, and much that is nobody's business."""
    folder = tmp_path / "home"
    for model in ("absent/policy", "absent/reference"):
        (folder / model).mkdir(parents=True)
        (folder / model / "model.safetensors").write_bytes(b"weights")
    (folder / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    (folder / ".env").write_text("WANDB_API_KEY=secret")
    (folder / "huge.bin").write_bytes(b"\0" * 1000)
    monkeypatch.chdir(folder)
    return folder


def staged(cfg: RunConfig, folder: Path) -> set[str]:
    """Relative paths of all files but the code's."""
    folder.mkdir()
    stage(cfg, folder)
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(path) for path in files if path.parts[0] not in ("align", "cluster")}


def test_only_what_the_run_names_is_taken_along(home: Path, tmp_path: Path) -> None:
    found = staged(config(run={"dir": "/shared/run"}), tmp_path / "job")
    models = {"absent/policy/model.safetensors", "absent/reference/model.safetensors"}
    assert found == {RUN_FILE, "prompts.jsonl", *models}


def test_the_model_that_a_critic_starts_from_is_taken_along(home: Path, tmp_path: Path) -> None:
    (home / "absent/critic").mkdir()
    (home / "absent/critic" / "model.safetensors").write_bytes(b"weights")
    critic = {"model": "absent/critic", "optimizer": {"lr": 1e-4}}
    cfg = config(run={"dir": "/shared/run"}, algorithm={"name": "ppo"}, critic=critic)
    assert "absent/critic/model.safetensors" in staged(cfg, tmp_path / "job")


def test_the_code_that_submits_is_the_code_that_runs(home: Path, tmp_path: Path) -> None:
    staged(config(run={"dir": "/shared/run"}), tmp_path / "job")
    for module in ("align/learner/learner.py", "cluster/cli.py", "cluster/views/report.html.j2"):
        ours = REPOSITORY / module
        assert (tmp_path / "job" / module).read_bytes() == ours.read_bytes()
    assert not list((tmp_path / "job").rglob("__pycache__"))


def test_the_run_file_holds_the_overrides(home: Path, tmp_path: Path) -> None:
    cfg = config(run={"dir": "/shared/run", "seed": 41})
    staged(cfg, tmp_path / "job")
    assert load_config(tmp_path / "job" / RUN_FILE) == cfg


def test_absolute_paths_are_left_where_they_are(home: Path, tmp_path: Path) -> None:
    sections = {"policy": {"model": "/nowhere/policy"}, "reference": {"model": "/nowhere/reference"}}
    found = staged(
        config(run={"dir": "/shared/run"}, prompts={"files": ["/data/p.jsonl"]}, **sections), tmp_path / "job"
    )
    assert found == {RUN_FILE}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"run": {}}, "run.dir is 'left out': a job's working folder vanishes"),
        ({"run": {"dir": "runs/here"}}, "run.dir is 'runs/here'"),
        ({"prompts": {"files": ["missing.jsonl"]}}, "prompt file missing.jsonl does not exist"),
        ({"prompts": {"files": ["../prompts.jsonl"]}}, "outside the folder you submit from"),
        ({"policy": {"model": "models/missing"}}, "model folder models/missing does not exist"),
    ],
)
def test_what_a_job_could_not_find_is_refused(home: Path, tmp_path: Path, sections: dict, message: str) -> None:  # type: ignore[type-arg]
    cfg = config(**{"run": {"dir": "/shared/run"}} | sections)
    with pytest.raises(ConfigError, match=message):
        staged(cfg, tmp_path / "job")


@pytest.mark.parametrize("large", ["absent/policy/model.safetensors", "prompts.jsonl"])
def test_what_is_large_is_not_sent_over_the_wire(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: str
) -> None:
    monkeypatch.setattr(upload, "MAX_BYTES", 3 << 20)
    (home / large).write_bytes(bytes(4 << 20))
    name = large.removesuffix("/model.safetensors")
    with pytest.raises(ConfigError, match=rf"4 MiB would be sent along with the job, 4 MiB of them the .*{name}"):
        staged(config(run={"dir": "/shared/run"}), tmp_path / "job")
    assert not list((tmp_path / "job").iterdir()), "nothing was copied"


def test_what_lies_around_beside_a_model_is_left_out(home: Path, tmp_path: Path) -> None:
    """A cloned folder has .git; a .gitignore would make Ray leave the weights out."""
    folder = home / "absent" / "policy"
    (folder / ".git").mkdir()
    (folder / ".git" / "pack").write_bytes(b"history")
    (folder / ".gitignore").write_text("*.safetensors")
    (folder / ".env").write_text("WANDB_API_KEY=secret")
    found = staged(config(run={"dir": "/shared/run"}), tmp_path / "job")
    assert {path for path in found if path.startswith("absent/policy")} == {"absent/policy/model.safetensors"}
