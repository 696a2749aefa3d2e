"""The trial of engine, scorer and learner: what is compared, and one process after another. Actors are fakes."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from align.data.types import FinishReason, Group, Prompt, Ticket, Trajectory, VersionSpan
from cluster.doctor import agreement as subject
from cluster.doctor.agreement import agreement, compared
from cluster.faults import ActorLost
from cluster.loop.rollout import Rollout
from cluster.spec.config import RunConfig
from tests.fakes.run_files import config

CFG = config(run={"group_size": 2}, rollout={"dtype": "float32"}, sampling={"temperature": 0.5, "max_tokens": 99})
PROMPTS = [Prompt(str(i), "q", (5, 6)) for i in range(6)]


def trajectory(seed: int = 0, logprob: float = -1.0) -> Trajectory:
    """Two prompt tokens and two sampled ones."""
    return Trajectory.from_completion(
        (5, 6), [7, 8], [logprob, logprob], [VersionSpan(0, 0, 2)], FinishReason.STOP, seed
    )


def test_only_sampled_tokens_are_compared_and_the_limits_are_those_of_the_canary() -> None:
    def look(by: float, cfg: RunConfig = CFG) -> tuple[str, str]:
        verdict = compared(cfg, [trajectory(), trajectory()], [[-50.0, -1.0, -1.0 - 2 * by], [9.0, -1.0, -1.0]])
        return verdict.state, verdict.found

    state, found = look(0.00016)
    assert (state, found) == (
        "ok",
        "engine and learner differ by 8e-05 nats in the mean, 0.00032 at most, over 4 tokens in float32; "
        "a run warns above 0.0001 and stops above 0.001 in the mean",
    )
    assert look(0.0008)[0] == "warn"
    assert look(0.004)[0] == "fail"
    assert look(0.0008, replace_dtype("bfloat16"))[0] == "ok"
    assert look(float("nan"))[0] == "fail"


def replace_dtype(dtype: str) -> RunConfig:
    return config(run={"group_size": 2}, rollout={"dtype": dtype})


class Fleet:
    """Makes the three handles, and writes down who is there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, learner_says: float = -1.0, outcome: float = 0.25) -> None:
        self.events: list[str] = []
        self.sampling: Any = None
        self.learner_says, self.outcome, self.lost = learner_says, outcome, ""
        monkeypatch.setattr(subject, "reserve", self._reserve)
        for name in ("rollout", "scorer", "learner"):
            monkeypatch.setattr(subject, f"new_{name}", lambda cfg, *_, name=name: self._start(name, cfg))

    async def _reserve(self, cfg: RunConfig, say: Any, warn: Any) -> None:
        self.events.append("room")

    def _start(self, name: str, cfg: RunConfig) -> FakeHandle:
        self.events.append(f"{name} starts")
        if name == "rollout":
            self.sampling = cfg.sampling
        return FakeHandle(name, self)


class FakeHandle:
    """What the three handles do in a trial."""

    def __init__(self, name: str, fleet: Fleet) -> None:
        self.name, self.fleet, self.actor = name, fleet, self
        self.shutdown = self
        self.remote = self._shut_down

    async def _shut_down(self) -> None:
        self.fleet.events.append(f"{self.name} shuts down")

    async def ready(self) -> None:
        if self.fleet.lost == self.name:
            raise ActorLost(self.name, 0, "start", "no answer")

    async def rollout(self, ticket: Ticket) -> Rollout:
        group = Group(ticket, tuple(trajectory(seed) for seed in ticket.seeds))
        return Rollout(ticket, 0, 4, 2, group)

    async def answer(self, payload: Any, phase: str, deadline_s: float) -> Any:
        return payload

    async def score(self, rollout: Rollout) -> Rollout:
        return replace(rollout, outcomes=(self.fleet.outcome, 1.0))

    async def canary(self, sequences: list[list[int]]) -> list[list[float]]:
        assert all(sequence == [5, 6, 7, 8] for sequence in sequences)
        return [[0.0, self.fleet.learner_says, self.fleet.learner_says] for _ in sequences]

    def kill(self) -> None:
        self.fleet.events.append(f"{self.name} ends")


def test_each_process_ends_before_the_next_one_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(monkeypatch)
    judged, agreed = agreement(CFG, PROMPTS, pytest.fail)
    assert fleet.events == [
        *("room", "rollout starts", "rollout shuts down", "rollout ends"),
        *("scorer starts", "scorer ends", "learner starts"),
    ]
    assert (agreed.state, "over 16 tokens" in agreed.found) == ("ok", True), "four groups of two with two tokens each"
    assert (judged.state, judged.found.split(";")[0]) == ("ok", "8 answers get 0.25 to 1")
    assert "a group of 2, at most 600 s" in judged.found


def test_it_samples_where_both_mean_the_same_by_a_log_probability(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(monkeypatch)
    list(agreement(CFG, PROMPTS, pytest.fail))
    sampling = fleet.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_tokens) == (1.0, 1.0, 0, 32)


def test_a_learner_that_says_otherwise_and_a_reward_that_is_not_finite_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    Fleet(monkeypatch, learner_says=-1.5, outcome=float(np.nan))
    judged, agreed = agreement(CFG, PROMPTS, pytest.fail)
    assert (judged.state, agreed.state) == ("fail", "fail")
    assert "0.5 nats in the mean" in agreed.found


@pytest.mark.parametrize("lost", ["rollout", "scorer"])
def test_a_process_that_does_not_start_is_an_error_and_is_ended(lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(monkeypatch)
    fleet.lost = lost
    with pytest.raises(ActorLost, match=f"{lost} 0 was lost during start"):
        list(agreement(CFG, PROMPTS, pytest.fail))
    assert fleet.events[-1] == f"{lost} ends"


def test_the_trial_leaves_no_task(monkeypatch: pytest.MonkeyPatch) -> None:
    Fleet(monkeypatch)

    async def trial() -> int:
        await subject._trial(CFG, PROMPTS, pytest.fail)
        return len(asyncio.all_tasks())

    assert asyncio.run(trial()) == 1
