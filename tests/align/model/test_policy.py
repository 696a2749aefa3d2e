"""The policy against a naive forward pass, its end tokens, and its folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from align.data.sampling import Sampling
from align.model.folder import checked_model_directory
from align.model.policy import Policy
from tests.fakes.models import VOCAB_SIZE, random_qwen3
from tests.oracles import formulas as oracle
from tests.oracles.naive import naive_distribution
from tests.oracles.tabular import TabularLM

IDS = torch.tensor([[5, 9, 30, 31, 32, 7], [8, 8, 40, 3, 11, 60]])


# --- log-probabilities -------------------------------------------------------------------------------------------


def test_the_distribution_behind_entry_t_minus_start_is_that_of_token_t(policy: Policy) -> None:
    for start in (1, 3):
        logits = policy.logits(IDS, start)
        assert logits.shape == (2, 6 - start, VOCAB_SIZE)
        for b, row in enumerate(IDS.tolist()):
            for t in range(start, 6):
                expected = torch.tensor(naive_distribution(policy, row[:t]))
                torch.testing.assert_close(logits[b, t - start].softmax(-1), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_logprobs_and_entropy_are_those_of_the_naive_distribution(policy: Policy, temperature: float) -> None:
    with torch.no_grad():
        output = policy.token_logprobs(IDS, start=2, sampling=Sampling(temperature), with_entropy=True)
    assert not output.logprobs[:, :2].any()
    assert not output.entropy[:, :2].any()
    for b, row in enumerate(IDS.tolist()):
        for t in range(2, 6):
            distribution = naive_distribution(policy, row[:t], temperature)
            assert float(output.logprobs[b, t].exp()) == pytest.approx(distribution[row[t]], rel=1e-3)
            assert float(output.entropy[b, t]) == pytest.approx(oracle.entropy(distribution), abs=1e-4)


def test_the_start_cuts_and_changes_nothing_else(policy: Policy) -> None:
    whole, cut = policy.token_logprobs(IDS, start=1).logprobs, policy.token_logprobs(IDS, start=4).logprobs
    torch.testing.assert_close(cut[:, 4:], whole[:, 4:])


def test_token_0_is_predicted_by_nothing(policy: Policy) -> None:
    with pytest.raises(ValueError, match="token 0 is predicted by nothing"):
        policy.logits(IDS, start=0)


def test_entropy_is_computed_only_on_request_and_has_no_gradient(policy: Policy) -> None:
    assert not policy.token_logprobs(IDS).entropy.any()
    output = policy.token_logprobs(IDS, with_entropy=True)
    assert not output.entropy.requires_grad
    assert output.logprobs.requires_grad


def test_the_gradient_of_the_entropy_is_that_of_finite_differences() -> None:
    table = torch.tensor([[0.3, -1.0, 0.8, 0.1], [1.5, 0.0, -0.4, 0.2]])
    policy = Policy(TabularLM(table), tokenizer=None)
    ids, temperature, step = torch.tensor([[0, 2, 1]]), 0.7, 1e-3

    def entropy(logits: torch.Tensor) -> float:
        rows = [logits[0].tolist(), logits[1].tolist()]  # states past the first share the last row
        return sum(oracle.entropy(oracle.softmax(row, temperature)) for row in rows)

    output = policy.token_logprobs(ids, sampling=Sampling(temperature), with_entropy=True, entropy_gradient=True)
    assert float(output.entropy.sum().detach()) == pytest.approx(entropy(table), rel=1e-5)
    output.entropy.sum().backward()
    for row in range(2):
        for token in range(4):
            change = torch.zeros_like(table, dtype=torch.float64)
            change[row, token] = step
            slope = (entropy(table + change) - entropy(table - change)) / (2 * step)
            assert float(policy.model.table.grad[row, token]) == pytest.approx(slope, abs=1e-5)


def test_the_entropy_is_the_same_with_and_without_its_gradient(policy: Policy) -> None:
    without, with_gradient = (
        policy.token_logprobs(IDS, with_entropy=True, entropy_gradient=wanted).entropy for wanted in (False, True)
    )
    assert with_gradient.requires_grad
    assert torch.equal(without, with_gradient.detach())


def test_asking_for_the_entropy_does_not_disturb_the_gradient(policy: Policy) -> None:
    gradients = []
    for with_entropy in (False, True):
        policy.model.zero_grad()
        policy.token_logprobs(IDS, with_entropy=with_entropy).logprobs.sum().backward()
        gradients.append([p.grad.clone() for p in policy.model.parameters()])
    for without, with_ in zip(*gradients, strict=True):
        assert torch.equal(without, with_)


def test_padding_on_the_right_changes_no_logprob_and_no_gradient(policy: Policy) -> None:
    results = []
    for garbage in ([], [[0] * 5] * 2, [[63, 1, 17, 2, 40], [4, 4, 9, 50, 0]]):
        ids = torch.cat([IDS, torch.tensor(garbage, dtype=torch.long).reshape(2, -1)], dim=1)
        policy.model.zero_grad()
        logprobs = policy.token_logprobs(ids).logprobs[:, :6]
        logprobs.sum().backward()
        results.append((logprobs.detach(), [p.grad.clone() for p in policy.model.parameters()]))
    (unpadded, gradients), *padded = results
    for logprobs, other in padded:
        torch.testing.assert_close(logprobs, unpadded, rtol=1e-4, atol=1e-5)
        for mine, theirs in zip(gradients, other, strict=True):
            torch.testing.assert_close(theirs, mine, rtol=1e-3, atol=1e-4)


def test_bfloat16_computes_near_float32_over_float32_weights(model_folder: Path) -> None:
    exact = Policy.load(model_folder)
    rounded = Policy.load(model_folder, compute_dtype="bfloat16")
    assert {p.dtype for p in rounded.model.parameters()} == {torch.float32}
    with torch.no_grad():
        gap = (exact.token_logprobs(IDS).logprobs - rounded.token_logprobs(IDS).logprobs).abs().max()
    assert 0 < float(gap) < 0.3


@pytest.mark.parametrize(
    ("configured", "of_the_tokenizer", "expected"),
    [(7, "<|end|>", {7}), ([7, 8], "<|end|>", {7, 8}), (None, "<|end|>", {0}), (None, None, set())],
)
def test_end_tokens_come_from_the_generation_config_else_from_the_tokenizer(
    policy: Policy, configured: object, of_the_tokenizer: str | None, expected: set[int]
) -> None:
    policy.model.generation_config.eos_token_id = configured
    eos, policy.tokenizer.eos_token = policy.tokenizer.eos_token, of_the_tokenizer
    try:
        assert policy.end_token_ids() == expected
    finally:
        policy.tokenizer.eos_token = eos


# --- folders -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_policy_loads_with_the_same_weights_logprobs_and_tokenizer(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, tied: bool
) -> None:
    policy = Policy(random_qwen3(seed=5, tied=tied), tokenizer)
    policy.save(tmp_path / "saved")
    loaded = Policy.load(tmp_path / "saved")
    assert dict(loaded.named_weights()).keys() == dict(policy.named_weights()).keys()
    for name, weight in loaded.named_weights():
        assert torch.equal(weight, policy.model.get_parameter(name)), name
    assert torch.equal(loaded.token_logprobs(IDS).logprobs, policy.token_logprobs(IDS).logprobs)
    assert loaded.tokenizer.encode("我今天, hello") == tokenizer.encode("我今天, hello")
    assert loaded.end_token_ids() == {0}


def test_a_policy_saved_in_bfloat16_loads_rounded_to_bfloat16_and_stays_float32_itself(
    tmp_path: Path, policy: Policy
) -> None:
    before = {name: weight.clone() for name, weight in policy.named_weights()}
    policy.save(tmp_path / "saved", dtype="bfloat16")
    for name, weight in Policy.load(tmp_path / "saved").named_weights():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, before[name].bfloat16().float()), name
        assert torch.equal(policy.model.get_parameter(name), before[name]), name


def test_a_tied_head_is_named_once(tokenizer: PreTrainedTokenizerFast) -> None:
    names = {tied: dict(Policy(random_qwen3(0, tied), tokenizer).named_weights()) for tied in (True, False)}
    assert set(names[False]) - set(names[True]) == {"lm_head.weight"}


def test_the_vocabulary_counts_logits_and_not_the_tokenizers_tokens(policy: Policy) -> None:
    assert policy.vocab_size == VOCAB_SIZE > len(policy.tokenizer)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere does not exist; .* correct the path"):
        checked_model_directory(tmp_path / "nowhere")


def test_a_folder_without_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json"):
        Policy.load(tmp_path)


@pytest.mark.parametrize("content", ["{broken", '{"model_type": "no-such-architecture"}', "{}"])
def test_a_config_that_cannot_be_read_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        checked_model_directory(tmp_path)


SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 8}


@pytest.mark.parametrize(
    "model",
    [
        BertForMaskedLM(BertConfig(**SMALL)),
        T5ForConditionalGeneration(T5Config(d_model=8, d_ff=8, d_kv=8, num_layers=1, num_heads=1, vocab_size=8)),
        Qwen3ForSequenceClassification(Qwen3Config(**SMALL, num_key_value_heads=1, head_dim=8)),
    ],
    ids=lambda model: type(model).__name__,
)
def test_a_model_that_is_not_a_causal_lm_is_refused_by_its_architecture(tmp_path: Path, model: PreTrainedModel) -> None:
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"holds {type(model).__name__}, which is not a causal language model"):
        checked_model_directory(tmp_path)


def test_a_folder_without_safetensors_is_refused(tmp_path: Path, model_folder: Path) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"holds no \*\.safetensors weights"):
        checked_model_directory(folder)


def test_a_config_that_names_no_architecture_is_judged_by_its_type(tmp_path: Path, model_folder: Path) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "unnamed")
    config = json.loads((folder / "config.json").read_text())
    del config["architectures"]
    (folder / "config.json").write_text(json.dumps(config))
    assert checked_model_directory(folder) == folder
