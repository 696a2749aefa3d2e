"""Metrics for Prometheus, through Ray: every node of the cluster serves them at its metrics port."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from align.metrics import GLOSSARY


def gauge_name(metric: str) -> str:
    """Name of a metric as a gauge; Ray serves it with `ray_` before it. `time/step_s` becomes `align_time_step_s`."""
    return "align_" + re.sub(r"[^a-z0-9]+", "_", metric.lower())


class PrometheusSink:
    """The newest value of every metric as a gauge, with the run's name as its tag.

    A gauge is made with its first value, so that what a run does not measure is not served as 0. Ray serves values for as long
    as the process lives, and gives them out a few seconds late.

    Args:
        run: Name of the run.
        new_gauge: Makes a gauge from name, description and tag keys; left out: Ray's.

    Raises:
        RuntimeError: If this process is in no Ray session.
    """

    def __init__(self, run: str, new_gauge: Any = None) -> None:
        if new_gauge is None:
            import ray
            from ray.util.metrics import Gauge

            if not ray.is_initialized():
                raise RuntimeError("metrics for Prometheus need a Ray session")
            new_gauge = Gauge
        self._new_gauge = new_gauge
        self._tags = {"run": run}
        self._gauges: dict[str, Any] = {}

    def log(self, step: int, wall_s: float, values: Mapping[str, float]) -> None:
        """See `cluster.record.sinks.sink.Sink`."""
        for name, value in values.items():
            if name not in self._gauges:
                self._gauges[name] = self._new_gauge(gauge_name(name), GLOSSARY[name].meaning, tag_keys=("run",))
            self._gauges[name].set(value, tags=self._tags)

    def close(self) -> None:
        """See `cluster.record.sinks.sink.Sink`; Ray forgets the values with the process."""
