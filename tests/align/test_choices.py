"""Descriptions of settings that are one of a few names."""

from __future__ import annotations

from align.choices import choices


def test_every_choice_has_a_line_of_its_own() -> None:
    assert choices("What is eaten.", {"none": "nothing", "soup": "hot"}) == "What is eaten.\nnone: nothing\nsoup: hot"
