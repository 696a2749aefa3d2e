"""Ray's session: how it begins and ends, and what is told of a cluster."""

from __future__ import annotations

import os
import signal
import time
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.capacity.machines import Cluster
from cluster.faults import ResourceError
from cluster.fleet import session
from cluster.fleet.session import joined, ray_session


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("10.0.0.7:6379", "could not join the cluster at 10.0.0.7:6379: "),
        (None, "could not start Ray on this machine: "),
    ],
)
def test_a_ray_that_cannot_be_reached_or_started_is_one_named_error(
    address: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(*arguments: Any, **settings: Any) -> None:
        raise ConnectionError("nobody answers")

    monkeypatch.setattr(session.ray, "init", init)
    with pytest.raises(ResourceError, match=expected + "nobody answers"), ray_session(address, weights_bytes=1):
        pytest.fail("there is no session")


def test_ctrl_c_while_ray_starts_takes_effect_once_it_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def init(**_: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)  # the signal's handler has run by now
        done.append("started")
        return SimpleNamespace(address_info={})

    monkeypatch.setattr(session.ray, "init", init)
    monkeypatch.setattr(session.ray, "shutdown", lambda: done.append("ended"))
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), ray_session(None, weights_bytes=0):
        done.append("used")
    assert done == ["started", "ended"]
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize(("most", "grows_to"), [(None, {}), ({"CPU": 64}, {"CPU": 64})])
def test_a_cluster_is_told_as_its_machines_that_are_alive_and_what_it_may_grow_to(
    most: dict[str, float] | None, grows_to: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def node(cpus: float, alive: bool) -> dict[str, Any]:
        return {"Alive": alive, "Resources": {"CPU": cpus}}

    state = SimpleNamespace(state=SimpleNamespace(get_max_resources_from_cluster_config=lambda: most))
    fake = SimpleNamespace(
        nodes=lambda: [node(2, alive=True), node(8, alive=False)],
        cluster_resources=lambda: {"CPU": 2.0},
        _private=SimpleNamespace(state=state),
    )
    monkeypatch.setattr(session, "ray", fake)
    assert joined("10.0.0.7:6379") == Cluster("10.0.0.7:6379", [{"CPU": 2}], {"CPU": 2}, grows_to)
