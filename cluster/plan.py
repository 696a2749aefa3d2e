"""`align plan`: what a run will need and how its numbers hang together, before anything is started."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cluster.bill import Arithmetic, Rates, Role, StepTime, critic_shape, roles
from cluster.config import RunConfig
from cluster.faults import ResourceError
from cluster.fit import Node, remedies, unplaced
from cluster.shape import model_shape


def plan(cfg: RunConfig, machines: Sequence[Node], rates: Rates | None) -> str:
    """The plan as text.

    Args:
        cfg: The run.
        machines: Where it should fit; empty for the bill alone.
        rates: Measured rates for the estimate, or None.

    Raises:
        ConfigError: If a model folder has no config.json.
        ResourceError: If the run can never fit on the machines, with what is missing and what would fit.
    """
    policy = model_shape(cfg.policy.model, cfg.policy.adapter)
    reference = model_shape(cfg.reference.model) if cfg.reference else None
    critic = critic_shape(cfg)
    needed = roles(cfg, policy, reference, critic)
    lines = [
        f"run          {cfg.run.name}: policy of {policy.num_parameters / 1e6:,.1f} M parameters, {cfg.engine_dtype}"
    ]
    lines += ["", *_bill(needed), "", *_arithmetic(cfg, Arithmetic.of(cfg, policy, critic))]
    if rates is not None:
        lines += ["", *_estimate(StepTime.of(cfg, rates))]
    if machines:
        check_fit(cfg, needed, machines)
        lines += ["", f"fits         every process finds a place on the {len(machines)} machine(s)"]
    return "\n".join(lines)


def check_fit(cfg: RunConfig, needed: Sequence[Role], machines: Sequence[Node]) -> None:
    """Raise ResourceError if a process finds no machine, naming which, and changes that were tried and fit."""
    if not (missing := unplaced(needed, machines)):
        return
    what = "; ".join(f"{role.count} of {_need(role)}" for role in missing)
    biggest = max(machines, key=lambda machine: (machine.gpus, machine.memory_gib))
    there = f"{biggest.cpus:g} CPUs, {biggest.memory_gib:g} GiB, {biggest.gpus} GPUs of {biggest.gpu_memory_gib:g} GiB"
    changes = list(remedies(cfg, needed, machines))[:2]
    raise ResourceError(
        f"no machine has room for {what}; the largest of the {len(machines)} machine(s) has {there}",
        "would fit: " + ", or ".join(changes) if changes else "take a smaller model or larger machines",
    )


def _need(role: Role) -> str:
    gpus = f", {role.gpus:g} GPUs with {_size(role.gpu_bytes)} each" if role.gpus else ""
    return f"{role.name} ({role.cpus:g} CPUs, {_size(role.host_bytes)}{gpus})"


def _bill(needed: Sequence[Role]) -> Iterator[str]:
    yield f"{'role':<12} {'count':>5} {'CPUs':>6} {'GPUs':>6} {'host memory':>12} {'GPU memory':>12}   each; made of"
    for role in needed:
        gpu = _size(role.gpu_bytes) if role.gpus else "-"
        yield (
            f"{role.name:<12} {role.count:>5} {role.cpus:>6g} {role.gpus:>6g} {_size(role.host_bytes):>12} {gpu:>12}"
            f"   {role.formula}"
        )
    total = [sum(getattr(role, key) * role.count for role in needed) for key in ("cpus", "gpus", "host_bytes")]
    yield f"{'in all':<12} {sum(r.count for r in needed):>5} {total[0]:>6g} {total[1]:>6g} {_size(total[2]):>12}"


def _arithmetic(cfg: RunConfig, numbers: Arithmetic) -> Iterator[str]:
    run = cfg.run
    yield (
        f"each step    {run.prompts_per_step} prompts x {run.group_size} = {numbers.trajectories_per_step} trajectories, "
        f"at most {numbers.max_tokens_per_step:,} tokens, which take {numbers.max_micro_batches} micro-batches"
        f"{' on each rank' * (cfg.learner.num_ranks > 1)} and {numbers.optimizer_steps} optimizer step"
        f"{'s' * (numbers.optimizer_steps > 1)}"
    )
    yield f"staleness    at most {run.max_staleness}; {numbers.groups_in_flight} groups in flight at once"
    yield (
        f"publication  {_size(numbers.publish_bytes)} to each of {cfg.rollout.num_actors} actor(s) by {cfg.transport}, "
        f"{_size(numbers.published_bytes_per_step)} a step"
    )
    yield (
        f"checkpoints  {_size(numbers.checkpoint_bytes)} each (4 B x parameters, moments of trained ones), every "
        f"{cfg.checkpoint.every} steps; {_size(numbers.disk_bytes)} of disk with the newest "
        f"{cfg.checkpoint.keep}, one being written and the final policy"
    )


def _estimate(time: StepTime) -> Iterator[str]:
    yield (
        f"step time    {time.step_s:.1f} s: generation {time.generate_s:.1f} s, update {time.update_s:.1f} s, publication "
        f"{time.publish_s:.1f} s (from the rates given)"
    )
    yield f"idle         learner {time.learner_idle:.0%}, rollout actors {time.actors_idle:.0%} of a step"


def _size(num_bytes: float) -> str:
    """Bytes for people: 3 significant digits, binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.3g} TiB" if num_bytes < 1000 else f"{num_bytes:,.0f} TiB"
