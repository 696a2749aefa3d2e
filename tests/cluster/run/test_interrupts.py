"""Interrupts: what the first, the second and the third one do, before, during and after training."""

from __future__ import annotations

import asyncio
import signal

import pytest

from cluster.faults import INTERRUPTED
from cluster.run.interrupts import Interrupts


class Told:
    """What interrupts did, in order."""

    def __init__(self, in_training: bool = False) -> None:
        self.events: list[str] = []
        self.interrupts = Interrupts(
            lambda text: self.events.append(f"warned: {text}"), lambda code: self.events.append(f"died: {code}")
        )
        self.interrupts.in_training = in_training

    def interrupt(self, times: int = 1) -> None:
        for _ in range(times):
            self.interrupts.interrupt(lambda: self.events.append("cancelled"))


WARNED = "warned: stopping: the step in progress ends, a checkpoint is saved; Ctrl-C again stops now"


def test_the_first_one_in_training_waits_for_the_step_and_says_so() -> None:
    told = Told(in_training=True)
    assert not told.interrupts.stop.is_set()
    told.interrupt()
    assert told.interrupts.stop.is_set()
    assert told.events == [WARNED]


def test_the_second_one_in_training_stops_now_and_the_third_ends_the_process() -> None:
    told = Told(in_training=True)
    told.interrupt(4)
    assert told.events == [WARNED, "cancelled", f"died: {INTERRUPTED}", f"died: {INTERRUPTED}"]


def test_where_no_step_is_trained_the_first_one_stops_now() -> None:
    told = Told()
    told.interrupt(3)
    assert told.events == ["cancelled", "cancelled", f"died: {INTERRUPTED}"]
    assert not told.interrupts.stop.is_set()


def test_one_before_training_counts_so_that_one_in_training_is_the_second() -> None:
    told = Told()
    told.interrupt()
    told.interrupts.in_training = True
    told.interrupt()
    assert told.events == ["cancelled", "cancelled"]
    assert not told.interrupts.stop.is_set()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_both_signals_are_taken_over_and_given_back_with_the_event_loop(number: signal.Signals) -> None:
    told, handler = Told(in_training=True), signal.getsignal(number)

    async def scenario() -> None:
        told.interrupts.listen()
        signal.raise_signal(number)
        await asyncio.wait_for(told.interrupts.stop.wait(), 5)
        signal.raise_signal(number)
        with pytest.raises(asyncio.CancelledError):
            await asyncio.sleep(5)

    asyncio.run(scenario())
    assert told.events == [WARNED]
    assert signal.getsignal(number) in (handler, signal.default_int_handler, signal.SIG_DFL)
