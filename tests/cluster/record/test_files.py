"""Files that are there whole or not at all, and folders that are hashed and removed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from cluster.record.files import hash_tree, remove_tree, write_atomically


def test_a_write_replaces_the_file_as_a_whole_and_leaves_nothing_aside(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    for text in ("first, and longer", "我"):
        write_atomically(path, text)
        assert [path.name for path in tmp_path.iterdir()] == ["state.json"]
        assert path.read_text(encoding="utf-8") == text


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \ud800")  # a lone surrogate cannot be written
    assert path.read_text() == "old"


def test_a_write_reaches_the_disk_before_it_takes_the_place_of_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.json"
    write_atomically(path, "old")

    def power_cut(handle: int) -> None:
        assert path.read_text() == "old"
        raise OSError("power cut")

    monkeypatch.setattr(os, "fsync", power_cut)
    with pytest.raises(OSError, match="power cut"):
        write_atomically(path, "new")
    assert path.read_text() == "old"


def test_a_tree_is_hashed_by_relative_path(tmp_path: Path) -> None:
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "b").write_bytes(b"bbb")
    (tmp_path / "a").write_bytes(b"")
    assert hash_tree(tmp_path) == {
        "a": hashlib.sha256(b"").hexdigest(),
        "policy/b": hashlib.sha256(b"bbb").hexdigest(),
    }


def test_removing_a_folder_that_is_not_there_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    remove_tree(tmp_path / "a")
    remove_tree(tmp_path / "a")
    assert not (tmp_path / "a").exists()
