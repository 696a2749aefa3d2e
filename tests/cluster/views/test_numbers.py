"""How numbers are written for people."""

from __future__ import annotations

import pytest

from cluster.views.numbers import duration, memory, number, percent


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (number(None), "–"),
        (number(1.512), "1.51"),
        (number(1234567), "1,234,567"),
        (number(2.34e-6), "2.34e-06"),
        (percent(0.0), "0%"),
        (percent(0.004), "0.4%"),
        (percent(0.0625), "6%"),
        (percent(0.996), "99.6%"),
        (duration(61), "1 min 01 s"),
        (duration(7500), "2 h 05 min"),
        (memory(5 * 2**20), "5 MiB"),
        (memory(1.5 * 2**30), "1.5 GiB"),
    ],
)
def test_numbers_are_written_with_the_digits_that_count(shown: str, expected: str) -> None:
    assert shown == expected
