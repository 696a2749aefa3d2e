"""Files written whole or not at all, and folders hashed and removed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from align.digests import file_sha256


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that it is there complete or not at all."""
    aside = path.with_name(path.name + ".tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def hash_tree(directory: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by relative path."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): file_sha256(path) for path in files}


def remove_tree(directory: Path) -> None:
    """Remove a folder if it is there."""
    shutil.rmtree(directory, ignore_errors=True)
