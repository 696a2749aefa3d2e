"""A deadline for code of others that runs in this process."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


class _Expired(BaseException):
    """Not an Exception, so that code which catches all of those does not swallow it."""


@contextlib.contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Give up on the block after some seconds, wherever it is. On the main thread of a process alone.

    A timer signal interrupts Python, and C code that looks for signals, as regular expressions and sleeps do. Other C code is
    beyond its reach: then the deadline of whoever waits for this process counts. So it is with code that sets the process's
    alarm for itself (`signal.alarm`), which there is but one of.

    Raises:
        TimeoutError: With the place where the block was as its cause.
    """

    def expire(number: int, frame: FrameType | None) -> None:
        raise _Expired

    previous = signal.signal(signal.SIGALRM, expire)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds, seconds)  # again, if the block swallows even this
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except _Expired as expired:
        raise TimeoutError(f"no answer within {seconds:g} s") from expired
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)  # the alarm may have come just before the line above
        signal.signal(signal.SIGALRM, previous)
