"""Adapters: what they add to a matrix, their gradient, what others see of them, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast

from align.algorithm.config import AlgorithmConfig
from align.data.sampling import PLAIN
from align.learner.learner import LearnerConfig
from align.learner.optimizer import OptimizerConfig
from align.model.adapters import Adapter, AdapterConfig
from align.model.folder import LOCAL
from align.model.policy import Policy
from align.rewards.reference import ReferenceRewardConfig
from cluster.actors.learner import LearnerActor
from cluster.actors.scorer import ScorerActor, ScorerConfig
from cluster.faults import ConfigError
from cluster.spec.inputs import load_inputs
from tests.align.learner.test_learner import (
    assert_bitwise,
    assert_close,
    new_learner,
    ragged_batch,
    reduced,
    update,
    weights,
)
from tests.cluster.spec.test_config import refused
from tests.cluster.spec.test_config import run_file as run_file
from tests.cluster.spec.test_inputs import write_prompts
from tests.conftest import random_qwen3
from tests.fakes.families import random_model, write
from tests.fakes.run_files import config
from tests.fakes.trajectories import make_scored, make_trajectory

IDS = torch.tensor([[5, 9, 30, 31, 32, 7], [8, 8, 40, 3, 11, 60]])
KINDS = [
    pytest.param({"kind": "lora"}, id="lora"),
    pytest.param({"kind": "lora", "rslora": True}, id="rslora"),
    pytest.param({"kind": "dora"}, id="dora"),
    pytest.param({"kind": "dora", "rslora": True}, id="rsdora"),
]


def adapt(policy: Policy, *, moved: bool = True, seed: int = 0, **settings: Any) -> Policy:
    """The same policy with an adapter of rank 3; `moved` away from 0, as if it had learned."""
    policy.adapter = Adapter(policy.model, AdapterConfig(**({"rank": 3, "alpha": 4.0} | settings)), seed)
    if moved:
        generator = torch.Generator().manual_seed(seed)
        for _, parameter in trained(policy):
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return policy


def trained(policy: Policy) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in policy.model.named_parameters() if p.requires_grad]


def plain(policy: Policy, tied: bool = True) -> Policy:
    """A policy without an adapter that has the merged weights."""
    model = random_qwen3(seed=9, tied=tied)
    model.load_state_dict(dict(policy.named_weights()), strict=not tied)
    return Policy(model, policy.tokenizer)


# --- the formula -------------------------------------------------------------------------------------------------


def test_the_scale_is_alpha_over_the_rank_or_over_its_root() -> None:
    assert AdapterConfig(rank=16, alpha=8.0).scale == 0.5
    assert AdapterConfig(rank=16, alpha=8.0, rslora=True).scale == 2.0


def by_hand(w: Any, a: Any, b: Any, scale: float, magnitude: Any) -> list[list[float]]:
    """W + s B A, and for DoRA each row brought to the length that its magnitude says; float64 loops."""
    (rows, columns), rank = w.shape, len(a)
    merged = [[0.0] * columns for _ in range(rows)]
    for i in range(rows):
        for j in range(columns):
            merged[i][j] = w[i, j] + scale * sum(b[i, k] * a[k, j] for k in range(rank))
        if magnitude is not None:
            length = math.sqrt(sum(value * value for value in merged[i]))
            merged[i] = [magnitude[i] * value / length for value in merged[i]]
    return merged


@pytest.mark.parametrize("settings", KINDS)
def test_a_merged_matrix_is_the_formula(policy: Policy, settings: dict[str, Any]) -> None:
    before = {name: weight.clone() for name, weight in policy.named_weights()}
    adapt(policy, **settings)
    name = "model.layers.1.mlp.down_proj"
    parts = {n.removeprefix(f"{name}.").partition(".")[0]: p for n, p in trained(policy) if n.startswith(name)}
    scale = 4 / math.sqrt(3) if settings.get("rslora") else 4 / 3
    w, a, b = (t.detach().double().numpy() for t in (before[f"{name}.weight"], parts["lora_A"], parts["lora_B"]))
    magnitude = parts["lora_magnitude_vector"].detach().double().numpy() if settings["kind"] == "dora" else None
    expected = by_hand(w, a, b, scale, magnitude)
    merged = dict(policy.named_weights())
    torch.testing.assert_close(merged[f"{name}.weight"].double(), torch.tensor(expected), rtol=1e-5, atol=1e-6)
    untouched = [n for n in before if "norm" in n or "embed" in n]
    assert untouched and all(torch.equal(before[n], merged[n]) for n in untouched)


@pytest.mark.parametrize("settings", KINDS)
def test_an_adapter_that_has_learned_nothing_changes_nothing(policy: Policy, settings: dict[str, Any]) -> None:
    before, weights_before = policy.token_logprobs(IDS).logprobs, dict(plain(policy).named_weights())
    after = adapt(policy, moved=False, **settings).token_logprobs(IDS).logprobs
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
    for name, weight in policy.named_weights():
        torch.testing.assert_close(weight, weights_before[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("settings", KINDS)
def test_the_adapted_policy_and_its_merged_weights_say_the_same(
    tokenizer: PreTrainedTokenizerFast, settings: dict[str, Any], tied: bool
) -> None:
    places = {} if tied else {"target_modules": ("q_proj", "down_proj", "lm_head")}
    policy = adapt(Policy(random_qwen3(0, tied), tokenizer), **settings, **places)
    assert policy.trunk.has_head == tied, "a head with an adapter is no plain product any longer"
    own, merged = (p.token_logprobs(IDS, with_entropy=True) for p in (policy, plain(policy, tied)))
    torch.testing.assert_close(own.logprobs, merged.logprobs, rtol=1e-6, atol=4e-6)  # of up to 20 nats
    torch.testing.assert_close(own.entropy, merged.entropy, rtol=1e-6, atol=4e-6)


@torch.no_grad()
@pytest.mark.parametrize("settings", KINDS)
def test_in_bfloat16_the_sum_of_rounded_parts_stays_near_the_rounded_sum(
    tokenizer: PreTrainedTokenizerFast, settings: dict[str, Any]
) -> None:
    policy = adapt(Policy(random_qwen3(0), tokenizer, "bfloat16"), **settings)
    merged = plain(policy)
    merged.compute_dtype = "bfloat16"
    gap = (policy.token_logprobs(IDS).logprobs - merged.token_logprobs(IDS).logprobs)[:, 1:].abs()
    assert 0 < float(gap.mean()) < 0.05


# --- the gradient ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", KINDS)
def test_the_gradient_follows_from_that_of_the_full_weights_by_the_chain_rule(
    policy: Policy, settings: dict[str, Any]
) -> None:
    """dA = s B^T dV, dB = s dV A^T, with dV = dW' for LoRA; for DoRA dV = (m / c) dW' and dm = sum_in dW' V / c, c = ||V||."""
    start = {name: weight.clone() for name, weight in policy.named_weights()}
    adapt(policy, **settings)
    assert policy.adapter is not None
    full, scale = plain(policy), policy.adapter.cfg.scale
    expected = {}
    for one in (policy, full):
        output = one.token_logprobs(IDS, with_entropy=True, entropy_gradient=True)
        (output.logprobs * torch.arange(6) + output.entropy).sum().backward()  # type: ignore[no-untyped-call]
    of_full = {name: p.grad for name, p in full.model.named_parameters()}
    for name, parameter in trained(policy):
        if not name.endswith("lora_A.default.weight"):
            continue
        layer = policy.model.get_submodule(name.removesuffix(".lora_A.default.weight"))
        matrix = name.replace(".lora_A.default", "")
        a, b, dv = parameter.detach(), layer.lora_B["default"].weight.detach(), of_full[matrix]
        assert dv is not None
        if settings["kind"] == "dora":
            key = "lora_magnitude_vector.default.weight"
            v = start[matrix] + scale * b @ a
            length, magnitude = v.norm(dim=1), layer.get_parameter(key).detach()
            expected[name.replace("lora_A.default.weight", key)] = (dv * v).sum(dim=1) / length
            dv = (magnitude / length)[:, None] * dv
        expected[name] = scale * b.T @ dv
        expected[name.replace("lora_A", "lora_B")] = scale * dv @ a.T
    assert_close({name: p.grad for name, p in trained(policy) if p.grad is not None}, expected)


