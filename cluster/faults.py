"""Named errors of a run. Each says what failed, where, in which phase, and the one next thing to do.

Every error has a stable code. All of them survive pickling, since they cross process boundaries.
"""

from __future__ import annotations

import re

INTERRUPTED = 130  # exit code of a run that was stopped by Ctrl-C
EXIT_CODES = {
    0: "finished",
    1: "an unexpected error",
    2: "the run file, its inputs or what W&B is given cannot be used",
    3: "resources are missing",
    4: "actors were lost beyond the restart budget",
    5: "wrong weights or a broken bound",
    6: "the training diverged, or no prompt has signal",
    INTERRUPTED: "interrupted",
}


class RunError(RuntimeError):
    """An error that a user sees.

    Args:
        message: What was expected, what came, where.
        advice: The one next thing to do.
    """

    code = "RUN"
    exit_code = 1

    def __init__(self, message: str, advice: str = "") -> None:
        super().__init__(message, advice)
        self.message = message
        self.advice = advice

    def __str__(self) -> str:
        return f"[{self.code}] {self.message}" + (f"\n  -> {self.advice}" if self.advice else "")


class ConfigError(RunError):
    """The run file, an override, or an input that it names cannot be used."""

    code = "CONFIG"
    exit_code = 2


class ResourceError(RunError):
    """The machine or the cluster does not have what the run asks for."""

    code = "RESOURCES"
    exit_code = 3


class ClusterAway(ResourceError):
    """A cluster that was there does not answer, and may again."""

    code = "CLUSTER_AWAY"


class RunFolderError(RunError):
    """The run folder already holds something else."""

    code = "RUN_FOLDER"
    exit_code = 2


class TrackingError(RunError):
    """W&B refused the key."""

    code = "WANDB_KEY"
    exit_code = 2


class WrongEntity(RunError):
    """The W&B key may not write for the entity that is configured."""

    code = "WANDB_ENTITY"
    exit_code = 2


class DashboardError(RunError):
    """W&B cannot be reached, or does not take the dashboard."""

    code = "DASHBOARD"
    exit_code = 2


class CheckpointError(RunError):
    """A checkpoint could not be written."""

    code = "CHECKPOINT"


class ActorLost(RunError):
    """An actor died, froze or answered too late. A named outcome: the loop replaces it while its budget lasts.

    Args:
        role: "rollout", "scorer" or "learner".
        rank: Number within the role.
        phase: What was asked of it.
        reason: What was observed.
    """

    code = "ACTOR_LOST"
    exit_code = 4

    def __init__(self, role: str, rank: int, phase: str, reason: str) -> None:
        RuntimeError.__init__(self, role, rank, phase, reason)
        self.role, self.rank, self.phase, self.reason = role, rank, phase, reason
        self.message = f"{role} {rank} was lost during {phase}: {reason}"
        self.advice = "the actor's log in Ray's session folder (environment.json: ray_session) says more"


def from_ray(error: BaseException, role: str, rank: int, phase: str) -> RunError:
    """One of Ray's errors as a named one: that of the actor itself, a failure of the work, or the loss of the actor.

    Args:
        error: Raised by Ray for a call of an actor's method.
        role: Role of the actor that was called.
        rank: Its rank.
        phase: What was asked of it.
    """
    from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

    if isinstance(error, RayTaskError):
        if isinstance(error.cause, RunError):
            return error.cause
        return RunError(f"{role} {rank} failed during {phase}:\n{_plain(str(error))}", "see the traceback above")
    text = _plain(str(error))
    if isinstance(error, OutOfMemoryError):  # Ray's memory monitor killed the actor
        return ActorLost(role, rank, phase, " ".join(text.split())[:400])
    if not isinstance(error, RayActorError):
        return RunError(f"{role} {rank}: Ray failed during {phase}: {text}", "see the logs of the Ray session")
    if error.actor_init_failed:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return RunError(f"{role} {rank} could not start: {lines[-1]}", "correct what it names, or see the actor's log")
    return ActorLost(role, rank, phase, " ".join(text.split())[:400])


def reason(error: BaseException) -> str:
    """What happened, without code and advice: for a message that goes on after it."""
    return error.message if isinstance(error, RunError) else str(error)


def _plain(text: str) -> str:
    """Without the colours that Ray puts into its texts."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


class RewardError(RunError):
    """A reward raised on a trajectory."""

    code = "REWARD"


class RestartBudgetSpent(RunError):
    """Actors were lost more often than the budget allows."""

    code = "RESTART_BUDGET"
    exit_code = 4


class WrongWeights(RunError):
    """An engine does not serve the weights that were published."""

    code = "WRONG_WEIGHTS"
    exit_code = 5


class StalenessViolation(RunError):
    """A trajectory older than the limit reached the learner: a bug of the loop."""

    code = "STALENESS"
    exit_code = 5


class NoSignal(RunError):
    """So many groups were dropped for one step that the batch will hardly ever be full."""

    code = "NO_SIGNAL"
    exit_code = 6


class TrainingDiverged(RunError):
    """Several updates in a row were not finite."""

    code = "NON_FINITE"
    exit_code = 6
