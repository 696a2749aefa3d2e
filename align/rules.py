"""Rules of settings: whether one is broken, and what to say then."""

from __future__ import annotations

from collections.abc import Iterable

Rule = tuple[bool, str]
"""(broken, message): a rule's message is told where it is broken."""


def check(rules: Iterable[Rule]) -> None:
    """Hold rules, and tell of all broken ones at once, in their order.

    Raises:
        ValueError: With the messages of the broken ones, between them "; ".
    """
    if problems := [message for broken, message in rules if broken]:
        raise ValueError("; ".join(problems))