def test_the_gradient_of_lora_is_that_of_finite_differences(policy: Policy) -> None:
    adapt(policy)
    loss = policy.token_logprobs(IDS).logprobs.sum()
    loss.backward()  # type: ignore[no-untyped-call]
    generator = torch.Generator().manual_seed(3)
    directions = {n: torch.randn(p.shape, generator=generator) for n, p in trained(policy)}
    slope = sum(float((p.grad * directions[n]).sum()) for n, p in trained(policy) if p.grad is not None)

    def moved(step: float) -> float:
        with torch.no_grad():
            for name, parameter in trained(policy):
                parameter += step * directions[name]
            value = float(policy.token_logprobs(IDS).logprobs.double().sum())
            for name, parameter in trained(policy):
                parameter -= step * directions[name]
        return value

    assert (moved(1e-3) - moved(-1e-3)) / 2e-3 == pytest.approx(slope, rel=1e-2)


# --- the learner -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", KINDS)
def test_steps_change_the_adapter_and_nothing_else(policy: Policy, settings: dict[str, Any]) -> None:
    learner = new_learner(adapt(policy, moved=False, **settings))
    before = weights(learner)
    for seed in (0, 1):  # the first has no gradient for A, since B is 0
        update(learner, ragged_batch(seed))
    names, after = {name for name, _ in trained(policy)}, weights(learner)
    assert names == {name for name in after if "lora" in name} != set()
    assert {name for name, value in after.items() if not torch.equal(value, before[name])} == names
    assert {n for n, p in learner.policy.model.named_parameters() if p in learner.optimizer.adam.state} == names


