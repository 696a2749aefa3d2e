"""The report of a run: what it says, what it does with damaged folders and hostile text, and that it is reproducible."""

import json
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from align.metrics import GLOSSARY, Definition
from cluster.views.plots import COLORS
from cluster.views.report import verdict, write_report
from cluster.views.run_record import read_run

FINISHED = {
    "status": "finished",
    "name": "grammar",
    "seed": 12345,
    "steps": 2,
    "wall_s": 812.4,
    "peak_rss_bytes": 3 * 2**30,
    "generated_tokens": 98304,
    "kl_per_token_before": 1.512,
    "kl_per_token_after": 0.004,
    "grammatical_before": 0.0625,
    "grammatical_after": 0.9375,
    "grammatical_reference": 0.961,
}
ROWS: tuple[dict[str, Any], ...] = (
    {"step": 0, "eval/heldout/kl_per_token": 1.512, "eval/heldout/grammatical": 0.0625},
    {"step": 1, "kl/behavior_reference": 1.2, "reward/token_mean": -2.5, "staleness/max": 1},
    {"step": 2, "kl/behavior_reference": 0.01, "reward/token_mean": -1.25, "staleness/max": 1},
    {"step": 2, "eval/heldout/kl_per_token": 0.004, "eval/heldout/grammatical": 0.9375},
)
FILES = ("summary.json", "metrics.jsonl", "samples.json", "config.toml", "environment.json")


