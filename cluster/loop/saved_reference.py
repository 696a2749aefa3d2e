"""A policy that was saved to be the reference."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class SavedReference:
    """A policy that was saved to be the reference.

    Attributes:
        folder: Hugging Face folder; scorers have to see it.
        version: Its policy version.
        fingerprint: Of its weights in float32; what a scorer loads must have it.
    """

    folder: Path
    version: int
    fingerprint: str
