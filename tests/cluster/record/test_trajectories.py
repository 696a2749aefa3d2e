"""Trajectories read from disk: which steps there are, and what is said of each in brief."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.record.trajectories import Trajectories, excerpt, returns
from tests.fakes.transcripts import scored_group, written


def test_in_brief_a_trajectory_says_what_a_list_needs(tmp_path: Path) -> None:
    written(tmp_path / "trajectories" / "step_00006.parquet", scored_group(), scored_group(with_reference=False))
    long, short, unreferenced, _ = Trajectories(tmp_path).briefs(6)
    assert (long.step, long.ticket, long.repeat, long.prompt_id, long.prompt, long.excerpt) == (
        6,
        42,
        0,
        "p-1",
        "ij",
        "bcd",
    )
    assert (long.finish_reason, long.reward, long.num_tokens) == ("length", 9.0, 3)
    assert (long.staleness, short.staleness) == (1, 0), (
        "step 6 makes version 6 of version 5; the oldest tokens are of 4 and 5"
    )
    assert long.ref_gap == pytest.approx((-0.5 - 1.0 - 1.5 + 2 + 3 + 4) / 3)
    assert short.ref_gap == pytest.approx((-0.5 - 1.0 + 2 + 3) / 2)
    assert unreferenced.ref_gap is None
    assert long.log_ratio is None, "the update has not ended"


def test_where_no_trajectory_was_judged_by_a_reference_none_is_far_from_it(tmp_path: Path) -> None:
    written(tmp_path / "trajectories" / "step_00001.parquet", scored_group(with_reference=False))
    assert [brief.ref_gap for brief in Trajectories(tmp_path).briefs(1)] == [None, None]


@pytest.mark.parametrize("name", ["step_00001.tmp", "step_00001_not_finite.safetensors", "step_x.parquet"])
def test_other_files_beside_the_steps_are_no_steps(tmp_path: Path, name: str) -> None:
    written(tmp_path / "trajectories" / "step_00002.parquet", scored_group())
    (tmp_path / "trajectories" / name).write_bytes(b"")
    assert list(Trajectories(tmp_path).files) == [2]


def test_an_excerpt_is_one_line_that_keeps_the_end() -> None:
    assert excerpt("a\n  b\tc") == "a b c"
    assert excerpt("question and answer", 7) == "…answer"
    assert returns([1.0, -2.0, 4.0]) == [3.0, 2.0, 4.0]
