"""One machine: packages, processor, GPUs, shared memory, limits, disk for temporary files, network."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cluster.doctor.network import network
from cluster.doctor.verdict import Verdict
from cluster.doctor.versions import installed, versions
from cluster.spec.processor import native_dtype

_MIN_SHM_BYTES = 1 << 30
_MIN_FILES = 4096
_MAX_DISK_SHARE = 0.95  # Ray stores nothing on a disk that is fuller
_SMI_S = 30.0


def machine(address: str = "127.0.0.1", *, alone: bool = True) -> Iterator[Verdict]:
    """Look at this machine. Quick, and nothing stays behind.

    Args:
        address: Under which the other machines know it.
        alone: Whether no other machine takes part.
    """
    yield from versions(installed())
    yield _processor()
    yield from _gpus()
    yield _shared_memory()
    yield _open_files()
    yield _temporary_files()
    yield from network(address, alone=alone)


def _processor() -> Verdict:
    native = native_dtype(on_gpu=False)
    found = f"{len(os.sched_getaffinity(0))} CPUs; computes in {native.dtype}: {native.reason}"
    return Verdict("processor", "ok", found)


def _gpus() -> Iterator[Verdict]:
    """What torch sees, held against what the driver lists. Met fakes only: no GPU was there when this was written."""
    import torch

    listed = _listed_by_driver()
    if not torch.cuda.is_available():
        seen = "none that torch sees"
        if listed:
            build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs"
            fix = "pip install -e '.[cuda]', with a driver that is new enough for its CUDA: see nvidia-smi"
            yield Verdict("GPUs", "warn", f"{seen}: it is built for {build}; nvidia-smi lists {len(listed)}", fix)
        else:
            yield Verdict("GPUs", "ok", f"{seen} (runs with num_gpus = 0 need none)")
        return
    for number in range(torch.cuda.device_count()):
        name, memory = torch.cuda.get_device_name(number), torch.cuda.get_device_properties(number).total_memory
        used = f", {listed[number][1]} in use" if number < len(listed) else ""
        yield Verdict(f"GPU {number}", "ok", f"{name}, {memory / 2**30:.0f} GiB{used}")
    driver = listed[0][0] if listed else "of unknown version: there is no nvidia-smi"
    yield Verdict("driver", "ok", f"{driver}; torch is built for CUDA {torch.version.cuda}")
    yield Verdict("NCCL", "ok", ".".join(map(str, torch.cuda.nccl.version())))  # type: ignore[no-untyped-call]


def _listed_by_driver() -> list[tuple[str, str]]:
    """Version of the driver and memory in use, for each GPU; nothing where there is no driver that answers."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=driver_version,memory.used", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SMI_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[field.strip() for field in line.split(",")] for line in done.stdout.splitlines()]
    return [(row[0], row[1]) for row in rows if len(row) == 2]


def _shared_memory() -> Verdict:
    """Ray's object store, staged weights and NCCL want it; without GPUs they find another place, and are slower."""
    import torch

    free = shutil.disk_usage("/dev/shm").free
    fix = "docker run --shm-size 8g …, or an emptyDir of medium Memory at /dev/shm"
    otherwise = "fail" if torch.cuda.is_available() else "warn"
    found = f"{free / 2**30:.1f} GiB free in /dev/shm"
    return Verdict.of("shared memory", free >= _MIN_SHM_BYTES, found, fix, otherwise)


def _open_files() -> Verdict:
    """Ray raises the soft limit of its processes to the hard one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    good = hard == resource.RLIM_INFINITY or hard >= _MIN_FILES
    found = "unlimited" if hard == resource.RLIM_INFINITY else f"at most {hard}"
    fix = "docker run --ulimit nofile=65536 …, or a higher hard limit in /etc/security/limits.conf"
    return Verdict.of("open files", good, found, fix, "warn")


def _temporary_files() -> Verdict:
    """Where Ray logs, and spills what its object store cannot hold."""
    folder = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    usage = shutil.disk_usage(folder)
    found = f"{usage.free / 2**30:.1f} GiB free in {folder}"
    good = usage.total - usage.free < _MAX_DISK_SHARE * usage.total
    fix = "make room there, or export RAY_TMPDIR=… before Ray starts: on a disk over 95% full it stores nothing"
    return Verdict.of("temp files", good, found, fix, "warn")
