"""The busy clock, on a clock that the test moves."""

from __future__ import annotations

import contextlib

from cluster.actors.usage import BusyClock


class Time:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_time_with_work_in_hand_is_counted_once_however_much_work_there_is() -> None:
    time = Time()
    clock = BusyClock(time)
    time.now += 1
    with clock.working():
        time.now += 2
        with clock.working():
            time.now += 4
        time.now += 8
    time.now += 16
    assert clock.read() == (14, 31)


def test_every_reading_starts_anew_in_the_middle_of_work_too() -> None:
    time = Time()
    clock = BusyClock(time)
    with clock.working():
        time.now += 3
        assert clock.read() == (3, 3)
        time.now += 1
    time.now += 1
    assert clock.read() == (1, 2)


def test_work_that_stands_still_is_no_work() -> None:
    time = Time()
    clock = BusyClock(time)
    with clock.working():
        time.now += 1
        clock.pause(True)
        time.now += 2
        clock.pause(False)
        time.now += 4
    clock.pause(True)
    time.now += 8
    assert clock.read() == (5, 15)


def test_work_that_fails_is_out_of_hand() -> None:
    time = Time()
    clock = BusyClock(time)
    with contextlib.suppress(ZeroDivisionError), clock.working():
        time.now += 1
        raise ZeroDivisionError
    time.now += 1
    assert clock.read() == (1, 2)
