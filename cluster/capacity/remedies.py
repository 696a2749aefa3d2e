"""What is said when a run does not fit, and the changes that would: each one is tried before it is named."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from pydantic import ValidationError

from cluster.capacity.bill import Bill, Role
from cluster.capacity.fit import unplaced
from cluster.capacity.machines import Node
from cluster.capacity.words import machine, need
from cluster.faults import ResourceError
from cluster.spec.config import RunConfig

Change = Mapping[str, Any]
_MOST_MACHINES = 128


def check_fit(cfg: RunConfig, bill: Bill, machines: Sequence[Node], where: str = "", *, can_join: bool = True) -> None:
    """Raise ResourceError if a process finds no machine, naming which, and changes that were tried and fit.

    Args:
        cfg: The run.
        bill: What it needs, and what it would need with other settings.
        machines: What there is.
        where: Of whom the machines are, e.g. "of the cluster at http://…".
        can_join: Whether more machines could join these; else a larger one is named.
    """
    needed = bill(cfg)
    if not (missing := unplaced(needed, machines)):
        return
    what = "; ".join(f"{role.count} of {need(role)}" for role in missing if role.cpus or role.gpus or role.host_bytes)
    settings = islice(settings_that_fit(cfg, lambda other: not unplaced(bill(other), machines)), 2)
    larger = _more_machines(needed, machines) if can_join and machines else None
    first, *others = [*settings, None]
    changes = [change for change in (first, larger or _one_machine(needed), *others) if change][:2]
    raise ResourceError(f"no room for {what}; {_there(machines, where)}", "would fit: " + ", or ".join(changes))


def settings_that_fit(cfg: RunConfig, fits: Callable[[RunConfig], bool]) -> Iterator[str]:
    """Settings for `--set` that a check accepts, the gentlest first."""

    def accepted(change: Change) -> bool:
        other = _changed(cfg, change)
        return other is not None and fits(other)

    for family in _families(cfg, accepted):
        if found := next(filter(accepted, family), None):
            yield " ".join(f"--set {key}={_toml(value)}" for key, value in found.items())


def _families(cfg: RunConfig, accepted: Callable[[Change], bool]) -> Iterator[Iterator[Change]]:
    """Kinds of changes, each with its candidates; those of large ranges are searched by halving."""
    learner, rollout, scorer = cfg.learner, cfg.rollout, cfg.scorer
    on_gpus = learner.num_gpus or rollout.num_gpus or scorer.num_gpus
    kinds = [f"{role}.num_gpus" for role in ("learner", "rollout", "scorer") if getattr(cfg, role).num_gpus]
    shares = [f"{role}.num_cpus" for role in ("learner", "rollout", "scorer") if getattr(cfg, role).num_cpus]
    one_rank = {"learner.num_ranks": 1}

    yield _most(rollout.num_actors - 1, lambda n: {"rollout.num_actors": n}, accepted)
    yield _most(learner.num_ranks - 1, lambda n: {"learner.num_ranks": n}, accepted)
    yield _most(scorer.num_actors - 1, lambda n: {"scorer.num_actors": n}, accepted)
    if learner.num_ranks > 1:
        yield _most(rollout.num_actors - 1, lambda n: {"rollout.num_actors": n, **one_rank}, accepted)
    if on_gpus:
        yield ({"rollout.num_gpus": rollout.num_gpus * more} for more in (2, 4, 8) if rollout.num_gpus)
        yield ({"learner.num_ranks": learner.num_ranks * more} for more in (2, 4, 8) if learner.num_gpus)
        yield iter([{"learner.activation_checkpointing": True}])
        yield iter([dict.fromkeys(kinds, 0)])
        yield iter([{**dict.fromkeys(kinds, 0), "rollout.num_actors": 1, **one_rank}])
    else:
        yield (dict.fromkeys(shares, share) for share in (0.5, 0.25))
        if rollout.kv_cache_bytes:
            yield ({"rollout.kv_cache_bytes": rollout.kv_cache_bytes // less} for less in (2, 4, 8))
        least = dict.fromkeys(shares, 0.25)
        yield _most(rollout.num_actors - 1, lambda n: {"rollout.num_actors": n, **least}, accepted)


def _most(limit: int, change: Callable[[int], Change], accepted: Callable[[Change], bool]) -> Iterator[Change]:
    """The change with the largest number up to the limit that is accepted: fewer processes never need more."""
    number = bisect.bisect_left(range(1, limit + 1), True, key=lambda n: not accepted(change(n)))
    if number:
        yield change(number)


def _changed(cfg: RunConfig, change: Change) -> RunConfig | None:
    """The run with other values, or None if they are what it has, or contradict the rest of it."""
    tree = cfg.model_dump()
    for key, value in change.items():
        section, name = key.split(".")
        tree[section][name] = value
    try:
        other = RunConfig.model_validate(tree)
    except ValidationError:
        return None
    return None if other == cfg else other


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _more_machines(needed: Sequence[Role], machines: Sequence[Node]) -> str | None:
    """How many more machines like the largest would do, if any number does."""
    like = _largest(machines)
    numbers = range(1, _MOST_MACHINES + 1)
    tried = bisect.bisect_left(numbers, True, key=lambda n: not unplaced(needed, [*machines, *[like] * n]))
    if tried == len(numbers):
        return None
    number = numbers[tried]
    return f"{number} more machine{'s' if number > 1 else ''} with {machine(like)}"


def _one_machine(needed: Sequence[Role]) -> str:
    """A machine that has room for all."""
    gib = sum(role.count * role.host_bytes for role in needed) / 2**30
    return "one machine with " + machine(
        Node(
            cpus=max(math.ceil(sum(role.count * role.cpus for role in needed)), 1),
            gpus=math.ceil(sum(role.count * role.gpus for role in needed)),
            memory_gib=math.ceil(gib) if gib else math.inf,
            gpu_memory_gib=math.ceil(max(role.gpu_bytes for role in needed) / 2**30) or math.inf,
        )
    )


def _there(machines: Sequence[Node], where: str) -> str:
    if not machines:
        return f"no machine {where} has CPUs".replace("  ", " ")
    largest = machine(_largest(machines))
    if len(machines) == 1:
        return f"the only machine {where} has {largest}".replace("  ", " ")
    return f"the largest of the {len(machines)} machines {where} has {largest}".replace("  ", " ")


def _largest(machines: Sequence[Node]) -> Node:
    return max(machines, key=lambda node: (node.gpus, node.memory_gib, node.cpus))
