"""When a process did a piece of work."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of work, timed in the process that did it.

    Attributes:
        role: "loop", "rollout" or "scorer".
        rank: Number within the role.
        began_s: Seconds since the epoch, by the clock of that process's machine.
        ended_s: So too.
    """

    role: str
    rank: int
    began_s: float
    ended_s: float
