"""Runs as Ray jobs: submit, list, stop. Talks to the cluster's dashboard over HTTP; joins no cluster."""

from __future__ import annotations

import logging
import os
import queue
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from cluster.faults import ClusterAway, ConfigError, ResourceError, RunError
from cluster.jobs.room import check_room
from cluster.jobs.upload import RUN_FILE, stage
from cluster.record.sinks.wandb.identity import known_run_id
from cluster.spec.config import RunConfig

STOP_GRACE_S = 120
TERMINAL = ("SUCCEEDED", "FAILED", "STOPPED")
ANSWER_S = 30.0
_AGENT_S = 60
_UPLOAD_S = 600
# Ray signals the run and all that it started: W&B's process ends itself at SIGTERM, with what was not yet written.
_STOP_GENTLY = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_GRACE_S), "RAY_JOB_STOP_SIGNAL": "SIGINT"}
_TOKEN_ADVICE = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH (or RAY_AUTH_TOKEN) to the cluster's token"
# Ray cannot stop a job whose driver has no place yet; ending the actor that waits for the place does.
_DROP = (
    'python -c "import ray; ray.init(log_to_driver=False); '
    "ray.kill(ray.get_actor('_ray_internal_job_actor_{job}', namespace='SUPERVISOR_ACTOR_RAY_NAMESPACE'))\""
)


class Clock(Protocol):
    """What `time` offers; tests bring their own."""

    def monotonic(self) -> float:
        """Seconds that only grow."""
        ...

    def sleep(self, seconds: float, /) -> None:
        """Wait."""
        ...


