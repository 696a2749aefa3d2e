"""The README says what is so: commands exist, figures are those of the committed results, the glossary is the code's."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from align.metrics import GLOSSARY
from cluster.cli import app
from cluster.config import RunConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "deploy" / "runs" / "results"


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


def test_the_glossary_is_that_of_the_code() -> None:
    assert section("glossary") == glossary_table()


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
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
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
            assert (ROOT / name).exists() or (ROOT / folder / name).exists(), name
