"""Servers on 127.0.0.1 in place of W&B's: one that knows as much of its interface as the client needs, and keeps what it was
sent; and one that answers the same to everything."""

from __future__ import annotations

import contextlib
import gzip
import http.server
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

USER = {
    "id": "VXNlcjox",
    "name": "Me",
    "username": "me",
    "email": None,
    "admin": False,
    "flags": "{}",
    "entity": "me",
    "deletedAt": None,
    "apiKeys": None,
    "teams": {"edges": [{"node": {"name": "team"}}]},
}


@dataclass
class FakeWandb:
    """What the server answers and what it was sent.

    Attributes:
        url: Its address.
        refuses: Names of GraphQL operations that are answered with an error, and its text.
        operations: Name and variables of every GraphQL request.
        streamed: Bodies of the file stream: history, events, the end of a run.
    """

    url: str = ""
    refuses: dict[str, str] = field(default_factory=dict)
    operations: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    streamed: list[dict[str, Any]] = field(default_factory=list)

    def sent(self, operation: str) -> list[dict[str, Any]]:
        """Variables of the requests with this name."""
        return [variables for name, variables in self.operations if name == operation]

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """To one GraphQL request."""
        match = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])
        name = request.get("operationName") or (match[1] if match else "")
        variables = request.get("variables") or {}
        self.operations.append((name, variables))
        if name in self.refuses:
            return {"errors": [{"message": self.refuses[name]}], "data": None}
        return {"data": self._data(name, variables)}

    def _data(self, name: str, variables: dict[str, Any]) -> dict[str, Any]:
        run, project = variables.get("name") or "run", {"id": "p", "name": "align", "entity": {"id": "e", "name": "me"}}
        bucket = {"id": "b", "name": run, "displayName": run, "config": "{}", "historyLineCount": 0, "project": project}
        view = {"id": "v1", "name": "nw1", "type": "project-view", "displayName": variables.get("displayName")}
        page = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
        answers: dict[str, dict[str, Any]] = {
            "ServerFeaturesQuery": {"serverInfo": {"features": []}},
            "UpsertBucket": {"upsertBucket": {"bucket": bucket, "inserted": True}},
            "UpsertView2": {"upsertView": {"view": view | {"spec": variables.get("spec")}, "inserted": True}},
            "upsertView": {"upsertView": {"view": view | {"spec": variables.get("spec")}, "inserted": True}},
            "ProjectInternalId": {"project": {"internalId": "UHJvamVjdEludGVybmFsSWQ6MQ=="}},
            "GetProjects": {"models": {"edges": [], "pageInfo": page}},
            "CreateRunFiles": {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": []}},
            "NotifyScriptableRunAlert": {"notifyScriptableRunAlert": {"success": True}},
        }
        return {"viewer": USER} | answers.get(name, {})


@contextlib.contextmanager
def fake_wandb() -> Iterator[FakeWandb]:
    """A server that runs until the end of the block."""
    state = FakeWandb()

    def answer(path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        if path.startswith("/graphql"):
            return 200, state.answer(json.loads(body))
        if "file_stream" in path:
            state.streamed.append(json.loads(body))
        return 200, {}

    with _serving(answer) as state.url:
        yield state


@dataclass
class PlainServer:
    """One that gives the same answer to everything.

    Attributes:
        url: Its address.
        status: HTTP status of the answer.
        body: Of the answer.
        num_requests: Answered so far.
    """

    url: str = ""
    status: int = 200
    body: dict[str, Any] = field(default_factory=dict)
    num_requests: int = 0


@contextlib.contextmanager
def plain_server() -> Iterator[PlainServer]:
    """A server that runs until the end of the block."""
    state = PlainServer()

    def answer(path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        state.num_requests += 1
        return state.status, state.body

    with _serving(answer) as state.url:
        yield state


@contextlib.contextmanager
def _serving(answer: Callable[[str, bytes], tuple[int, dict[str, Any]]]) -> Iterator[str]:
    """The address of a server that answers to a path and a body with a status and JSON."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            status, content = answer(self.path, body)
            text = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_PUT = do_POST  # noqa: N815 (names of http.server)

        def log_message(self, *arguments: Any) -> None:
            """Nothing is printed."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()
