"""The filter: what signal is, which groups are dropped, and the loop with drops, replacements, a curriculum and resumes."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from align.data.curriculum import CurriculumConfig
from align.data.prompts import derive_seed
from align.data.types import Prompt, Ticket
from align.metrics import Metric, reduce
from cluster.faults import NoSignal
from cluster.loop.fate import Entry, Fate, settled_before
from cluster.loop.filtering import Filter, FilterConfig, has_signal
from cluster.loop.loop import Run, run_loop
from tests.fakes.loop import (
    World,
    complete,
    flat,
    largest_staleness,
    make_run,
    run_and_act,
    saved,
    trained,
)

DROP = FilterConfig(drop_without_signal=True)
MIXED, PASSED, FAILED = (0.0, 1.0), (1.0, 1.0), (0.0, 0.0)


def ticket(number: int, prompt: str = "p") -> Ticket:
    return Ticket(number, Prompt(prompt, "", (1,)), (0, 1))


def entries(judge: Filter, groups: Mapping[int, tuple[float, ...]], fate: Fate, prompt: str = "p") -> list[Entry]:
    """The ledger's entries of groups with these outcomes."""
    return [Entry(n, prompt, pass_rate=judge.pass_rate(outcomes), fate=fate) for n, outcomes in groups.items()]


# --- signal ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outcomes", "outcome_range", "expected"),
    [
        (MIXED, None, True),
        (PASSED, None, False),
        (FAILED, None, False),
        ((0.9,) * 6, None, False),
        ((-3.0, -3.0, -2.9), None, True),
        ((1.0, 1.0 + 1e-7), None, False),
        ((1e6, 1e6 + 10), None, True),
        ((2.0, 3.0), (0.0, 1.0), False),
        ((-2.0, -3.0), (-1.0, 1.0), False),
        ((0.5, 3.0), (0.0, 1.0), True),
        ((float("nan"), 1.0), None, True),
        ((1.0, float("nan")), None, True),
        ((float("inf"), float("inf")), None, True),
        ((0.7,), None, False),
    ],
)
def test_a_group_has_signal_if_what_is_paid_differs_by_more_than_rounding(
    outcomes: tuple[float, ...], outcome_range: tuple[float, float] | None, expected: bool
) -> None:
    assert has_signal(outcomes, outcome_range) is expected


@given(
    outcomes=st.lists(st.sampled_from([-1.0, 0.0, 0.3, 0.9, 1.0, 1.0 + 2**-23]), min_size=2, max_size=6),
    outcome_range=st.sampled_from([None, (0.0, 0.5)]),
)
def test_what_is_dropped_is_what_gives_the_learner_no_advantage(
    outcomes: list[float], outcome_range: tuple[float, float] | None
) -> None:
    """The learner's own mathematics is the oracle."""
    import torch

    from align.algorithm.returns import divide_by_group_std, group_outcome_mean

    paid = torch.tensor(outcomes).clamp(*(outcome_range or (-torch.inf, torch.inf)))
    mask, groups = torch.ones(len(outcomes), 1, dtype=torch.bool), torch.zeros(len(outcomes), dtype=torch.long)
    advantages = paid[:, None] - group_outcome_mean(paid, mask, groups)
    advantages = divide_by_group_std(advantages, paid, mask, groups, 0.0)
    assert has_signal(tuple(outcomes), outcome_range) is bool(advantages.any())


def test_a_filter_that_is_off_drops_nothing_and_says_nothing() -> None:
    judge = Filter(FilterConfig(), groups_per_step=2, seed=0)
    assert not judge.drops(PASSED, [])
    assert judge.end_step(entries(judge, {0: PASSED}, Fate.TRAINED)) == []
    assert judge.visits(ticket(1))


