"""How a batch is shared out over ranks: by work, each trajectory to one rank, as many passes for all.

Every rank is given the whole batch and computes advantages and weights of all of it, so that every global statistic is a
number that needs no communication. Forward and backward passes run on a rank's own trajectories alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from align.model.ranks import Ranks

Cut = Callable[[Sequence[int]], Sequence[Sequence[int]]]
"""Lengths of trajectories -> micro-batches of their numbers."""
_ATTENTION_TOKENS = 12_288
"""Length at which causal attention costs as much as the matrices of a layer: 12 times a hidden size of 1,024.

A layer has about `12 h^2` parameters, hence `24 h^2` operations per token; the scores and the mixture of values of a causal
sequence of T tokens take `2 h T` per token on average. Other sizes move the balance a little, never the gradient."""


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward and backward pass of a rank.

    Attributes:
        rows: Its trajectories.
        counts: False for a pass that only keeps this rank in step with the others: its tokens carry no loss and nothing of
            it is logged.
    """

    rows: list[int]
    counts: bool


def passes(ranks: Ranks, lengths: Sequence[int], cut: Cut) -> Iterator[Pass]:
    """A rank's passes over the batch, as many as every other rank's, since each pass gathers the weights.

    Args:
        ranks: This rank among all.
        lengths: Tokens of all trajectories of the batch.
        cut: Cuts trajectories of these lengths into micro-batches of their numbers.

    Yields:
        Micro-batches of trajectories of the batch; each trajectory counts on one rank and in one pass.
    """
    shares = balance(lengths, ranks.num_ranks)
    cuts = [[[rows[i] for i in part] for part in cut([lengths[row] for row in rows])] for rows in shares]
    own = cuts[ranks.rank]
    yield from (Pass(rows, counts=True) for rows in own)
    shortest = min(range(len(lengths)), key=lambda row: lengths[row])
    for _ in range(max(map(len, cuts)) - len(own)):
        yield Pass([shortest], counts=False)


def balance(lengths: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Share trajectories out by work, attention included: the largest first, each to the rank with the least so far.

    Deterministic, so that every rank finds the same shares by itself.

    Returns:
        Numbers of the trajectories of every rank, ascending; each appears once.
    """
    work = [0] * num_ranks
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        rank = work.index(min(work))
        shares[rank].append(row)
        work[rank] += lengths[row] * (_ATTENTION_TOKENS + lengths[row])
    return [sorted(rows) for rows in shares]
