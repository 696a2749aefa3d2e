"""The rows of metrics.jsonl, over kills and resumes."""

from __future__ import annotations

from pathlib import Path

from cluster.record.figures import summarize_run
from cluster.record.history import read_rows, seconds_so_far


def write_lines(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines))
    return path


def test_of_a_step_that_was_trained_twice_around_a_kill_the_later_row_counts(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "metrics.jsonl",
        '{"step": 1, "tokens/generated": 10}',
        '{"step": 2, "tokens/generated": 20}',
        '{"step": 3, "tokens/generated": 30, "memory/rss_bytes": 9}',
        '{"step": 2, "tokens/generated": 21}',  # resumed after step 1
        '{"step": 3, "tokens/generated": 31}',
    )
    rows = read_rows(path)
    assert [(row["step"], row["tokens/generated"]) for row in rows] == [(1, 10), (2, 21), (3, 31)]
    assert summarize_run(rows, {})["generated_tokens"] == 62


def test_two_rows_of_one_step_are_one(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "metrics.jsonl", '{"step": 0, "a": 1}', '{"step": 0, "b": 2}')
    assert read_rows(path) == [{"step": 0, "a": 1, "b": 2}]


def test_a_torn_line_is_passed_over(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "metrics.jsonl", '{"step": 1, "a": 1}', '{"step": 2, "a"', "", '{"step": 3, "a": 3}')
    assert [row["step"] for row in read_rows(path)] == [1, 3]


def test_an_empty_file_has_no_rows(tmp_path: Path) -> None:
    assert read_rows(write_lines(tmp_path / "metrics.jsonl")) == []


def test_the_seconds_of_all_earlier_processes_add_up(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "metrics.jsonl",
        '{"step": 1, "wall_s": 20.5}',
        '{"step": 2, "wall_s": 30.25}',
        '{"step": 3, "wall_s": 40',  # torn by a kill; the second process counts from 0 again
        '{"step": 3, "wall_s": 12.0}',
        '{"step": 4, "wall_s": 25.5}',
        '{"step": 5, "wall_s": 11.0}',
    )
    assert seconds_so_far(path) == 30.25 + 25.5 + 11.0


def test_a_run_that_logged_nothing_took_no_seconds(tmp_path: Path) -> None:
    assert seconds_so_far(write_lines(tmp_path / "metrics.jsonl")) == 0