def test_drops_are_counted_by_what_their_trajectories_did_and_pass_rates_cover_all_groups() -> None:
    judge = Filter(DROP, groups_per_step=2, seed=0)
    groups = {0: PASSED, 1: MIXED, 2: FAILED, 3: FAILED, 4: (1.0, 0.0)}
    assert [judge.drops(outcomes, []) for outcomes in groups.values()] == [True, False, True, True, False]
    filtered = entries(judge, {n: groups[n] for n in (0, 2, 3)}, Fate.FILTERED)
    trained = entries(judge, {n: groups[n] for n in (1, 4)}, Fate.TRAINED)
    quarantined = entries(judge, {5: PASSED}, Fate.QUARANTINED)
    metrics = reduce(judge.end_step([*filtered, *quarantined, *trained]))
    assert (metrics["filter/dropped_passed"], metrics["filter/dropped_failed"]) == (1, 2)
    assert metrics["filter/pass_rate"] == pytest.approx((1 + 0.5 + 0 + 0 + 0.5) / 5)


def test_one_group_more_than_the_limit_ends_the_run_and_says_whether_prompts_are_too_easy_or_too_hard() -> None:
    judge = Filter(FilterConfig(drop_without_signal=True, max_dropped_batches=2), groups_per_step=2, seed=0)
    filtered = entries(judge, dict.fromkeys(range(4), PASSED), Fate.FILTERED)
    others = [*entries(judge, {5: MIXED}, Fate.TRAINED), *entries(judge, {6: PASSED}, Fate.QUARANTINED)]
    assert judge.drops(PASSED, [*filtered[:3], *others])
    with pytest.raises(NoSignal, match=r"5 groups .*\(4 too easy.*; 1 too hard.*the limit is 4"):
        judge.drops(FAILED, [*filtered, *others])


# --- curriculum --------------------------------------------------------------------------------------------------


def test_pass_rates_change_at_the_end_of_a_step_in_the_order_of_tickets() -> None:
    cfg = FilterConfig(drop_without_signal=True, curriculum=CurriculumConfig(low=0.1, high=0.9, newest_weight=0.5))
    judge = Filter(cfg, groups_per_step=2, seed=0)
    filtered = entries(judge, {2: PASSED, 0: FAILED}, Fate.FILTERED)
    assert judge.state(filtered)["rates"] == {}
    other = entries(judge, {3: (1.0, 1.0, 0.0, 0.0)}, Fate.TRAINED, "other")
    judge.end_step([*filtered, *entries(judge, {1: MIXED}, Fate.TRAINED), *other])
    assert judge.state([])["rates"] == {"p": 0.5 * (0.5 * 0 + 0.5 * 0.5) + 0.5 * 1, "other": 0.5}


def test_a_state_goes_through_json_and_back() -> None:
    cfg = FilterConfig(drop_without_signal=True, max_dropped_batches=1, curriculum=CurriculumConfig(high=0.9))
    judge = Filter(cfg, groups_per_step=1, seed=3)
    judge.end_step(entries(judge, {0: PASSED}, Fate.TRAINED, "easy"))
    judge.end_step(entries(judge, {1: (1.0, 1.0, 0.0)}, Fate.TRAINED, "thirds"))
    filtered = entries(judge, {2: PASSED}, Fate.FILTERED, "easy")
    visits = [judge.visits(ticket(n, "easy")) for n in range(3, 40)]
    state = json.loads(json.dumps(judge.state(filtered)))
    resumed = Filter(cfg, groups_per_step=1, seed=3, state=state)
    assert settled_before({}, state) == filtered
    assert resumed.state(filtered) == judge.state(filtered) == state
    assert state["num_skipped"] == visits.count(False) > 0
    assert [resumed.visits(ticket(n, "easy")) for n in range(3, 40)] == visits
    with pytest.raises(NoSignal):
        resumed.drops(FAILED, filtered)


# --- the loop ----------------------------------------------------------------------------------------------------


def outcomes_by_ticket(seed: int, without_signal: float) -> Any:
    """Outcomes that the ticket's number decides; that share of groups has no signal."""

    def outcomes(one: Ticket) -> tuple[float, ...]:
        draw = derive_seed(seed, "outcome", one.number) / 2**63
        return MIXED if draw >= without_signal else (PASSED if draw < without_signal / 2 else FAILED)

    return outcomes


def in_order(world: World, groups_per_step: int, steps: int) -> list[list[int]]:
    """The batches that the rule asks for: the first tickets with signal, in their order."""
    numbers = [n for n in range(10_000) if has_signal(world.outcomes(ticket(n)), None)]
    return [numbers[k * groups_per_step : (k + 1) * groups_per_step] for k in range(steps)]


