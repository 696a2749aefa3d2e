"""What a job takes along from the machine that submits it."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster import upload
from cluster.config import RunConfig, load_config
from cluster.faults import ConfigError
from cluster.upload import RUN_FILE, stage
from tests.run_files import config


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to submit from, with models, prompts, and much that is nobody's business."""
    folder = tmp_path / "home"
    for model in ("models/policy", "models/reference"):
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
    models = {"models/policy/model.safetensors", "models/reference/model.safetensors"}
    assert found == {RUN_FILE, "prompts.jsonl", *models}


def test_the_model_that_a_critic_starts_from_is_taken_along(home: Path, tmp_path: Path) -> None:
    (home / "models/critic").mkdir()
    (home / "models/critic" / "model.safetensors").write_bytes(b"weights")
    critic = {"model": "models/critic", "optimizer": {"lr": 1e-4}}
    cfg = config(run={"dir": "/shared/run"}, algorithm={"name": "ppo"}, critic=critic)
    assert "models/critic/model.safetensors" in staged(cfg, tmp_path / "job")


def test_the_code_that_submits_is_the_code_that_runs(home: Path, tmp_path: Path) -> None:
    staged(config(run={"dir": "/shared/run"}), tmp_path / "job")
    for module in ("align/learner.py", "cluster/cli.py", "cluster/report.html.j2"):
        ours = Path(upload.__file__).parents[1] / module
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


def test_a_large_model_is_not_sent_over_the_wire(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "MAX_MODEL_BYTES", 3)
    with pytest.raises(ConfigError, match="are sent along with a job"):
        staged(config(run={"dir": "/shared/run"}), tmp_path / "job")
