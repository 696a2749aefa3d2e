"""Runs as Ray jobs: submit, follow, list, stop. Talks to the cluster's dashboard over HTTP; joins no cluster."""

from __future__ import annotations

import logging
import os
import secrets
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.config import RunConfig
from cluster.faults import INTERRUPTED, ConfigError, ResourceError, RunError
from cluster.upload import RUN_FILE, stage

STOP_GRACE_S = 120
_AWAY_S = 300
_AGENT_S = 60
# Ray signals the run and all that it started: W&B's process ends itself at SIGTERM, with what was not yet written.
_STOP_GENTLY = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_GRACE_S), "RAY_JOB_STOP_SIGNAL": "SIGINT"}
_TERMINAL = ("SUCCEEDED", "FAILED", "STOPPED")
_TOKEN_ADVICE = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH (or RAY_AUTH_TOKEN) to the cluster's token"


class Jobs:
    """The jobs of one cluster.

    Args:
        address: Of the dashboard, e.g. "http://127.0.0.1:8265".

    Raises:
        ResourceError: If nothing answers there, it wants a token, or runs another version of Ray.
    """

    def __init__(self, address: str) -> None:
        for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
            os.environ.pop(name, None)  # they would win over the address that was asked for
        import ray

        logging.disable(logging.INFO)  # Ray tells of every upload
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient

        self.address = address
        try:
            self.client = JobSubmissionClient(address)
        except AuthenticationError:
            raise ResourceError(
                f"the cluster at {address} does not accept this token, or none was sent", _TOKEN_ADVICE
            ) from None
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ResourceError(
                f"no Ray cluster answers at {address}: {error}",
                "start one, forward its dashboard port, or correct --address (http://HOST:8265)",
            ) from None
        found = self.client._server_ray_version  # the public get_version() is that of the interface, 4
        if found != ray.__version__:
            raise ResourceError(
                f"the cluster at {address} runs Ray {found}, this machine has {ray.__version__}",
                f"install ray=={found} here, or use an image with {ray.__version__}",
            )

    def submit(self, cfg: RunConfig, job_id: str | None = None) -> str:
        """Upload what the run needs and start it; returns the job's id. Resubmitted with the same run.dir, it resumes.

        Raises:
            ConfigError: If something cannot be uploaded or the id is taken.
        """
        job_id = job_id or f"{cfg.run.name}-{time.strftime('%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        with tempfile.TemporaryDirectory() as folder:
            stage(cfg, Path(folder))
            return self._start(
                entrypoint=f"python -m cluster.cli train {RUN_FILE}",
                submission_id=job_id,
                metadata={"align_run": cfg.run.name, "align_run_dir": str(cfg.run.dir)},
                runtime_env={"working_dir": folder, "env_vars": _STOP_GENTLY | {"PYTHONUNBUFFERED": "1"}},
            )

    def _start(self, **job: Any) -> str:
        """Submit; a cluster that has just started may have no agent for jobs yet."""
        deadline = time.monotonic() + _AGENT_S
        while True:
            try:
                return str(self.client.submit_job(**job))
            except (RuntimeError, ValueError) as error:
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise ConfigError(
                        f"the job was not accepted: {_last_line(error)}", "choose another --id, or try again later"
                    ) from None
                time.sleep(1)

    def status(self, job_id: str) -> Any:
        """Ray's details of a job.

        Raises:
            ConfigError: If there is no such job.
        """
        try:
            return self.client.get_job_info(job_id)
        except RuntimeError as error:
            raise ConfigError(
                f"no job {job_id!r} at {self.address}: {_last_line(error)}", "see align jobs list"
            ) from None

    def log(self, job_id: str) -> str:
        """The log so far."""
        self.status(job_id)
        return str(self.client.get_job_logs(job_id))

    def list(self) -> list[Any]:
        """The jobs that were submitted by `align`, oldest first."""
        found = [job for job in self.client.list_jobs() if "align_run" in (job.metadata or {})]
        return sorted(found, key=lambda job: job.start_time or 0)

    def stop(self, job_id: str) -> str:
        """Ask a job to save and end, and wait for it; returns its status.

        Raises:
            RunError: If it has not ended within its grace period.
        """
        if self.status(job_id).status == "PENDING":
            raise RunError(
                f"job {job_id} has not started, and Ray cannot stop such a job", "it is dropped after 15 minutes"
            )
        self.client.stop_job(job_id)
        deadline = time.monotonic() + STOP_GRACE_S + 30
        while (status := str(self.status(job_id).status)) not in _TERMINAL:
            if time.monotonic() > deadline:
                raise RunError(
                    f"job {job_id} is {status} {STOP_GRACE_S + 30} s after it was told to stop", "see its log"
                )
            time.sleep(0.5)
        return status

    def follow(self, job_id: str, say: Callable[[str], None]) -> int:
        """Print the log of a job as it grows, and return the run's exit code once the job has ended.

        While the cluster does not answer it is asked again; no line is lost or printed twice.

        Raises:
            ResourceError: If the cluster stays away, or the job could not start.
        """
        job, seen, answered = self.status(job_id), 0, time.monotonic()
        while True:
            asked = time.monotonic()
            try:
                ended = str(job.status) in _TERMINAL
                log = self.client.get_job_logs(job_id)
                job = job if ended else self.client.get_job_info(job_id)
            except (ConnectionError, RuntimeError) as error:
                if asked - answered > _AWAY_S:
                    raise ResourceError(
                        f"the cluster at {self.address} has not answered for {_AWAY_S} s: {_last_line(error)}",
                        f"later: align jobs logs {job_id} --follow --address {self.address}",
                    ) from None
                time.sleep(2)
                continue
            answered = time.monotonic()
            if new := log[seen:]:
                say(new)
            seen = len(log)
            if ended:
                return _exit_code(job)
            time.sleep(max(1.0, 20 * (answered - asked)))  # the longer the log, the less often it is asked for


def _exit_code(job: Any) -> int:
    """That of the run; Ray's own tools do not pass it on."""
    if job.status == "STOPPED":
        return INTERRUPTED
    if job.driver_exit_code is None and job.status == "FAILED":
        raise ResourceError(
            f"job {job.submission_id} could not start: {job.message}", "align doctor looks at a cluster"
        )
    return int(job.driver_exit_code or 0)


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
