"""The examination as the command tells it: a line for each verdict as it comes, or all of them as JSON."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable

from cluster.doctor.examination import examine
from cluster.doctor.verdict import exit_code, together
from cluster.spec.config import RunConfig


def tell(cfg: RunConfig | None, address: str | None, *, quick: bool, as_json: bool, echo: Callable[[str], None]) -> int:
    """Examine, tell, and return the exit code; see `verdict.exit_code`.

    Args:
        cfg: The run, if there is one.
        address: Of a Ray cluster that this machine is part of, or None.
        quick: Leave out what starts an engine.
        as_json: Tell all verdicts at the end, those of each node by itself.
        echo: Takes what is told.
    """
    if address is not None:
        os.environ["RAY_ADDRESS"] = address
    looks = examine(cfg, quick=quick, say=lambda text: print(text, file=sys.stderr, flush=True))
    verdicts = []
    for verdict in looks if as_json else together(looks):
        verdicts.append(verdict)
        if not as_json:
            echo(verdict.line())
    if as_json:
        echo(json.dumps([dataclasses.asdict(verdict) for verdict in verdicts], indent=2))
    return exit_code(verdicts)
