"""Checkpoints: the newest complete one is found, whatever was torn, damaged or left behind."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.faults import CheckpointError
from cluster.record import checkpoint
from cluster.record.checkpoint import Checkpoint, RunState
from cluster.record.files import hash_tree


def state(version: int) -> RunState:
    return RunState(
        version,
        cursor=4 * version,
        leased=(4 * version - 1, 4 * version - 3),
        num_trained=2 * version,
        num_filtered=version,
        filter={"dropped": [[7, "p", 0.0]], "rates": {"p": 1 / 3}, "num_skipped": 2},
        num_quarantined=1,
        quarantine={"recent": "010", "decided": [[7, 4, 1]]},
        reference_version=version - 1,
        reference_fingerprint="abc",
    )


def save(directory: Path, version: int, keep: int = 2) -> Checkpoint:
    """A checkpoint with a policy of two files and an optimizer, each of which says its version."""

    async def write(folder: Path) -> None:
        write_files(folder, version)

    return asyncio.run(checkpoint.save(directory, state(version), keep, write))


def write_files(folder: Path, version: int) -> None:
    (folder / "policy").mkdir()
    (folder / "policy" / "model.safetensors").write_bytes(b"weights %d" % version)
    (folder / "policy" / "config.json").write_text("{}")
    (folder / "optimizer.safetensors").write_bytes(b"moments %d" % version)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def newest_version(directory: Path) -> int | None:
    found = checkpoint.newest(directory)
    return found.state.version if found else None


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    saved = save(tmp_path / "checkpoints", 3)
    found = checkpoint.newest(tmp_path / "checkpoints")
    assert found == saved == Checkpoint(tmp_path / "checkpoints" / "step_00003", state(3))
    assert found.state.leased == (11, 9), "a tuple again, in its order"
    assert (found.policy / "model.safetensors").read_bytes() == b"weights 3"


@pytest.mark.parametrize("there", [False, True])
def test_without_a_checkpoint_there_is_none(there: bool, tmp_path: Path) -> None:
    if there:
        (tmp_path / "checkpoints").mkdir()
    assert checkpoint.newest(tmp_path / "checkpoints") is None


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for version in (5, 10, 15, 20):
        save(tmp_path, version, keep=2)
    assert names(tmp_path) == ["step_00015", "step_00020"]
    assert newest_version(tmp_path) == 20


def test_keeping_one_keeps_the_one_just_written(tmp_path: Path) -> None:
    save(tmp_path, 1, keep=1)
    save(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["step_00002"]


def test_a_sixth_digit_does_not_make_a_checkpoint_old(tmp_path: Path) -> None:
    for version in (99_998, 99_999, 100_000):
        save(tmp_path, version, keep=2)
    assert names(tmp_path) == ["step_100000", "step_99999"]
    assert newest_version(tmp_path) == 100_000


def test_saving_a_version_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "step_00001" / "optimizer.safetensors").write_bytes(b"damaged")
    save(tmp_path, 1)
    assert newest_version(tmp_path) == 1


# --- damage -------------------------------------------------------------------------------------------------------


def _flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no state": lambda path: (path / "state.json").unlink(),
    "an empty state": lambda path: (path / "state.json").write_text(""),
    "a state that was cut": lambda path: _cut(path / "state.json"),
    "a state of another form": lambda path: (path / "state.json").write_text("{}"),
    "a state that is a list": lambda path: (path / "state.json").write_text("[]"),
    "a weight with one bit flipped": lambda path: _flip_a_bit(path / "policy" / "model.safetensors"),
    "weights that were cut": lambda path: _cut(path / "policy" / "model.safetensors"),
    "weights that are empty": lambda path: (path / "policy" / "model.safetensors").write_bytes(b""),
    "a file that is missing": lambda path: (path / "policy" / "config.json").unlink(),
    "a file too many": lambda path: (path / "policy" / "model-2.safetensors").write_bytes(b"other weights"),
    "a damaged optimizer": lambda path: _flip_a_bit(path / "optimizer.safetensors"),
    "no folder of the policy": lambda path: shutil.rmtree(path / "policy"),
    "a file in place of the folder": lambda path: (shutil.rmtree(path), path.write_text("")),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_is_passed_over(damage: Callable[[Path], object], tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    damage(tmp_path / "step_00002")
    assert newest_version(tmp_path) == 1
    damage(tmp_path / "step_00001")
    assert newest_version(tmp_path) is None


def test_a_state_whose_numbers_changed_is_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    path = tmp_path / "step_00002" / "state.json"
    content = json.loads(path.read_text())
    content["state"]["cursor"] += 1
    path.write_text(json.dumps(content))
    assert newest_version(tmp_path) == 1


def test_a_write_that_fails_leaves_the_old_checkpoints(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)

    async def disk_is_full(folder: Path) -> None:
        (folder / "optimizer.safetensors").write_bytes(b"half")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        asyncio.run(checkpoint.save(tmp_path, state(3), 2, disk_is_full))
    assert newest_version(tmp_path) == 2
    assert {"step_00001", "step_00002"} <= set(names(tmp_path))
    assert "step_00003" not in names(tmp_path)


def test_what_a_killed_write_left_is_never_used_and_is_cleared_by_the_next(tmp_path: Path) -> None:
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "step_00001", tmp_path / ".step_00002.tmp")
    assert newest_version(tmp_path) == 1
    save(tmp_path, 3)
    assert names(tmp_path) == ["step_00001", "step_00003"]


def test_the_checkpoint_appears_only_when_all_is_written(tmp_path: Path) -> None:
    async def look(folder: Path) -> None:
        assert checkpoint.newest(tmp_path) is None
        assert folder.parent == tmp_path, "on the same disk, so that a rename is enough"
        write_files(folder, 1)
        assert checkpoint.newest(tmp_path) is None

    asyncio.run(checkpoint.save(tmp_path, state(1), 2, look))
    assert newest_version(tmp_path) == 1


@pytest.mark.parametrize("missing", ["policy/config.json", "optimizer.safetensors"])
def test_what_the_learner_wrote_on_another_disk_is_no_checkpoint(missing: str, tmp_path: Path) -> None:
    save(tmp_path, 1)

    async def write_elsewhere(folder: Path) -> None:
        write_files(folder, 2)
        (folder / missing).unlink()

    with pytest.raises(CheckpointError, match=f"the learner wrote no {missing} that this process can see") as caught:
        asyncio.run(checkpoint.save(tmp_path, state(2), 1, write_elsewhere))
    assert "storage that the controller and the learner share" in caught.value.advice
    assert "step_00002" not in names(tmp_path)
    assert newest_version(tmp_path) == 1, "the old one stays, though only one is kept"


def test_the_run_goes_on_while_a_checkpoint_is_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashing waits here for something that only another task of the loop does."""
    others_ran = threading.Event()

    async def both() -> None:
        loop, began = asyncio.get_running_loop(), asyncio.Event()

        def hash_slowly(directory: Path) -> dict[str, str]:
            loop.call_soon_threadsafe(began.set)
            assert others_ran.wait(120), "the event loop stood still"
            return hash_tree(directory)

        async def other_work() -> None:
            await began.wait()
            others_ran.set()

        async def write(folder: Path) -> None:
            write_files(folder, 1)

        monkeypatch.setattr(checkpoint, "hash_tree", hash_slowly)
        await asyncio.gather(checkpoint.save(tmp_path, state(1), 2, write), other_work())

    asyncio.run(both())
    monkeypatch.undo()
    assert newest_version(tmp_path) == 1
