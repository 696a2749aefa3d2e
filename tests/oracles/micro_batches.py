"""How a batch is cut into micro-batches is a matter of memory alone."""

from __future__ import annotations

from typing import Any

import pytest

from align.data.batching import Batch
from tests.fakes.learners import PolicyFactory, new_learner, reduced, update, weights
from tests.oracles.equality import assert_close


def assert_cuts_are_equal(new_policy: PolicyFactory, batch: Batch, least: float, **settings: Any) -> None:
    """One micro-batch, several, or one per trajectory: one gradient (its largest entry above `least`), step and metrics."""
    results = []
    for max_tokens in (10_000, 24, 1):
        learner = new_learner(new_policy(), max_tokens, **settings)
        gradients, stats = update(learner, batch)
        results.append((gradients, weights(learner), reduced(stats)))
    (gradients, after, values), *others = results
    assert max(float(g.abs().max()) for g in gradients.values()) > least
    for other_gradients, other_after, other_values in others:
        assert_close(other_gradients, gradients)
        assert_close(other_after, after, rtol=1e-5)
        assert other_values == pytest.approx(values, rel=1e-4, abs=1e-5)
