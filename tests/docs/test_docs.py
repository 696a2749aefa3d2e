"""The README says what is so: commands exist, figures are those of the committed results, the glossary is the code's."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from typer.testing import CliRunner

from align.metrics import GLOSSARY
from cluster.cli import app
from cluster.spec.config import RunConfig
from tests.places import REPOSITORY, RESULTS

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def section(name: str) -> str:
    """The text between two markers."""
    return README.split(f"<!-- {name}:begin -->")[1].split(f"<!-- {name}:end -->")[0]


def result(name: str) -> dict[str, Any]:
    """A committed summary."""
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return content


def glossary_table() -> str:
    """The glossary as the README shows it."""
    rows = [f"| `{name}` | {d.unit or '–'} | {d.meaning} |" for name, d in GLOSSARY.items()]
    return "\n".join(["", "| metric | unit | meaning |", "|---|---|---|", *rows, ""])


def algorithms_table() -> str:
    """The committed table of the bundles as the README shows it: all seeds of a bundle in a row."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in json.loads((RESULTS / "algorithms.json").read_text()):
        rows.setdefault(row["bundle"], []).append(row)
    lines = ["", "| bundle | KL per token, held-out prompts | grammatical | goal |", "|---|---|---|---|"]
    for bundle, seeds in rows.items():
        before, goal = seeds[0]["before"], seeds[0]["goal"]
        kl = ", ".join(f"{seed['after']['kl_per_token']:.3f}" for seed in seeds)
        grammatical = ", ".join(f"{seed['after']['grammatical']:.0%}" for seed in seeds)
        lines.append(
            f"| `{bundle}` | {before['kl_per_token']:.2f} → {kl} | {before['grammatical']:.0%} → {grammatical} "
            f"| {goal['grammatical']:.0%}, {goal['kl_per_token_fall']:g}x |"
        )
    return "\n".join([*lines, ""])


def variance_table() -> str:
    """What baselines do to the gradient, as the README shows it."""
    rows = [row for row in result("variance")["rows"] if row["group_size"] == 4]
    lines = [
        "",
        "| estimator, groups of 4 | scale of the gradient | error of its direction | variance |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {row['estimator']} | {row['scale']:.3f} | {row['direction_error']:.1%} | {row['variance_relative']:.1%} |"
        for row in rows
    ]
    return "\n".join([*lines, ""])


def head_table() -> str:
    """Time and memory of the head, each way, as the README shows it."""
    ways = {"naive": "all logits at once", "recompute": "chunks, computed again", "formed": "ours"}
    lines = ["", "| hidden units | way | peak memory | without the gradients | CPU time |", "|---|---|---|---|---|"]
    for name in ("head", "head_1024"):
        report = result(name)
        num_gradients = report["hidden_size"] * (report["vocab_size"] + report["num_tokens"])
        for way, words in ways.items():
            found = report["median"][way]
            peak, rest = found["peak_bytes"], found["peak_bytes"] - 4 * num_gradients
            lines.append(
                f"| {report['hidden_size']:,} | {words} | {peak / 1e9:.2f} GB | {rest / 1e9:.2f} GB | {found['cpu_s']:.1f} s |"
            )
    return "\n".join([*lines, ""])


def staleness_table() -> str:
    """What staleness costs with and without its correction, as the README shows it."""
    report = result("staleness")
    words = {"on_policy": "on-policy", "corrected": "staleness 4, corrected", "uncorrected": "staleness 4, uncorrected"}
    lines = ["", "| run | KL per token, five seeds | share of the KL gone | of on-policy's |", "|---|---|---|---|"]
    for arm, name in words.items():
        rows = [row for row in report["rows"] if row["arm"] == arm]
        after = ", ".join(f"{row['after']:.3f}" for row in rows)
        closed, relative = report["closed_mean"][arm], report["relative_to_on_policy"][arm]
        lines.append(f"| {name} | {rows[0]['before']:.2f} → {after} | {closed:.2%} | {relative:.2%} |")
    return "\n".join([*lines, ""])


def test_the_table_of_the_bundles_is_the_committed_one() -> None:
    if not (RESULTS / "algorithms.json").is_file():
        pytest.skip("make bench-algorithms has not been run to its end")
    assert section("algorithms") == algorithms_table()


def test_the_table_of_the_variance_is_the_committed_one() -> None:
    assert section("variance") == variance_table()


def test_the_table_of_the_head_is_the_committed_one_and_meets_the_goals() -> None:
    assert section("head") == head_table()
    small, large = result("head"), result("head_1024")
    assert small["peak_of_naive_over_formed"] >= 6 and small["cpu_of_recompute_over_formed"] >= 2
    assert large["cpu_of_recompute_over_formed"] > 1.5
    for report in (small, large):
        assert max(found["gradient_error"] for found in report["median"].values()) < 1e-5


def test_the_table_of_staleness_is_the_committed_one_and_meets_the_goals() -> None:
    assert section("staleness") == staleness_table()
    report = result("staleness")
    assert {row["seed"] for row in report["rows"]} == {1, 2, 3, 4, 5}
    assert report["relative_to_on_policy"]["corrected"] >= 0.99 > report["relative_to_on_policy"]["uncorrected"]
    assert report["after_mean"]["uncorrected"] > 1.5 * report["after_mean"]["corrected"]


