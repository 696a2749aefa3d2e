"""The moving reference: every N steps the scorers' reference takes the weights of the policy."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

from align.metrics import Metric
from cluster.loop.saved_reference import SavedReference
from cluster.record.folder import remove_tree


class MovingReference:
    """Refreshes the reference in order with scoring and training.

    The loop refreshes after version k is published and before the slots of step k are free. With max_staleness = 0 no group
    is in flight then: all of step k + 1 and later are scored by the new reference, all before by the old one. With a larger
    one, a group in flight is scored by the reference that its scorer has when its turn comes, and those that were scored keep
    their rewards; so for max_staleness steps a batch may hold groups of both.

    The newest reference stays in the run folder for scorers that are replaced. A checkpoint gets a copy of its own.

    Args:
        folder: For the saved references; emptied first.
        every: Steps between refreshes; 0 for none.
        export: Writes the policy into a folder; returns the fingerprint of its weights.
        load: Brings a saved reference to every scorer, verified.
    """

    def __init__(
        self,
        folder: Path,
        every: int,
        export: Callable[[Path], Awaitable[str]],
        load: Callable[[SavedReference], Awaitable[None]],
    ) -> None:
        self.folder = folder.resolve()
        self.every = every
        self.saved: SavedReference | None = None
        self._export = export
        self._load = load
        remove_tree(self.folder)

    async def refresh(self, step: int) -> list[Metric]:
        """Take the policy of version `step`, if its turn has come."""
        if not self.every:
            return []
        if step % self.every == 0:
            folder = self.folder / f"step_{step:05d}"
            folder.mkdir(parents=True)
            await self._take(SavedReference(folder, step, await self._export(folder)))
        return [Metric("reference/version", self.saved.version if self.saved else 0)]

    async def restore(self, checkpoint: Path, version: int, fingerprint: str) -> None:
        """Take the reference of a checkpoint, of which `copy_into` made a part."""
        folder = self.folder / f"step_{version:05d}"
        await asyncio.to_thread(shutil.copytree, checkpoint / "reference", folder)
        await self._take(SavedReference(folder, version, fingerprint))

    async def copy_into(self, checkpoint: Path) -> None:
        """Write the reference into a checkpoint, if it is not the run's first one."""
        if self.saved:
            await asyncio.to_thread(shutil.copytree, self.saved.folder, checkpoint / "reference")

    async def _take(self, saved: SavedReference) -> None:
        await self._load(saved)
        if self.saved:
            remove_tree(self.saved.folder)
        self.saved = saved
