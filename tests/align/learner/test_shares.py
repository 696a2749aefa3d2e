"""How a batch is shared out over ranks: each trajectory once, equal work, equally many passes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from align.data.batching import micro_batches
from align.learner.shares import Cut, Pass, balance, passes
from align.model.ranks import Ranks


def by_tokens(max_tokens: int) -> Cut:
    return lambda lengths: micro_batches(lengths, max_tokens)


@given(st.lists(st.integers(1, 50_000), min_size=1, max_size=30), st.integers(1, 5), st.integers(1, 100_000))
def test_every_trajectory_counts_once_on_one_rank_and_all_ranks_do_as_many_passes(
    lengths: list[int], num_ranks: int, max_tokens: int
) -> None:
    shares = [list(passes(Ranks(rank, num_ranks), lengths, by_tokens(max_tokens))) for rank in range(num_ranks)]
    assert len({len(of_rank) for of_rank in shares}) == 1
    rows = [row for of_rank in shares for one in of_rank if one.counts for row in one.rows]
    assert sorted(rows) == list(range(len(lengths)))
    assert all(len(one.rows) == 1 for of_rank in shares for one in of_rank if not one.counts)
    assert max(sum(one.counts for one in of_rank) for of_rank in shares) == len(shares[0]), "no pass without need"


def test_one_rank_alone_has_the_micro_batches_of_the_batch() -> None:
    lengths = [5, 40, 12, 33, 7, 21, 3, 18]
    expected = [Pass(rows, counts=True) for rows in micro_batches(lengths, 45)]
    assert list(passes(Ranks(), lengths, by_tokens(45))) == expected


@given(st.lists(st.integers(1, 50_000), min_size=1, max_size=30), st.integers(1, 5))
def test_no_rank_has_more_work_than_another_by_more_than_one_trajectory(lengths: list[int], num_ranks: int) -> None:
    work = [sorted(n * (12_288 + n) for n in (lengths[row] for row in rows)) for rows in balance(lengths, num_ranks)]
    least = min(map(sum, work))
    assert all(sum(of_rank[1:]) <= least for of_rank in work)


def test_attention_counts_as_work() -> None:
    """By tokens alone, the last trajectory would go to the first rank."""
    assert balance([10_000, 4_000, 4_000, 4_000, 4_000], 2) == [[0], [1, 2, 3, 4]]
