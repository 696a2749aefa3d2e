"""The main loop: rollout loops fill a bounded buffer, the train loop empties it and publishes the weights.

Imports neither ray nor vllm nor torch; what it drives is behind the protocols of `roles`, so that the tests drive the same
loop with plain async fakes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from align.data.prompts import PromptStream
from align.metrics import Metric
from cluster.faults import ActorLost
from cluster.loop.batch import check_staleness, learned_tokens, summarize
from cluster.loop.buffer import Buffer
from cluster.loop.fate import Fate
from cluster.loop.filtering import Filter
from cluster.loop.ledger import Ledger
from cluster.loop.quarantine import Quarantine
from cluster.loop.roles import Fleet, Learner, Observer, Reference, RolloutActor, Scorer
from cluster.loop.rollout import Rollout


@dataclass
class Run:
    """Everything the loops share.

    Attributes:
        first_step: 1, or the version of the checkpoint plus 1.
        last_step: Last step of the run.
    """

    prompts: PromptStream
    buffer: Buffer[Rollout]
    fleet: Fleet
    scorer: Scorer
    quarantine: Quarantine
    filter: Filter
    learner: Learner
    reference: Reference
    observer: Observer
    ledger: Ledger
    max_staleness: int
    first_step: int
    last_step: int
    stop: asyncio.Event = field(default_factory=asyncio.Event)


async def run_loop(run: Run) -> int:
    """Run until the last step or until `run.stop` is set; returns the last step that was trained.

    Any exception in any task ends all of them and is raised as itself.
    """
    try:
        async with asyncio.TaskGroup() as tasks:
            rollouts = [tasks.create_task(rollout_loop(run, actor)) for actor in run.fleet.actors]
            last = await tasks.create_task(train_loop(run))
            for task in rollouts:
                task.cancel()
    except BaseExceptionGroup as group:
        raise first_error(group) from None
    return last


async def rollout_loop(run: Run, actor: RolloutActor) -> None:
    """Keeps one actor busy, for ever. Waits for a place among the actor's groups; a group that ends wakes it.

    An actor that is lost is replaced; its prompts have been given back and go out again first.
    """
    while True:
        try:
            async with asyncio.TaskGroup() as groups:
                places = asyncio.Semaphore(actor.max_groups)
                while True:
                    await places.acquire()
                    groups.create_task(roll_out(run, actor)).add_done_callback(_release(places))
        except BaseExceptionGroup as group:
            _, other = group.split(ActorLost)
            if other is not None:
                raise first_error(other) from None
            if (task := asyncio.current_task()) and task.cancelling():
                raise asyncio.CancelledError from None
            actor = await run.fleet.replace(actor, first_error(group))


def _release(places: asyncio.Semaphore) -> Callable[[asyncio.Task[None]], None]:
    """A place becomes free however its group ended."""
    return lambda _: places.release()


async def roll_out(run: Run, actor: RolloutActor) -> None:
    """One group: reserve a slot, take a prompt, roll it out, score it, fill the slot.

    Waits for a free slot; `Buffer.release` and `Buffer.cancel` wake it. If anything fails, slot and prompt are given back.
    A group that quarantine or filter drops gives back its slot alone: whoever reserves that takes another prompt.
    """
    slot = await run.buffer.reserve()
    ticket = run.prompts.next()
    run.ledger.admit(ticket)
    try:
        rollout = await actor.rollout(ticket)
        run.ledger.sample(ticket.number, rollout.num_tokens)
        rollout = await run.scorer.score(rollout)
    except BaseException:
        run.prompts.give_back([ticket])
        run.ledger.settle(ticket.number, Fate.RETURNED)
        run.buffer.cancel(slot)
        raise
    if dropped := judge(run, rollout):
        run.ledger.settle(ticket.number, dropped)
        run.buffer.cancel(slot)
    else:
        run.buffer.fill(slot, rollout)
    run.observer.after_group(rollout)


def judge(run: Run, rollout: Rollout) -> Fate | None:
    """The fate of a scored group that is dropped; None for one that is to be trained."""
    entries = run.ledger.judge(rollout, run.filter.pass_rate(rollout.outcomes))
    if run.quarantine.drops(rollout.ticket, rollout.failures, entries):
        return Fate.QUARANTINED
    if run.filter.drops(rollout.outcomes, entries):
        return Fate.FILTERED
    return None


async def train_loop(run: Run) -> int:
    """Trains step after step. Consumes groups; waits for the oldest ones to be filled; `Buffer.fill` wakes it.

    A step's time runs from the last publish to its own: `step = other + rollout_wait + update + publish`. The learner's idle
    share is `rollout_wait / step`.
    """
    began = time.perf_counter()
    for step in range(run.first_step, run.last_step + 1):
        started = time.perf_counter()
        rollouts = await take_or_stop(run)
        if rollouts is None:
            return step - 1
        taken = time.perf_counter()
        metrics = check_staleness(rollouts, version=step - 1, limit=run.max_staleness)
        update = await run.learner.update(rollouts, step)
        updated = time.perf_counter()
        metrics += update
        metrics += await run.fleet.publish(step)
        metrics += await run.reference.refresh(step)
        run.buffer.release()
        if step == run.last_step:
            run.buffer.close()
        settled = run.ledger.end_step((r.ticket.number for r in rollouts), *learned_tokens(update))
        metrics += run.scorer.end_step() + run.quarantine.end_step(settled) + run.filter.end_step(settled)
        published = time.perf_counter()
        metrics += summarize(rollouts, published - began) + run.ledger.metrics()
        metrics += [
            Metric("time/other_s", started - began),
            Metric("time/rollout_wait_s", taken - started),
            Metric("time/update_s", updated - taken),
            Metric("time/publish_s", published - updated),
            Metric("time/step_s", published - began),
            Metric("idle/learner_fraction", (taken - started) / (published - began)),
        ]
        began = published
        await run.observer.after_step(step, metrics)
    return run.last_step


async def take_or_stop(run: Run) -> list[Rollout] | None:
    """The next batch in ticket order, or None once `run.stop` is set."""
    take = asyncio.ensure_future(run.buffer.take())
    stop = asyncio.ensure_future(run.stop.wait())
    try:
        await asyncio.wait({take, stop}, return_when=asyncio.FIRST_COMPLETED)
        if run.stop.is_set():
            return None
        return sorted(take.result(), key=lambda rollout: rollout.ticket.number)
    finally:
        for task in (take, stop):
            task.cancel()


def first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that came first in a group of groups: the cause, not what it brought down with it."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
