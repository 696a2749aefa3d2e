"""The run folder: a new one, one that is taken up again, and those that are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.faults import RunFolderError
from cluster.record.files import write_atomically
from cluster.record.folder import RunFolder
from cluster.spec.config import load_config, resolved
from tests.fakes.run_files import config
from tests.places import REPOSITORY


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def finish(path: Path, status: str) -> None:
    write_atomically(path / "summary.json", json.dumps({"status": status}))


@pytest.mark.parametrize("there", [False, True])
def test_a_new_folder_holds_the_whole_config(there: bool, tmp_path: Path) -> None:
    path = tmp_path / "runs" / "one"
    if there:
        path.mkdir(parents=True)
    folder = RunFolder(path, resolved(config(run={"seed": 9})))
    assert not folder.resumed
    assert sorted(files(path)) == [".lock", "config.toml"]
    assert load_config(path / "config.toml") == config(run={"seed": 9})


def begin(path: Path) -> None:
    """What a run leaves that got past its start."""
    write_atomically(path / "environment.json", "{}")


@pytest.mark.parametrize("status", [None, "stopped", "failed"])
def test_a_folder_of_the_same_run_that_did_not_finish_is_taken_up(status: str | None, tmp_path: Path) -> None:
    RunFolder(tmp_path, resolved(config()))
    begin(tmp_path)
    if status:
        finish(tmp_path, status)
    assert RunFolder(tmp_path, resolved(config())).resumed


@pytest.mark.parametrize("left", [(), (".lock",), ("config.toml",), (".lock", "config.toml", "config.toml.tmp")])
def test_what_a_run_left_that_could_not_start_is_in_nobodys_way(left: tuple[str, ...], tmp_path: Path) -> None:
    for name in left:
        (tmp_path / name).write_text("of another config")
    folder = RunFolder(tmp_path, resolved(config(run={"seed": 9})))
    assert not folder.resumed
    assert load_config(tmp_path / "config.toml") == config(run={"seed": 9})


def test_a_folder_of_another_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    RunFolder(tmp_path, resolved(config()))
    begin(tmp_path)
    before = files(tmp_path)
    with pytest.raises(RunFolderError, match="already holds another run"):
        RunFolder(tmp_path, resolved(config(optimizer={"lr": 0.5})))
    assert files(tmp_path) == before


def test_a_finished_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    RunFolder(tmp_path, resolved(config()))
    finish(tmp_path, "finished")
    before = files(tmp_path)
    with pytest.raises(RunFolderError, match="already holds this run, finished"):
        RunFolder(tmp_path, resolved(config()))
    assert files(tmp_path) == before


def test_a_folder_with_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunFolderError, match="is not empty and holds no run"):
        RunFolder(tmp_path, resolved(config()))
    assert files(tmp_path) == {"thesis.tex": b"years of work"}


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.write_text("a file")
    with pytest.raises(RunFolderError, match="is a file"):
        RunFolder(path, resolved(config()))


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=r"file/run cannot be used: .*Not a directory"):
        RunFolder(tmp_path / "file" / "run", resolved(config()))


def test_a_folder_is_held_by_one_run_at_a_time(tmp_path: Path) -> None:
    first, second = RunFolder(tmp_path, resolved(config())), RunFolder(tmp_path, resolved(config()))
    with first.lock(), pytest.raises(RunFolderError, match="is in use by a run that is under way"), second.lock():
        pytest.fail("two runs hold one folder")
    with second.lock():
        pass


def test_a_run_that_is_starting_up_keeps_its_config(tmp_path: Path) -> None:
    """It has written nothing else yet, so that its folder looks like one of a run that could not start."""
    with RunFolder(tmp_path, resolved(config())).lock():
        with pytest.raises(RunFolderError, match=r"is in use by a run that is under way"):
            RunFolder(tmp_path, resolved(config(optimizer={"lr": 0.5})))
        assert load_config(tmp_path / "config.toml") == config()


HOLD_AND_DIE = """
import os, sys
from pathlib import Path
from cluster.record.folder import RunFolder
from cluster.spec.config import resolved
from tests.fakes.run_files import config
with RunFolder(Path(sys.argv[1]), resolved(config())).lock():
    os.kill(os.getpid(), 9)
"""


def test_a_run_that_was_killed_holds_nothing(tmp_path: Path) -> None:
    root = REPOSITORY
    died = subprocess.run([sys.executable, "-c", HOLD_AND_DIE, str(tmp_path)], cwd=root, timeout=300)
    assert died.returncode == -9
    assert (tmp_path / ".lock").is_file()
    with RunFolder(tmp_path, resolved(config())).lock():
        pass


def test_every_refusal_says_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("")
    with pytest.raises(RunFolderError) as caught:
        RunFolder(tmp_path, resolved(config()))
    assert "--set run.dir" in caught.value.advice


def test_the_command_that_is_printed_after_a_stop_takes_the_run_up_again(tmp_path: Path) -> None:
    """`align train FOLDER/config.toml --set run.dir=FOLDER`, for a run whose file named no folder, or another spelling."""
    for run_dir in (None, tmp_path / "one" / ".." / "one"):
        cfg = config(run={"dir": run_dir}) if run_dir else config()
        RunFolder(tmp_path / "one", resolved(cfg))
        begin(tmp_path / "one")
        again = resolved(load_config(tmp_path / "one" / "config.toml", [f"run.dir={tmp_path / 'one'}"]))
        assert RunFolder(RunFolder.default_path(again), again).resumed


def test_the_default_folder_is_named_after_run_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "strftime", lambda shape: {"%Y%m%d-%H%M%S": "20261124-073000"}[shape])
    assert RunFolder.default_path(resolved(config(run={"name": "demo"}))) == Path("runs/demo-20261124-073000")
    assert RunFolder.default_path(resolved(config(run={"dir": "/data/mine"}))) == Path("/data/mine")


def test_the_environment_names_packages_seed_machine_and_what_else_is_given(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, resolved(config(run={"seed": 11})))
    folder.write_environment({"dtype": "float32"})
    content = json.loads((tmp_path / "environment.json").read_text())
    assert content["seed"] == 11
    assert content["dtype"] == "float32"
    assert {"align", "torch", "ray", "wandb"} <= content["packages"].keys()
    assert content["machine"]["cpus"] == os.cpu_count()
