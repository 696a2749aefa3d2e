"""The machines of a live cluster, as Ray or its dashboard tells of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from cluster.fit import Node


def nodes(resources: Iterable[Mapping[str, float]]) -> list[Node]:
    """Machines by what Ray places by, which is neither host nor GPU memory; those without CPUs take no process of a run."""
    return [
        Node(cpus=each["CPU"], gpus=int(each.get("GPU", 0)), memory_gib=math.inf, gpu_memory_gib=math.inf)
        for each in resources
        if each.get("CPU")
    ]


def is_fixed(status: Any) -> bool:
    """Whether nothing can grow the cluster, by the dashboard's answer to `/api/cluster_status`.

    Without an autoscaler Ray's monitor makes up a type for each node, "node_" and the node's id; with one the types have
    names. Where the monitor says nothing (autoscaler v2) it may grow.
    """
    report = ((status.get("data") or {}).get("clusterStatus") or {}).get("autoscalerReport") or {}
    types = report.get("nodeTypeMapping") or {}
    return bool(types) and all(kind == f"node_{name}" for name, kind in types.items())
