"""The ledger: every ticket has one fate, and the counts add up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.metrics import reduce
from cluster.loop.ledger import Ledger


def counts(ledger: Ledger) -> tuple[float, float, float]:
    values = reduce(ledger.metrics())
    return values["ledger/admitted"], values["ledger/trained"], values["ledger/returned"]


def num_filtered(ledger: Ledger) -> float:
    return reduce(ledger.metrics())["ledger/filtered"]


def test_each_fate_is_counted() -> None:
    ledger = Ledger()
    for ticket in (0, 1, 2, 3):
        ledger.admit(ticket)
    ledger.give_back(1)
    ledger.train([0, 3])
    assert counts(ledger) == (4, 2, 1)
    assert ledger.in_flight == {2}
    ledger.filter(2)
    assert (counts(ledger), num_filtered(ledger), ledger.in_flight) == ((4, 2, 1), 1, set())


def test_a_ticket_that_was_given_back_may_be_admitted_again_and_counts_twice_as_admitted() -> None:
    ledger = Ledger()
    ledger.admit(5)
    ledger.give_back(5)
    ledger.admit(5)
    ledger.train([5])
    assert counts(ledger) == (2, 1, 1)


def test_a_resumed_ledger_goes_on_counting() -> None:
    ledger = Ledger(trained=10, filtered=3)
    ledger.admit(7)
    assert (counts(ledger), num_filtered(ledger)) == ((14, 10, 0), 3)


def test_a_ticket_in_flight_is_not_admitted_again() -> None:
    ledger = Ledger()
    ledger.admit(3)
    with pytest.raises(ValueError, match="ticket 3 was admitted twice"):
        ledger.admit(3)


@pytest.mark.parametrize("trained_first", [True, False])
def test_a_ticket_that_is_not_in_flight_is_not_trained(trained_first: bool) -> None:
    ledger = Ledger()
    if trained_first:
        ledger.admit(3)
        ledger.train([3])
    with pytest.raises(KeyError):
        ledger.train([3])


def test_a_ticket_that_is_not_in_flight_is_not_given_back() -> None:
    with pytest.raises(KeyError):
        Ledger().give_back(0)


def test_a_ticket_that_is_not_in_flight_is_not_filtered() -> None:
    ledger = Ledger()
    with pytest.raises(KeyError):
        ledger.filter(0)
    ledger.admit(0)
    ledger.filter(0)
    with pytest.raises(KeyError):
        ledger.train([0])


def test_counts_that_do_not_add_up_are_noticed() -> None:
    ledger = Ledger()
    ledger.admit(0)
    ledger.in_flight.clear()  # as a defect would lose a ticket
    with pytest.raises(AssertionError, match="the ledger adds up"):
        ledger.metrics()


@given(st.lists(st.tuples(st.sampled_from(["admit", "give_back", "filter", "train"]), st.integers(0, 5)), max_size=60))
def test_the_counts_add_up_after_every_order_of_events(events: list[tuple[str, int]]) -> None:
    ledger = Ledger()
    for event, ticket in events:
        if (event == "admit") == (ticket in ledger.in_flight):
            continue  # refused, as the tests above show
        ledger.train([ticket]) if event == "train" else getattr(ledger, event)(ticket)
        admitted, trained, returned = counts(ledger)
        assert admitted == trained + num_filtered(ledger) + returned + len(ledger.in_flight)
