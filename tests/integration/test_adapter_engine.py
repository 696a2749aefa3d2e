"""The real vLLM engine with an adapter of its own. One probe measures, each test judges one figure."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.families import write
from tests.fakes.models import write_small_model

pytestmark = pytest.mark.integration

PROBE = Path(__file__).with_name("adapter_probe.py")
FAMILIES = ("llama", "mistral", "gemma2")


def measure(*folders: Path) -> dict[str, Any]:
    """What the probe prints."""
    repository = PROBE.parents[2]
    command = [sys.executable, "-m", "tests.integration.adapter_probe", *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=repository)
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Measured on a small random model with a tied head and a rank-stabilised adapter on all its layers."""
    return measure(write_small_model(tmp_path_factory.mktemp("model")))


def test_engine_and_learner_agree_at_equal_version(found: dict[str, Any]) -> None:
    print(f"|behaviour - policy| mean {found['mismatch_mean']:.2e}, largest {found['mismatch_max']:.2e}")
    assert 0 < found["initial_mean"] <= 1e-5
    assert 0 < found["mismatch_mean"] <= 1e-5
    assert found["mismatch_max"] <= 1e-3


def test_sequences_that_are_scored_at_once_agree_too(found: dict[str, Any]) -> None:
    assert 0 < found["together_max"] <= 1e-4


def test_the_adapter_alone_travels(found: dict[str, Any]) -> None:
    of_layer = 3 * (
        (64 + 64) + 2 * (64 + 32) + (64 + 64) + 3 * (64 + 128)
    )  # rank x (in + out) of q, k and v, o, the MLP
    assert found["bytes"] == 4 * 2 * of_layer
    assert found["bytes"] < 0.1 * found["model_bytes"]


def test_one_flipped_bit_is_refused_and_the_old_adapter_goes_on_serving(found: dict[str, Any]) -> None:
    assert "arrived damaged" in found["damaged_refused"]
    assert found["damaged_version"] == 0
    assert found["damaged_still_serves"]
    assert found["staged_files_left"] == []


def test_a_load_between_two_steps_leaves_running_requests_alive_and_labels_every_token(found: dict[str, Any]) -> None:
    assert [0, 1] in found["in_flight_spans"], "no request ran across the load, the test shows nothing"
    assert found["in_flight_max"] <= 1e-3
    assert found["in_flight_version"] == 1


def test_keys_and_values_of_an_old_adapter_are_not_used_after_a_load(found: dict[str, Any]) -> None:
    assert found["prefix_cleared"] <= 1e-3
    assert found["prefix_kept"] > 0.1, "without clearing nothing went wrong, the test shows nothing"


def test_layers_that_compute_with_another_scale_are_refused_and_the_next_load_serves(found: dict[str, Any]) -> None:
    assert "version 4: the worker loaded" in found["other_scale_refused"]
    assert (found["other_scale_then"], found["other_scale_served"]) == (5, 19)


def test_a_layer_that_the_engine_does_not_have_is_refused_by_name(found: dict[str, Any]) -> None:
    assert "w_proj" in found["other_places_refused"]


@pytest.mark.long
def test_other_families_agree_too(tmp_path: Path, tiny_task: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_task / "policy", local_files_only=True)
    for name in FAMILIES:
        write(name, tokenizer, tmp_path / name)
    found = measure(*(tmp_path / name for name in FAMILIES))
    for name in FAMILIES:
        assert "error" not in found[name], found[name]
        print(f"{name}: mean {found[name]['mismatch_mean']:.1e}, largest {found[name]['mismatch_max']:.1e}")
        assert 0 < found[name]["mismatch_mean"] <= 1e-4
