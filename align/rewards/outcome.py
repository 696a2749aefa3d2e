"""Outcome rewards: one number for a whole trajectory, paid at its last sampled token."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from align.data.types import Group, Prompt, TokenRewards, Trajectory
from align.rewards.deadline import deadline

Decode = Callable[[Sequence[int]], str]
DEADLINE_S = 10.0


class Verifier(Protocol):
    """Says how right a completion is, from its text and the prompt's metadata alone."""

    def check(self, prompt: Prompt) -> None:
        """Raise ValueError if completions of this prompt could not be verified; asked before a run starts."""
        ...

    def __call__(self, prompt: Prompt, completion: str) -> float:
        """From 0 (wrong) to 1 (right)."""
        ...


def verify(verifier: Verifier, prompt: Prompt, completion: str, deadline_s: float) -> tuple[float, str | None]:
    """The verdict of a verifier, and None; or 0 and the traceback, if it raised, took too long or gave no finite number."""
    try:  # code of others judges text that nobody has seen before
        with deadline(deadline_s):
            verdict: Any = verifier(prompt, completion)
        if isinstance(verdict, str | bytes):
            raise TypeError(f"{type(verifier).__name__} returned {verdict!r}, expected a number")
        value = float(verdict)
        if not math.isfinite(value) or abs(value) > float(np.finfo(np.float32).max):
            raise ValueError(f"{type(verifier).__name__} returned {value!r}, expected a finite number")
    except (Exception, SystemExit):  # exit() in code that is judged is a failure like another
        return 0.0, traceback.format_exc()
    return value, None


class VerifierReward:
    """A verifier as a `Reward`: `R_t = verifier(prompt, text)` at the last sampled token, 0 at every other.

    Args:
        verifier: Judges the decoded completion.
        decode: Sampled tokens to text.
        deadline_s: Time for one trajectory.
    """

    def __init__(self, verifier: Verifier, decode: Decode, deadline_s: float = DEADLINE_S) -> None:
        self.verifier = verifier
        self.decode = decode
        self.deadline_s = deadline_s

    def __call__(self, group: Group) -> tuple[TokenRewards, ...]:
        """See `Reward`. A trajectory that the verifier failed on gets the traceback in place of a reward."""
        return tuple(self._judge(group.ticket.prompt, trajectory) for trajectory in group.trajectories)

    def _judge(self, prompt: Prompt, trajectory: Trajectory) -> TokenRewards:
        completion = self.decode(trajectory.token_ids[trajectory.loss_mask].tolist())
        outcome, failure = verify(self.verifier, prompt, completion, self.deadline_s)
        return replace(at_the_end(trajectory, outcome), failure=failure)


def at_the_end(trajectory: Trajectory, outcome: float) -> TokenRewards:
    """`outcome` at the last sampled token, 0 elsewhere; a trajectory without sampled tokens gets nothing."""
    rewards = np.zeros(len(trajectory.token_ids), np.float32)
    rewards[np.flatnonzero(trajectory.loss_mask)[-1:]] = outcome
    return TokenRewards(rewards)
