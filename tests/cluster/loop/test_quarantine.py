"""Quarantine: a trajectory whose reward failed is as if it had never been sampled; it is kept, counted, and limited."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from align.algorithm.config import AlgorithmConfig
from align.algorithm.objective import Objective
from align.data.batching import collate
from align.data.sampling import PLAIN
from align.data.types import Prompt, ScoredGroup, Ticket
from align.learner.learner import LearnerConfig
from align.learner.optimizer import OptimizerConfig
from align.metrics import reduce
from align.rewards.reference import ReferenceRewardConfig
from cluster.actors.learner import LearnerActor
from cluster.faults import ActorLost, RewardError
from cluster.loop.fate import Entry, Fate, settled_before
from cluster.loop.loop import run_loop
from cluster.loop.quarantine import Failure, Quarantine, QuarantineConfig
from tests.fakes.loop import FakeActor, World, complete, flat, make_run, run_and_act, saved, trained
from tests.fakes.trajectories import make_scored, make_trajectory


def ticket(number: int, group_size: int = 4) -> Ticket:
    return Ticket(number, Prompt(f"p{number}", "", (1,)), tuple(range(group_size)))


def failures(number: int, num: int) -> tuple[Failure, ...]:
    return tuple(Failure(number, f"p{number}", "2 + 3 =", "five", seed, 3, "in judge: by zero") for seed in range(num))


def quarantine(folder: Path, **cfg: Any) -> Quarantine:
    return Quarantine(QuarantineConfig(**cfg), folder / "quarantine.jsonl")


def judge_all(judge: Quarantine, numbers: Mapping[int, int], earlier: Sequence[Entry] = ()) -> list[Entry]:
    """Judge groups of four with so many failures by ticket, one after the other; the ledger's entries then."""
    entries = list(earlier)
    for number, num in numbers.items():
        entries.append(Entry(number, f"p{number}", num_judged=4, num_failed=num))
        judge.drops(ticket(number), failures(number, num), entries)
    return entries


# --- what is dropped, kept and counted ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group_size", "num_failed", "dropped"),
    [
        (4, 0, False),
        (4, 1, False),
        (4, 2, False),
        (4, 3, True),
        (4, 4, True),
        (2, 1, True),
        (1, 0, False),
        (1, 1, True),
    ],
)
def test_a_group_is_dropped_if_fewer_than_two_are_left_to_compare(
    group_size: int, num_failed: int, dropped: bool, tmp_path: Path
) -> None:
    judge = quarantine(tmp_path, max_fraction=0.99)
    assert judge.drops(ticket(0, group_size), failures(0, num_failed), []) is dropped


def test_every_failure_is_written_with_its_traceback_and_none_without_one(tmp_path: Path) -> None:
    judge = quarantine(tmp_path, max_fraction=0.99)
    judge.drops(ticket(0), (), [])
    assert not (tmp_path / "quarantine.jsonl").exists()
    judge_all(judge, {3: 2, 4: 1})
    rows = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [(row["ticket"], row["seed"]) for row in rows] == [(3, 0), (3, 1), (4, 0)]
    expected = {"prompt_id": "p4", "prompt": "2 + 3 =", "completion": "five", "traceback": "in judge: by zero"}
    assert rows[-1] == expected | {"ticket": 4, "seed": 0, "num_tokens": 3}


def test_the_fraction_of_a_step_is_that_of_the_groups_decided_in_it(tmp_path: Path) -> None:
    judge = quarantine(tmp_path, max_fraction=0.99)
    entries = judge_all(judge, {0: 1, 1: 0, 2: 4, 3: 2})
    assert reduce(judge.end_step(entries[:3])) == {"reward/quarantined_fraction": 5 / 12}
    assert reduce(judge.end_step([])) == {"reward/quarantined_fraction": 0}
    assert reduce(judge.end_step(entries[3:])) == {"reward/quarantined_fraction": 2 / 4}


# --- the limit ----------------------------------------------------------------------------------------------------


def test_one_failure_more_than_the_share_of_the_window_ends_the_run_with_the_newest_traceback(tmp_path: Path) -> None:
    judge = quarantine(tmp_path, max_fraction=0.1, window=20)
    entries = judge_all(judge, {0: 1, 1: 1})
    with pytest.raises(
        RewardError, match=r"failed for 3 of the last 12 .*0\.1 of 20.*'p2'.*'five':\nin judge: by zero"
    ):
        judge_all(judge, {2: 1}, entries)
    assert len((tmp_path / "quarantine.jsonl").read_text().splitlines()) == 3, "the last one is on record too"


