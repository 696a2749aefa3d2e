"""Memory of a run: this process and its descendants, sampled at its peak."""

from __future__ import annotations

import subprocess
import sys
import threading

import psutil

from cluster.run.memory import MemoryMeter, resident_bytes
from tests.harness.commands import wait_until

MIB = 1 << 20


def test_the_own_process_is_measured() -> None:
    before = resident_bytes()
    block = bytearray(b"x" * 64 * MIB)
    after = resident_bytes()
    assert 48 * MIB < after - before < 96 * MIB
    del block


def test_descendants_count() -> None:
    hold = "import sys; block = b'x' * (64 << 20); print('ready', flush=True); sys.stdin.read()"
    nested = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {hold!r}]))"
    before = resident_bytes()
    with subprocess.Popen(
        [sys.executable, "-c", nested], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None and child.stdin is not None
        assert child.stdout.readline() == "ready\n"
        assert resident_bytes() - before > 60 * MIB
        child.stdin.close()
    assert child.returncode == 0


def test_the_meter_keeps_the_peak_and_its_thread_ends() -> None:
    with MemoryMeter(period_s=0.005) as meter:
        wait_for_a_sample(meter)
        start = meter.peak_bytes
        assert start > psutil.Process().memory_info().rss / 2
        block = bytearray(b"x" * 128 * MIB)
        wait_until(lambda: meter.peak_bytes >= start + 64 * MIB, "a look at the block", timeout_s=30)
        del block
        peak = meter.peak_bytes
    assert meter.peak_bytes >= peak, "it never falls"
    assert "memory-meter" not in [thread.name for thread in threading.enumerate()]


def wait_for_a_sample(meter: MemoryMeter) -> None:
    wait_until(lambda: meter.peak_bytes > 0, "a first look", timeout_s=30)
