"""What real engines were measured to do, once for all that judge it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fakes.models import write_small_model
from tests.harness.probes import Probe


@pytest.fixture(scope="session")
def weights_engine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An engine that is given weights: a small random model with a tied head."""
    return Probe("tests.integration.engine_probe", write_small_model(tmp_path_factory.mktemp("model"))).answer()


@pytest.fixture(scope="session")
def adapter_engine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An engine that is given a rank-stabilised adapter on all layers of such a model."""
    return Probe("tests.integration.adapter_probe", write_small_model(tmp_path_factory.mktemp("model"))).answer()
