"""Whether a run is uploaded: asked of servers on 127.0.0.1, in processes of their own since wandb keeps global state."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.wandb_server import PlainServer, fake_wandb, plain_server
from tests.harness.wandb_files import API_KEY, run_python

pytestmark = pytest.mark.integration

CHECK_ONLINE = """
import json, psutil
from cluster.faults import TrackingError
from cluster.record.sinks.wandb.settings import WandbConfig
from cluster.record.sinks.wandb.access import check_online
for mode in {modes!r}:
    warnings = []
    try:
        answer = check_online(WandbConfig(mode=mode), warnings.append)
    except TrackingError as error:
        answer = str(error)
    print(json.dumps([answer, warnings, len(psutil.Process().children())]))
"""


@pytest.fixture
def server() -> Iterator[PlainServer]:
    with plain_server() as running:
        yield running


def asked(folder: Path, *modes: str, **environment: str) -> list[tuple[bool | str, list[str], int]]:
    """For each mode the answer (or the text of the TrackingError), the warnings, and how many processes of W&B's are left."""
    done = run_python(CHECK_ONLINE.format(modes=modes), folder, **{"WANDB_HTTP_TIMEOUT": "120", **environment})
    assert done.returncode == 0, done.stderr
    rows = [tuple(json.loads(line)) for line in done.stdout.splitlines()]
    assert len(rows) == len(modes)
    return rows  # type: ignore[return-value]


def check_online(folder: Path, *modes: str, **environment: str) -> list[tuple[bool | str, list[str]]]:
    """For each mode the answer and the warnings."""
    return [(answer, warnings) for answer, warnings, _ in asked(folder, *modes, **environment)]


def test_without_a_key_a_run_is_offline_unless_online_was_asked_for(tmp_path: Path) -> None:
    auto, online = check_online(tmp_path, "auto", "online")
    assert auto == (False, [])
    message, warnings = online
    assert str(message).startswith("[WANDB_KEY] wandb.mode is 'online', but no W&B key is set\n  -> set WANDB_API_KEY")
    assert warnings == []


def test_offline_and_disabled_ask_nobody(tmp_path: Path, server: PlainServer) -> None:
    key = {"WANDB_API_KEY": API_KEY, "WANDB_BASE_URL": server.url}
    assert check_online(tmp_path, "offline", "disabled", **key) == [(False, []), (False, [])]
    assert check_online(tmp_path, "auto", "online", WANDB_MODE="offline", **key) == [(False, []), (False, [])]
    assert server.num_requests == 0


def test_a_key_of_a_wrong_form_is_refused(tmp_path: Path, server: PlainServer) -> None:
    ((message, _),) = check_online(tmp_path, "auto", WANDB_API_KEY="too-short", WANDB_BASE_URL=server.url)
    assert str(message).startswith("[WANDB_KEY] W&B refused the key: ")
    assert "-> set WANDB_API_KEY" in str(message)


def test_a_key_that_the_server_refuses_is_an_error(tmp_path: Path, server: PlainServer) -> None:
    server.status, server.body = 401, {"errors": [{"message": "unauthorized"}]}
    ((message, _),) = check_online(tmp_path, "auto", WANDB_API_KEY=API_KEY, WANDB_BASE_URL=server.url)
    assert server.num_requests > 0
    assert str(message).startswith("[WANDB_KEY] W&B refused the key: ")
    assert API_KEY not in str(message)


def test_a_server_in_trouble_means_offline_with_a_warning_and_says_nothing_about_the_key(
    tmp_path: Path, server: PlainServer
) -> None:
    server.status = 500
    environment = {"WANDB_API_KEY": API_KEY, "WANDB_BASE_URL": server.url, "WANDB_HTTP_TIMEOUT": "1"}
    ((answer, warnings, num_left),) = asked(tmp_path, "auto", **environment)
    assert answer is False
    assert num_left == 0, "W&B waits for its process at the end, which may not end with a request under way"
    assert warnings == [
        f"the W&B server {server.url} does not answer; the run is recorded offline (wandb sync uploads it later)"
    ]


def test_a_server_that_is_not_there_means_offline_with_a_warning(tmp_path: Path) -> None:
    with socket.socket() as bound:  # a port that nobody listens on
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        ((answer, warnings),) = check_online(tmp_path, "auto", WANDB_API_KEY=API_KEY, WANDB_BASE_URL=url)
    assert answer is False
    assert warnings == [
        f"the W&B server {url} cannot be reached; the run is recorded offline (wandb sync uploads it later)"
    ]


def test_a_key_that_the_server_knows_means_online(tmp_path: Path, server: PlainServer) -> None:
    server.body = {"data": {"viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}"}}}
    assert check_online(tmp_path, "auto", WANDB_API_KEY=API_KEY, WANDB_BASE_URL=server.url) == [(True, [])]
    assert server.num_requests > 0
    kept = [path for path in (tmp_path / "home").rglob("*") if path.is_file() and API_KEY in path.read_text()]
    assert kept == [], "the key is not written anywhere"


CHECK_ENTITY = """
from cluster.faults import RunError
from cluster.record.sinks.wandb.settings import WandbConfig
from cluster.record.sinks.wandb.access import check_online
for entity in ("me", "team", "teem"):
    try:
        print(check_online(WandbConfig(entity=entity), print))
    except RunError as error:
        print(error.exit_code, error)
"""


def test_an_entity_that_the_key_does_not_belong_to_is_refused_with_those_that_it_does(tmp_path: Path) -> None:
    with fake_wandb() as server:
        done = run_python(
            CHECK_ENTITY, tmp_path, WANDB_API_KEY=API_KEY, WANDB_BASE_URL=server.url, WANDB_HTTP_TIMEOUT="120"
        )
    assert done.stdout.splitlines() == [
        "True",
        "True",
        "2 [WANDB_ENTITY] the W&B key may not write for the entity 'teem'; it may for me, team",
        "  -> set wandb.entity to one of them, use another key, or set wandb.mode to 'offline'",
    ], done.stderr
