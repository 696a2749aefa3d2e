"""What rounding leaves between two ways of computing one log-probability has no direction: its mean is 0 within its error.

A direction would be a bias of every importance weight, which no bound on single residuals shows.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from align.model.policy import Policy
from tests.fakes.models import VOCAB_SIZE, random_qwen3

ROWS, LENGTH = 96, 40
LENGTHS = torch.randint(LENGTH // 2, LENGTH + 1, (ROWS,), generator=torch.Generator().manual_seed(8))
REAL = torch.arange(1, LENGTH) < LENGTHS[:, None]
WAYS: dict[str, dict[str, Any]] = {
    "padded": {},
    "packed": {"lengths": LENGTHS},
    "seven tokens' logits at a time": {"max_logits_bytes": 4 * VOCAB_SIZE * 7},
    "bfloat16": {"compute_dtype": "bfloat16"},
    "bfloat16, packed": {"compute_dtype": "bfloat16", "lengths": LENGTHS},
}
LARGEST = {"float32": 2e-5, "bfloat16": 0.5}
"""Nats: a residual may be this large, a mean by no means."""
NUM_ERRORS = 4
"""Standard errors that the mean may be away from 0: one case of 16,000 by chance; the seeds are fixed."""


@pytest.fixture(scope="module")
def token_ids() -> Tensor:
    return torch.randint(3, VOCAB_SIZE, (ROWS, LENGTH), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def exact(token_ids: Tensor) -> Tensor:
    """Log-probabilities [B, T - 1] from whole logits in float64."""
    model = copy.deepcopy(random_qwen3(seed=0)).double()
    with torch.no_grad():
        logits = model(input_ids=token_ids).logits[:, :-1]
    return logits.log_softmax(dim=-1).gather(-1, token_ids[:, 1:, None])[..., 0]


@pytest.mark.parametrize("name", WAYS)
def test_residuals_of_log_probabilities_have_mean_zero(name: str, token_ids: Tensor, exact: Tensor) -> None:
    settings = dict(WAYS[name])
    dtype = settings.pop("compute_dtype", "float32")
    policy = Policy(random_qwen3(seed=0), None, dtype)
    policy.max_logits_bytes = settings.pop("max_logits_bytes", policy.max_logits_bytes)
    wanted = torch.nn.functional.pad(REAL, (1, 0))
    with torch.no_grad():
        found = policy.token_logprobs(token_ids, wanted=wanted, **settings).logprobs[:, 1:].double()
    residuals = (found - exact)[REAL]
    error = float(residuals.std()) / math.sqrt(len(residuals))
    assert 0 < float(residuals.abs().max()) < LARGEST[dtype]
    assert abs(float(residuals.mean())) < NUM_ERRORS * error
