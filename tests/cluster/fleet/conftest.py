"""What the tests of handles share: groups, and Ray's kill."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.fleet import handle


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Actors that were killed; Ray is not running."""
    actors: list[Any] = []
    monkeypatch.setattr(handle.ray, "kill", lambda actor, no_restart: actors.append(actor))
    return actors
