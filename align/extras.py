"""Packages that only some runs need: the extras of the distribution."""

from __future__ import annotations

import importlib
from typing import Any


def extra(module: str, refusal: str) -> Any:
    """A module of such a package, imported when it is needed.

    Args:
        module: Its name.
        refusal: What is said without it; `{error}` stands for the reason.

    Raises:
        ValueError: With the refusal, if it cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(refusal.format(error=error)) from None
