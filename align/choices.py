"""Settings that are one of a few names: what each name means, in the setting's description."""

from __future__ import annotations

from collections.abc import Mapping


def choices(lead: str, meanings: Mapping[str, str]) -> str:
    """A description: what the setting is about, then a line `name: meaning` for every choice."""
    return "\n".join([lead, *(f"{name}: {meaning}" for name, meaning in meanings.items())])