@pytest.mark.parametrize("steps", [1, 10])
def test_failures_that_the_window_has_passed_are_forgiven(steps: int, tmp_path: Path) -> None:
    judge = quarantine(tmp_path, max_fraction=0.1, window=20)
    for step in range(steps):
        groups = range(step * 50 // steps, (step + 1) * 50 // steps)
        judge.end_step(judge_all(judge, {number: number % 3 == 0 for number in groups}))  # 1 of 12, at most 2 of 20


def test_with_a_limit_of_0_the_first_failure_ends_the_run(tmp_path: Path) -> None:
    judge = quarantine(tmp_path, max_fraction=0)
    entries = judge_all(judge, {0: 0})
    with pytest.raises(RewardError):
        judge_all(judge, {1: 1}, entries)


def test_a_resumed_run_remembers_the_window_and_judges_anew_what_was_in_flight(tmp_path: Path) -> None:
    first = quarantine(tmp_path, max_fraction=0.15, window=20)
    entries = judge_all(first, {0: 1, 1: 0, 2: 1, 3: 1})
    first.end_step(entries[:2])
    state = json.loads(json.dumps(first.state(entries[2:3])))
    assert state == {"recent": "10000000", "decided": [[2, 4, 1]]}
    again = Quarantine(first.cfg, tmp_path / "quarantine.jsonl", state)
    before = settled_before(state, {})
    assert before == [Entry(2, "", num_judged=4, num_failed=1, fate=Fate.QUARANTINED)]
    entries = judge_all(again, {3: 1}, before)
    with pytest.raises(RewardError, match="4 of the last 20"):
        judge_all(again, {4: 1}, entries)


def test_what_is_on_record_does_not_depend_on_which_group_was_ready_first(tmp_path: Path) -> None:
    numbers = {0: 2, 1: 0, 2: 1, 3: 4}
    states = []
    for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
        judge = quarantine(tmp_path, max_fraction=0.99)
        judge.end_step(judge_all(judge, {number: numbers[number] for number in order}))
        states.append(judge.state([]))
    assert states[0] == states[1] == {"recent": "1100000010001111", "decided": []}


def test_the_window_is_in_the_order_of_tickets_while_they_are_decided_too(tmp_path: Path) -> None:
    judge = quarantine(tmp_path, max_fraction=0.2, window=10)
    entries = judge_all(judge, {5: 0, 4: 0, 0: 2, 1: 0})
    judge_all(judge, {2: 3}, entries)  # the last 10 are tickets 5, 4 and half of 2, which is 1 failure
    with pytest.raises(RewardError, match="3 of the last 10"):
        judge_all(judge, {6: 3}, entries)


# --- the mathematics: the oracle is the group that never had the trajectory ---------------------------------------

REWARDS = {0: [0.1, 0.7, 0.2, 0.9], 1: [1.0, 0.3, 0.3, 0.6]}
FAILED = {0: (1,), 1: (0, 3)}


def scored(number: int, rows: list[int]) -> ScoredGroup:
    """The given trajectories of a group of four of unequal lengths, each with a seed of its own."""
    lengths = [3, 5, 2, 4]
    trajectories = [replace(make_trajectory([5, 6], range(7, 7 + lengths[row])), seed=row) for row in rows]
    rewards = [[0.0] * (lengths[row] - 1) + [REWARDS[number][row]] for row in rows]
    return make_scored(trajectories, rewards, number)


def with_failures(number: int) -> ScoredGroup:
    whole = scored(number, [0, 1, 2, 3])
    marked = [
        replace(score, rewards=0 * score.rewards, failure="a traceback") if row in FAILED[number] else score
        for row, score in enumerate(whole.scores)
    ]
    return ScoredGroup(whole.group, tuple(marked))


def without_them(number: int) -> ScoredGroup:
    return scored(number, [row for row in range(4) if row not in FAILED[number]])


ALGORITHMS = pytest.mark.parametrize(
    "algorithm",
    [
        AlgorithmConfig(rewards="outcome", baseline="group_mean"),
        AlgorithmConfig(rewards="outcome", baseline="leave_one_out", aggregation="trajectory_mean"),
        AlgorithmConfig(rewards="outcome", baseline="group_outcome_mean", group_std=True, aggregation="prompt_mean"),
        AlgorithmConfig(rewards="outcome", baseline="group_outcome_mean", aggregation="token_mean"),
        AlgorithmConfig(rewards="outcome", baseline="group_outcome_mean", aggregation="constant_length", loss_length=8),
        AlgorithmConfig(rewards="outcome", baseline="batch_mean", whiten=True),
    ],
    ids=lambda algorithm: f"{algorithm.baseline}, {algorithm.aggregation}",
)


@ALGORITHMS
def test_baselines_advantages_and_weights_are_bitwise_those_of_the_groups_without_the_failures(
    algorithm: AlgorithmConfig,
) -> None:
    batch, expected = (
        collate([make(n) for n in REWARDS]) for make in (lambda n: with_failures(n).judged(), without_them)
    )
    objective = Objective(algorithm)
    assert all(
        torch.equal(one, dict(expected.tensors())[name]) for name, one in batch.tensors() if name != "ref_logprobs"
    )
    (advantages, metrics), (true_advantages, true_metrics) = objective.advantages(batch), objective.advantages(expected)
    assert torch.equal(advantages, true_advantages)
    assert advantages.any()
    assert torch.equal(objective.weights(batch), objective.weights(expected))
    assert reduce(metrics) == reduce(true_metrics)
    naive = objective.advantages(collate([with_failures(n) for n in REWARDS]))[0]
    assert not torch.equal(naive[:1, :5], advantages[:1, :5]), "a failure taken for a 0 would move the baseline"


@ALGORITHMS
def test_an_update_is_bitwise_that_of_the_groups_without_the_failures(
    algorithm: AlgorithmConfig, model_folder: Path, tmp_path: Path
) -> None:
    weights, metrics = [], []
    for make in (with_failures, without_them):
        actor = LearnerActor(
            model_folder,
            algorithm,
            OptimizerConfig(lr=1e-3),
            LearnerConfig(),
            compute_dtype="float32",
            wire_dtype="float32",
            num_steps=3,
            sampling=PLAIN,
            judge=None,
            reward=ReferenceRewardConfig(),
            trajectories=tmp_path,
            seed=0,
        )
        groups = [make(number) for number in REWARDS]
        logged = reduce(actor.update(1, *(g.group for g in groups), *(g.scores for g in groups)))
        metrics.append({name: value for name, value in logged.items() if not name.startswith("throughput/")})
        weights.append(actor.policy.model.state_dict())
    assert metrics[0] == metrics[1]
    assert metrics[0]["tokens/trained"] == 3 + 2 + 4 + 5 + 2, "the lengths of those that are left"
    assert all(torch.equal(one, weights[1][name]) for name, one in weights[0].items())


def test_a_group_whose_reward_failed_nowhere_is_itself() -> None:
    whole = scored(0, [0, 1, 2, 3])
    assert whole.judged() is whole


# --- the loop -----------------------------------------------------------------------------------------------------


LENIENT = QuarantineConfig(max_fraction=0.99)


def failing(group_size: int, *numbers: int) -> Any:
    return lambda one: failures(one.number, group_size) if one.number in numbers else ()


def test_a_dropped_group_is_replaced_by_the_next_prompt_and_counted(tmp_path: Path) -> None:
    world = World(failures=failing(2, 0, 3))
    run = make_run(world, steps=3, quarantining=LENIENT)
    assert complete(run_loop(run)) == 3
    assert trained(world) == [[1, 2], [4, 5], [6, 7]]
    last = run.observer.metrics[-1]  # type: ignore[attr-defined]
    assert (last["ledger/quarantined"], last["ledger/trained"], last["ledger/admitted"]) == (2, 6, 8)
    assert [row["reward/quarantined_fraction"] for row in run.observer.metrics] == [2 / 6, 2 / 6, 0]  # type: ignore[attr-defined]


def test_a_group_with_enough_trajectories_left_is_trained_and_judged_by_their_outcomes(tmp_path: Path) -> None:
    world = World(outcomes=lambda _: (0.0, 1.0, 1.0), failures=lambda one: failures(one.number, one.number == 1))
    run = make_run(world, steps=1, group_size=3, quarantining=LENIENT)
    complete(run_loop(run))
    assert trained(world) == [[0, 1]]
    assert run.ledger.goodput.counts["quarantined"] == 3


def test_a_reward_that_always_fails_ends_the_run(tmp_path: Path) -> None:
    world = World(failures=lambda one: failures(one.number, 2))
    run = make_run(world, steps=9, quarantining=QuarantineConfig())
    with pytest.raises(RewardError, match=r"12 of the last 12 .*max_fraction 0\.05 of 200"):
        complete(run_loop(run))
    assert not trained(world)


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_a_run_with_failures_that_is_stopped_anywhere_and_resumed_trains_every_prompt_once(
    max_staleness: int, tmp_path: Path
) -> None:
    bad = failing(2, 1, 4, 5, 9)
    straight = World(failures=bad)
    complete(run_loop(make_run(straight, steps=4, quarantining=LENIENT)))
    ends = set()
    for turns in range(0, 160, 3):
        world, again = (World(dice=random.Random(turns + seed), failures=bad) for seed in (0, 1))
        if turns % 2:
            world.hooks["rollout"] = lose_first
        more: dict[str, Any] = {"steps": 4, "max_staleness": max_staleness, "num_actors": 2}
        run = make_run(world, quarantining=LENIENT, **more)
        last = run_and_act(world, run, turns, lambda _, run=run: run.stop.set())  # type: ignore[misc]
        ends.add(last)
        resumed = make_run(
            again,
            quarantining=LENIENT,
            **saved(run, last or 0),
            **more,
        )
        assert complete(run_loop(resumed)) == 4
        batches = trained(world) + trained(again)
        assert len(set(flat(batches))) == len(flat(batches)) == 8
        assert not set(flat(batches)) & {1, 4, 5, 9}
        if max_staleness == 0:
            assert batches == trained(straight)
    assert {0, 4} <= ends


async def lose_first(about: tuple[FakeActor, Ticket]) -> None:
    if about[0].rank == 0 and about[0].version == 0:
        about[0].version = -1  # no second time
        raise ActorLost("rollout", 0, "rollout", "killed by the test")