def assert_every_ticket_has_one_fate(run: Run, world: World, earlier: list[int]) -> None:
    """Trained, given back, in flight; what is left of the numbers was filtered or skipped, and counted."""
    run.ledger.metrics()
    fates = [*earlier, *flat(trained(world)), *run.prompts.returned, *run.ledger.in_flight]
    assert len(fates) == len(set(fates))
    rest = set(range(run.prompts.cursor)) - set(fates)
    assert len(rest) == run.ledger.num[Fate.FILTERED] + run.filter.num_skipped
    if not run.filter.num_skipped:
        assert not any(has_signal(world.outcomes(ticket(number)), None) for number in rest)


@settings(max_examples=60, deadline=None, phases=[Phase.generate])
@given(
    seed=st.integers(0, 2**32),
    max_staleness=st.sampled_from([0, 1, 3]),
    groups_per_step=st.integers(1, 4),
    num_actors=st.integers(1, 3),
    max_groups=st.integers(1, 8),
    without_signal=st.sampled_from([0.1, 0.5, 0.8]),
    losses=st.sets(st.integers(0, 40), max_size=3),
)
def test_every_batch_is_full_of_groups_with_signal_whatever_the_interleaving_and_the_losses(
    seed: int,
    max_staleness: int,
    groups_per_step: int,
    num_actors: int,
    max_groups: int,
    without_signal: float,
    losses: set[int],
) -> None:
    world = World(dice=random.Random(seed), outcomes=outcomes_by_ticket(seed, without_signal))
    world.lose(losses)
    run = make_run(
        world,
        steps=5,
        groups_per_step=groups_per_step,
        max_staleness=max_staleness,
        num_actors=num_actors,
        max_groups=max_groups,
        restarts=len(losses),
        filtering=FilterConfig(drop_without_signal=True, max_dropped_batches=1000),
    )
    assert complete(run_loop(run)) == 5
    assert largest_staleness(world) <= max_staleness
    assert [len(batch) for batch in trained(world)] == [groups_per_step] * 5
    assert all(has_signal(world.outcomes(ticket(number)), None) for number in flat(trained(world)))
    assert_every_ticket_has_one_fate(run, world, [])
    if max_staleness == 0:
        assert trained(world) == in_order(world, groups_per_step, 5), "the first tickets with signal, in their order"


def test_a_dropped_group_frees_its_slot_for_the_next_prompt_and_counts_as_filtered() -> None:
    world = World(outcomes=lambda one: PASSED if one.number in (0, 3) else MIXED)
    run = make_run(world, steps=2, groups_per_step=2, filtering=DROP)
    complete(run_loop(run))
    assert trained(world) == [[1, 2], [4, 5]]
    first, second = run.observer.metrics  # type: ignore[attr-defined]
    assert (first["filter/dropped_passed"], second["filter/dropped_passed"]) == (1, 1)
    assert (first["ledger/filtered"], second["ledger/filtered"]) == (1, 2)
    assert (second["ledger/admitted"], second["ledger/trained"]) == (6, 4)


@pytest.mark.parametrize("max_staleness", [0, 1])
@pytest.mark.parametrize(("outcomes", "words"), [(PASSED, "7 too easy"), (FAILED, "7 too hard")])
def test_prompts_that_never_have_signal_end_the_run_with_a_named_error(
    outcomes: tuple[float, ...], words: str, max_staleness: int
) -> None:
    world = World(outcomes=lambda _: outcomes)
    cfg = FilterConfig(drop_without_signal=True, max_dropped_batches=3)
    run = make_run(world, groups_per_step=2, max_staleness=max_staleness, num_actors=2, filtering=cfg)
    with pytest.raises(NoSignal, match=words) as caught:
        complete(run_loop(run))
    assert caught.value.code == "NO_SIGNAL"
    assert trained(world) == []
    run.ledger.metrics()


