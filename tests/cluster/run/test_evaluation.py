"""Evaluations: the same tickets every time, figures over all tokens, and what becomes of lost actors."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from align.data.prompts import PromptStream
from align.data.types import Prompt, Ticket
from align.metrics import reduce
from cluster.faults import ActorLost, RestartBudgetSpent
from cluster.fleet.placement import Workers
from cluster.loop.answer import Answer
from cluster.loop.rollout import Rollout
from cluster.record.samples import Samples
from cluster.run.evaluation import Evaluator, fixed_tickets, metrics_of
from cluster.spec.config import RunConfig
from cluster.spec.inputs import Inputs
from tests.fakes.run_files import config

PROMPTS = [Prompt(f"p{number}", f"prompt {number}", (1,)) for number in range(6)]


def answer(kl: float | None, num_tokens: int, judged: bool | None = None, accuracy: float | None = None) -> Answer:
    return Answer("prompt", "completion", kl, num_tokens, judged, accuracy)


@pytest.mark.parametrize("group_size", [1, 3])
def test_there_is_one_ticket_per_prompt_in_order_with_seeds_of_its_own(group_size: int) -> None:
    tickets = fixed_tickets(PROMPTS, group_size, seed=3)
    assert [ticket.prompt for ticket in tickets] == PROMPTS
    assert len({seed for ticket in tickets for seed in ticket.seeds}) == group_size * len(PROMPTS)
    assert len({ticket.number for ticket in tickets}) == len(PROMPTS)


def test_tickets_are_the_same_at_every_evaluation_and_others_for_another_seed() -> None:
    assert fixed_tickets(PROMPTS, 1, seed=3) == fixed_tickets(PROMPTS, 1, seed=3)
    assert {t.seeds for t in fixed_tickets(PROMPTS, 1, seed=3)}.isdisjoint(
        t.seeds for t in fixed_tickets(PROMPTS, 1, seed=4)
    )


def test_the_seeds_of_an_evaluation_are_not_those_of_training_under_another_seed() -> None:
    training = PromptStream(PROMPTS, 1, seed=3)
    assert {training.next().seeds for _ in PROMPTS}.isdisjoint(t.seeds for t in fixed_tickets(PROMPTS, 1, seed=4))


def test_the_kl_is_a_mean_over_tokens_and_not_over_completions() -> None:
    values = reduce(metrics_of("heldout", [answer(kl=9.0, num_tokens=3), answer(kl=1.0, num_tokens=7)]))
    assert values == {"eval/heldout/kl_per_token": 1.0, "eval/heldout/completion_tokens_mean": 5.0}


def test_the_rate_of_the_judge_is_over_completions() -> None:
    verdicts = [True, False, True, True]
    values = reduce(metrics_of("train", [answer(0.0, 1, judged) for judged in verdicts]))
    assert values["eval/train/grammatical"] == 0.75
    assert reduce(metrics_of("train", [answer(0.0, 1, False)]))["eval/train/grammatical"] == 0.0


def test_the_accuracy_is_a_mean_over_completions_and_without_a_reference_there_is_no_kl() -> None:
    values = reduce(metrics_of("heldout", [answer(None, 4, accuracy=a) for a in (1.0, 0.0, 0.5, 0.0)]))
    assert values == {"eval/heldout/accuracy": 0.375, "eval/heldout/completion_tokens_mean": 4.0}


def test_completions_without_a_token_have_no_kl() -> None:
    values = reduce(metrics_of("train", [answer(0.0, 0)]))
    assert values == {"eval/train/kl_per_token": 0.0, "eval/train/completion_tokens_mean": 0.0}


# --- the evaluator, on plain async objects --------------------------------------------------------------------------


class FakeActor:
    def __init__(self, rank: int, dead: bool = False, max_groups: int = 4) -> None:
        self.rank, self.dead, self.max_groups = rank, dead, max_groups
        self.asked: list[str] = []
        self.num_in_flight = self.most_in_flight = 0

    async def rollout(self, ticket: Ticket) -> Rollout:
        self.asked.append(ticket.prompt.id)
        self.num_in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.num_in_flight)
        await asyncio.sleep(0)
        self.num_in_flight -= 1
        if self.dead:
            raise ActorLost("rollout", self.rank, "rollout", "killed by the test")
        return Rollout(ticket, 0, 1, 1, payload=ticket.prompt.id)


class FakeFleet:
    """Replaces like `FleetHandle`: the first call that names an actor replaces it, the others get what it made."""

    def __init__(self, actors: list[FakeActor], spares: list[FakeActor]) -> None:
        self.actors, self.spares = actors, spares
        self.num_restarts = 0

    async def replace(self, lost: FakeActor, error: ActorLost) -> FakeActor:
        if lost in self.actors:
            if not self.spares:
                raise RestartBudgetSpent(str(error))
            self.num_restarts += 1
            self.actors[self.actors.index(lost)] = self.spares.pop(0)
        return next(actor for actor in self.actors if actor.rank == lost.rank)


class FakeScorers:
    def __init__(self) -> None:
        self.parts: list[int] = []
        self.sampled: list[list[str]] = []

    async def log_distributions(self, rollouts: Sequence[Rollout]) -> list[str]:
        self.parts.append(len(rollouts))
        return [f"distributions of {rollout.payload}" for rollout in rollouts]

    async def sample(self, prompts: Sequence[Prompt], max_tokens: int, seed: int) -> list[str]:
        self.sampled.append([prompt.id for prompt in prompts])
        return [f"the reference's {number}" for number in range(len(prompts))]


class FakeLearner:
    async def evaluate(self, distributions: list[str] | None, rollouts: list[Rollout]) -> list[Answer]:
        assert distributions is None or distributions == [f"distributions of {rollout.payload}" for rollout in rollouts]
        return [Answer(rollout.payload, "", 0.0, 1, None) for rollout in rollouts]


def evaluate(fleet: FakeFleet, scorers: FakeScorers, bytes_per_group: int | None = 1) -> dict[str, list[Answer]]:
    workers = Workers(fleet, scorers, FakeLearner())  # type: ignore[arg-type]
    sets = {"heldout": fixed_tickets(PROMPTS, 1, 7), "train": fixed_tickets(PROMPTS[:2], 1, 7)}
    return asyncio.run(Evaluator(sets, workers, bytes_per_group).evaluate())


def test_answers_come_in_the_order_of_the_prompts_and_actors_share_the_work() -> None:
    actors = [FakeActor(0), FakeActor(1)]
    answers = evaluate(FakeFleet(actors, []), FakeScorers())
    assert [a.prompt for a in answers["heldout"]] == [p.id for p in PROMPTS]
    assert [a.prompt for a in answers["train"]] == [p.id for p in PROMPTS[:2]]
    assert [len(actor.asked) for actor in actors] == [4, 4]


@pytest.mark.parametrize("max_groups", [1, 2, 100])
def test_an_evaluation_has_no_more_groups_in_flight_than_the_actors_hold(max_groups: int) -> None:
    actor = FakeActor(0, max_groups=max_groups)
    assert len(evaluate(FakeFleet([actor], []), FakeScorers())["heldout"]) == len(PROMPTS)
    assert actor.most_in_flight == min(max_groups, len(PROMPTS))


def test_distributions_travel_in_parts_that_fit_the_memory() -> None:
    for bytes_per_group, parts in ((40 << 20, [3, 3, 2]), (1 << 40, [1] * 8), (1, [6, 2])):
        scorers = FakeScorers()
        assert len(evaluate(FakeFleet([FakeActor(0)], []), scorers, bytes_per_group)["heldout"]) == len(PROMPTS)
        assert scorers.parts == parts


def test_without_a_reference_no_distribution_is_asked_for() -> None:
    scorers = FakeScorers()
    answers = evaluate(FakeFleet([FakeActor(0)], []), scorers, bytes_per_group=None)
    assert [a.prompt for a in answers["heldout"]] == [p.id for p in PROMPTS]
    assert scorers.parts == []


def test_a_lost_actor_is_replaced_and_its_replacement_answers_in_its_place() -> None:
    lost, fresh = FakeActor(1, dead=True), FakeActor(1)
    fleet = FakeFleet([FakeActor(0), lost, FakeActor(2)], [fresh])
    answers = evaluate(fleet, FakeScorers())
    assert [a.prompt for a in answers["heldout"]] == [p.id for p in PROMPTS]
    assert fleet.actors[1] is fresh
    assert fleet.num_restarts == 1
    assert set(lost.asked) <= set(fresh.asked), "what was lost is asked again, of the same rank"
    assert [len(actor.asked) for actor in (fleet.actors[0], fleet.actors[2])] == [3, 2], "the others do their share"


def test_a_replacement_that_is_lost_too_is_replaced_again() -> None:
    fleet = FakeFleet([FakeActor(0, dead=True)], [FakeActor(0, dead=True), FakeActor(0)])
    assert len(evaluate(fleet, FakeScorers())["heldout"]) == len(PROMPTS)
    assert fleet.num_restarts == 2


def test_an_evaluation_ends_the_run_when_the_restarts_are_spent() -> None:
    with pytest.raises(RestartBudgetSpent, match="killed by the test"):
        evaluate(FakeFleet([FakeActor(0, dead=True)], [FakeActor(0, dead=True)]), FakeScorers())


# --- of a run -------------------------------------------------------------------------------------------------------

INPUTS = Inputs(train=PROMPTS[:4], heldout=PROMPTS[4:], num_left_out=0, vocab_size=100, weights_bytes=1)


def of_run(scorers: FakeScorers, inputs: Inputs = INPUTS, **evaluation: Any) -> tuple[Evaluator, RunConfig]:
    cfg = config(evaluation=evaluation, sampling={"max_tokens": 5})
    workers = Workers(FakeFleet([FakeActor(0)], []), scorers, FakeLearner())  # type: ignore[arg-type]
    return Evaluator.of_run(cfg, inputs, PromptStream(inputs.train, 2, seed=0), workers), cfg


def prompts_of(evaluator: Evaluator) -> dict[str, list[str]]:
    return {name: [ticket.prompt.id for ticket in tickets] for name, tickets in evaluator.sets.items()}


def test_a_run_evaluates_heldout_prompts_and_the_first_that_it_trains_on() -> None:
    evaluator, _ = of_run(FakeScorers(), max_prompts=3, group_size=4)
    order = PromptStream(INPUTS.train, 2, seed=0)
    assert prompts_of(evaluator) == {"heldout": ["p4", "p5"], "train": [order.next().prompt.id for _ in range(3)]}
    assert {len(ticket.seeds) for tickets in evaluator.sets.values() for ticket in tickets} == {4}


def test_a_run_without_heldout_prompts_evaluates_the_others_alone() -> None:
    evaluator, _ = of_run(FakeScorers(), Inputs(PROMPTS[:2], [], 0, 100, 1))
    assert list(evaluator.sets) == ["train"]
    assert sorted(prompts_of(evaluator)["train"]) == ["p0", "p1"]


@pytest.mark.parametrize(("judge", "heldout"), [(None, ["p4"]), ("grammatical", ["p4", "p5"])])
def test_the_reference_answers_what_is_shown_and_all_prompts_where_a_judge_counts(
    judge: str | None, heldout: list[str], tmp_path: Path
) -> None:
    scorers = FakeScorers()
    evaluator, cfg = of_run(scorers, judge=judge, num_samples=1, group_size=2)
    samples = Samples(tmp_path / "samples.json")
    for name, answers in asyncio.run(evaluator.evaluate()).items():
        samples.add(name, answers, 1)
    asyncio.run(evaluator.sample_reference(cfg, samples))
    assert scorers.sampled[0] == 2 * heldout, "as many answers as of the policy"
    assert [row["reference"] for row in samples.content["sets"]["heldout"]] == ["the reference's 0"]
    assert ("reference_rates" in samples.content) == (judge is not None)


def test_where_no_answers_are_shown_or_counted_the_reference_is_not_asked(tmp_path: Path) -> None:
    scorers = FakeScorers()
    evaluator, cfg = of_run(scorers, num_samples=0)
    asyncio.run(evaluator.sample_reference(cfg, Samples(tmp_path / "samples.json")))
    assert scorers.sampled == []
