"""Digests of files."""

from __future__ import annotations

from pathlib import Path

from align.digests import file_sha256


def test_a_file_has_the_sha256_that_the_standard_gives_for_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_sha256(tmp_path / "file") == expected