@pytest.mark.parametrize(
    "knobs",
    [{"packing": False}, {"max_tokens": 12}, {"activation_checkpointing": True}, {"max_logits_bytes": 2048}],
    ids=lambda knobs: next(iter(knobs)),
)
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_knobs_of_memory_and_speed_change_nothing_with_an_adapter(
    tokenizer: PreTrainedTokenizerFast, kind: str, knobs: dict[str, Any]
) -> None:
    found = []
    for settings in ({}, knobs):
        learner = new_learner(adapt(Policy(random_qwen3(0), tokenizer), kind=kind), **settings)
        found.append(update(learner, ragged_batch()))
    (gradients, stats), (others, other_stats) = found
    assert_close(others, gradients)
    padding = "throughput/padding_fraction"
    one, other = ({n: v for n, v in reduced(s).items() if n != padding} for s in (stats, other_stats))
    assert other == pytest.approx(one, rel=1e-4, abs=1e-6)


def test_equal_seeds_start_equal_adapters_whatever_was_drawn_before(tokenizer: PreTrainedTokenizerFast) -> None:
    found = []
    for drawn, seed in ((0, 1), (5, 1), (0, 2)):
        torch.randn(drawn)
        policy = adapt(Policy(random_qwen3(0), tokenizer), moved=False, seed=seed)
        found.append({name: p.detach() for name, p in trained(policy)})
    assert_bitwise(found[0], found[1])
    assert not torch.equal(*(next(iter(one.values())) for one in (found[0], found[2])))


# --- what others see ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma2", "qwen3_moe", "mixtral"])
def test_engines_get_the_names_and_shapes_of_the_plain_model(family: str, tokenizer: PreTrainedTokenizerFast) -> None:
    policy = Policy(random_model(family, tokenizer), tokenizer)
    linear = {f"{n}.weight" for n, m in policy.model.named_modules() if isinstance(m, torch.nn.Linear)}
    before, shapes = {n: w.clone() for n, w in policy.named_weights()}, policy.named_shapes()
    after = dict(adapt(policy).named_weights())
    assert list(after) == list(before) == list(shapes)
    assert policy.named_shapes() == shapes == {name: tuple(weight.shape) for name, weight in after.items()}
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == linear - {"lm_head.weight"}
    assert any("q_proj" in name for name in changed)
    assert not any("experts" in name for name in changed), "as the description of target_modules says"


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_merged_folder_and_the_adapter_on_the_first_weights_are_both_the_policy(
    policy: Policy, kind: str, model_folder: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    adapt(policy, kind=kind)
    assert policy.adapter is not None
    policy.save(tmp_path / "policy")
    policy.adapter.save(tmp_path / "policy_adapter")
    assert_bitwise(dict(Policy.load(tmp_path / "policy").named_weights()), dict(policy.named_weights()))
    first = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, **LOCAL)
    again = PeftModel.from_pretrained(first, tmp_path / "policy_adapter").eval()
    assert torch.equal(again(input_ids=IDS).logits, policy.model(input_ids=IDS).logits)


def new_actor(model: Path, folder: Path, **adapter: Any) -> LearnerActor:
    return LearnerActor(
        model,
        AlgorithmConfig(),
        OptimizerConfig(lr=1e-2),
        LearnerConfig(),
        compute_dtype="float32",
        wire_dtype="float32",
        num_steps=4,
        sampling=PLAIN,
        judge=None,
        reward=ReferenceRewardConfig(),
        trajectories=folder,
        seed=0,
        adapter=AdapterConfig(rank=3, **adapter),
    )


