"""Artifacts of a run for W&B: what it ran on and with, and where its weights are."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from cluster.record.sinks.wandb.sink import WandbSink

ENVIRONMENT_FILES = ("config.toml", "environment.json")
_PACKAGES = ("align", "cluster")
_SOURCES = {".py", ".j2"}


class WandbArtifacts:
    """Files and folders beside the metrics. Nothing of the user's is uploaded but what the run itself wrote or was made of.

    Environment and code are recorded once per process of the run; W&B keeps what did not change once. Weights are references:
    their folders stay where they are, and `checkpoint.keep` removes old ones from there all the same.

    Args:
        record: The W&B run.
        run_dir: The run folder, with `ENVIRONMENT_FILES`.
        kinds: Which artifacts; see `WandbConfig.artifacts`.
    """

    def __init__(self, record: WandbSink, run_dir: Path, kinds: Collection[str]) -> None:
        self._record, self._kinds = record, kinds
        if "environment" in kinds:
            folder = (
                record.directory / "environment"
            )  # a copy, since a resumed run writes its own; `wandb sync` reads it
            folder.mkdir()
            for name in ENVIRONMENT_FILES:
                shutil.copyfile(run_dir / name, folder / name)
            self._log_files("environment", "environment", {name: folder / name for name in ENVIRONMENT_FILES})
        if "code" in kinds:
            self._log_files("code", "code", sources())

    def artifact(self, kind: str, folder: Path, step: int) -> None:
        """See `ArtifactSink`."""
        import wandb

        if kind in self._kinds:
            artifact = wandb.Artifact(f"{kind}-{self._record.run.id}", "model", metadata={"step": step})
            # By path: the checkpoint has hashes of its own, and reading it again would take a while.
            artifact.add_reference(folder.resolve().as_uri(), name=folder.name, checksum=False)
            self._record.run.log_artifact(artifact, aliases=["latest", f"step-{step}"])

    def _log_files(self, name: str, kind: str, files: Mapping[str, Path]) -> None:
        import wandb

        artifact = wandb.Artifact(f"{name}-{self._record.run.id}", kind)
        for inside, path in files.items():
            artifact.add_file(str(path), name=inside, policy="immutable", skip_cache=True)
        self._record.run.log_artifact(artifact)

    def log(self, step: int, wall_s: float, values: Mapping[str, float]) -> None:
        """See `Sink`; metrics are not its business."""

    def close(self) -> None:
        """See `Sink`; the artifacts are part of the record."""


def sources() -> dict[str, Path]:
    """The sources of both packages as they are installed here, by their path in an artifact."""
    root = Path(__file__).parents[4]
    files = (path for package in _PACKAGES for path in sorted((root / package).rglob("*")))
    return {str(path.relative_to(root)): path for path in files if path.suffix in _SOURCES}
