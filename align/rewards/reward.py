"""Rewards: what judges a group of trajectories, token by token."""

from __future__ import annotations

from typing import Protocol

from align.data.types import Group, TokenRewards


class Reward(Protocol):
    """Gives every sampled token of a group its reward."""

    def __call__(self, group: Group) -> tuple[TokenRewards, ...]:
        """Rewards of the trajectories of `group`, in their order; 0 outside the loss mask, finite everywhere."""
        ...
