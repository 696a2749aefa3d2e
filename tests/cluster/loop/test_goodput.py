"""Goodput: every sampled token has one fate, whatever happens to a run; the shares add up to 1."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from align.metrics import reduce
from cluster.loop.goodput import FATES, Goodput, shares
from cluster.loop.loop import Run, run_loop
from tests.fakes.loop import EVENTFUL_STEPS, World, complete, eventful, make_run, run_and_act, saved, trained


def values(goodput: Goodput) -> dict[str, float]:
    return reduce(goodput.metrics())


# --- the counts ---------------------------------------------------------------------------------------------------


def test_each_fate_has_its_tokens_and_together_they_are_all_that_was_sampled() -> None:
    goodput = Goodput()
    for num_tokens in (100, 30, 20, 7, 50):
        goodput.sample(num_tokens)
    goodput.settle(30, "filtered")
    goodput.settle(20, "returned")
    goodput.settle(10, "quarantined")
    goodput.settle(50, "quarantined")
    goodput.settle(0, "returned")  # lost before it was handed over
    goodput.train(90, trained=60, masked=25)
    expected = {
        "trained": 60,
        "masked": 25,
        "skipped": 5,
        "filtered": 30,
        "quarantined": 60,
        "returned": 20,
        "waiting": 7,
    }
    assert goodput.counts == dict.fromkeys(FATES, 0) | expected
    logged = values(goodput)
    assert logged["goodput/sampled_tokens"] == 207 == sum(logged[f"goodput/{fate}_tokens"] for fate in FATES)


def test_the_goodput_of_a_step_is_that_of_the_tokens_that_it_decided_on() -> None:
    goodput = Goodput()
    goodput.sample(40)
    goodput.train(10, trained=10, masked=0)
    goodput.settle(10, "filtered")
    assert values(goodput)["goodput/trained_fraction"] == 0.5
    goodput.train(10, trained=9, masked=1)
    assert values(goodput)["goodput/trained_fraction"] == 0.9
    assert values(goodput)["goodput/trained_fraction"] == 0, "nothing was decided"


def test_an_update_that_claims_more_tokens_than_it_was_given_is_noticed() -> None:
    goodput = Goodput()
    goodput.sample(10)
    with pytest.raises(AssertionError, match="no more tokens than it was given"):
        goodput.train(10, trained=11, masked=0)


def test_shares_are_those_of_a_row_and_none_without_tokens() -> None:
    row = {"goodput/sampled_tokens": 8, "goodput/trained_tokens": 6, "goodput/left_tokens": 2}
    assert {fate: share for fate, share in shares(row).items() if share} == {"trained": 0.75, "left": 0.25}
    assert shares({}) == shares({"goodput/sampled_tokens": 0}) == {}


# --- resume -------------------------------------------------------------------------------------------------------


def line(step: int, trained: int, waiting: int = 0, **counts: int) -> dict[str, Any]:
    counts |= {"trained": trained, "waiting": waiting}
    by_name = {f"goodput/{fate}_tokens": num for fate, num in (dict.fromkeys(FATES, 0) | counts).items()}
    return {"step": step, "goodput/sampled_tokens": sum(counts.values()), **by_name}


@pytest.mark.parametrize(
    ("lines", "version", "expected"),
    [
        ([], 0, {}),
        ([{"step": 0}], 0, {}),
        ([line(1, 10), line(2, 20, waiting=5, filtered=3)], 2, {"trained": 20, "left": 5, "filtered": 3}),
        ([line(1, 10), line(2, 20), line(3, 30, waiting=5)], 1, {"trained": 10, "redone": 20, "left": 5}),
        ([line(1, 10), line(2, 20)], 0, {"redone": 20}),
        ([line(1, 10)], 2, {"trained": 10}),  # killed after the checkpoint of step 2, before its line
        # resumed after step 1, killed again after step 2, and resumed after step 1 once more
        ([line(1, 10), line(2, 20), line(3, 30), line(2, 21, redone=20)], 1, {"trained": 10, "redone": 31}),
        # and after step 2
        ([line(1, 10), line(2, 20), line(3, 30), line(2, 21, redone=20)], 2, {"trained": 21, "redone": 20}),
    ],
)
def test_a_resumed_run_goes_on_from_its_lines(
    lines: list[dict[str, Any]], version: int, expected: dict[str, int]
) -> None:
    assert Goodput.resumed(lines, version).counts == dict.fromkeys(FATES, 0) | expected


# --- the loop -----------------------------------------------------------------------------------------------------


def num_tokens(number: int) -> int:
    """As the fake actor has it."""
    return 10 + number


def handed_over(world: World) -> int:
    return sum(num_tokens(number) for _, number in world.events("handed over"))


def assert_adds_up(row: dict[str, float]) -> None:
    counts = [Fraction(row[f"goodput/{fate}_tokens"]) for fate in FATES]
    assert all(count >= 0 for count in counts)
    assert sum(count / Fraction(row["goodput/sampled_tokens"]) for count in counts) == 1
    assert sum(shares(row).values()) == pytest.approx(1, abs=1e-12)


@settings(max_examples=60, deadline=None, phases=[Phase.generate])  # shrinking runs that hang would take minutes
@given(seed=st.integers(0, 2**32), max_staleness=st.sampled_from([0, 1, 3]))
def test_shares_add_up_to_1_at_every_step_whatever_happens(seed: int, max_staleness: int) -> None:
    run = eventful(seed, max_staleness)
    world: World = run.fleet.world  # type: ignore[attr-defined]
    assert complete(run_loop(run)) == EVENTFUL_STEPS
    for row in run.observer.metrics:  # type: ignore[attr-defined]
        assert_adds_up(row)
    counts = run.ledger.goodput.counts
    assert sum(counts.values()) == handed_over(world), "the actors' own count"
    judged = [sum(num_tokens(n) - 3 * num_failures(world, run, n) for n in batch) - 2 for batch in trained(world)]
    assert counts["masked"] == 2 * EVENTFUL_STEPS
    assert counts["skipped"] == sum(num for step, num in enumerate(judged, 1) if step in world.skips)
    assert counts["trained"] == sum(judged) - counts["skipped"]


def test_the_worlds_above_see_every_fate() -> None:
    seen: set[str] = set()
    for seed in range(40):
        run = eventful(seed, max_staleness=1)
        complete(run_loop(run))
        seen |= {fate for fate, num in run.ledger.goodput.counts.items() if num}
    assert seen == set(FATES) - {"redone", "left"}, "which only a resume brings about"


def num_failures(world: World, run: Run, number: int) -> int:
    return len(world.failures(run.prompts.ticket(number)))


@settings(max_examples=60, deadline=None, phases=[Phase.generate])
@given(seed=st.integers(0, 2**32), turns=st.integers(0, 250), max_staleness=st.sampled_from([0, 1, 3]))
def test_shares_add_up_to_1_over_a_stop_and_a_resume(seed: int, turns: int, max_staleness: int) -> None:
    run = eventful(seed, max_staleness)
    world: World = run.fleet.world  # type: ignore[attr-defined]
    last = run_and_act(world, run, turns, lambda _: run.stop.set())
    assert last is not None
    lines = [{"step": step, **row} for step, row in enumerate(run.observer.metrics, 1)]  # type: ignore[attr-defined]
    first = Goodput.resumed(lines, last)
    on_record = int(lines[-1]["goodput/sampled_tokens"]) if lines else 0
    assert sum(first.counts.values()) == on_record <= handed_over(world)

    resumed = eventful(seed + 1, max_staleness, goodput=first, **saved(run, last))
    assert complete(run_loop(resumed)) == EVENTFUL_STEPS
    for row in resumed.observer.metrics:  # type: ignore[attr-defined]
        assert_adds_up(row)
    assert sum(resumed.ledger.goodput.counts.values()) == on_record + handed_over(resumed.fleet.world)  # type: ignore[attr-defined]


def test_the_phases_of_a_step_add_up_to_its_time_and_the_learner_was_idle_while_it_waited() -> None:
    run = make_run(World(), steps=3)
    complete(run_loop(run))
    for row in run.observer.metrics:  # type: ignore[attr-defined]
        parts = sum(row[f"time/{phase}_s"] for phase in ("other", "rollout_wait", "update", "publish"))
        assert parts == pytest.approx(row["time/step_s"], rel=1e-9)
        assert row["idle/learner_fraction"] == pytest.approx(row["time/rollout_wait_s"] / row["time/step_s"])
