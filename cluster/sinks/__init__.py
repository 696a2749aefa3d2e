"""Where metrics go: console, JSONL, W&B. None of them may end a run or make it wait."""

from cluster.sinks.access import check_online
from cluster.sinks.console import Console
from cluster.sinks.jsonl import JsonLines
from cluster.sinks.sink import Sink, Sinks
from cluster.sinks.wandb import WandbConfig, WandbSink

__all__ = ["Console", "JsonLines", "Sink", "Sinks", "WandbConfig", "WandbSink", "check_online"]