class Page(HTMLParser):
    """What a browser would see: the tags with their attributes, and the text outside the style sheet."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.parts: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.text = re.sub(r"\s+", " ", " ".join(self.parts))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] != ["style"]:
            self.parts.append(data)


def write_run(
    folder: Path,
    summary: Mapping[str, Any] = FINISHED,
    rows: tuple[dict[str, Any], ...] = ROWS,
    samples: tuple[dict[str, Any], ...] = (),
) -> Path:
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "samples.json").write_text(json.dumps({"sets": {"heldout": samples}}))
    (folder / "config.toml").write_text("[learner]\nlr = 0.001\n")
    (folder / "environment.json").write_text(json.dumps({"torch": "2.11.0"}))
    return folder


def test_the_verdict_gives_the_numbers_before_and_after_and_the_factor_between_them() -> None:
    assert verdict(FINISHED) == (
        "KL per token to the reference 1.51 → 0.004 (378 times smaller); grammatical 6% → 94% (reference 96%)."
    )


def test_the_page_says_where_tokens_and_time_went_and_leaves_out_what_was_nothing(tmp_path: Path) -> None:
    shares = {"trained": 0.875, "filtered": 0.125, "left": 0.0}
    time = {"rollout_wait": 0.25, "update": 0.75, "idle_learner": 0.25, "idle_scorer": 0.9}
    page = Page(write_report(write_run(tmp_path, {**FINISHED, "goodput": shares, "time": time}), GLOSSARY))
    assert re.search(r"Sampled tokens trained 88% Sampled tokens so far that carried loss .* filtered 12%", page.text)
    assert re.search(r"Time of the steps rollout wait 25% Time the learner waited for groups\. update 75%", page.text)
    assert re.search(r"Idle learner 25% .* scorer 90% Share of the scorers' time", page.text)
    assert "left" not in page.text.split("Where tokens and time went")[1].split("Curves")[0]
    for damaged in ({}, {"goodput": 3, "time": {"update": "much"}}):
        assert "Where tokens" not in Page(write_report(write_run(tmp_path, {**FINISHED, **damaged}), GLOSSARY)).text


def test_a_run_without_a_reference_is_summed_up_by_its_right_answers(tmp_path: Path) -> None:
    summary = {"status": "finished", "kl_per_token_before": None, "accuracy_before": 0.078125, "accuracy_after": 0.5}
    rows = tuple({"step": step, "eval/heldout/accuracy": value} for step, value in ((0, 0.078125), (2, 0.5)))
    assert verdict(summary) == "Right answers 8% → 50%."
    text = Page(write_report(write_run(tmp_path, summary, rows))).text
    assert "Right answers held-out prompts before 8% after 50%" in text
    assert "8% → 50%" in text.split("Curves")[1]
    assert "KL" not in text


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (0.5, 1.0, "0.5 → 1 (2.0 times larger)."),
        (1.0, 1.01, "1 → 1.01 (about the same)."),
        (1.0, 0.0, "1 → 0."),
        (1.0, -0.001, "1 → -0.001."),
    ],
)
def test_the_verdict_gives_a_factor_only_where_one_means_something(before: float, after: float, said: str) -> None:
    assert verdict({"kl_per_token_before": before, "kl_per_token_after": after}).endswith(said)


def test_a_finished_run_shows_its_key_figures_and_raises_no_complaint(tmp_path: Path) -> None:
    text = Page(write_report(write_run(tmp_path))).text
    for shown in (
        "grammar",
        "finished",
        "13 min 32 s",
        "98,304",
        "3.0 GiB",
        "12345",
        "lr = 0.001",
        '"torch": "2.11.0"',
    ):
        assert shown in text
    assert "incomplete" not in text
    assert "failed" not in text


def test_the_tiles_leave_out_what_was_not_measured(tmp_path: Path) -> None:
    text = Page(write_report(write_run(tmp_path))).text
    assert "Judged grammatical held-out prompts before 6% after 94% reference 96%" in text
    assert "training prompts" not in text
    assert "Tokens trained" not in text


def test_each_curve_has_the_meaning_from_the_glossary_as_its_caption(tmp_path: Path) -> None:
    glossary = {"reward/token_mean": Definition("nats", "How much the judge liked a token.", "mean")}
    text = Page(write_report(write_run(tmp_path), glossary)).text
    assert "-2.5 → -1.25 nats How much the judge liked a token. reward/token_mean" in text
    assert "kl/behavior_reference" in text, "a metric that the glossary lacks is shown by its bare name"


def test_text_from_models_and_files_is_shown_and_never_interpreted(tmp_path: Path) -> None:
    attack = "</td></style><script>alert(1)</script><img src=x onerror=alert(2)>"
    run = write_run(
        tmp_path,
        {**FINISHED, "name": attack, "status": f'failed" onclick="{attack}', "error": attack},
        (*ROWS, {"step": 3, f"x/{attack}": 1.0}),
        ({"prompt": attack, "before": attack, "after": attack, "reference": "{{ 7 * 191 }} $\\frac{1$"},),
    )
    (run / "config.toml").write_text(attack)
    (run / "environment.json").write_text(json.dumps({attack: attack}))
    page = Page(write_report(run))
    assert not {"script", "img"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.text.count(attack) >= 9
    assert "{{ 7 * 191 }} $\\frac{1$" in page.text


def test_the_page_loads_nothing_from_outside_itself(tmp_path: Path) -> None:
    page = Page(write_report(write_run(tmp_path)))
    links = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "srcset", "data")]
    assert links, "the markers of the curves refer to their shape inside the page"
    assert [link for link in links if not link.startswith("#")] == []
    assert "@import" not in page.source
    assert re.findall(r"url\((?!#)", page.source) == []
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


def test_samples_stand_side_by_side_with_the_word_of_the_judge(tmp_path: Path) -> None:
    sample = {"prompt": "the dog", "before": "", "after": "sees <b>", "reference": None}
    judged = {**sample, "grammatical_before": False, "grammatical_after": True, "grammatical_reference": None}
    text = Page(write_report(write_run(tmp_path, samples=(judged,)))).text
    assert "Before After Reference the dog ✗ (empty) ✓ sees <b> –" in text


def test_verified_samples_are_marked_and_without_a_reference_there_is_no_column_for_it(tmp_path: Path) -> None:
    sample = {"prompt": "2 + 3 =", "before": "6", "accuracy_before": 0.25, "after": "5", "accuracy_after": 1.0}
    page = Page(write_report(write_run(tmp_path, samples=(sample,))))
    assert "Before After 2 + 3 = ✗ 6 ✓ 5" in page.text
    assert ("title", "scored 0.25 of 1") in page.attributes


def test_samples_beyond_the_first_twelve_are_folded_away_but_kept(tmp_path: Path) -> None:
    samples = tuple({"prompt": f"prompt number {index}.", "before": "a", "after": "b"} for index in range(15))
    text = Page(write_report(write_run(tmp_path, samples=samples))).text
    assert text.index("prompt number 11.") < text.index("3 more") < text.index("prompt number 12.")
    assert "prompt number 14." in text


def test_a_failed_run_says_why_before_anything_else(tmp_path: Path) -> None:
    error = "ActorLost: rollout actor 1 on node a\nnext: align resume"
    text = Page(write_report(write_run(tmp_path, {"status": "failed", "name": "broken", "error": error}))).text
    assert "The run failed. ActorLost: rollout actor 1 on node a next: align resume" in text
    assert text.index("ActorLost") < text.index("Curves")


def test_a_failed_run_without_a_reason_says_that_there_is_none(tmp_path: Path) -> None:
    assert (
        "The run failed. The summary gives no reason."
        in Page(write_report(write_run(tmp_path, {"status": "failed"}))).text
    )


def test_a_summary_of_nulls_gives_a_page_without_invented_numbers(tmp_path: Path) -> None:
    nothing = dict.fromkeys(FINISHED)
    text = Page(write_report(write_run(tmp_path, nothing, rows=()))).text
    assert "No evaluation before and after was recorded." in text
    assert "No metrics were recorded." in text
    assert "None" not in text
    assert "Steps" not in text


def test_an_empty_folder_gives_a_page_that_names_every_missing_file(tmp_path: Path) -> None:
    text = Page(write_report(tmp_path)).text
    assert [name for name in FILES if f"{name} is missing." not in text] == []
    assert "no summary" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html"]


@pytest.mark.parametrize("missing", FILES)
def test_one_missing_file_is_the_only_one_complained_about(tmp_path: Path, missing: str) -> None:
    (write_run(tmp_path) / missing).unlink()
    assert read_run(tmp_path).notes == (f"{missing} is missing.",)
    assert f"{missing} is missing." in Page(write_report(tmp_path)).text


def test_a_place_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected the folder of a run at .*nowhere"):
        write_report(tmp_path / "nowhere")


def test_torn_files_are_reported_and_the_rest_is_used(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    with (run / "metrics.jsonl").open("a") as lines:
        lines.write('[1]\n{"no/step": 1}\n{"step": 3, "rew')
    (run / "summary.json").write_text('{"status": "fin')
    (run / "samples.json").write_text('{"sets": [1]}')
    (run / "environment.json").write_bytes(b"\xff\x00")
    record = read_run(run)
    assert record.notes == (
        "summary.json is damaged: it does not hold one JSON object.",
        "metrics.jsonl: 3 damaged lines left out.",
        "samples.json is damaged: `sets` is not a table of lists.",
        "environment.json is damaged: it does not hold one JSON object.",
    )
    assert record.series["reward/token_mean"] == {1: -2.5, 2: -1.25}
    assert "3 damaged lines left out" in Page(write_report(run)).text


def test_rows_that_a_resumed_run_wrote_again_replace_the_first_ones(tmp_path: Path) -> None:
    rows = ({"step": 2, "staleness/max": 9}, {"step": 1, "staleness/max": 1}, {"step": 2, "staleness/max": 2})
    series = read_run(write_run(tmp_path, rows=rows)).series
    assert list(series["staleness/max"].items()) == [(1, 1.0), (2, 2.0)]


def test_metrics_that_are_null_or_no_number_are_left_out(tmp_path: Path) -> None:
    rows = ({"step": 1, "wall_s": 2.0, "a/null": None, "a/text": "x", "a/flag": True, "a/value": 3},)
    assert read_run(write_run(tmp_path, rows=rows)).series == {"a/value": {1: 3.0}}


def test_text_that_utf8_cannot_hold_does_not_stop_the_report(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    (run / "samples.json").write_text('{"sets": {"heldout": [{"prompt": "half \\ud83d pair"}]}}')
    assert "half ? pair" in Page(write_report(run)).text


def test_the_same_folder_gives_the_same_bytes_twice(tmp_path: Path) -> None:
    run = write_run(tmp_path, samples=({"prompt": "a", "before": "b", "after": "c"},))
    first = [write_report(run).read_bytes(), (run / "curves.svg").read_bytes()]
    assert [write_report(run).read_bytes(), (run / "curves.svg").read_bytes()] == first


def test_only_paths_that_the_run_folder_has_are_offered(tmp_path: Path) -> None:
    (write_run(tmp_path) / "policy").mkdir()
    text = Page(write_report(tmp_path)).text
    assert "tail -n 1 metrics.jsonl" in text
    assert "the trained policy, as a Hugging Face folder" in text
    assert "wandb" not in text


def test_an_old_picture_does_not_outlive_its_metrics(tmp_path: Path) -> None:
    write_report(write_run(tmp_path))
    assert (tmp_path / "curves.svg").exists()
    write_report(write_run(tmp_path, rows=()))
    assert not (tmp_path / "curves.svg").exists()


def test_every_colour_of_a_drawing_has_a_light_and_a_dark_value(tmp_path: Path) -> None:
    source = write_report(write_run(tmp_path)).read_text(encoding="utf-8")
    assert [re.findall(rf"--c{index}: (#\w+);", source) for index in range(len(COLORS))] == [list(c) for c in COLORS]


def test_values_that_a_log_scale_cannot_show_are_counted_on_the_page(tmp_path: Path) -> None:
    rows = tuple({"step": step, "kl/behavior_reference": value} for step, value in enumerate((0.5, -0.01, 0.0, 0.1)))
    text = Page(write_report(write_run(tmp_path, rows=rows))).text
    assert "2 values at or below zero cannot be drawn on a log scale." in text


def test_values_that_are_not_finite_leave_a_gap_and_are_named(tmp_path: Path) -> None:
    rows = ({"step": 1, "reward/token_mean": -1.0}, {"step": 2, "reward/token_mean": float("nan")})
    page = Page(write_report(write_run(tmp_path, rows=(*rows, {"step": 3, "staleness/max": float("inf")}))))
    assert "-1 → nan nats" in page.text
    assert not re.search(r"\b(nan|inf)\b", "".join(re.findall(r"<svg.*?</svg>", page.source, re.DOTALL)))
