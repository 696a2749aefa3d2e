"""Ctrl-C and SIGTERM: the first ends the run after a step, the second at once, the third without another word."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable

from cluster.faults import INTERRUPTED


class Interrupts:
    """Counts interrupts and acts on each.

    While steps are trained, the first lets the step in progress end, after which a checkpoint is saved. Before and after that
    there is no step to end: then the first, like every second, cancels the run's task, which still writes the end of the run.
    A third ends the process.

    Attributes:
        stop: Set by an interrupt that waits for the end of a step.
        in_training: Whether steps are trained now.

    Args:
        warn: Told what the first one does.
        die: Ends the process with an exit code.
    """

    def __init__(self, warn: Callable[[str], None], die: Callable[[int], object] = os._exit) -> None:
        self.stop = asyncio.Event()
        self.in_training = False
        self._warn, self._die = warn, die
        self._num = 0

    def listen(self) -> None:
        """Take over both signals for the task that calls, until its event loop is closed."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None, "a task listens, so that there is one to cancel"
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.interrupt, task.cancel)

    def interrupt(self, cancel: Callable[[], object]) -> None:
        """One more interrupt; `cancel` stops the run now."""
        self._num += 1
        if self._num == 1 and self.in_training:
            self._warn("stopping: the step in progress ends, a checkpoint is saved; Ctrl-C again stops now")
            self.stop.set()
        elif self._num <= 2:
            cancel()
        else:
            self._die(INTERRUPTED)