class Jobs:
    """The jobs of one cluster.

    Args:
        client: Ray's client for jobs.
        address: Of the dashboard, for messages.
        clock: For waits.
    """

    def __init__(self, client: Any, address: str, clock: Clock = time) -> None:
        self.client, self.address, self.clock = client, address, clock

    @classmethod
    def at(cls, address: str) -> Jobs:
        """The jobs of the cluster whose dashboard is at `address`, e.g. "http://127.0.0.1:8265".

        Raises:
            ResourceError: If nothing answers there, it wants a token, or runs another version of Ray.
        """
        for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
            os.environ.pop(name, None)  # they would win over the address that was asked for
        import ray

        logging.disable(logging.INFO)  # Ray tells of every upload
        from ray.job_submission import JobSubmissionClient

        try:
            jobs = cls(within(ANSWER_S, lambda: JobSubmissionClient(address)), address)
        except (OSError, RuntimeError, ValueError) as error:
            raise ResourceError(
                f"no Ray cluster answers at {address}: {last_line(error)}",
                "start one, forward its dashboard port, or correct --address (http://HOST:8265)",
            ) from None
        except Exception as error:
            raise _refused(error, address) from None
        jobs.check_version(ray.__version__)
        return jobs

    def check_version(self, ours: str) -> None:
        """Raise ResourceError if the cluster runs another version of Ray."""
        found = self._get("/api/version")["ray_version"]  # get_version() of Ray's client is that of the interface
        if found != ours:
            raise ResourceError(
                f"the cluster at {self.address} runs Ray {found}, this machine has {ours}",
                f"install ray=={found} here, or use an image with {ours}",
            )

    def check_room(self, cfg: RunConfig, driver: Mapping[str, float]) -> str:
        """See `room.check_room`."""
        return check_room(cfg, driver, self._get, self.address)

    def submit(self, cfg: RunConfig, job_id: str | None = None, driver: Mapping[str, float] | None = None) -> str:
        """Upload what the run needs and start it; returns the job's id. Resubmitted with the same run.dir, it resumes.

        Args:
            cfg: The run.
            job_id: The job's id, or None for a new one.
            driver: Resources that the driver asks for; without any it runs on the head.

        Raises:
            ConfigError: If something cannot be uploaded or the id is taken.
        """
        job_id = job_id or f"{cfg.run.name}-{time.strftime('%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        amounts = dict(driver or {})
        options: dict[str, Any] = {
            f"entrypoint_num_{kind.lower()}s": amounts.pop(kind) for kind in ("CPU", "GPU") if kind in amounts
        }
        if amounts:
            options["entrypoint_resources"] = amounts
        with tempfile.TemporaryDirectory() as folder:
            stage(cfg, Path(folder))
            environment = _STOP_GENTLY | {"PYTHONUNBUFFERED": "1", "WANDB_RUN_ID": self.wandb_id(cfg)}
            return self._start(
                entrypoint=f"python -m cluster.cli train {RUN_FILE}",
                submission_id=job_id,
                metadata={
                    "align_run": cfg.run.name,
                    "align_run_dir": str(cfg.run.dir),
                    "align_wandb_id": environment["WANDB_RUN_ID"],
                },
                runtime_env={"working_dir": folder, "env_vars": environment},
                **options,
            )

    def wandb_id(self, cfg: RunConfig) -> str:
        """The W&B id of the run: of its folder where that is seen from here, of an earlier job with this folder, or a new one."""
        assert cfg.run.dir is not None
        earlier = [job.metadata for job in self.list() if job.metadata["align_run_dir"] == str(cfg.run.dir)]
        ids = [metadata["align_wandb_id"] for metadata in earlier if "align_wandb_id" in metadata]
        return known_run_id(cfg.run.dir) or (ids[-1] if ids else secrets.token_hex(4))

    def _start(self, **job: Any) -> str:
        """Submit; a cluster that has just started may have no agent for jobs yet."""
        deadline = self.clock.monotonic() + _AGENT_S
        name = job["submission_id"]
        while True:
            try:
                return str(within(_UPLOAD_S, lambda: self.client.submit_job(**job)))
            except OSError as error:
                raise self.away(error) from None
            except (RuntimeError, ValueError) as error:
                if "already exists" in str(error):
                    raise ConfigError(
                        f"there is a job {name!r} already, and it is {self.status(name).status}",
                        f"choose another --id, or see it: align jobs logs {name} --follow --address {self.address}",
                    ) from None
                if "No available agent" not in str(error) or self.clock.monotonic() > deadline:
                    raise ConfigError(f"the job was not accepted: {last_line(error)}", "try again later") from None
                self.clock.sleep(1)

    def status(self, job_id: str) -> Any:
        """Ray's details of a job.

        Raises:
            ConfigError: If there is no such job.
            ClusterAway: If the cluster does not answer.
        """
        return self.ask(lambda: self.client.get_job_info(job_id), job_id)

    def log(self, job_id: str) -> str:
        """The log so far; raises as `status` does."""
        self.status(job_id)
        return str(self.ask(lambda: self.client.get_job_logs(job_id), job_id))

    def folder(self, job_id: str) -> Path:
        """The run folder of a job; raises as `status` does.

        Raises:
            ConfigError: If it is no job of `align`, or its folder is not seen from here.
        """
        path = Path((self.status(job_id).metadata or {}).get("align_run_dir", ""))
        if not path.is_absolute():
            raise ConfigError(f"job {job_id} was not submitted by align", "name its run folder instead")
        if not path.is_dir():
            advice = f"align status {path} on a machine of the cluster, or align jobs logs {job_id}"
            raise ConfigError(f"run folder {path} of job {job_id} is not seen from here", advice)
        return path

    def list(self) -> list[Any]:
        """The jobs that were submitted by `align`, oldest first."""
        found = [job for job in self.ask(self.client.list_jobs) if "align_run" in (job.metadata or {})]
        return sorted(found, key=lambda job: job.start_time or 0)

    def stop(self, job_id: str) -> str:
        """Ask a job to save and end, and wait for it; returns its status.

        Raises:
            RunError: If it has not ended within its grace period.
        """
        if self.status(job_id).status == "PENDING":
            drop = {"submission_id": f"drop-{job_id}-{secrets.token_hex(2)}", "entrypoint": _DROP.format(job=job_id)}
            self.ask(lambda: self.client.submit_job(**drop))
        else:
            self.ask(lambda: self.client.stop_job(job_id))
        deadline = self.clock.monotonic() + STOP_GRACE_S + 30
        while (status := str(self.status(job_id).status)) not in TERMINAL:
            if self.clock.monotonic() > deadline:
                raise RunError(
                    f"job {job_id} is {status} {STOP_GRACE_S + 30} s after it was told to stop", "see its log"
                )
            self.clock.sleep(0.5)
        return status

    def ask(self, call: Callable[[], Any], job_id: str = "") -> Any:
        """The answer to a call of Ray's client, within a deadline.

        Raises:
            ConfigError: If there is no such job.
            ClusterAway: If the cluster does not answer.
        ResourceError: If it does not let us in.
        """
        try:
            return within(ANSWER_S, call)
        except (OSError, RuntimeError) as error:
            if "status code 404" in str(error):
                raise ConfigError(
                    f"no job {job_id!r} at {self.address}: {last_line(error)}", "see align jobs list"
                ) from None
            raise self.away(error) from None
        except Exception as error:
            raise _refused(error, self.address) from None

    def away(self, error: BaseException) -> ClusterAway:
        """What to say of a cluster that answered before."""
        return ClusterAway(f"the cluster at {self.address} does not answer: {last_line(error)}", "try again later")

    def _get(self, path: str) -> Any:
        """What the dashboard says. Ray's client has no public way to ask it; this is the only use of a private one."""

        def call() -> Any:
            answer = self.client._do_request("GET", path)
            answer.raise_for_status()
            return answer.json()

        return self.ask(call)


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """The answer of a call that may wait without end, as those of Ray's client do.

    Raises:
        TimeoutError: If there is none in time; the call is left to itself.
    """
    answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            answers.put((call(), None))
        except BaseException as error:
            answers.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        answer, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return answer


def read_resources(settings: list[str]) -> dict[str, float]:
    """Resources from `NAME=AMOUNT` texts.

    Raises:
        ConfigError: If one has another form.
    """
    try:
        pairs = [setting.split("=") for setting in settings]
        return {name: float(amount) for name, amount in pairs}
    except ValueError:
        raise ConfigError(
            f"--driver-resources {' '.join(settings)}: expected NAME=AMOUNT", "e.g. --driver-resources CPU=1"
        ) from None


def _refused(error: Exception, address: str) -> Exception:
    """Ray's error of a missing or wrong token as ours; others as they are."""
    if type(error).__name__ != "AuthenticationError":
        return error
    return ResourceError(f"the cluster at {address} does not accept this token, or none was sent", _TOKEN_ADVICE)


def last_line(error: BaseException) -> str:
    """The last line of an error: in Ray's, the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" .")]
    return lines[-1] if lines else type(error).__name__