def step(actor: LearnerActor, number: int) -> None:
    scored = make_scored([make_trajectory([5, 6], [7 + number, 8]), make_trajectory([5, 6], [9])], [[1, -2], [3]])
    actor.update(number, scored.group, scored.scores)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_resumed_learner_equals_the_one_that_went_on_bit_for_bit(
    kind: str, model_folder: Path, tmp_path: Path
) -> None:
    actor = new_actor(model_folder, tmp_path, kind=kind)
    start = actor.fingerprint()
    for number in (1, 2):
        step(actor, number)
    actor.save(tmp_path / "checkpoint")
    resumed = new_actor(model_folder, tmp_path, kind=kind)
    assert resumed.fingerprint() == start
    resumed.restore(tmp_path / "checkpoint", 2)
    assert resumed.fingerprint() == actor.fingerprint() != start
    for number in (3, 4):
        step(actor, number)
        step(resumed, number)
    assert_bitwise(weights(resumed.learner), weights(actor.learner))
    assert resumed.export()[0].fingerprint == actor.export()[0].fingerprint


def test_a_reference_that_is_refreshed_takes_the_merged_weights(model_folder: Path, tmp_path: Path) -> None:
    actor = new_actor(model_folder, tmp_path)
    step(actor, 1)
    actor.export_policy(tmp_path / "saved")
    scorer = ScorerActor(model_folder, model_folder, ReferenceRewardConfig(), False, ScorerConfig(), "float32")
    assert scorer.load_reference(tmp_path / "saved") == actor.fingerprint()
    assert not (tmp_path / "saved_adapter").exists()
    actor.export_policy(tmp_path / "policy", with_adapter=True)
    settings = json.loads((tmp_path / "policy_adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["peft_type"], settings["base_model_name_or_path"]) == (3, "LORA", str(model_folder))


# --- engines that have the adapter itself --------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
def test_the_factors_that_engines_get_multiply_to_what_is_merged(policy: Policy, rslora: bool) -> None:
    start = {name: weight.clone() for name, weight in policy.named_weights()}
    adapt(policy, rslora=rslora, target_modules=("q_proj", "down_proj"))
    factors, merged = dict(policy.named_factors()), dict(policy.named_weights())
    places = {name.partition(".lora_")[0] for name in factors}
    assert len(factors) == 2 * len(places) == 2 * 2 * 2
    for place in places:
        name = f"{place.removeprefix('base_model.model.')}.weight"
        a, b = (factors[f"{place}.lora_{part}.weight"] for part in "AB")
        torch.testing.assert_close(start[name] + b @ a, merged[name], rtol=1e-5, atol=1e-6)
        assert not torch.equal(start[name], merged[name])


def test_peft_takes_the_factors_for_an_adapter_whose_alpha_is_its_rank(
    policy: Policy, model_folder: Path, tmp_path: Path
) -> None:
    """So does vLLM, which has the same folders."""
    from peft import LoraConfig, PeftModel

    adapt(policy, rslora=True)
    save_file({n: t.contiguous() for n, t in policy.named_factors()}, tmp_path / "adapter_model.safetensors")
    LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=3, target_modules="all-linear").save_pretrained(tmp_path)
    first = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, **LOCAL)
    again = PeftModel.from_pretrained(first, tmp_path).eval()
    torch.testing.assert_close(again(input_ids=IDS).logits, policy.model(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)


def test_a_learner_sends_the_adapter_alone_where_engines_have_it_and_what_else_it_writes_is_the_same(
    model_folder: Path, tmp_path: Path
) -> None:
    actors = [new_actor(model_folder, tmp_path, publish=publish) for publish in ("merged", "adapter")]
    for actor in actors:
        step(actor, 1)
    merged, adapter = (actor.export() for actor in actors)
    trained_bytes = 4 * sum(p.numel() for _, p in trained(actors[1].policy))
    assert adapter[1] == (trained_bytes, 1) and adapter[0].num_bytes == trained_bytes
    assert merged[0].num_bytes == 4 * sum(w.numel() for _, w in actors[0].policy.named_weights())
    assert {name.split(".")[-2] for name in adapter[0].arrays} == {"lora_A", "lora_B"}
    assert actors[0].fingerprint() == actors[1].fingerprint()


def test_an_adapter_goes_by_ray_also_between_gpus() -> None:
    gpus = {"learner": {"num_gpus": 1}, "rollout": {"num_gpus": 1}}
    adapter = {"publish": "adapter", "rank": 4}
    assert config(**gpus, policy={"model": Path("m"), "adapter": {"rank": 4}}).transport == "nccl"
    cfg = config(**gpus, policy={"model": Path("m"), "adapter": adapter})
    assert (cfg.transport, cfg.policy.engine_adapter) == ("object_store", cfg.policy.adapter)


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (["policy.adapter.dropout=0.1"], "another policy than the one that sampled; it has to be 0"),
        (["policy.adapter.publish='adapter'", "policy.adapter.kind='dora'"], "needs kind = 'lora': vLLM has no DoRA"),
        (["policy.adapter.publish='adapter'", "policy.adapter.rank=513"], "needs a rank of at most 512 (not 513)"),
        (
            [
                "policy.adapter.publish='adapter'",
                "weights.transport='nccl'",
                "learner.num_gpus=1",
                "rollout.num_gpus=1",
            ],
            "needs weights.transport = 'object_store' (not 'nccl'): vLLM takes adapters from files",
        ),
        (["policy.adapter.publish='adapter'", "rollout.num_gpus=2"], "needs rollout.num_gpus of at most 1"),
        (["policy.adapter.rank=0"], "policy.adapter.rank: Input should be greater than or equal to 1"),
        (["policy.adapter.lora_alpha=3"], "unknown key 'policy.adapter.lora_alpha'; did you mean 'alpha'"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused_with_the_reason(
    settings: list[str], reason: str, run_file: Path
) -> None:
    assert reason in refused(run_file, *settings)


@pytest.mark.parametrize(
    ("places", "reason"),
    [
        (("q_proj", "w_proj"), "no layer of Qwen3ForCausalLM is called 'w_proj'"),
        (("lm_head",), "lm_head is the embedding too"),
        (("embed_tokens",), "model.embed_tokens is a Embedding; only linear layers"),
    ],
)
def test_places_that_cannot_be_adapted_are_refused(
    places: tuple[str, ...], reason: str, policy: Policy, model_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=reason):
        adapt(policy, target_modules=places)
    section = {"model": model_folder, "adapter": {"target_modules": places}}
    prompts = {"files": [write_prompts(tmp_path / "train.jsonl", "a cat")]}
    room = {"sampling": {"max_tokens": 32}, "rollout": {"max_model_len": 64}}
    cfg = config(policy=section, reference={"model": model_folder}, prompts=prompts, **room)
    with pytest.raises(ConfigError, match=rf"\[policy\.adapter\].*{reason}"):
        load_inputs(cfg)


def test_a_head_that_engines_would_have_an_adapter_on_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    policy = Policy(random_qwen3(0, tied=False), tokenizer)
    with pytest.raises(ValueError, match="lm_head is the head; with an adapter there vLLM cannot score"):
        adapt(policy, target_modules=("q_proj", "lm_head"), publish="adapter")


@pytest.mark.parametrize("num_gpus", [0, 1])
def test_a_mixture_of_experts_has_its_adapter_merged_on_cpus(
    num_gpus: int, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    write("qwen3_moe", tokenizer, tmp_path / "model")
    section = {"model": tmp_path / "model", "adapter": {"publish": "adapter"}}
    prompts = {"files": [write_prompts(tmp_path / "train.jsonl", "a cat")]}
    room = {"sampling": {"max_tokens": 32}, "rollout": {"max_model_len": 64, "num_gpus": num_gpus}}
    cfg = config(policy=section, reference={"model": tmp_path / "model"}, prompts=prompts, **room)
    if num_gpus:
        assert len(load_inputs(cfg).train) == 1
    else:
        with pytest.raises(ConfigError, match=r"needs rollout\.num_gpus = 1 for a mixture of experts"):
            load_inputs(cfg)


def test_models_whose_matrices_are_something_else_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no linear layers but its head"):
        Adapter(gpt2, AdapterConfig())
    model = random_qwen3(0)
    model.config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(ValueError, match="quantised"):
        Adapter(model, AdapterConfig())


def test_the_adapter_of_another_run_is_not_taken_up(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    policy, other = (adapt(Policy(random_qwen3(0), tokenizer), rank=rank) for rank in (3, 4))
    assert policy.adapter is not None and other.adapter is not None
    with pytest.raises(ValueError, match="holds no adapter"):
        policy.adapter.load(tmp_path)
    other.adapter.save(tmp_path)
    with pytest.raises(ValueError, match="not of this run's kind, rank, places and model"):
        policy.adapter.load(tmp_path)