def test_the_console_of_the_jobs_is_the_committed_one() -> None:
    captured = (RESULTS / "jobs_console.txt").read_text(encoding="utf-8")
    assert section("jobs") == f"\n```\n{captured}```\n"
    commands = re.findall(r"^\$ align (jobs \w+|\w+)", captured, re.M)
    assert commands == ["submit", "submit", "jobs stop", "jobs logs", "submit", "jobs list"]
    assert re.findall(r"^# exit code (\d+)", captured, re.M) == ["3", "0", "0", "130", "0", "0"]
    assert "resuming     after step" in captured


def test_the_output_of_doctor_is_the_committed_one() -> None:
    assert section("doctor") == f"\n```\n{(RESULTS / 'doctor.txt').read_text(encoding='utf-8')}```\n"


def test_the_glossary_is_that_of_the_code() -> None:
    assert section("glossary") == glossary_table()


def test_the_sums_are_learned_as_the_committed_run_says() -> None:
    figures, rows = (
        result("smollm2_addition"),
        dict(re.findall(r"^\| ([^|]+?) \| (.+?) \|$", section("addition"), re.M)),
    )
    assert figures["status"] == "finished"
    assert rows == {
        "figure": "value",
        "right answers, held-out sums": f"{figures['accuracy_before']:.1%} → {figures['accuracy_after']:.1%}",
        "right answers, trained sums": f"{figures['accuracy_before_train']:.1%} → {figures['accuracy_after_train']:.1%}",
        "engine and learner differ by": f"{figures['mismatch_mean']:.1e} mean, {figures['mismatch_max']:.1e} largest",
        "tokens generated": f"{figures['generated_tokens']:,}",
        "peak memory, all processes": f"{figures['peak_rss_bytes'] / 2**30:.1f} GiB",
        "time": f"{figures['wall_s']:.0f} s",
    }
    assert figures["accuracy_before"] < 0.15
    assert figures["accuracy_after"] >= 0.5
    assert figures["wall_s"] <= 15 * 60


@pytest.mark.parametrize("name", ["demo", "smollm2_heal", "plain"])
def test_figures_are_those_of_the_committed_run(name: str) -> None:
    text, figures = section({"demo": "demo", "smollm2_heal": "real", "plain": "plain"}[name]), result(name)
    assert figures["status"] == "finished"
    rows = dict(re.findall(r"^\| ([^|]+?) \| (.+?) \|$", text, flags=re.MULTILINE))
    shown = {
        "KL per token, held-out prompts": f"{figures['kl_per_token_before']:.3g} → {figures['kl_per_token_after']:.3g}",
        "KL per token, trained prompts": (
            f"{figures['kl_per_token_before_train']:.3g} → {figures['kl_per_token_after_train']:.3g}"
        ),
        "engine and learner differ by": f"{figures['mismatch_mean']:.1e} mean, {figures['mismatch_max']:.1e} largest",
        "tokens generated": f"{figures['generated_tokens']:,}",
        "peak memory, all processes": f"{figures['peak_rss_bytes'] / 2**30:.1f} GiB",
        "time": f"{figures['wall_s']:.0f} s",
    }
    if figures["grammatical_before"] is not None:
        before, after, reference = (figures[f"grammatical_{when}"] for when in ("before", "after", "reference"))
        shown["grammatical, held-out prompts"] = f"{before:.1%} → {after:.1%} (reference {reference:.1%})"
    assert {key: rows.get(key) for key in shown} == shown


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


def test_engine_and_learner_agree_on_the_real_model_in_float32() -> None:
    figures = result("smollm2_float32")
    assert figures["steps"] >= 1
    assert 0 < figures["mismatch_mean"] <= 1e-5
    assert figures["mismatch_max"] <= 1e-3


def test_every_command_of_the_readme_exists() -> None:
    used = set(
        re.findall(r"^\s*(?:\.venv/bin/)?align ([a-z0-9]+(?: [a-z0-9]+(?= (?:DIR|FILE|SOURCE|models)))?)", README, re.M)
    )
    assert {"train", "config", "models tiny", "models gguf"} <= used
    for command in used:
        assert CliRunner().invoke(app, [*command.split(), "--help"]).exit_code == 0, command


def test_every_make_target_of_the_readme_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), flags=re.M))
    assert set(re.findall(r"(?:`|^)make ([a-z-]+)", README, flags=re.M)) <= targets


def test_the_run_file_of_the_readme_is_valid() -> None:
    import tomllib

    (text,) = re.findall(r"```toml\n(.*?)```", README, flags=re.S)
    cfg = RunConfig.model_validate(tomllib.loads(text))
    assert cfg.transport == "nccl"
    assert cfg.engine_dtype == "bfloat16"


def test_every_file_of_the_file_map_exists() -> None:
    for row in re.findall(r"^\| (`(?:align|cluster|deploy)/.+?) \|", README, flags=re.M):
        names = re.findall(r"`([^`]+)`", row)
        folder = names[0].split("/")[0]
        for name in names:
            assert (REPOSITORY / name).exists() or (REPOSITORY / folder / name).exists(), name
