"""Rules of settings: all broken ones are told at once, in their order."""

from __future__ import annotations

import pytest

from align.rules import check


def test_rules_that_hold_pass_and_so_do_none() -> None:
    check([(False, "a"), (False, "b")])
    check([])


def test_all_broken_rules_are_told_in_their_order() -> None:
    with pytest.raises(ValueError, match=r"^c; a$"):
        check(iter([(True, "c"), (False, "b"), (True, "a")]))
