"""W&B's own process, which keeps the record and asks the server: found, and given up."""

from __future__ import annotations

import contextlib
from typing import Any

_END_S = 5.0


def running() -> list[Any]:
    """Those that this process started, as psutil knows them; ended ones that nobody has waited for among them."""
    import psutil

    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # it has just ended
            if child.name().startswith("wandb-core"):
                found.append(child)
    return found


def give_up() -> None:
    """End W&B's process in another way than W&B does; what is asked of W&B next starts a new one.

    At the end of this process W&B tells its own to end and waits for it without a deadline. Told so while it breaks off a
    request that got no answer, it may miss that, and both wait for ever (seen with wandb 0.31).
    """
    import psutil
    import wandb

    found = running()
    for process in found:
        process.terminate()
    _, alive = psutil.wait_procs(found, timeout=_END_S)
    for process in alive:
        process.kill()
    psutil.wait_procs(alive)
    with contextlib.suppress(Exception, SystemExit):  # there is nobody left to talk to, nor an exit code that matters
        wandb.teardown()
