"""What one run writes down while it goes on: its log in every sink, alerts, samples and trace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from align.metrics import Metric, reduce
from cluster.fleet.address import cluster_address
from cluster.record.alerts import Alerts
from cluster.record.history import read_rows, seconds_so_far
from cluster.record.samples import Samples
from cluster.record.sinks.console import Console
from cluster.record.sinks.jsonl import JsonLines
from cluster.record.sinks.prometheus import PrometheusSink
from cluster.record.sinks.sink import Sinks
from cluster.record.sinks.wandb.access import entity_of
from cluster.record.sinks.wandb.artifacts import WandbArtifacts
from cluster.record.sinks.wandb.identity import whereabouts
from cluster.record.sinks.wandb.sink import WandbSink
from cluster.record.sinks.wandb.tables import TrajectoryTables
from cluster.run.timeline import Timeline
from cluster.spec.config import RunConfig, resolved


class _Wandb(NamedTuple):
    sink: WandbSink
    link: str  # what a person was told at the start


class Recording:
    """The record of one run, opened, or gone on with where an earlier process of the run left it.

    Attributes:
        path: The run folder.
        started: `time.monotonic()` at the start of this process of the run.
        earlier_s: Seconds of its earlier processes.
        alerts: What somebody should be told of.
        samples: Answers before, after and of the reference.
        timeline: The trace.

    Args:
        cfg: The run.
        path: The run folder.
        console: The console.
        started: See above.
        online: Whether W&B is uploaded to.
    """

    def __init__(self, cfg: RunConfig, path: Path, console: Console, started: float, online: bool) -> None:
        self.path, self.started = path, started
        self._cfg, self._console = cfg, console
        metrics = path / "metrics.jsonl"
        earlier = read_rows(metrics) if metrics.is_file() else []
        self.earlier_s = seconds_so_far(metrics) if earlier else 0.0
        self._sinks = Sinks([console, JsonLines(metrics)], console.warn, started)
        self.alerts = Alerts(cfg.alerts, self._sinks.alert, earlier)
        self._sinks.add(lambda: self.alerts)
        self._wandb = self._record_in_wandb(online, earlier) if cfg.wandb.mode != "disabled" else None
        if cluster_address() is not None:  # a Ray of the run's own serves no metrics
            self._sinks.add(lambda: PrometheusSink(path.name))
        self.samples = Samples(path / "samples.json")
        self.timeline = Timeline.open(path / "trace.json", console.warn) if cfg.run.trace else Timeline(None)

    def _record_in_wandb(self, online: bool, earlier: Sequence[Mapping[str, Any]]) -> _Wandb | None:
        """The W&B run with its artifacts and tables; says where it is."""
        cfg, path, sinks, warn = self._cfg, self.path, self._sinks, self._console.warn
        record = sinks.add(
            lambda: WandbSink(cfg.wandb, path, path.name, resolved(cfg), online, warn, earlier, self.earlier_s)
        )
        if record is None:
            return None
        sinks.add(lambda: WandbArtifacts(record, path, cfg.wandb.artifacts))
        if cfg.wandb.tables:
            folder, every, num_rows = path / "trajectories", cfg.wandb.tables, cfg.wandb.table_rows
            sinks.add(lambda: TrajectoryTables(record, folder, every, num_rows, cfg.algorithm.discount))
        entity = entity_of(cfg.wandb) if online else None
        link = whereabouts(cfg.wandb, path, online=online, entity=entity)
        self._console.say(f"W&B          {link}")
        return _Wandb(record, link)

    def log(self, step: int, metrics: Sequence[Metric]) -> None:
        """The step's values into every sink."""
        self._sinks.log(step, reduce(metrics))

    def artifact(self, kind: str, folder: Path, step: int) -> None:
        """The run wrote a folder of weights: kind "checkpoints" or "policy"."""
        self._sinks.artifact(kind, folder, step)

    def close(self) -> None:
        """Write what is left."""
        self._sinks.close()
        self.timeline.close()

    def in_wandb(self) -> str:
        """Where W&B shows the run, or where its record lies if not all of it is there; once it is closed."""
        if self._wandb is not None and self._wandb.sink.uploaded:
            return self._wandb.link
        return whereabouts(self._cfg.wandb, self.path, online=False)
