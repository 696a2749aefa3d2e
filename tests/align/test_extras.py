"""Packages of the extras, there or not."""

from __future__ import annotations

import json

import pytest

from align.extras import extra


def test_a_module_that_is_there_is_given() -> None:
    assert extra("json", "never said") is json


def test_one_that_is_missing_is_refused_in_the_callers_words_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"^needs it \(No module named 'not_there'\); pip install 'align\[x\]'$"):
        extra("not_there", "needs it ({error}); pip install 'align[x]'")
