"""`align status`, on folders written as a run writes them, and on consoles of any size."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from cluster.faults import ConfigError
from cluster.record.folder import RunFolder
from cluster.spec.config import resolved
from cluster.views.status import show, status
from tests.fakes.run_files import config

CONFIG = resolved(config(run={"name": "demo"}))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with a path of 200 characters that has written two steps; rich could take a part of the path for markup."""
    folder = tmp_path / ("[red]" + "x" * (194 - len(str(tmp_path))))
    assert len(str(folder)) == 200
    RunFolder(folder, CONFIG)
    rows = [{"step": k, "time/step_s": 2.0, "time/update_s": 0.5, "reward/trajectory_mean": -k} for k in (1, 2)]
    rows[1]["eval/heldout/kl_per_token"] = 0.125
    rows[1]["throughput/generated_tokens_per_s"] = 123456.0
    rows[1] |= {"goodput/sampled_tokens": 8, "goodput/trained_tokens": 7, "goodput/filtered_tokens": 1}
    rows[1]["idle/learner_fraction"] = 0.5
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def shown(run: Path, width: int = 160) -> str:
    console = Console(width=width, file=io.StringIO())
    show(run, live=False, console=console)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def watched(run: Path, width: int, height: int) -> str:
    """What `--live` has on the screen when Ctrl-C comes, without what is printed after that."""
    file = io.StringIO()
    console = Console(width=width, height=height, file=file, force_terminal=True, color_system=None)
    at_the_end: list[str] = []

    def interrupt(seconds: float) -> None:
        at_the_end.append(file.getvalue())
        raise KeyboardInterrupt

    show(run, live=True, console=console, sleep=interrupt)
    return at_the_end[0]


def test_it_tells_a_run_under_way_from_one_that_was_killed_and_one_that_ended(run: Path) -> None:
    assert "ended without a word" in shown(run)
    with RunFolder(run, CONFIG).lock():
        text = shown(run)
    assert ["state", "running"] in [line.split() for line in text.splitlines()]
    assert "2 of 3; 2.0 s each, 2 s left" in text
    assert "update 25%" in text
    assert "trained 87.5%, filtered 12.5%" in text
    assert "learner 25.0%" in text, "of the two steps"
    assert "-1.5 (mean of 2 steps)" in text
    assert "heldout/kl_per_token 0.125" in text
    (run / "summary.json").write_text(json.dumps({"status": "failed", "error": "[RUN] no luck in [/data]"}))
    assert "failed: [RUN] no luck in [/data]" in shown(run)


@pytest.mark.parametrize("width", [40, 60, 80])
def test_a_long_path_on_a_narrow_console_costs_neither_the_state_nor_the_path_nor_a_figure(
    run: Path, width: int
) -> None:
    with RunFolder(run, CONFIG).lock():
        text = shown(run, width)
    assert "…" not in text
    assert ["state", "running"] in [line.replace(":", " ").split() for line in text.splitlines()]
    assert f"demoin{run}" in "".join(text.split())
    assert {"throughput/generated_tokens_per_s", "1.235e+05"} <= set(text.replace(":", " ").split())


@pytest.mark.parametrize("height", [4, 8, 12, 50])
def test_a_live_view_shows_the_state_in_a_window_of_few_lines_and_says_what_it_leaves_out(
    run: Path, height: int
) -> None:
    with RunFolder(run, CONFIG).lock():
        screen = watched(run, 60, height)
    assert "…" not in screen
    assert screen.count("\n") < height
    assert ["state", "running"] in [line.split()[-2:] for line in screen.splitlines()]
    assert (str(run) in "".join(screen.split())) == (height >= 8)
    assert ("in a taller window, or without --live" in " ".join(screen.split())) == (height < 50)


def test_what_stays_after_a_live_view_is_the_whole_status(run: Path) -> None:
    file = io.StringIO()

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    show(run, True, Console(width=60, height=4, file=file, force_terminal=True, color_system=None), interrupt)
    assert "heldout/kl_per_token" in file.getvalue()


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        status(tmp_path)
