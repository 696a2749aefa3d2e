"""Machines, processes and bytes in words."""

from __future__ import annotations

import math

from cluster.capacity.bill import Role
from cluster.capacity.machines import Node


def machine(node: Node) -> str:
    """In words; what is not known is left out."""
    gpus = f"{node.gpus} GPUs" + (f" of {node.gpu_memory_gib:g} GiB" if math.isfinite(node.gpu_memory_gib) else "")
    memory = f"{node.memory_gib:g} GiB" if math.isfinite(node.memory_gib) else ""
    return ", ".join(part for part in (f"{node.cpus:g} CPUs", memory, gpus if node.gpus else "no GPUs") if part)


def need(role: Role) -> str:
    """What one process of a role needs, in words; without memory where none is counted."""
    on_gpu = f" with {size(role.gpu_bytes)} each" if role.gpu_bytes else ""
    memory = size(role.host_bytes) if role.host_bytes else ""
    gpus = f"{role.gpus:g} GPUs{on_gpu}" if role.gpus else ""
    return f"{role.name} ({', '.join(part for part in (f'{role.cpus:g} CPUs', memory, gpus) if part)})"


def size(num_bytes: float) -> str:
    """Bytes for people: 3 significant digits, binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.3g} TiB" if num_bytes < 1000 else f"{num_bytes:,.0f} TiB"
