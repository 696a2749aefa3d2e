"""A handle on a Ray actor: every call has a deadline, and Ray's errors become named ones.

Token arrays stay behind Ray's object references: they go from actor to actor, and this process sees summaries.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError

from cluster.faults import ActorLost, RestartBudgetSpent, from_ray, reason

Result = TypeVar("Result")


class Handle:
    """One Ray actor with its role and rank.

    Args:
        actor: Ray's handle.
        role: "rollout", "scorer" or "learner".
        rank: Number within the role.
    """

    def __init__(self, actor: Any, role: str, rank: int) -> None:
        self.actor = actor
        self.role = role
        self.rank = rank

    async def answer(self, reference: Awaitable[Result], phase: str, deadline_s: float) -> Result:
        """The value behind a reference.

        Raises:
            ActorLost: If the actor died, or did not answer within the deadline (a frozen one looks the same).
            RunError: If the work itself failed; a RunError of the actor is raised as it is.
        """
        try:
            async with asyncio.timeout(deadline_s):
                return await reference
        except RayError as error:  # first, since a RayTaskError may be a TimeoutError of the work
            raise from_ray(error, self.role, self.rank, phase) from None
        except TimeoutError:
            raise ActorLost(self.role, self.rank, phase, f"no answer within {deadline_s:g} s") from None

    def kill(self) -> None:
        """End the actor's process at once."""
        ray.kill(self.actor, no_restart=True)


def spend(used: int, limit: int, key: str, error: BaseException) -> int:
    """One more restart.

    Raises:
        RestartBudgetSpent: If there is none left.
    """
    if used >= limit:
        raise RestartBudgetSpent(
            f"{reason(error)}; {used} of {limit} restarts ({key}) are used", "see the actor's log for the cause"
        )
    return used + 1
