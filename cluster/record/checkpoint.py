"""Checkpoints: written aside, hashed, renamed; found again by their hashes, so that a torn one is never used."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cluster.faults import CheckpointError
from cluster.record.files import hash_tree, remove_tree, write_atomically


@dataclass(frozen=True, slots=True)
class RunState:
    """Where a run stands, beside the weights.

    Attributes:
        version: Policy version, the number of optimizer steps that were applied.
        cursor: Number of the next new ticket.
        leased: Tickets that were handed out and not yet trained or dropped; they go out again first.
        num_trained: Tickets trained so far.
        num_filtered: Tickets filtered so far.
        num_quarantined: Tickets quarantined so far.
        quarantine: From `Quarantine.state`.
        filter: From `Filter.state`.
        reference_version: Policy version of the reference in `reference/`; 0 if it is the run's first one, which is not there.
        reference_fingerprint: Of its weights.
        wandb_id: The W&B run that goes on after a resume.
    """

    version: int
    cursor: int
    leased: tuple[int, ...]
    num_trained: int
    num_filtered: int = 0
    num_quarantined: int = 0
    quarantine: Mapping[str, Any] = field(default_factory=dict)
    filter: Mapping[str, Any] = field(default_factory=dict)
    reference_version: int = 0
    reference_fingerprint: str = ""
    wandb_id: str = ""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint: `policy/` (a Hugging Face folder), `optimizer.safetensors`, `state.json`; maybe `policy_adapter/`,
    a critic's files, `reference/`."""

    path: Path
    state: RunState

    @property
    def policy(self) -> Path:
        """The policy's folder."""
        return self.path / "policy"


async def save(directory: Path, state: RunState, keep: int, write: Callable[[Path], Awaitable[None]]) -> Checkpoint:
    """Write a checkpoint and remove the oldest beyond `keep`.

    Args:
        directory: Folder of all checkpoints.
        state: Where the run stands.
        keep: Checkpoints to keep.
        write: Writes policy and optimizer into the folder it is given.

    Raises:
        CheckpointError: If they are not there afterwards.
    """
    directory.mkdir(parents=True, exist_ok=True)
    final = directory / f"step_{state.version:05d}"
    aside = directory / f".step_{state.version:05d}.tmp"
    for leftover in directory.glob(".step_*.tmp"):
        remove_tree(leftover)
    aside.mkdir()
    await write(aside)
    await asyncio.to_thread(_seal, aside, final, state)
    for old in _oldest_first(directory)[:-keep]:
        remove_tree(old)
    return Checkpoint(final, state)


def _seal(aside: Path, final: Path, state: RunState) -> None:
    """Bring what was written to the disk, hash it, and give it its name; off the event loop, for it takes a while."""
    for name in ("policy/config.json", "optimizer.safetensors"):
        if not (aside / name).is_file():
            raise CheckpointError(
                f"the learner wrote no {name} that this process can see in {aside}",
                "the run folder has to be on storage that the controller and the learner share",
            )
    for path in aside.rglob("*"):
        if path.is_file():
            _fsync(path)
    content = {"state": asdict(state), "sha256": _hashes(aside, asdict(state))}
    write_atomically(aside / "state.json", json.dumps(content, indent=2))
    remove_tree(final)
    aside.replace(final)
    _fsync(final.parent)


def newest(directory: Path) -> Checkpoint | None:
    """The newest checkpoint whose files have the hashes that were written with it."""
    for path in reversed(_oldest_first(directory)):
        try:
            content = json.loads((path / "state.json").read_text())
            state = content["state"]
            complete = content["sha256"] == _hashes(path, state)
        except (OSError, ValueError, KeyError, TypeError):
            continue  # torn
        if complete:
            return Checkpoint(path, RunState(**{**state, "leased": tuple(state["leased"])}))
    return None


def _oldest_first(directory: Path) -> list[Path]:
    """All checkpoints by version; a version with more digits is newer."""
    return sorted(directory.glob("step_*"), key=lambda path: (len(path.name), path.name))


def _hashes(directory: Path, state: Mapping[str, object]) -> dict[str, str]:
    """SHA-256 of every file of a checkpoint by relative path, and of the state that `state.json` holds beside them."""
    of_state = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
    return {**hash_tree(directory), "state.json": of_state}


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
