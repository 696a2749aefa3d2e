"""The machines of a live cluster, as Ray or its dashboard tells of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from cluster.capacity.fit import Node


def nodes(resources: Iterable[Mapping[str, float]]) -> list[Node]:
    """Machines by what Ray places by, which is neither host nor GPU memory; those without CPUs take no process of a run."""
    return [
        Node(cpus=each["CPU"], gpus=int(each.get("GPU", 0)), memory_gib=math.inf, gpu_memory_gib=math.inf)
        for each in resources
        if each.get("CPU")
    ]


def with_memory(resources: Mapping[str, Mapping[str, float]], summary: Any) -> list[Node]:
    """The same with the memory that the dashboard has seen of each, by the ids of the nodes; infinite where it has not.

    Args:
        resources: What Ray places by, of the nodes that are alive.
        summary: The dashboard's answer to `/nodes?view=summary`.
    """
    seen = {entry.get("raylet", {}).get("nodeId"): entry for entry in summary["data"]["summary"]}
    found = []
    for name, amounts in resources.items():
        host = seen.get(name, {}).get("mem") or [math.inf]
        gpus = [gpu["memoryTotal"] / 2**10 for gpu in seen.get(name, {}).get("gpus") or () if gpu.get("memoryTotal")]
        memory = {"memory_gib": round(host[0] / 2**30, 1), "gpu_memory_gib": round(min(gpus, default=math.inf), 1)}
        found += [machine.model_copy(update=memory) for machine in nodes([amounts])]
    return found


def is_fixed(status: Any) -> bool:
    """Whether nothing can grow the cluster, by the dashboard's answer to `/api/cluster_status`.

    Without an autoscaler Ray's monitor makes up a type for each node, "node_" and the node's id; with one the types have
    names. Where the monitor says nothing (autoscaler v2) it may grow.
    """
    report = ((status.get("data") or {}).get("clusterStatus") or {}).get("autoscalerReport") or {}
    types = report.get("nodeTypeMapping") or {}
    return bool(types) and all(kind == f"node_{name}" for name, kind in types.items())
