"""`align plan` as a person sees it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from align.model.adapters import AdapterConfig
from cluster.capacity.machines import Node
from cluster.capacity.plan import plan
from cluster.capacity.rates import Rates
from cluster.faults import ConfigError
from cluster.spec.shape import model_shape
from tests.fakes.models import config_folder
from tests.fakes.run_files import config


def test_the_shape_of_a_model_is_that_of_the_model_itself(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    shape = model_shape(config_folder(tmp_path))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())
    assert (shape.num_layers, shape.hidden_size, shape.vocab_size) == (3, 32, 96)
    assert (shape.num_kv_heads, shape.head_dim) == (2, 8)


def test_a_model_of_seventy_billion_parameters_is_counted_without_memory(tmp_path: Path) -> None:
    sizes = {"vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    shape = model_shape(config_folder(tmp_path, **sizes, num_attention_heads=64, num_key_value_heads=8))
    assert shape.num_parameters == 70_553_706_496  # as published for this architecture
    assert shape.kv_bytes_per_token(2) == 327_680


def test_an_adapter_has_its_rank_times_the_sides_of_every_matrix_and_with_dora_a_length_of_every_row(
    tmp_path: Path,
) -> None:
    """Four attention matrices with keys and values half as wide, three of the feed-forward layer, in three layers."""
    sides = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 64), (32, 64), (64, 32)]
    lora, dora = (model_shape(config_folder(tmp_path), AdapterConfig(rank=5, kind=kind)) for kind in ("lora", "dora"))
    assert lora.num_adapter_parameters == lora.num_trained == 3 * sum(5 * (i + o) for i, o in sides)
    assert dora.num_adapter_parameters - lora.num_adapter_parameters == 3 * sum(o for _, o in sides)
    plain = model_shape(tmp_path)
    assert lora.num_parameters == plain.num_parameters == plain.num_trained


def test_a_folder_without_a_causal_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        model_shape(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ConfigError, match="cannot be used"):
        model_shape(tmp_path)


def test_a_plan_says_what_a_person_asks_of_it(tmp_path: Path) -> None:
    model = config_folder(tmp_path / "model")
    cfg = config(policy={"model": model}, reference={"model": model}, run={"group_size": 4, "max_staleness": 1})
    rates = Rates(generate=100, train=400, completion=50)
    text = plan(cfg, [Node(cpus=2, memory_gib=16)], rates)
    for words in (
        "2 prompts x 4 = 8 trajectories",
        "staleness    at most 1; 4 groups in flight at once",
        "to each of 1 actor(s) by object_store",
        "step time    4.0 s: generation 4.0 s, update 1.0 s",
        "idle         learner 75%, rollout actors 0% of a step",
        "fits         every process finds a place on the 1 machine(s)",
    ):
        assert words in text
    assert [line.split()[0] for line in text.splitlines()[3:7]] == ["controller", "learner", "rollout", "scorer"]
