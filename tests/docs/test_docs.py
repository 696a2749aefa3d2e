"""What is generated in the documents is what `make docs` would write, and the committed runs meet their goals."""

from __future__ import annotations

import re

import pytest

from tests.docs.documents import cell, documents, parts_in, read, with_parts
from tests.docs.figures import figures, short_console
from tests.docs.parts import PARTS, grafana
from tests.docs.tables import result
from tests.places import REPOSITORY, RESULTS

SHOWN = [(path.relative_to(REPOSITORY), name) for path in documents() for name in parts_in(read(path))]


@pytest.mark.parametrize(("document", "name"), SHOWN, ids=[f"{path}-{name}" for path, name in SHOWN])
def test_a_generated_part_is_as_make_docs_would_write_it(document: str, name: str) -> None:
    assert parts_in(read(REPOSITORY / document))[name] == f"{PARTS[name]()}\n", f"make docs writes {name} anew"


def test_every_part_is_shown_somewhere_and_no_marker_stands_alone() -> None:
    assert {name for _, name in SHOWN} == set(PARTS)
    markers = [marker for path in documents() for marker in re.findall(r"^<!-- [\w-]+:\w+ -->$", read(path), re.M)]
    assert len(markers) == 2 * len(SHOWN)


def test_the_files_of_grafana_are_as_make_docs_would_write_them() -> None:
    for path, content in grafana().items():
        assert read(path) == content, f"make docs writes {path} anew"


def test_a_part_is_replaced_between_its_markers_and_nothing_else_is() -> None:
    text = "before\n<!-- a:begin -->\nold\nlines\n<!-- a:end -->\nbetween <!-- b:begin -->\n<!-- b:end --> after"
    new = with_parts(text, {"a": "new", "b": r"with \1 in it"})
    assert parts_in(new) == {"a": "new\n", "b": "with \\1 in it\n"}
    assert new.startswith("before\n") and "\nbetween " in new and new.endswith(" after")
    assert with_parts(new, {"a": "new", "b": r"with \1 in it"}) == new


def test_a_part_that_nothing_writes_is_an_error() -> None:
    with pytest.raises(KeyError, match="unknown"):
        with_parts("<!-- unknown:begin -->\n<!-- unknown:end -->", {})


def test_a_bar_does_not_end_a_cell() -> None:
    assert cell("KL(mu || pi)") == r"KL(mu \|\| pi)"


def test_the_short_console_is_a_dozen_lines_of_the_long_one() -> None:
    shown = [line for line in short_console().strip("`\n").splitlines() if line != "  …"]
    captured = (RESULTS / "demo_console.txt").read_text(encoding="utf-8").splitlines()
    assert 9 <= len(shown) <= 12
    assert [line for line in captured if line in shown] == shown
    assert shown[0].startswith("ready after") and shown[-1].startswith("finished after 100 steps")


# --- what was captured --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("console", "run"), [("demo_console", "demo"), ("smollm2_heal_console", "smollm2_heal")])
def test_a_captured_console_is_that_of_the_committed_run(console: str, run: str) -> None:
    last, figure = (RESULTS / f"{console}.txt").read_text(encoding="utf-8").splitlines()[-1], result(run)
    assert last.startswith(f"finished after {figure['steps']} steps and {figure['wall_s']:.0f} s.")
    assert f"{figure['kl_per_token_before']:.3g} → {figure['kl_per_token_after']:.3g}" in last


def test_the_console_of_the_jobs_shows_a_refusal_a_stop_and_a_resumed_run() -> None:
    captured = (RESULTS / "jobs_console.txt").read_text(encoding="utf-8")
    commands = re.findall(r"^\$ align (jobs \w+|\w+)", captured, re.M)
    assert commands == ["submit", "submit", "jobs stop", "jobs logs", "submit", "jobs list"]
    assert re.findall(r"^# exit code (\d+)", captured, re.M) == ["3", "0", "0", "130", "0", "0"]
    assert "resuming     after step" in captured


# --- goals of the committed runs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["demo", "plain", "smollm2_heal", "smollm2_addition"])
def test_figures_are_those_of_a_run_that_finished(name: str) -> None:
    summary = result(name)
    assert summary["status"] == "finished"
    rows = dict(re.findall(r"^\| ([^|]+?) \| (.+?) \|$", figures(name), flags=re.M))
    assert rows["tokens generated"] == f"{summary['generated_tokens']:,}"
    assert rows["time"] == f"{summary['wall_s']:.0f} s"


def test_the_committed_runs_meet_their_goals() -> None:
    demo, real = result("demo"), result("smollm2_heal")
    assert demo["grammatical_before"] < 0.15
    assert demo["grammatical_after"] >= 0.9
    assert demo["kl_per_token_before"] >= 20 * demo["kl_per_token_after"]
    assert demo["wall_s"] <= 240
    assert real["kl_per_token_after"] <= real["kl_per_token_before"] / 2
    assert real["wall_s"] <= 25 * 60
    path = [row["eval/heldout/kl_per_token"] for row in real["evaluations"]]
    assert len(path) >= 4
    assert path == sorted(path, reverse=True), "the KL divergence falls at every evaluation"


def test_the_sums_are_learned() -> None:
    sums = result("smollm2_addition")
    assert sums["accuracy_before"] < 0.15
    assert sums["accuracy_after"] >= 0.5
    assert sums["wall_s"] <= 15 * 60


def test_engine_and_learner_agree_on_the_real_model_in_float32() -> None:
    real = result("smollm2_float32")
    assert real["steps"] >= 1
    assert 0 < real["mismatch_mean"] <= 1e-5
    assert real["mismatch_max"] <= 1e-3


def test_the_head_meets_its_goals() -> None:
    small, large = result("head"), result("head_1024")
    assert small["peak_of_naive_over_formed"] >= 6 and small["cpu_of_recompute_over_formed"] >= 2
    assert large["cpu_of_recompute_over_formed"] > 1.5
    for report in (small, large):
        assert max(found["gradient_error"] for found in report["median"].values()) < 1e-5


def test_the_correction_of_staleness_meets_its_goals() -> None:
    report = result("staleness")
    assert {row["seed"] for row in report["rows"]} == {1, 2, 3, 4, 5}
    assert report["relative_to_on_policy"]["corrected"] >= 0.99 > report["relative_to_on_policy"]["uncorrected"]
    assert report["after_mean"]["uncorrected"] > 1.5 * report["after_mean"]["corrected"]
