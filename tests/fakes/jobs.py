"""A cluster that is played, as far as Ray's client of jobs tells of it, and its clock."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import requests

from cluster.jobs.submit import Jobs

NODE = "ab" * 28


def details(status: str = "RUNNING", exit_code: int | None = None, **more: Any) -> SimpleNamespace:
    """As much of Ray's details of a job as is read."""
    facts = {"submission_id": "demo", "message": "", "metadata": {}, "start_time": 0}
    return SimpleNamespace(status=status, driver_exit_code=exit_code, **facts | more)


class FakeClock:
    """Time that passes by sleeping."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float, /) -> None:
        self.slept.append(seconds)
        self.now += seconds


@dataclass
class FakeClient:
    """Ray's client with a cluster behind it that follows a script: each answer is given once, the last one for ever."""

    infos: list[Any] = field(default_factory=lambda: [details()])
    logs: list[Any] = field(default_factory=lambda: [""])
    submissions: list[Any] = field(default_factory=lambda: ["demo"])
    jobs: list[Any] = field(default_factory=list)
    pages: dict[str, Any] = field(default_factory=dict)
    stopped: list[str] = field(default_factory=list)
    submitted: list[dict[str, Any]] = field(default_factory=list)

    def get_job_info(self, job_id: str) -> Any:
        return self._next(self.infos)

    def get_job_logs(self, job_id: str) -> Any:
        return self._next(self.logs)

    def list_jobs(self) -> Any:
        return self.jobs

    def stop_job(self, job_id: str) -> bool:
        self.stopped.append(job_id)
        return True

    def submit_job(self, **job: Any) -> Any:
        self.submitted.append(job)
        return self._next(self.submissions)

    def _do_request(self, method: str, path: str) -> Any:
        assert method == "GET"
        answer = requests.Response()
        answer.status_code = 200 if path in self.pages else 503
        answer._content = json.dumps(self.pages.get(path)).encode()
        return answer

    @staticmethod
    def _next(script: list[Any]) -> Any:
        answer = script.pop(0) if len(script) > 1 else script[0]
        if isinstance(answer, BaseException):
            raise answer
        return answer


def jobs_of(client: FakeClient) -> Jobs:
    return Jobs(client, "http://c:8265", FakeClock())
