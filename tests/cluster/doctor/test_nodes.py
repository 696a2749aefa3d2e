"""What doctor says of the nodes of a cluster; Ray is replaced, real raylets are in `integration/test_doctor.py`."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import GetTimeoutError, RayActorError

from cluster.doctor import nodes as subject
from cluster.doctor.nodes import Node, Probe, nodes
from cluster.doctor.verdict import Verdict


class Late:
    """A call that is not answered in time."""


class FakeRay:
    """Ray with nodes at these addresses. A call runs at once, or is late on a node that is silent."""

    def __init__(self, *addresses: str, silent: str = "", broken: str = "", driver: str = "10.0.0.1") -> None:
        self.addresses, self.silent, self.broken = addresses, silent, broken
        self.killed: list[str] = []
        self.util = SimpleNamespace(get_node_ip_address=lambda: driver)

    def nodes(self) -> list[dict[str, Any]]:
        alive = [{"Alive": True, "NodeManagerAddress": a, "NodeID": f"{i:06d}ff"} for i, a in enumerate(self.addresses)]
        return [*alive, {"Alive": False, "NodeManagerAddress": "10.0.0.9", "NodeID": "gone"}]

    def on_node(self, kind: type, node_id: str) -> Any:
        address = self.addresses[int(node_id[:6])]

        def method(name: str) -> Any:
            def remote(*arguments: Any) -> Any:
                if address == self.silent:
                    return Late()
                if address == self.broken:
                    return RayActorError()
                return lambda: getattr(probe, name)(*arguments)

            return SimpleNamespace(remote=remote)

        probe = kind()
        return SimpleNamespace(address=address, **{name: method(name) for name in ("look", "clock", "listen", "reach")})

    def wait(self, calls: list[Any], num_returns: int, timeout: float) -> None:
        assert (num_returns, timeout) == (len(calls), subject.NODE_S)

    def get(self, call: Any, timeout: float) -> Any:
        if isinstance(call, Late):
            raise GetTimeoutError("late")
        if isinstance(call, Exception):
            raise call
        return call()

    def kill(self, actor: Any) -> None:
        self.killed.append(actor.address)


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[FakeRay], list[Verdict]]:
    """The verdicts on a cluster whose machines are all well, as far as they look at themselves."""
    monkeypatch.setattr(subject, "machine", lambda address, alone: [Verdict("machine", "ok", f"{address}, {alone}")])
    monkeypatch.setattr(subject, "listening", _Open)
    monkeypatch.setattr(subject, "reach", lambda address, port: "" if port else "refused")

    def look(ray: FakeRay) -> list[Verdict]:
        monkeypatch.setattr(subject, "ray", ray)
        monkeypatch.setattr(subject, "on_node", ray.on_node)
        return list(nodes(None))

    return look


class _Open:
    """A port for every address but those that end with 13."""

    def __init__(self, address: str) -> None:
        self.port = 0 if address.endswith("13") else 4000

    def __enter__(self) -> int:
        return self.port

    def __exit__(self, *_: object) -> None:
        pass


def test_every_node_that_is_alive_is_looked_at_under_its_name(on: Any) -> None:
    ray = FakeRay("10.0.0.1", "10.0.0.2")
    found = on(ray)
    assert found[0].found == "2 alive, driven from 10.0.0.1"
    for address in ray.addresses:
        of_the_node = {v.item: v for v in found if v.node == address}
        assert set(of_the_node) == {"machine", "clock", "way"}
        assert {v.state for v in of_the_node.values()} == {"ok"}
        assert of_the_node["machine"].found == f"{address}, False"
    assert sorted(ray.killed) == ["10.0.0.1", "10.0.0.2"]


def test_one_node_alone_has_no_name_and_nodes_of_one_machine_are_told_apart_by_their_ids(on: Any) -> None:
    assert {verdict.node for verdict in on(FakeRay("10.0.0.1"))} == {""}
    found = on(FakeRay("10.0.0.1", "10.0.0.1"))
    assert {verdict.node for verdict in found} == {"", "10.0.0.1 000000", "10.0.0.1 000001"}
    assert next(v for v in found if v.item == "machine").found == "10.0.0.1, True"


def test_a_node_that_does_not_answer_or_has_no_align_is_named_and_the_others_are_looked_at(on: Any) -> None:
    ray = FakeRay("10.0.0.1", "10.0.0.2", "10.0.0.3", silent="10.0.0.2", broken="10.0.0.3")
    found = on(ray)
    failed = {v.node: v for v in found if v.state == "fail"}
    assert set(failed) == {"10.0.0.2", "10.0.0.3"}
    assert failed["10.0.0.2"].found == "none in time: 90 s for all looks, 30 s for a call after that"
    assert failed["10.0.0.3"].fix == "install align on this node as where the run is driven"
    assert "machine" in {v.item for v in found if v.node == "10.0.0.1"}
    assert len(ray.killed) == 3


def test_a_way_that_is_closed_is_a_failure_that_says_in_which_direction(on: Any) -> None:
    there = [v for v in on(FakeRay("10.0.0.1", "10.0.0.13")) if v.item == "way" and v.state == "fail"]
    assert [v.found for v in there] == ["10.0.0.1 does not reach 10.0.0.13:0: refused"]
    back = [v for v in on(FakeRay("10.0.0.2", driver="10.0.0.13")) if v.item == "way"]
    assert [v.found for v in back] == ["10.0.0.2 does not reach 10.0.0.13:0: refused"]


def test_nodes_with_different_nccl_fail_together(on: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_nccl(version: dict[str, str]) -> list[Verdict]:
        monkeypatch.setattr(subject, "machine", lambda address, alone: [Verdict("NCCL", "ok", version[address])])
        return [v for v in nodes(None) if v.item == "NCCL" and not v.node]

    on(FakeRay("10.0.0.1", "10.0.0.2"))
    assert with_nccl({"10.0.0.1": "2.27.5", "10.0.0.2": "2.27.5"}) == []
    (verdict,) = with_nccl({"10.0.0.1": "2.27.5", "10.0.0.2": "2.26.2"})
    assert verdict.state == "fail"
    assert verdict.found == "the nodes have different ones: 10.0.0.1 2.27.5, 10.0.0.2 2.26.2"


def test_a_clock_is_compared_with_the_middle_of_the_call() -> None:
    def clock(theirs: float, *own: float) -> tuple[str, str]:
        times = iter(own)
        verdict = subject._clock(lambda: theirs, lambda: next(times))
        return verdict.state, verdict.found

    assert clock(100.5, 100.0, 101.0) == ("ok", "+0.000 s (± 0.500)")
    assert clock(101.9, 100.0, 101.0) == ("ok", "+1.400 s (± 0.500)"), "half a second may be the call's"
    assert clock(102.1, 100.0, 101.0) == ("warn", "+1.600 s (± 0.500)")
    assert clock(90.0, 100.0, 100.0) == ("warn", "-10.000 s (± 0.000)")


def test_a_probe_keeps_its_port_open_until_it_ends() -> None:
    probe = Probe()
    port = probe.listen("127.0.0.1")
    assert Probe().reach("127.0.0.1", port) == ""
    verdicts, found = probe.look("127.0.0.1", True, None)
    assert {"torch", "interface"} <= {verdict.item for verdict in verdicts}
    assert found["python"].startswith("3.")
    probe._open.close()
    assert probe.reach("127.0.0.1", port) != ""


def test_nodes_are_known_by_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "ray", FakeRay("10.0.0.2", "10.0.0.1"))
    assert [node.name for node in Node.alive()] == ["10.0.0.1", "10.0.0.2"]
