"""The storage that a run names: room for it, and whether every machine sees the same."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.capacity.arithmetic import Arithmetic
from cluster.capacity.bill import critic_shape
from cluster.doctor.verdict import Verdict
from cluster.spec.config import RunConfig
from cluster.spec.shape import model_shape

_SHARE = "put it on storage that every node has, under one path, and name it by that path"


@dataclass(frozen=True, slots=True)
class Storage:
    """What every node has to find.

    Attributes:
        models: Model folders with the bytes of their weights.
        mark: A file that was just written beside the run.
        content: Its content.
    """

    models: tuple[tuple[Path, int], ...]
    mark: Path
    content: str

    def look(self) -> Iterator[Verdict]:
        """Whether this machine finds it."""
        for folder, num_bytes in self.models:
            here = weights_bytes(folder) if _readable(folder) else None
            found = f"{folder} cannot be read" if here is None else f"{folder} has {here} bytes of weights"
            if here != num_bytes:
                found = f"{found}; where the run is driven: {num_bytes}"
            yield Verdict.of("model folders", here == num_bytes, found, _SHARE)
        seen = self.mark.is_file() and self.mark.read_text() == self.content
        what = "sees" if seen else "does not see"
        found = f"{what} a file that was written to {self.mark.parent}"
        yield Verdict.of("run folder", seen, found, "--set run.dir=… on storage that every node shares")


@contextlib.contextmanager
def shared(cfg: RunConfig) -> Iterator[Storage]:
    """The storage of a run, with a mark in it while the block lasts.

    Raises:
        OSError: If the run folder cannot be written to.
    """
    sections = (cfg.policy, cfg.reference, cfg.critic)
    folders = dict.fromkeys(s.model.resolve() for s in sections if s and s.model)
    mark = existing_part(run_folder(cfg)).resolve() / f".align-doctor-{secrets.token_hex(4)}"
    content = secrets.token_hex(16)
    mark.write_text(content)
    try:
        yield Storage(tuple((folder, weights_bytes(folder)) for folder in folders), mark, content)
    finally:
        mark.unlink(missing_ok=True)


def disk(cfg: RunConfig) -> Iterator[Verdict]:
    """Whether the run folder can be written to and the run fits there; what a stopped run left there is counted."""
    folder = run_folder(cfg)
    there = existing_part(folder)
    if not os.access(there, os.W_OK):
        yield Verdict("disk", "fail", f"{there} cannot be written to", "set run.dir to a folder that can")
        return
    needed = Arithmetic.of(cfg, model_shape(cfg.policy.model, cfg.policy.adapter), critic_shape(cfg)).disk_bytes
    left = max(needed - sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()), 0) if cfg.run.dir else needed
    free = shutil.disk_usage(there).free
    found = f"{free / 2**30:.1f} GiB free in {there}, the run needs {left / 2**30:.2g} GiB"
    fix = "set run.dir to a larger disk, or lower checkpoint.keep"
    yield Verdict.of("disk", free > 1.2 * left, found, fix)


def run_folder(cfg: RunConfig) -> Path:
    """The run folder, or the one in which a new one is made."""
    return cfg.run.dir or Path("runs")


def existing_part(folder: Path) -> Path:
    """The folder or, until it is made, the nearest one above it."""
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def weights_bytes(folder: Path) -> int:
    """Size of a model folder's weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _readable(folder: Path) -> bool:
    files = [folder / "config.json", *folder.glob("*.safetensors")]
    return all(os.access(file, os.R_OK) for file in files)
