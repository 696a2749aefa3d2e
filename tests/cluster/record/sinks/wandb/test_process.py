"""W&B's own process, given up: it is gone whatever it was doing, and the next use of W&B starts another."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness.wandb_files import run_python

pytestmark = pytest.mark.integration

GIVE_UP = """
import os, signal
import wandb
from cluster.record.sinks.wandb.process import give_up, running
wandb.setup()
(first,) = running()
if {frozen}:
    os.kill(first.pid, signal.SIGSTOP)
give_up()
assert running() == []
wandb.setup()
(second,) = running()
assert second.pid != first.pid
"""


@pytest.mark.parametrize("frozen", [False, True])
def test_it_is_gone_even_if_it_listens_to_nobody_and_the_next_use_starts_another(tmp_path: Path, frozen: bool) -> None:
    done = run_python(GIVE_UP.format(frozen=frozen), tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
