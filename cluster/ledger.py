"""Which prompt went where. At any moment: admitted = trained + filtered + returned + in flight."""

from __future__ import annotations

from collections.abc import Iterable

from align.metrics import Metric


class Ledger:
    """Counts tickets by fate and knows which are in flight.

    Args:
        trained: Tickets trained before this process began (after a resume).
        filtered: Tickets filtered before.
    """

    def __init__(self, trained: int = 0, filtered: int = 0) -> None:
        self.num_admitted = trained + filtered
        self.num_trained = trained
        self.num_filtered = filtered
        self.num_returned = 0
        self.in_flight: set[int] = set()

    def admit(self, ticket: int) -> None:
        """A ticket is being rolled out.

        Raises:
            ValueError: If it is in flight already.
        """
        if ticket in self.in_flight:
            raise ValueError(f"ticket {ticket} was admitted twice")
        self.in_flight.add(ticket)
        self.num_admitted += 1

    def give_back(self, ticket: int) -> None:
        """A ticket could not be rolled out and will be admitted again."""
        self.in_flight.remove(ticket)
        self.num_returned += 1

    def filter(self, ticket: int) -> None:
        """The group of a ticket was dropped; the ticket is done."""
        self.in_flight.remove(ticket)
        self.num_filtered += 1

    def train(self, tickets: Iterable[int]) -> None:
        """Tickets were part of an update.

        Raises:
            KeyError: If one is not in flight, so was never admitted or is trained twice.
        """
        for ticket in tickets:
            self.in_flight.remove(ticket)
            self.num_trained += 1

    def metrics(self) -> list[Metric]:
        """The counts, after a check that they add up."""
        done = self.num_trained + self.num_filtered + self.num_returned
        assert self.num_admitted == done + len(self.in_flight), "the ledger adds up"
        return [
            Metric("ledger/admitted", self.num_admitted),
            Metric("ledger/trained", self.num_trained),
            Metric("ledger/filtered", self.num_filtered),
            Metric("ledger/returned", self.num_returned),
        ]
