"""The sampling distribution as a value."""

from __future__ import annotations

import pytest

from align.data.sampling import PLAIN, Sampling


@pytest.mark.parametrize(("top_k", "top_p"), [(-1, 1.0), (0, 0.0), (0, 1.1)])
def test_limits_out_of_range_are_refused(top_k: int, top_p: float) -> None:
    with pytest.raises(ValueError, match="top_k is at least 0, top_p above 0 and at most 1"):
        Sampling(1.0, top_k, top_p)


def test_a_distribution_truncates_if_some_token_can_never_be_sampled() -> None:
    assert not PLAIN.truncates
    assert not Sampling(0.3).truncates
    assert Sampling(top_k=1).truncates
    assert Sampling(top_p=0.99).truncates
