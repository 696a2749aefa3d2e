"""The answer in a completion's text: where to look, and when two answers are the same."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from align.choices import choices

# A sign counts unless something stands before it that it could be minus of: 3-7 ends in 7, "is -7" in -7.
_NUMBER = re.compile(r"(?:(?<![\w)\].])[-+−])?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?", re.ASCII)


class Extraction(BaseModel):
    """How the answer is found in the text of a completion."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    extract: Literal["last_number", "regex", "text"] = Field(
        "last_number",
        description=choices(
            "What counts as the answer.",
            {
                "last_number": "the last number in the completion",
                "regex": "what `pattern` finds in it",
                "text": "all of it",
            },
        ),
    )
    pattern: str | None = Field(
        None,
        description="For regex: a regular expression; its last match is the answer, or the first group of that match if "
        "the pattern has groups.",
    )

    @model_validator(mode="after")
    def _pattern_fits(self) -> Extraction:
        if (self.pattern is not None) != (self.extract == "regex"):
            raise ValueError("extract = 'regex' needs a pattern, and nothing else reads one")
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            raise ValueError(f"pattern {self.pattern!r} is not a regular expression: {error}") from None
        return self

    def find(self, text: str) -> str | None:
        """The answer as it stands in the text, or None if there is none."""
        if self.extract == "text":
            return text
        pattern = _NUMBER if self.pattern is None else re.compile(self.pattern)
        found = list(pattern.finditer(text))
        return found[-1][1 if found[-1].re.groups else 0] if found else None

    def normalise(self, answer: str) -> str | Decimal:
        """What is compared: a number's value (1,000.0 is 1000), or the text in lower case with single spaces.

        Raises:
            ValueError: If a number is asked for and `answer` is not exactly one.
        """
        if self.extract != "last_number":
            return " ".join(answer.split()).casefold()
        if not _NUMBER.fullmatch(answer.strip()):
            raise ValueError(f"{answer!r} is not a number")
        return Decimal(answer.strip().replace(",", "").replace("−", "-"))
