"""Whether a run can ever fit a cluster, by what its dashboard tells of the machines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from cluster.capacity.bill import Bill, Role, model_shapes, places, roles
from cluster.capacity.machines import is_fixed, nodes, with_memory
from cluster.capacity.remedies import check_fit
from cluster.faults import ResourceError
from cluster.spec.config import RunConfig


def check_room(cfg: RunConfig, driver: Mapping[str, float], get: Callable[[str], Any], address: str) -> str:
    """Whether the run can ever fit, by CPUs and GPUs, before anything is uploaded; and by memory, as far as it is known.

    Args:
        cfg: The run.
        driver: Resources that the driver asks for.
        get: Asks the dashboard for one of its pages.
        address: Of the dashboard, for messages.

    Returns:
        What the user should know, or nothing.

    Raises:
        ResourceError: If it never can, with what is missing and changes that would fit.
    """
    found = get("/api/v0/nodes?limit=10000")["data"]["result"]["result"]
    there = {node["node_id"]: node["resources_total"] for node in found if node["state"] == "ALIVE"}
    where = f"of the cluster at {address}"
    needed = Role("driver", 1, driver.get("CPU", 0), driver.get("GPU", 0), 0, 0, "")
    try:
        _check_named(driver, there.values())
        check_fit(cfg, lambda other: [needed, *places(other)], nodes(there.values()), where)
    except ResourceError as error:
        if is_fixed(get("/api/cluster_status")):
            raise
        return f"{error.message}; the cluster may grow, so the job goes there and finds out"
    try:
        if bill := _bill_with_memory(cfg):
            check_fit(cfg, bill, with_memory(there, get("/nodes?view=summary")), where)
    except ResourceError as error:  # an estimate, by which nothing is refused
        return f"by the bill of align plan memory is short: {error.message}\n             -> {error.advice}"
    return ""


def _bill_with_memory(cfg: RunConfig) -> Bill | None:
    """What the run needs, memory too; None if its models are not seen from here."""
    folders = [section.model for section in (cfg.policy, cfg.reference, cfg.critic) if section and section.model]
    if not all((folder / "config.json").is_file() for folder in folders):
        return None
    shapes = model_shapes(cfg)
    return lambda other: roles(other, *shapes)


def _check_named(wanted: Mapping[str, float], there: Iterable[Mapping[str, float]]) -> None:
    """Raise ResourceError if no machine offers a resource that has a name of its own."""
    for name, amount in wanted.items():
        if name not in ("CPU", "GPU") and not any(machine.get(name, 0) >= amount for machine in there):
            raise ResourceError(
                f"no machine of the cluster offers {name}={amount:g} to the driver",
                f"""start one with: ray start … --resources='{{"{name}": {amount:g}}}', or leave --driver-resources out""",
            )
