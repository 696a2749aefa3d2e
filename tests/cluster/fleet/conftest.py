"""Ray's kill, for all tests of the room."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.fleet import handle
from tests.fakes.ray_actors import FakeActor


@pytest.fixture(autouse=True)
def killed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Actors that were killed; Ray is not running."""
    actors: list[Any] = []

    def kill(actor: FakeActor, no_restart: bool) -> None:
        actors.append(actor)
        actor.subject.killed = True

    monkeypatch.setattr(handle.ray, "kill", kill)
    return actors
