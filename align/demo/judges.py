"""Judges: verdicts on finished text, used by evaluations and never seen by a reward."""

from __future__ import annotations

from collections.abc import Callable

from align.demo.language import is_grammatical

Judge = Callable[[str], bool]

JUDGES: dict[str, Judge] = {"grammatical": is_grammatical}
