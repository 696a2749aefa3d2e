"""Which prompt went where. At any moment: admitted = trained + filtered + quarantined + returned + in flight."""

from __future__ import annotations

from collections.abc import Iterable

from align.metrics import Metric
from cluster.loop.goodput import Goodput


class Ledger:
    """Counts tickets by fate and knows which are in flight; and their tokens with them.

    Args:
        trained: Tickets trained before this process began (after a resume).
        filtered: Tickets filtered before.
        quarantined: Tickets quarantined before.
        goodput: Counts the tokens.
    """

    def __init__(
        self, trained: int = 0, filtered: int = 0, quarantined: int = 0, goodput: Goodput | None = None
    ) -> None:
        self.goodput = goodput or Goodput()
        self.num_admitted = trained + filtered + quarantined
        self.num_trained = trained
        self.num_filtered = filtered
        self.num_quarantined = quarantined
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

    def sample(self, ticket: int, num_tokens: int) -> None:
        """The group of a ticket was handed over, with so many sampled tokens."""
        self.goodput.sample(ticket, num_tokens)

    def give_back(self, ticket: int) -> None:
        """A ticket could not be rolled out or scored and will be admitted again."""
        self.in_flight.remove(ticket)
        self.num_returned += 1
        self.goodput.settle(ticket, "returned")

    def filter(self, ticket: int) -> None:
        """The group of a ticket was dropped, since it has no signal; the ticket is done."""
        self.in_flight.remove(ticket)
        self.num_filtered += 1
        self.goodput.settle(ticket, "filtered")

    def quarantine_part(self, ticket: int, num_tokens: int) -> None:
        """So many tokens of a ticket's group are in trajectories whose reward failed; the others go on."""
        self.goodput.settle(ticket, "quarantined", num_tokens)

    def quarantine(self, ticket: int) -> None:
        """The group of a ticket was dropped, since its reward failed; the ticket is done."""
        self.in_flight.remove(ticket)
        self.num_quarantined += 1
        self.goodput.settle(ticket, "quarantined")

    def train(self, tickets: Iterable[int], trained_tokens: int = 0, masked_tokens: int = 0) -> None:
        """Tickets were part of an update, which trained or masked so many of their tokens and skipped the rest.

        Raises:
            KeyError: If one is not in flight, so was never admitted or is trained twice.
        """
        tickets = list(tickets)
        for ticket in tickets:
            self.in_flight.remove(ticket)
            self.num_trained += 1
        self.goodput.train(tickets, trained_tokens, masked_tokens)

    def metrics(self) -> list[Metric]:
        """The counts, after a check that they add up."""
        done = self.num_trained + self.num_filtered + self.num_quarantined + self.num_returned
        assert self.num_admitted == done + len(self.in_flight), "the ledger adds up"
        return [
            Metric("ledger/admitted", self.num_admitted),
            Metric("ledger/trained", self.num_trained),
            Metric("ledger/filtered", self.num_filtered),
            Metric("ledger/quarantined", self.num_quarantined),
            Metric("ledger/returned", self.num_returned),
            *self.goodput.metrics(),
        ]
