"""Trajectories of unequal lengths into micro-batches without padding."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Trajectories into as few micro-batches of at most `max_tokens` real tokens as best fit decreasing finds.

    Longest first, each goes where it leaves the least room, into a new micro-batch if it fits nowhere; one longer than the
    budget gets a micro-batch of its own. Depends on the lengths alone, so the same batch is always cut the same way.

    Args:
        lengths: Tokens of each trajectory.
        max_tokens: The budget.

    Returns:
        Lists of row numbers, longest trajectory first; each row appears exactly once.

    Source: best fit decreasing; Johnson et al. (1974): at most 11/9 of the optimal number, plus 4.
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, number of the bin), ascending
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        best = bisect_left(rooms, (lengths[row], -1))
        if best < len(rooms):
            room, number = rooms.pop(best)
            bins[number].append(row)
        else:
            room, number = max(max_tokens, lengths[row]), len(bins)
            bins.append([row])
        insort(rooms, (room - lengths[row], number))
    return bins
