"""Machines: those of a cluster file, of a live cluster as Ray or its dashboard tells of them, and this one."""

from __future__ import annotations

import math
import os
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.faults import ConfigError


class Node(BaseModel):
    """One kind of machine of a cluster file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    count: int = Field(1, ge=1, description="Machines of this kind.")
    cpus: float = Field(gt=0, description="CPUs of one.")
    memory_gib: float = Field(gt=0, description="Host memory of one, in GiB.")
    gpus: int = Field(0, ge=0, description="GPUs of one.")
    gpu_memory_gib: float = Field(0, ge=0, description="Memory of one GPU, in GiB.")


class ClusterFile(BaseModel):
    """A cluster as a TOML file of `[[nodes]]`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    nodes: tuple[Node, ...] = Field(min_length=1, description="Kinds of machines.")

    def machines(self) -> list[Node]:
        """Every machine by itself."""
        return [node.model_copy(update={"count": 1}) for node in self.nodes for _ in range(node.count)]


def read_cluster(path: Path) -> ClusterFile:
    """Read a cluster file.

    Raises:
        ConfigError: Naming what is wrong in it.
    """
    advice = "a cluster file has [[nodes]] with count, cpus, memory_gib, gpus and gpu_memory_gib"
    try:
        return ClusterFile.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"cluster file {path} cannot be read: {error.strerror}", advice) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"cluster file {path} is not valid TOML: {error}", advice) from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ConfigError(f"cluster file {path}: {place}: {first['msg']}", advice) from None


@dataclass(frozen=True, slots=True)
class ThisMachine:
    """What a Ray of the run's own may use."""

    num_cpus: int
    num_gpus: int
    memory_bytes: int

    @classmethod
    def look(cls) -> ThisMachine:
        """CPUs that this process may use, GPUs that torch sees, and all of the host's memory."""
        import torch

        return cls(len(os.sched_getaffinity(0)), torch.cuda.device_count(), psutil.virtual_memory().total)


@dataclass(frozen=True, slots=True)
class Cluster:
    """A live cluster as Ray tells of it, in Ray's words for resources.

    Attributes:
        address: Under which it was joined.
        machines: What each machine has that is alive.
        resources: What all of them have together.
        grows_to: What an autoscaler may grow it to; empty where there is none.
    """

    address: str
    machines: Sequence[Mapping[str, float]]
    resources: Mapping[str, float]
    grows_to: Mapping[str, float]


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
