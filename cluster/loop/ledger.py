"""Which prompt went where. At any moment: admitted = trained + filtered + quarantined + returned + in flight."""

from __future__ import annotations

from collections.abc import Iterable

from align.data.types import Ticket
from align.metrics import Metric
from cluster.loop.fate import Entry, Fate
from cluster.loop.goodput import Goodput
from cluster.loop.rollout import Rollout


class Ledger:
    """The one book of what became of every ticket; all figures about that follow from it.

    The counts of tickets by fate and the goodput of their tokens are kept here. The quarantine's share of failures, the
    filter's drops and the pass rates of the prompts are read from the entries: those of tickets in flight, and those that were
    settled since the end of the last step.

    Args:
        trained: Tickets trained before this process began (after a resume).
        filtered: Tickets filtered before.
        quarantined: Tickets quarantined before.
        goodput: Counts the tokens.
        settled: Of those before, the ones that no step has ended; see `settled_before`.
    """

    def __init__(
        self,
        trained: int = 0,
        filtered: int = 0,
        quarantined: int = 0,
        goodput: Goodput | None = None,
        settled: Iterable[Entry] = (),
    ) -> None:
        self.goodput = goodput or Goodput()
        self.num_admitted = trained + filtered + quarantined
        self.num = {Fate.TRAINED: trained, Fate.FILTERED: filtered, Fate.QUARANTINED: quarantined, Fate.RETURNED: 0}
        self.in_flight: dict[int, Entry] = {}
        self.settled = list(settled)  # since the end of the last step

    def admit(self, ticket: Ticket) -> None:
        """A ticket is being rolled out.

        Raises:
            ValueError: If it is in flight already.
        """
        if ticket.number in self.in_flight:
            raise ValueError(f"ticket {ticket.number} was admitted twice")
        self.in_flight[ticket.number] = Entry(ticket.number, ticket.prompt.id)
        self.num_admitted += 1

    def sample(self, ticket: int, num_tokens: int) -> None:
        """The group of a ticket was handed over, with so many sampled tokens."""
        self.in_flight[ticket].num_tokens = num_tokens
        self.goodput.sample(num_tokens)

    def judge(self, rollout: Rollout, pass_rate: float) -> list[Entry]:
        """The group of a ticket was scored; all entries, its own among them, by which its fate can be decided.

        The tokens of trajectories whose reward failed are in quarantine from now on, whatever becomes of the others.
        """
        entry = self.in_flight[rollout.ticket.number]
        entry.num_judged, entry.num_failed = len(rollout.ticket.seeds), len(rollout.failures)
        entry.pass_rate = pass_rate
        failed_tokens = sum(failure.num_tokens for failure in rollout.failures)
        entry.num_tokens -= failed_tokens
        self.goodput.settle(failed_tokens, Fate.QUARANTINED)
        return [*self.settled, *self.in_flight.values()]

    def settle(self, ticket: int, fate: Fate) -> None:
        """What became of a ticket that is not trained, and of its tokens with it.

        Raises:
            KeyError: If it is not in flight.
        """
        self.goodput.settle(self._close(ticket, fate).num_tokens, fate)

    def end_step(self, trained: Iterable[int], trained_tokens: int = 0, masked_tokens: int = 0) -> list[Entry]:
        """Tickets were part of an update, which trained or masked so many of their tokens and skipped the rest.

        Returns:
            All entries that were settled since the end of the last step, in that order, these tickets' among them.

        Raises:
            KeyError: If one is not in flight, so was never admitted or is trained twice.
        """
        num_tokens = sum(self._close(ticket, Fate.TRAINED).num_tokens for ticket in trained)
        self.goodput.train(num_tokens, trained_tokens, masked_tokens)
        settled, self.settled = self.settled, []
        return settled

    def _close(self, ticket: int, fate: Fate) -> Entry:
        entry = self.in_flight.pop(ticket)
        entry.fate = fate
        self.num[fate] += 1
        if fate is not Fate.RETURNED:
            self.settled.append(entry)
        return entry

    def metrics(self) -> list[Metric]:
        """The counts, after a check that they add up."""
        assert self.num_admitted == sum(self.num.values()) + len(self.in_flight), "the ledger adds up"
        return [
            Metric("ledger/admitted", self.num_admitted),
            *(Metric(f"ledger/{fate}", num) for fate, num in self.num.items()),
            *self.goodput.metrics(),
        ]
