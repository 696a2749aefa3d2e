"""W&B in processes of its own, since it keeps global state, and the records that it leaves on disk."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.places import REPOSITORY

API_KEY = "0123456789abcdef" * 2 + "01234567"  # the form of a key, and nobody's


def run_python(script: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A script in a home without keys."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "NETRC"))}
    home = folder / "home"
    home.mkdir(exist_ok=True)
    clean |= {"HOME": str(home), "NETRC": str(home / "netrc"), "WANDB_ERROR_REPORTING": "false", **environment}
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        env=clean | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=600,
    )


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: a header of 7 bytes, then LevelDB's log (blocks of 32 KiB, records in fragments)."""
    from wandb.proto.wandb_internal_pb2 import Record

    block_size, header = (
        32768,
        struct.Struct("<IHB"),
    )  # checksum, length, and whether it is whole, first, middle or last
    content = path.read_bytes()
    assert content[:7] == b":W&B\xe1\xbe\x00"
    position, fragments = 7, b""
    while position + header.size <= len(content):
        left_in_block = block_size - position % block_size
        if left_in_block < header.size:
            position += left_in_block
            continue
        checksum, length, kind = header.unpack_from(content, position)
        if kind == 0:
            position += left_in_block  # padding
            continue
        position += header.size
        data = content[position : position + length]
        assert zlib.crc32(bytes([kind]) + data) == checksum
        position += length
        fragments += data
        if kind in (1, 4):  # whole, or last
            record = Record()
            record.ParseFromString(fragments)
            fragments = b""
            yield record


def wandb_rows(record: Path) -> list[dict[str, Any]]:
    """What was logged, step by step, without W&B's own columns."""
    rows = [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in one.history.item}
        for one in wandb_records(record)
        if one.WhichOneof("record_type") == "history"
    ]
    return [{name: value for name, value in row.items() if not name.startswith("_")} for row in rows]
