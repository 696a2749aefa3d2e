"""What became of every ticket, and the four figures that follow from it, against a plain reading of what happened."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from cluster.loop.fate import Fate
from cluster.loop.filtering import has_signal
from cluster.loop.loop import Run, run_loop
from tests.fakes.loop import CURRICULUM, EVENTFUL_GROUP_SIZE, EVENTFUL_STEPS, complete, eventful, run_and_act, saved

FATES = ("trained", "filtered", "quarantined", "returned")
TOKENS = (*FATES, "masked", "skipped")


class Oracle:
    """Reads the figures from the log of a world, one event after the other, in the plainest way.

    Args:
        run: The run, of which it asks tickets and what the world says of them.
        before: From `saved`, for a run that was resumed.
    """

    def __init__(self, run: Run, before: dict[str, Any] | None = None) -> None:
        before = before or {}
        self.run, self.world = run, run.fleet.world  # type: ignore[attr-defined]
        self.tickets = Counter({fate: before.get(f"num_{fate}", 0) for fate in FATES})
        self.tokens: Counter[str] = Counter()
        self.waiting: dict[int, int] = {}
        self.scored: dict[int, int] = {}  # failures by ticket, of the groups without a step so far
        self.dropped: list[tuple[int, str, float]] = []
        self.recent, self.rates, self.num_skipped = "", dict[str, float](), 0
        self.admitted = sum(self.tickets.values())
        if before:
            self.scored = {number: failed for number, _, failed in before["quarantine_state"]["decided"]}
            self.recent = before["quarantine_state"]["recent"]
            self.dropped = [tuple(one) for one in before["filter_state"]["dropped"]]
            self.rates = dict(before["filter_state"]["rates"])

    def rows(self) -> list[dict[str, float]]:
        """The figures of every step."""
        return [row for event in self.world.log if (row := self.see(*event)) is not None]

    def see(self, kind: str, number: Any = None, *more: Any) -> dict[str, float] | None:
        """One event; the figures of the step that it ends."""
        match kind:
            case "rollout":
                self.admitted += 1
            case "handed over":
                self.waiting[number] = 10 + number
            case "given back":
                self.settle(number, "returned")
            case "score":
                self.score(number)
            case "update":
                self.batch = more[0]
            case "after_step":
                return self.end_step(number)
        return None

    def settle(self, number: int, fate: str) -> None:
        self.tickets[fate] += 1
        self.tokens[fate] += self.waiting.pop(number, 0)

    def rate(self, number: int) -> tuple[int, str, float]:
        ticket = self.run.prompts.ticket(number)
        paid = self.world.outcomes(ticket)[len(self.world.failures(ticket)) :]
        return number, ticket.prompt.id, sum(outcome >= 0.5 for outcome in paid) / len(paid)

    def score(self, number: int) -> None:
        ticket = self.run.prompts.ticket(number)
        self.scored[number] = failed = len(self.world.failures(ticket))
        self.tokens["quarantined"] += 3 * failed
        self.waiting[number] -= 3 * failed
        if EVENTFUL_GROUP_SIZE - failed < 2:
            self.settle(number, "quarantined")
        elif not has_signal(self.world.outcomes(ticket)[failed:], None):
            self.settle(number, "filtered")
            self.dropped.append(self.rate(number))

    def end_step(self, step: int) -> dict[str, float]:
        total = sum(self.waiting.pop(number) for number in self.batch)
        self.tickets["trained"] += len(self.batch)
        learned = 0 if step in self.world.skips else total - self.world.masked
        self.tokens += Counter(trained=learned, masked=self.world.masked, skipped=total - learned - self.world.masked)
        decided = {number: self.scored.pop(number) for number in sorted(self.scored) if number not in self.waiting}
        marks = "".join("1" * failed + "0" * (EVENTFUL_GROUP_SIZE - failed) for failed in decided.values())
        self.recent = (self.recent + marks)[-20:]
        groups = [self.rate(number) for number in self.batch] + self.dropped
        for _, prompt_id, rate in sorted(groups):
            before = self.rates.get(prompt_id, rate)
            self.rates[prompt_id] = before + CURRICULUM.newest_weight * (rate - before)
        row = {
            "ledger/admitted": self.admitted,
            **{f"ledger/{fate}": self.tickets[fate] for fate in FATES},
            **{f"goodput/{fate}_tokens": self.tokens[fate] for fate in TOKENS},
            "goodput/waiting_tokens": sum(self.waiting.values()),
            "reward/quarantined_fraction": sum(decided.values()) / (EVENTFUL_GROUP_SIZE * len(decided)),
            "filter/dropped_passed": sum(rate == 1 for *_, rate in self.dropped),
            "filter/dropped_failed": sum(rate < 1 for *_, rate in self.dropped),
            "filter/pass_rate": sum(rate for *_, rate in groups) / len(groups),
        }
        self.dropped = []
        return row

    def state(self) -> dict[str, Any]:
        """What a checkpoint says of the groups that were judged."""
        decided = [
            [n, EVENTFUL_GROUP_SIZE, failed] for n, failed in sorted(self.scored.items()) if n not in self.waiting
        ]
        return {
            **{f"num_{fate}": self.tickets[fate] for fate in ("trained", "filtered", "quarantined")},
            "quarantine_state": {"recent": self.recent, "decided": decided},
            "dropped": [list(one) for one in self.dropped],
            "rates": self.rates,
        }


def assert_as_read(run: Run, before: dict[str, Any] | None = None, *, version: int) -> dict[str, Any]:
    """All figures of a run that has ended, at every step and in its checkpoint, are the oracle's; the checkpoint."""
    oracle = Oracle(run, before)
    rows = oracle.rows()
    logged = run.observer.metrics  # type: ignore[attr-defined]
    assert [{name: row[name] for name in expected} for row, expected in zip(logged, rows, strict=True)] == rows
    after = saved(run, version)
    state = oracle.state()
    assert {name: after["filter_state"].pop(name) for name in ("dropped", "rates")} == {
        name: state.pop(name) for name in ("dropped", "rates")
    }
    assert {name: after[name] for name in state} == state
    return saved(run, version)


