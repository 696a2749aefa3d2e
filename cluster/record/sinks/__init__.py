"""Where metrics go: console, JSONL, W&B. None of them may end a run or make it wait."""

from cluster.sinks.access import check_online, entity_of
from cluster.sinks.artifacts import WandbArtifacts
from cluster.sinks.console import Console
from cluster.sinks.jsonl import JsonLines
from cluster.sinks.sink import Sink, Sinks
from cluster.sinks.tables import TrajectoryTables
from cluster.sinks.wandb import WandbConfig, WandbSink

__all__ = [
    "Console",
    "JsonLines",
    "Sink",
    "Sinks",
    "TrajectoryTables",
    "WandbArtifacts",
    "WandbConfig",
    "WandbSink",
    "check_online",
    "entity_of",
]
