"""A group as the loop sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from align.data.types import Ticket
from cluster.loop.quarantine import Failure
from cluster.loop.span import Span


@dataclass(frozen=True, slots=True)
class Rollout:
    """A small summary of a group, with an opaque reference to its tokens, which stay out of this process.

    Attributes:
        outcomes: Sum of the rewards of each trajectory that was judged; known once the group is scored.
        failures: The trajectories whose reward failed; known then too.
        spans: Who sampled and who scored it, and when.
    """

    ticket: Ticket
    oldest_version: int
    num_tokens: int
    num_stopped: int
    payload: Any
    scores: Any = None
    outcomes: tuple[float, ...] = ()
    failures: tuple[Failure, ...] = ()
    spans: tuple[Span, ...] = ()