@settings(max_examples=60, deadline=None, phases=[Phase.generate])  # shrinking runs that hang would take minutes
@given(seed=st.integers(0, 2**32), max_staleness=st.sampled_from([0, 1, 3]))
def test_all_figures_of_every_step_follow_from_what_became_of_the_tickets(seed: int, max_staleness: int) -> None:
    run = eventful(seed, max_staleness)
    assert complete(run_loop(run)) == EVENTFUL_STEPS
    assert_as_read(run, version=EVENTFUL_STEPS)


@settings(max_examples=60, deadline=None, phases=[Phase.generate])
@given(seed=st.integers(0, 2**32), turns=st.integers(0, 250), max_staleness=st.sampled_from([0, 1, 3]))
def test_they_do_so_over_a_stop_and_a_resume(seed: int, turns: int, max_staleness: int) -> None:
    run = eventful(seed, max_staleness)
    last = run_and_act(run.fleet.world, run, turns, lambda _: run.stop.set())  # type: ignore[attr-defined]
    assert last is not None
    state = assert_as_read(run, version=last)
    resumed = eventful(seed + 1, max_staleness, **state)
    assert complete(run_loop(resumed)) == EVENTFUL_STEPS
    assert_as_read(resumed, state, version=EVENTFUL_STEPS)


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_the_runs_above_see_every_fate_and_stop_with_every_kind_of_ticket(max_staleness: int) -> None:
    seen: Counter[str] = Counter()
    for seed in range(30):
        run = eventful(seed, max_staleness)
        last = run_and_act(run.fleet.world, run, 9 * seed, lambda _, run=run: run.stop.set())  # type: ignore[attr-defined, misc]
        state = saved(run, last or 0)
        seen += Counter(dropped=len(state["filter_state"]["dropped"]), leased=len(state["leased"]))
        seen += Counter(decided=len(state["quarantine_state"]["decided"]), returned=run.ledger.num[Fate.RETURNED])
        seen += Counter({name: state[f"num_{name}"] for name in ("trained", "filtered", "quarantined")})
    assert len(seen) == 7
    assert seen["decided"] > seen["dropped"], "quarantined ones among them"
