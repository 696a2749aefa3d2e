"""`align plan`: what a run will need and how its numbers hang together, before anything is started."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cluster.capacity.arithmetic import Arithmetic
from cluster.capacity.bill import Role, model_shapes, roles
from cluster.capacity.machines import Node
from cluster.capacity.rates import Rates, StepTime
from cluster.capacity.remedies import check_fit
from cluster.capacity.words import size
from cluster.spec.config import RunConfig


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
    policy, reference, critic = model_shapes(cfg)
    needed = roles(cfg, policy, reference, critic)
    lines = [
        f"run          {cfg.run.name}: policy of {policy.num_parameters / 1e6:,.1f} M parameters, {cfg.engine_dtype}"
    ]
    lines += ["", *_bill(needed), "", *_arithmetic(cfg, Arithmetic.of(cfg, policy, critic))]
    if rates is not None:
        lines += ["", *_estimate(StepTime.of(cfg, rates))]
    if machines:
        check_fit(cfg, lambda other: roles(other, policy, reference, critic), machines)
        lines += ["", f"fits         every process finds a place on the {len(machines)} machine(s)"]
    return "\n".join(lines)


def _bill(needed: Sequence[Role]) -> Iterator[str]:
    yield f"{'role':<12} {'count':>5} {'CPUs':>6} {'GPUs':>6} {'host memory':>12} {'GPU memory':>12}   each; made of"
    for role in needed:
        gpu = size(role.gpu_bytes) if role.gpus else "-"
        yield (
            f"{role.name:<12} {role.count:>5} {role.cpus:>6g} {role.gpus:>6g} {size(role.host_bytes):>12} {gpu:>12}"
            f"   {role.formula}"
        )
    total = [sum(getattr(role, key) * role.count for role in needed) for key in ("cpus", "gpus", "host_bytes")]
    yield f"{'in all':<12} {sum(r.count for r in needed):>5} {total[0]:>6g} {total[1]:>6g} {size(total[2]):>12}"


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
        f"publication  {size(numbers.publish_bytes)} to each of {cfg.rollout.num_actors} actor(s) by {cfg.transport}, "
        f"{size(numbers.published_bytes_per_step)} a step"
    )
    yield (
        f"checkpoints  {size(numbers.checkpoint_bytes)} each (4 B x parameters, moments of trained ones), every "
        f"{cfg.checkpoint.every} steps; {size(numbers.disk_bytes)} of disk with the newest "
        f"{cfg.checkpoint.keep}, one being written and the final policy"
    )


def _estimate(time: StepTime) -> Iterator[str]:
    yield (
        f"step time    {time.step_s:.1f} s: generation {time.generate_s:.1f} s, update {time.update_s:.1f} s, publication "
        f"{time.publish_s:.1f} s (from the rates given)"
    )
    yield f"idle         learner {time.learner_idle:.0%}, rollout actors {time.actors_idle:.0%} of a step"
