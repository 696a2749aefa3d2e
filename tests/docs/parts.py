"""Every generated part of a document by its name, and every generated file."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from functools import partial
from pathlib import Path

from align.metrics import GLOSSARY
from cluster.faults import EXIT_CODES
from tests.docs.documents import cell, documents, parts_in, read, table, with_parts
from tests.docs.figures import console, figures, short_console
from tests.docs.modules import modules
from tests.docs.run_files import run_files
from tests.docs.settings import settings
from tests.docs.tables import algorithms, head, staleness, variance
from tests.places import DEPLOY


def exit_codes() -> str:
    """What a run's exit code says."""
    return table("| exit code | meaning |", [f"| {code} | {meaning} |" for code, meaning in EXIT_CODES.items()])


def glossary() -> str:
    """Every metric with its unit and meaning."""
    rows = [f"| `{name}` | {d.unit or '–'} | {cell(d.meaning)} |" for name, d in GLOSSARY.items()]
    return table("| metric | unit | meaning |", rows)


PARTS: dict[str, Callable[[], str]] = {
    "demo-short": short_console,
    "exit-codes": exit_codes,
    "demo-console": partial(console, "demo_console"),
    "demo-figures": partial(figures, "demo"),
    "real-console": partial(console, "smollm2_heal_console"),
    "real-figures": partial(figures, "smollm2_heal"),
    "plain-figures": partial(figures, "plain", length=True),
    "addition-figures": partial(figures, "smollm2_addition"),
    "run-files": run_files,
    "settings": settings,
    "align-files": partial(modules, "align"),
    "cluster-files": partial(modules, "cluster"),
    "test-files": partial(modules, "tests", leave_out=("align", "cluster")),
    "algorithms": algorithms,
    "variance": variance,
    "staleness": staleness,
    "head": head,
    "glossary": glossary,
    "doctor": partial(console, "doctor"),
    "jobs": partial(console, "jobs_console"),
}


def files() -> dict[Path, str]:
    """What every generated file and every document with generated parts has to be."""
    parts = {name: make() for name, make in PARTS.items()}
    texts = {path: read(path) for path in documents()}
    return {path: with_parts(text, parts) for path, text in texts.items() if parts_in(text)} | grafana()


def grafana() -> dict[Path, str]:
    """Dashboard and alerts of Grafana, as deploy/grafana/generate.py makes them."""
    folder = DEPLOY / "grafana"
    made: dict[str, str] = runpy.run_path(str(folder / "generate.py"))["files"]()
    return {folder / name: content for name, content in made.items()}
