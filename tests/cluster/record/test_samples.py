"""The samples of a run: answers before, after and of the reference, over kills and resumes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.loop.answer import Answer
from cluster.record.figures import summarize_run
from cluster.record.samples import Samples


def answers(text: str, judged: bool | None = None, num: int = 3, accuracy: float | None = None) -> list[Answer]:
    return [Answer(f"prompt {i}", f"{text} {i}", 0.5, 4, judged, accuracy) for i in range(num)]


def test_the_first_answers_are_before_and_the_newest_after(tmp_path: Path) -> None:
    samples = Samples(tmp_path / "samples.json")
    assert not samples.begun
    samples.add("heldout", answers("old", False), num=2)
    assert not samples.begun, "the other sets and the reference may be missing"
    samples.mark_begun()
    assert samples.begun
    samples.add("heldout", answers("middle", False), num=2)
    samples.add("heldout", answers("new", True), num=2)
    assert json.loads((tmp_path / "samples.json").read_text())["sets"]["heldout"] == [
        {
            "prompt": f"prompt {i}",
            "before": f"old {i}",
            "grammatical_before": False,
            "accuracy_before": None,
            "after": f"new {i}",
            "grammatical_after": True,
            "accuracy_after": None,
        }
        for i in range(2)
    ]


def test_how_right_an_answer_was_stands_beside_it(tmp_path: Path) -> None:
    samples = Samples(tmp_path / "samples.json")
    samples.add("heldout", answers("old", num=1, accuracy=0.0), num=1)
    samples.add("heldout", answers("new", num=1, accuracy=0.5), num=1)
    (row,) = samples.content["sets"]["heldout"]
    assert (row["accuracy_before"], row["accuracy_after"]) == (0.0, 0.5)


def test_a_resumed_run_keeps_its_answers_from_before_training(tmp_path: Path) -> None:
    samples = Samples(tmp_path / "samples.json")
    samples.add("heldout", answers("before the kill"), num=1)
    samples.mark_begun()
    resumed = Samples(tmp_path / "samples.json")
    assert resumed.begun
    resumed.add("heldout", answers("after it"), num=1)
    (row,) = resumed.content["sets"]["heldout"]
    assert (row["before"], row["after"]) == ("before the kill 0", "after it 0")


def test_answers_of_a_start_that_was_killed_halfway_do_not_count(tmp_path: Path) -> None:
    Samples(tmp_path / "samples.json").add("heldout", answers("before the kill"), num=1)
    again = Samples(tmp_path / "samples.json")
    assert not again.begun
    again.add("heldout", answers("asked again"), num=1)
    (row,) = again.content["sets"]["heldout"]
    assert (row["before"], row.get("after")) == ("asked again 0", None)


def test_the_reference_is_judged_over_all_its_answers_and_shown_beside_the_samples(tmp_path: Path) -> None:
    samples = Samples(tmp_path / "samples.json")
    samples.add("heldout", answers("old"), num=1)
    prompts = ["the cat", "the dog", "the"]
    texts = [" sleeps .", " dog dog", " cat sleeps ."]
    samples.add_reference("heldout", prompts, texts, judge="grammatical")
    assert samples.content["reference_rates"] == {"heldout": pytest.approx(2 / 3)}
    (row,) = samples.content["sets"]["heldout"]
    assert (row["reference"], row["grammatical_reference"]) == (texts[0], True)
    assert summarize_run([], samples.content)["grammatical_reference"] == pytest.approx(2 / 3)


def test_without_a_judge_the_reference_is_shown_and_has_no_rate(tmp_path: Path) -> None:
    samples = Samples(tmp_path / "samples.json")
    samples.add("train", answers("old"), num=3)
    samples.add_reference("train", ["p"], ["text 我"], judge=None)
    assert "reference_rates" not in samples.content
    stored = json.loads((tmp_path / "samples.json").read_text(encoding="utf-8"))
    assert stored["sets"]["train"][0]["reference"] == "text 我"
