"""Outcome rewards: one number for a whole trajectory, paid at its last sampled token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from align.types import Group, Prompt, TokenRewards, Trajectory

Decode = Callable[[Sequence[int]], str]


class Verifier(Protocol):
    """Says how right a completion is, from its text and the prompt's metadata alone."""

    def check(self, prompt: Prompt) -> None:
        """Raise ValueError if completions of this prompt could not be verified; asked before a run starts."""
        ...

    def __call__(self, prompt: Prompt, completion: str) -> float:
        """From 0 (wrong) to 1 (right)."""
        ...


class RewardFailed(ValueError):
    """A reward raised; the message names the prompt."""


class VerifierReward:
    """A verifier as a `Reward`: `R_t = verifier(prompt, text)` at the last sampled token, 0 at every other.

    Args:
        verifier: Judges the decoded completion.
        decode: Sampled tokens to text.
    """

    def __init__(self, verifier: Verifier, decode: Decode) -> None:
        self.verifier = verifier
        self.decode = decode

    def __call__(self, group: Group) -> tuple[TokenRewards, ...]:
        """See `Reward`.

        Raises:
            RewardFailed: If the verifier raised, whatever it raised.
        """
        prompt = group.ticket.prompt
        return tuple(at_the_end(t, self._outcome(prompt, t)) for t in group.trajectories)

    def _outcome(self, prompt: Prompt, trajectory: Trajectory) -> float:
        completion = self.decode(trajectory.token_ids[trajectory.loss_mask].tolist())
        try:
            return float(self.verifier(prompt, completion))
        except Exception as error:  # code of others judges text that nobody has seen before
            raise RewardFailed(
                f"prompt {prompt.id!r}: {type(self.verifier).__name__} raised {type(error).__name__}: {error}; the "
                f"completion was {completion[:200]!r}"
            ) from error


def at_the_end(trajectory: Trajectory, outcome: float) -> TokenRewards:
    """`outcome` at the last sampled token, 0 elsewhere; a trajectory without sampled tokens gets nothing."""
    rewards = np.zeros(len(trajectory.token_ids), np.float32)
    rewards[np.flatnonzero(trajectory.loss_mask)[-1:]] = outcome
    return TokenRewards(rewards)
