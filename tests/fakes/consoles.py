"""A console that writes into a string."""

from __future__ import annotations

import io

from rich.console import Console as RichConsole

from cluster.record.sinks.console import Console


def console(
    num_steps: int = 10, terminal: bool = False, width: int = 200, pays_outcomes: bool = False
) -> tuple[Console, io.StringIO]:
    """The console of a run, and what it shows."""
    file = io.StringIO()
    rich = RichConsole(file=file, width=width, force_terminal=terminal, highlight=False, soft_wrap=True)
    return Console(num_steps, rich, pays_outcomes), file
