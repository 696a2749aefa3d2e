"""Secrets taken out of a text before it leaves the machine."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

_NAMES = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL")
_MIN_LENGTH = 8  # a shorter value is a number or a path, and stands in texts by chance


def redact(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """The text without the values of environment variables that are named like secrets, and without passwords in URLs."""
    for name, value in sorted(environment.items(), key=lambda item: -len(item[1])):  # one may begin with another
        if len(value) >= _MIN_LENGTH and _NAMES.search(name.upper()):
            text = text.replace(value, f"[{name}]")
    return re.sub(r"(\w+://)[^/\s@]*@", r"\1[…]@", text)
