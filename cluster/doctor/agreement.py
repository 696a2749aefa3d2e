"""Engine, reward and learner at work on prompts of the run: do the two compute the same, and can its answers be judged.

The processes are those of a run, made by `placement`, one after another: no more memory is needed than the largest takes.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from align.data.prompts import PromptStream
from align.data.types import Group, Prompt, Trajectory
from cluster.doctor.storage import run_folder
from cluster.doctor.verdict import Verdict
from cluster.doctor.versions import TESTED
from cluster.faults import ConfigError
from cluster.fleet.canary import canary_gap
from cluster.fleet.handle import Handle
from cluster.fleet.placement import new_learner, new_rollout, new_scorer
from cluster.fleet.reservation import reserve
from cluster.fleet.rollout import RolloutHandle
from cluster.fleet.scorers import ScorerHandle
from cluster.loop.rollout import Rollout
from cluster.spec.config import RunConfig

_NUM_PROMPTS = 4
_MAX_TOKENS = 32
_END_S = 10.0


def agreement(cfg: RunConfig, prompts: Sequence[Prompt], say: Callable[[str], None]) -> Iterator[Verdict]:
    """Sample a few answers with an engine, judge them with a scorer, compute their log-probabilities with the learner.

    Sampling is at temperature 1 from the whole distribution, where both sides mean the same by a log-probability.

    Args:
        cfg: The run.
        prompts: Those to train on.
        say: Told while a busy cluster has no room.

    Raises:
        ActorLost: If one of the three does not start or answer within its deadline of the run file.
        ResourceError: If the cluster has no room for the run.
    """
    yield from asyncio.run(_trial(_plainly_sampled(cfg), prompts, say))


def _plainly_sampled(cfg: RunConfig) -> RunConfig:
    plain = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_tokens": min(_MAX_TOKENS, cfg.sampling.max_tokens)}
    return cfg.model_copy(update={"sampling": cfg.sampling.model_copy(update=plain)})


async def _trial(cfg: RunConfig, prompts: Sequence[Prompt], say: Callable[[str], None]) -> list[Verdict]:
    reservation = await reserve(cfg, say, say)
    rollouts = await _sampled(cfg, prompts, new_rollout(cfg, 0, reservation))
    judged = await _judged(cfg, rollouts, new_scorer(cfg, 0, reservation))
    trajectories = [t for rollout in rollouts for t in rollout.payload.trajectories]
    learner = new_learner(cfg, run_folder(cfg), cfg.policy.model, reservation)
    await learner.ready()
    expected = await learner.canary([t.token_ids.tolist() for t in trajectories])
    return [judged, compared(cfg, trajectories, expected)]


async def _sampled(cfg: RunConfig, prompts: Sequence[Prompt], actor: RolloutHandle) -> list[Rollout]:
    """A group for each of a few prompts, with the group itself as payload."""
    stream = PromptStream(prompts, cfg.run.group_size, cfg.run.seed)
    try:
        await actor.ready()
        tickets = [stream.next() for _ in range(min(_NUM_PROMPTS, len(prompts)))]
        rollouts = await asyncio.gather(*(actor.rollout(ticket) for ticket in tickets))
        groups: list[Group] = [await actor.answer(r.payload, "rollout", _END_S) for r in rollouts]
        pairs = zip(rollouts, groups, strict=True)
        return [Rollout(r.ticket, r.oldest_version, r.num_tokens, r.num_stopped, group) for r, group in pairs]
    finally:
        await _end(actor, actor.actor.shutdown)


async def _judged(cfg: RunConfig, rollouts: Sequence[Rollout], scorer: ScorerHandle) -> Verdict:
    """What the reward makes of the engine's answers."""
    try:
        await scorer.ready()
        judged = []
        slowest = 0.0
        for rollout in rollouts:
            began = time.perf_counter()
            judged.append(await scorer.score(rollout))
            slowest = max(slowest, time.perf_counter() - began)
    finally:
        await _end(scorer)
    if failures := [failure for rollout in judged for failure in rollout.failures]:
        found = f"the reward failed on {len(failures)} answers: {failures[0].traceback.strip().splitlines()[-1]}"
        return Verdict("judgement", "fail", found, "correct the reward", ConfigError.exit_code)
    outcomes = [outcome for rollout in judged for outcome in rollout.outcomes]
    found = (
        f"{len(outcomes)} answers get {min(outcomes):.3g} to {max(outcomes):.3g}; "
        f"{slowest:.2g} s a group of {cfg.run.group_size}, at most {cfg.scorer.score_deadline_s:g} s"
    )
    good = all(map(math.isfinite, outcomes))
    return Verdict.of("judgement", good, found, "correct the reward: what it pays has to be finite")


async def _end(handle: Handle, shutdown: Any = None) -> None:
    """End a process, an engine's in an orderly way, and leave its memory to the next one."""
    if shutdown is not None:
        with contextlib.suppress(Exception):
            async with asyncio.timeout(_END_S):
                await shutdown.remote()
    handle.kill()


def compared(cfg: RunConfig, trajectories: Sequence[Trajectory], expected: Sequence[Sequence[float]]) -> Verdict:
    """|log mu - log pi| of the sampled tokens against the limits of the run's canary.

    Args:
        cfg: The run.
        trajectories: What the engine sampled.
        expected: The learner's log-probabilities of tokens 1.. of each.
    """
    masks = [t.loss_mask[1:] for t in trajectories]
    engine = [t.behavior_logprobs[1:][mask].tolist() for t, mask in zip(trajectories, masks, strict=True)]
    learner = [np.asarray(row)[mask].tolist() for row, mask in zip(expected, masks, strict=True)]
    mean = canary_gap(engine, learner)
    largest = max(abs(a - b) for pair in zip(engine, learner, strict=True) for a, b in zip(*pair, strict=True))
    warn, stop = cfg.weights.canary_limits(cfg.engine_dtype)
    found = (
        f"engine and learner differ by {mean:.2g} nats in the mean, {largest:.2g} at most, over "
        f"{sum(map(len, engine))} tokens in {cfg.engine_dtype}; a run warns above {warn:g} and stops above {stop:g} in the mean"
    )
    state = "fail" if not mean <= stop else "warn" if mean > warn else "ok"
    fix = (
        f"pip install 'vllm{TESTED['vllm']}' 'transformers{TESTED['transformers']}'; "
        "--set rollout.dtype=float32 tells rounding from wrong weights"
    )
    return Verdict("agreement", state, found, "" if state == "ok" else fix)
