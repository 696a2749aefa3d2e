"""What a step says of its batch: lengths, endings, tokens; and staleness, whose bound is reached and is never passed."""

from __future__ import annotations

import pytest

from align.metrics import Metric
from cluster.faults import StalenessViolation
from cluster.loop.batch import learned_tokens
from cluster.loop.loop import run_loop
from tests.fakes.loop import GROUP_SIZE, World, complete, largest_staleness, make_run, trained


def test_what_a_step_logs() -> None:
    run = make_run(World(), steps=2, groups_per_step=2)
    complete(run_loop(run))
    first, second = run.observer.metrics  # type: ignore[attr-defined]
    assert first["tokens/generated"] == 10 + 11
    assert first["tokens/trained"] == 10 + 11
    assert first["trajectory/completion_tokens_mean"] == (10 + 11) / (2 * GROUP_SIZE)
    assert first["trajectory/stopped_fraction"] == 2 / (2 * GROUP_SIZE)
    assert (first["staleness/mean"], first["staleness/max"]) == (0, 0)
    assert (first["weights/version"], second["weights/version"]) == (1, 2)
    assert (first["ledger/trained"], second["ledger/trained"], second["ledger/returned"]) == (2, 4, 0)


def test_an_update_that_says_nothing_of_its_tokens_trained_none() -> None:
    assert learned_tokens([Metric("tokens/trained", 7), Metric("tokens/masked", 2)]) == (7, 2)
    assert learned_tokens([]) == (0, 0)


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_fast_actors_reach_the_staleness_limit_and_no_more(max_staleness: int) -> None:
    world = World(pace={"rollout": 0, "score": 0, "update": 30, "publish": 30})
    complete(run_loop(make_run(world, steps=8, max_staleness=max_staleness, max_groups=100)))
    assert largest_staleness(world) == max_staleness


@pytest.mark.parametrize("max_staleness", [1, 3])
def test_the_bound_is_tight_one_more_slot_would_break_it(max_staleness: int) -> None:
    world = World(pace={"rollout": 0, "score": 0, "update": 30, "publish": 30})
    run = make_run(world, steps=8, groups_per_step=2, max_staleness=max_staleness, max_groups=100)
    run.buffer.num_slots += 1
    with pytest.raises(StalenessViolation):
        complete(run_loop(run))


@pytest.mark.parametrize(("reported", "staleness"), [(-1, 2), (2, -1)])
def test_a_group_outside_the_limit_ends_the_run_before_it_is_trained(reported: int, staleness: int) -> None:
    world = World(reported={2: reported})
    run = make_run(world, max_staleness=1)
    with pytest.raises(StalenessViolation, match=rf"met learner version 1: staleness {staleness}, the limit is 1"):
        complete(run_loop(run))
    assert trained(world) == [[0, 1]]
