"""Plain async objects in place of Ray's actors: work starts when it is called, and its answers are futures."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from types import SimpleNamespace
from typing import Any

from ray.exceptions import ActorDiedError, RayTaskError

SHORT = 0.02  # seconds; a deadline that passes in a test
DEAD = ActorDiedError()
Method = Callable[..., Awaitable[Any]]


class FakeMethod:
    """`actor.method`, with `remote` and `options` as Ray's."""

    def __init__(self, method: Method, num_returns: int = 1) -> None:
        self.method, self.num_returns = method, num_returns

    def options(self, num_returns: int) -> FakeMethod:
        return FakeMethod(self.method, num_returns)

    def remote(self, *arguments: Any, **settings: Any) -> Any:
        answer = asyncio.ensure_future(self.method(*arguments, **settings))
        if self.num_returns == 1:
            return answer

        async def part(number: int) -> Any:
            return (await answer)[number]

        return [asyncio.ensure_future(part(number)) for number in range(self.num_returns)]


class FakeActor:
    """In place of Ray's handle: its methods are those of the subject, or the async functions that it is given."""

    def __init__(self, subject: Any = None, **methods: Method) -> None:
        self.subject = SimpleNamespace(**methods) if subject is None else subject

    def __getattr__(self, name: str) -> FakeMethod:
        return FakeMethod(getattr(self.subject, name))


def gives(value: Any) -> Method:
    async def method(*arguments: Any) -> Any:
        return value

    return method


def fails(error: BaseException) -> Method:
    async def method(*arguments: Any) -> Any:
        raise error

    return method


async def never(*arguments: Any) -> None:
    await asyncio.Event().wait()


def failed_task(cause: Exception) -> BaseException:
    """What Ray raises for work that raised `cause`: an error of both types."""
    trace = f"Traceback (most recent call last):\n  File ...\n{cause!r}"
    error: BaseException = RayTaskError("method", trace, cause).as_instanceof_cause()
    return error


def complete(work: Coroutine[Any, Any, Any]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(10):
            return await work

    return asyncio.run(bounded())
