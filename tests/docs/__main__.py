"""Writes every generated part of the documents anew: `make docs`, or `python -m tests.docs`."""

from __future__ import annotations

from tests.docs.documents import read
from tests.docs.parts import files
from tests.places import REPOSITORY


def write() -> None:
    """Write what is not as it has to be, and say what that was."""
    for path, text in files().items():
        if read(path) != text:
            path.write_text(text, encoding="utf-8")
            print(f"{path.relative_to(REPOSITORY)} is written")


if __name__ == "__main__":
    write()
