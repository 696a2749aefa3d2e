"""The log of a job as it grows, its exit code, and what its end says about the cluster."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from cluster.faults import INTERRUPTED, ClusterAway, ResourceError, reason
from cluster.jobs.submit import TERMINAL, Jobs

AWAY_S = 300.0
_PENDING_S = 30.0
_MOST_PAUSE_S = 30.0
_IMAGE = "build it from deploy/docker/, or install deploy/requirements/ on every machine (align doctor looks at one)"
_HINTS = (
    (r"\balign: (?:command )?not found", "the image has no align; align submit takes the code along, or " + _IMAGE),
    (r"ModuleNotFoundError: No module named '([\w.]+)'", "the image has no package {0}: " + _IMAGE),
    (r"\bpython: (?:command )?not found", "the image has no python on its PATH: " + _IMAGE),
)
Say = Callable[[str], None]


def follow(jobs: Jobs, job_id: str, say: Say, note: Say) -> int:
    """Print the log of a job as it grows, and return the run's exit code once the job has ended.

    While the cluster does not answer it is asked again, after pauses that double up to 30 s; no line is lost or printed twice.

    Args:
        jobs: The jobs of the cluster.
        job_id: The job.
        say: Gets the log, piece by piece.
        note: Gets lines about it: that the job waits, that the cluster is away, what its end means.

    Raises:
        ConfigError: If there is no such job, or no longer.
        ClusterAway: If the cluster stays away.
        ResourceError: If it no longer lets us in, or the job could not start.
    """
    job, clock = jobs.status(job_id), jobs.clock
    seen, pause, noted = 0, 1.0, -_PENDING_S
    began = answered = clock.monotonic()
    while True:
        asked = clock.monotonic()
        try:
            ended = str(job.status) in TERMINAL
            log = jobs.ask(lambda: jobs.client.get_job_logs(job_id), job_id)
            job = job if ended else jobs.status(job_id)
        except ClusterAway as error:
            if clock.monotonic() - answered > AWAY_S:
                raise ClusterAway(
                    f"{reason(error)}; it was asked for {AWAY_S:g} s",
                    f"later: align jobs logs {job_id} --follow --address {jobs.address}",
                ) from None
            if pause == 1:
                note(f"the cluster at {jobs.address} does not answer; it is asked again for {AWAY_S:g} s")
            clock.sleep(pause)
            pause = min(2 * pause, _MOST_PAUSE_S)
            continue
        if pause > 1:
            note("the cluster is back")
        pause, answered = 1.0, clock.monotonic()
        if new := log[seen:]:
            say(new)
        seen = len(log)
        if ended:
            return _end(job, log, note)
        if str(job.status) == "PENDING" and answered - began >= 5 and answered - noted >= _PENDING_S:
            note(f"the job is PENDING for {answered - began:.0f} s: {job.message}")
            noted = answered
        clock.sleep(max(1.0, 20 * (answered - asked)))  # the longer the log, the less often it is asked for


def _end(job: Any, log: str, note: Say) -> int:
    """The exit code of the run, which Ray's own tools do not pass on; notes what can be done about it."""
    if job.status == "STOPPED":
        return INTERRUPTED
    if job.driver_exit_code is None and job.status == "FAILED":
        raise ResourceError(
            f"job {job.submission_id} could not start: {job.message}", "align doctor looks at a cluster"
        )
    code = int(job.driver_exit_code or 0)
    if code and (hint := advice(log)):
        note(f"  -> {hint}")
    return code


def advice(log: str) -> str:
    """What the end of a failed job's log says about the image it ran in; empty if nothing."""
    tail = log[-4000:]
    for pattern, hint in _HINTS:
        if found := re.search(pattern, tail):
            return hint.format(*found.groups())
    return ""
