"""The tiny task of the demo, built once where `make demo` builds it."""

from __future__ import annotations

from pathlib import Path

import pytest

from align.demo.tiny import build, is_built
from tests.places import REPOSITORY


@pytest.fixture(scope="session")
def tiny_task() -> Path:
    """models/tiny, complete."""
    folder = REPOSITORY / "models" / "tiny"
    if not is_built(folder):
        build(folder)
    return folder
