"""Named errors: they cross process boundaries, and say what failed and what to do."""

from __future__ import annotations

import inspect
import pickle

import pytest
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    ObjectLostError,
    OutOfMemoryError,
    RayTaskError,
    RuntimeEnvSetupError,
)

from cluster import faults
from cluster.faults import ActorLost, RunError, WrongWeights, from_ray, reason

CLASSES = [kind for _, kind in inspect.getmembers(faults, inspect.isclass) if issubclass(kind, RunError)]


def make(kind: type[RunError]) -> RunError:
    if kind is ActorLost:
        return ActorLost("rollout", 3, "load", "no answer within 5 s")
    return kind("what was expected, what came", "do this next")


@pytest.mark.parametrize("kind", CLASSES)
def test_an_error_survives_pickling(kind: type[RunError]) -> None:
    error = make(kind)
    copy = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(error))))
    assert type(copy) is kind
    assert (str(copy), copy.message, copy.advice) == (str(error), error.message, error.advice)
    assert copy.__dict__ == error.__dict__


@pytest.mark.parametrize("kind", [kind for kind in CLASSES if kind is not ActorLost])
def test_an_error_prints_its_code_its_message_and_its_advice(kind: type[RunError]) -> None:
    assert str(make(kind)) == f"[{kind.code}] what was expected, what came\n  -> do this next"
    assert str(kind("only a message")) == f"[{kind.code}] only a message"


def test_a_lost_actor_is_described_by_role_rank_phase_and_reason() -> None:
    assert str(make(ActorLost)).startswith("[ACTOR_LOST] rollout 3 was lost during load: no answer within 5 s\n  -> ")
    assert "Ray's session folder" in make(ActorLost).advice


def test_the_reason_is_what_another_message_can_go_on_after() -> None:
    assert reason(make(ActorLost)) == "rollout 3 was lost during load: no answer within 5 s"
    assert reason(RunError("what came", "do this next")) == "what came"
    assert reason(OSError("no space")) == "no space"


def test_codes_are_distinct() -> None:
    codes = [kind.code for kind in CLASSES]
    assert len(set(codes)) == len(codes) == 16


def test_exit_codes_tell_what_kind_of_thing_went_wrong() -> None:
    assert {kind.__name__: kind.exit_code for kind in CLASSES} == {
        "RunError": 1,
        "CheckpointError": 1,
        "RewardError": 1,
        "ConfigError": 2,
        "RunFolderError": 2,
        "TrackingError": 2,
        "WrongEntity": 2,
        "DashboardError": 2,
        "ResourceError": 3,
        "ClusterAway": 3,
        "ActorLost": 4,
        "RestartBudgetSpent": 4,
        "WrongWeights": 5,
        "StalenessViolation": 5,
        "TrainingDiverged": 6,
        "NoSignal": 6,
    }
    assert faults.INTERRUPTED == 130


def test_every_exit_code_is_explained_and_no_other_one() -> None:
    assert set(faults.EXIT_CODES) == {0, faults.INTERRUPTED, *(kind.exit_code for kind in CLASSES)}


# --- errors of Ray --------------------------------------------------------------------------------------------------


def task_error(cause: Exception) -> RayTaskError:
    """As Ray makes it, with its colours."""
    return RayTaskError("work", f"Traceback (most recent call last):\n  File ...\n{cause!r}", cause)


def test_an_actor_that_dies_or_cannot_be_reached_is_lost() -> None:
    for error in (ActorDiedError(), ActorUnavailableError("gone", None)):
        named = from_ray(error, "scorer", 2, "score")
        assert isinstance(named, ActorLost)
        assert (named.role, named.rank, named.phase) == ("scorer", 2, "score")
        assert "\n" not in named.message


def test_an_actor_that_cannot_start_is_no_lost_one_and_says_why_in_one_line() -> None:
    """A replacement would fail in the same way."""
    cause = task_error(ValueError("model folder x is empty"))
    named = from_ray(ActorDiedError(cause), "rollout", 1, "start")
    assert type(named) is RunError
    assert named.message == "rollout 1 could not start: ValueError('model folder x is empty')"
    assert "\x1b" in str(cause), "there were colours to take out"


def test_work_that_raised_shows_its_traceback_without_colours() -> None:
    named = from_ray(task_error(ZeroDivisionError("a bug")), "learner", 0, "update of step 3")
    assert type(named) is RunError
    assert named.message.startswith("learner 0 failed during update of step 3:\n")
    assert "ZeroDivisionError('a bug')" in named.message
    assert "\x1b" not in named.message


def test_work_that_raised_a_named_error_raises_that_one() -> None:
    cause = WrongWeights("version 3 arrived damaged")
    assert from_ray(task_error(cause), "rollout", 0, "load") is cause


@pytest.mark.parametrize(
    "error",
    [
        ObjectLostError("ab" * 14, None, "here"),
        RuntimeEnvSetupError("\x1b[31mno such folder\x1b[39m"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_trouble_of_ray_itself_is_one_named_error_and_no_lost_actor(error: Exception) -> None:
    named = from_ray(error, "rollout", 1, "rollout")
    assert type(named) is RunError
    assert named.message.startswith("rollout 1: Ray failed during rollout: ")
    assert "\x1b" not in named.message


def test_an_actor_that_ray_killed_for_memory_is_lost_and_can_be_replaced() -> None:
    lost = from_ray(OutOfMemoryError("\x1b[31mno memory\x1b[39m"), "rollout", 1, "rollout")
    assert isinstance(lost, ActorLost)
    assert (lost.role, lost.rank, lost.reason) == ("rollout", 1, "no memory")
