"""The real vLLM engine with an adapter of its own. One probe measures, each test judges one figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.fakes.families import write
from tests.harness.probes import Probe

pytestmark = pytest.mark.integration

FAMILIES = ("llama", "mistral", "gemma2")


@pytest.fixture
def found(adapter_engine: dict[str, Any]) -> dict[str, Any]:
    return adapter_engine


def test_engine_and_learner_agree_before_the_first_step(found: dict[str, Any]) -> None:
    assert 0 < found["initial_mean"] <= 1e-5


def test_sequences_that_are_scored_at_once_agree_too(found: dict[str, Any]) -> None:
    assert 0 < found["together_max"] <= 1e-4


def test_the_adapter_alone_travels(found: dict[str, Any]) -> None:
    of_layer = 3 * (
        (64 + 64) + 2 * (64 + 32) + (64 + 64) + 3 * (64 + 128)
    )  # rank x (in + out) of q, k and v, o, the MLP
    assert found["bytes"] == 4 * 2 * of_layer
    assert found["bytes"] < 0.1 * found["model_bytes"]


def test_layers_that_compute_with_another_scale_are_refused_and_the_next_load_serves(found: dict[str, Any]) -> None:
    assert "version 4: the worker loaded" in found["other_scale_refused"]
    assert (found["other_scale_then"], found["other_scale_served"]) == (5, 19)


def test_a_layer_that_the_engine_does_not_have_is_refused_by_name(found: dict[str, Any]) -> None:
    assert "w_proj" in found["other_places_refused"]


@pytest.mark.long
def test_other_families_agree_too(tmp_path: Path, tiny_task: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_task / "policy", local_files_only=True)
    folders = [tmp_path / name for name in FAMILIES]
    for folder in folders:
        write(folder.name, tokenizer, folder)
    measured = Probe("tests.integration.adapter_probe", *folders).answer()
    assert list(measured) == [str(folder) for folder in folders]
    for folder, figures in measured.items():
        assert "error" not in figures, figures
        print(f"{folder}: mean {figures['mismatch_mean']:.1e}, largest {figures['mismatch_max']:.1e}")
        assert 0 < figures["mismatch_mean"] <= 1e-4
