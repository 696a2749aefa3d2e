"""The ledger: every ticket has one fate, and the counts add up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.data.types import Prompt, Ticket
from align.metrics import reduce
from cluster.loop.fate import Entry, Fate
from cluster.loop.ledger import Ledger
from cluster.loop.quarantine import Failure
from cluster.loop.rollout import Rollout

PROMPT = Prompt("p", "", (1,))


def ticket(number: int) -> Ticket:
    return Ticket(number, PROMPT, (0, 1, 2))


def counts(ledger: Ledger) -> dict[str, float]:
    """By fate, without those that have none."""
    values = {name: value for name, value in reduce(ledger.metrics()).items() if name.startswith("ledger/")}
    return {name.removeprefix("ledger/"): value for name, value in values.items() if value}


def tokens(ledger: Ledger) -> dict[str, int]:
    """By fate, without those that have none."""
    return {fate: num for fate, num in ledger.goodput.counts.items() if num}


def admit(ledger: Ledger, *numbers: int) -> None:
    for number in numbers:
        ledger.admit(ticket(number))


# --- the fates ----------------------------------------------------------------------------------------------------


def test_each_fate_is_counted() -> None:
    ledger = Ledger()
    admit(ledger, 0, 1, 2, 3, 4)
    ledger.settle(1, Fate.RETURNED)
    ledger.end_step([0, 3])
    assert counts(ledger) == {"admitted": 5, "trained": 2, "returned": 1}
    assert set(ledger.in_flight) == {2, 4}
    ledger.settle(2, Fate.FILTERED)
    ledger.settle(4, Fate.QUARANTINED)
    assert counts(ledger) == {"admitted": 5, "trained": 2, "returned": 1, "filtered": 1, "quarantined": 1}
    assert not ledger.in_flight


@pytest.mark.parametrize("fate", [Fate.FILTERED, Fate.QUARANTINED, Fate.RETURNED])
def test_tokens_wait_until_their_ticket_is_settled_and_have_its_fate_then(fate: Fate) -> None:
    ledger = Ledger()
    admit(ledger, 0, 1)
    ledger.sample(0, 30)
    ledger.settle(1, fate)  # lost before it was handed over
    assert tokens(ledger) == {"waiting": 30}
    ledger.settle(0, fate)
    assert tokens(ledger) == {fate: 30}


def test_tokens_whose_reward_failed_are_in_quarantine_from_the_judgement_on_whatever_becomes_of_the_others() -> None:
    ledger = Ledger()
    admit(ledger, 0)
    ledger.sample(0, 30)
    failures = (Failure(0, "p", "", "", 0, 4, ""), Failure(0, "p", "", "", 1, 5, ""))
    entries = ledger.judge(Rollout(ticket(0), 0, 30, 0, None, failures=failures), pass_rate=0.5)
    assert entries == [Entry(0, "p", num_judged=3, num_failed=2, pass_rate=0.5, num_tokens=21)]
    assert tokens(ledger) == {"waiting": 21, "quarantined": 9}
    ledger.end_step([0], trained_tokens=15, masked_tokens=2)
    assert tokens(ledger) == {"trained": 15, "masked": 2, "skipped": 4, "quarantined": 9}


def test_a_step_ends_with_all_that_was_settled_in_it_but_what_was_given_back() -> None:
    ledger = Ledger()
    admit(ledger, 0, 1, 2, 3, 4)
    ledger.settle(3, Fate.FILTERED)
    ledger.settle(2, Fate.RETURNED)
    ledger.settle(1, Fate.QUARANTINED)
    settled = [(entry.number, entry.fate) for entry in ledger.end_step([0])]
    assert settled == [(3, Fate.FILTERED), (1, Fate.QUARANTINED), (0, Fate.TRAINED)]
    assert [entry.number for entry in ledger.end_step([4])] == [4], "a new step begins anew"


def test_a_ticket_that_was_given_back_may_be_admitted_again_and_counts_twice_as_admitted() -> None:
    ledger = Ledger()
    admit(ledger, 5)
    ledger.settle(5, Fate.RETURNED)
    admit(ledger, 5)
    ledger.end_step([5])
    assert counts(ledger) == {"admitted": 2, "trained": 1, "returned": 1}


def test_a_resumed_ledger_goes_on_counting_and_its_step_ends_with_what_was_settled_before() -> None:
    before = Entry(6, "p", 3, 0, 1.0, Fate.FILTERED)
    ledger = Ledger(trained=10, filtered=3, settled=[before])
    admit(ledger, 7)
    assert counts(ledger) == {"admitted": 14, "trained": 10, "filtered": 3}
    assert [entry.number for entry in ledger.end_step([7])] == [6, 7]


# --- what is refused ----------------------------------------------------------------------------------------------


def test_a_ticket_in_flight_is_not_admitted_again() -> None:
    ledger = Ledger()
    admit(ledger, 3)
    with pytest.raises(ValueError, match="ticket 3 was admitted twice"):
        admit(ledger, 3)


@pytest.mark.parametrize("trained_first", [True, False])
def test_a_ticket_that_is_not_in_flight_is_not_trained(trained_first: bool) -> None:
    ledger = Ledger()
    if trained_first:
        admit(ledger, 3)
        ledger.end_step([3])
    with pytest.raises(KeyError):
        ledger.end_step([3])


@pytest.mark.parametrize("fate", Fate)
def test_a_ticket_that_is_not_in_flight_is_not_settled(fate: Fate) -> None:
    ledger = Ledger()
    with pytest.raises(KeyError):
        ledger.settle(0, fate)
    admit(ledger, 0)
    ledger.settle(0, Fate.FILTERED)
    with pytest.raises(KeyError):
        ledger.settle(0, fate)


def test_counts_that_do_not_add_up_are_noticed() -> None:
    ledger = Ledger()
    admit(ledger, 0)
    ledger.in_flight.clear()  # as a defect would lose a ticket
    with pytest.raises(AssertionError, match="the ledger adds up"):
        ledger.metrics()


@given(st.lists(st.tuples(st.sampled_from(["admit", *Fate]), st.integers(0, 5)), max_size=60))
def test_the_counts_add_up_after_every_order_of_events(events: list[tuple[str, int]]) -> None:
    ledger = Ledger()
    for event, number in events:
        if (event == "admit") == (number in ledger.in_flight):
            continue  # refused, as the tests above show
        if event == "admit":
            admit(ledger, number)
        elif event == Fate.TRAINED:
            ledger.end_step([number])
        else:
            ledger.settle(number, Fate(event))
        by_fate = counts(ledger)
        assert by_fate.pop("admitted") == sum(by_fate.values()) + len(ledger.in_flight)
