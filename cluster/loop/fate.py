"""What becomes of a ticket, and what is known of it until then."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Fate(StrEnum):
    """What became of a ticket that was admitted; the glossary explains each as ledger/FATE."""

    TRAINED = "trained"  # its group was part of an update
    FILTERED = "filtered"  # its group has no signal; the ticket is done
    QUARANTINED = "quarantined"  # the reward failed for too much of its group; the ticket is done
    RETURNED = "returned"  # it could not be rolled out or scored, and will be admitted again


@dataclass(slots=True)
class Entry:
    """What the ledger knows of a ticket, from its admission to the end of the step in which it was settled.

    Attributes:
        number: Of the ticket.
        prompt_id: Name of its prompt; empty for a ticket that a checkpoint has in quarantine, where nobody asks for it.
        num_judged: Trajectories that were judged: 0 until its group is scored, then all of them.
        num_failed: Those of them whose reward failed.
        pass_rate: Share of passed ones among the others, from `Filter.pass_rate`.
        fate: None while the ticket is in flight.
        num_tokens: Sampled tokens that have no fate but the ticket's.
    """

    number: int
    prompt_id: str
    num_judged: int = 0
    num_failed: int = 0
    pass_rate: float = 0.0
    fate: Fate | None = None
    num_tokens: int = 0


def settled_before(quarantine: Mapping[str, Any], filtering: Mapping[str, Any]) -> list[Entry]:
    """Entries of the groups that were dropped between the last step of a checkpoint and its writing.

    Args:
        quarantine: From `Quarantine.state`.
        filtering: From `Filter.state`.
    """
    judged = {number: counts for number, *counts in quarantine.get("decided", ())}
    filtered = [
        Entry(number, prompt_id, *judged.pop(number, (0, 0)), pass_rate, Fate.FILTERED)
        for number, prompt_id, pass_rate in filtering.get("dropped", ())
    ]
    return filtered + [Entry(number, "", *counts, fate=Fate.QUARANTINED) for number, counts in judged.items()]
