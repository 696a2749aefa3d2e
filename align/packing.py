"""Trajectories of unequal lengths into micro-batches without padding, and micro-batches onto ranks of equal work."""

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


def balance(
    lengths: Sequence[int], num_ranks: int, max_tokens: int, attention_weight: float = 0.0
) -> list[list[list[int]]]:
    """Trajectories onto ranks: equally many micro-batches for each, of nearly equal work.

    Work of a trajectory of n tokens: `n + attention_weight * n^2`. By falling work, each goes to the micro-batch with the least
    work among those with room; there are as few micro-batches per rank as take all trajectories. Ranks must call their
    collectives equally often, so all get the same number of micro-batches, and with few trajectories some are **empty**.

    Args:
        lengths: Tokens of each trajectory.
        num_ranks: Ranks.
        max_tokens: Real tokens of a micro-batch; a longer trajectory gets one of its own.
        attention_weight: Work of attention, per pair of tokens, over the work of all else, per token: about
            `1 / (12 * hidden_size)` in a dense transformer (2 D of 24 D^2 multiplications in a layer).

    Returns:
        For each rank its micro-batches of row numbers; each row appears exactly once.
    """
    count = -(-sum(lengths) // max_tokens)
    while True:
        count = -(-count // num_ranks) * num_ranks
        if (bins := _spread(lengths, count, max_tokens, attention_weight)) is not None:
            return [bins[rank::num_ranks] for rank in range(num_ranks)]
        count += 1


def work(lengths: Sequence[int], attention_weight: float) -> float:
    """`sum n + attention_weight * n^2` over trajectories that do not see each other."""
    return sum(n + attention_weight * n * n for n in lengths)


def _spread(lengths: Sequence[int], num_bins: int, max_tokens: int, attention_weight: float) -> list[list[int]] | None:
    """`num_bins` bins of nearly equal work; None if the trajectories do not fit. Longest processing time first (Graham 1969)."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    tokens, works = [0] * num_bins, [0.0] * num_bins
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        open_bins = [b for b in range(num_bins) if not bins[b] or tokens[b] + lengths[row] <= max_tokens]
        if not open_bins:
            return None
        least = min(open_bins, key=lambda b: (works[b], b))
        bins[least].append(row)
        tokens[least] += lengths[row]
        works[least] += work([lengths[row]], attention_weight)
    return bins