def test_the_limit_is_one_of_a_step_and_not_of_the_run() -> None:
    world = World(outcomes=lambda one: MIXED if one.number % 3 == 2 else FAILED)
    cfg = FilterConfig(drop_without_signal=True, max_dropped_batches=2)
    run = make_run(world, steps=6, groups_per_step=2, filtering=cfg)
    assert complete(run_loop(run)) == 6
    assert run.ledger.num[Fate.FILTERED] == 24


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_after_the_last_step_nothing_is_rolled_out_for_the_filter_to_stumble_over(max_staleness: int) -> None:
    """The last evaluation and the last checkpoint take their time; prompts without signal must not end the run then."""
    world = World(pace={"after_step": 500})
    world.outcomes = lambda _: FAILED if len(world.events("update")) == 2 else MIXED
    cfg = FilterConfig(drop_without_signal=True, max_dropped_batches=max_staleness + 1)
    run = make_run(world, steps=2, groups_per_step=2, max_staleness=max_staleness, filtering=cfg, max_groups=100)
    assert complete(run_loop(run)) == 2


@pytest.mark.parametrize("max_staleness", [0, 1])
@pytest.mark.parametrize("curriculum", [None, CurriculumConfig(low=0.2, high=0.8, visit_probability=0.3)])
def test_a_run_with_filter_that_is_stopped_anywhere_and_resumed_trains_every_prompt_once(
    curriculum: CurriculumConfig | None, max_staleness: int
) -> None:
    """With max_staleness = 0 the batches are those of the run that was not stopped, visits and all."""
    cfg = FilterConfig(drop_without_signal=True, curriculum=curriculum)
    steps = 5
    shape: dict[str, Any] = {"steps": steps, "max_staleness": max_staleness, "num_actors": 2, "max_groups": 2}
    outcomes = outcomes_by_ticket(3, 0.5)
    straight = World(outcomes=outcomes)
    whole = make_run(straight, filtering=cfg, **shape)
    complete(run_loop(whole))
    ends = set()
    for turns in range(0, 240, 3):
        world = World(dice=random.Random(turns), outcomes=outcomes)
        run = make_run(world, filtering=cfg, **shape)
        last = run_and_act(world, run, turns, lambda _, run=run: run.stop.set())  # type: ignore[misc]
        assert last is not None
        assert_every_ticket_has_one_fate(run, world, [])
        ends.add(last)
        again = World(dice=random.Random(turns + 1), outcomes=outcomes)
        resumed = make_run(
            again,
            filtering=cfg,
            **saved(run, last),
            **shape,
        )
        assert complete(run_loop(resumed)) == steps
        assert_every_ticket_has_one_fate(resumed, again, flat(trained(world)))
        if max_staleness == 0:
            assert trained(world) + trained(again) == trained(straight)
            assert resumed.filter.state(resumed.ledger.settled) == whole.filter.state(whole.ledger.settled)
            assert resumed.ledger.num[Fate.FILTERED] == whole.ledger.num[Fate.FILTERED]
    assert len(ends) >= 4, "the stops fell into the steps"


def test_visits_on_policy_do_not_depend_on_which_group_was_ready_first() -> None:
    def batches(seed: int) -> list[list[int]]:
        world = World(dice=random.Random(seed), outcomes=lambda one: PASSED if one.prompt.id < "p3" else MIXED)
        cfg = FilterConfig(curriculum=CurriculumConfig(low=0.1, high=0.9, visit_probability=0.2))
        run = make_run(world, steps=8, groups_per_step=3, num_actors=2, max_groups=2, filtering=cfg)
        complete(run_loop(run))
        assert run.filter.num_skipped > 0
        assert_every_ticket_has_one_fate(run, world, [])
        return trained(world)

    assert all(batches(seed) == batches(0) for seed in range(1, 12))


def test_a_skipped_prompt_is_never_rolled_out() -> None:
    world = World(outcomes=lambda one: PASSED if one.prompt.id == "p0" else MIXED)
    cfg = FilterConfig(curriculum=CurriculumConfig(low=0.1, high=0.9, visit_probability=0.01))
    run = make_run(world, steps=10, groups_per_step=5, filtering=cfg)
    complete(run_loop(run))
    rolled_out = [run.prompts.ticket(number).prompt.id for _, number, _ in world.events("rollout")]
    assert rolled_out.count("p0") < rolled_out.count("p1") / 3
    last: list[Metric] = run.filter.end_step(entries(run.filter, {999: MIXED}, Fate.TRAINED))
    assert reduce(last)["filter/skipped"] == run.filter.num_skipped >= 6
