"""Packing wastes next to nothing, loses nothing, and keeps sequences apart in every model it is used with."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from align.data.packing import pack
from align.data.sampling import Sampling
from align.model.policy import Policy
from align.model.trunk import Trunk
from tests.oracles.tabular import TabularLM

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=30)


def log_normal(seed: int, count: int) -> list[int]:
    """Lengths around 400 tokens, as completions have them: a standard deviation of 1 in the logarithm."""
    rng = random.Random(seed)
    return [min(4096, max(16, int(rng.lognormvariate(6, 1)))) for _ in range(count)]


# --- micro-batches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_log_normal_lengths_fill_at_least_99_percent_in_the_fewest_possible_micro_batches(seed: int) -> None:
    lengths = log_normal(seed, 2048)
    parts = pack(lengths, 8192)
    filled = [sum(lengths[row] for row in part) for part in parts]
    assert len(parts) == -(-sum(lengths) // 8192)
    assert sum(filled) / (8192 * len(parts)) >= 0.99
    assert sorted(filled)[1] / 8192 >= 0.99  # all but the one that takes the remainder


@given(LENGTHS, st.integers(1, 100))
def test_every_trajectory_is_packed_once_and_the_budget_kept_unless_one_alone_exceeds_it(
    lengths: list[int], max_tokens: int
) -> None:
    parts = pack(lengths, max_tokens)
    assert sorted(row for part in parts for row in part) == list(range(len(lengths)))
    for part in parts:
        assert len(part) == 1 or sum(lengths[row] for row in part) <= max_tokens


@given(LENGTHS, st.integers(1, 100))
def test_no_micro_batch_could_take_what_was_put_into_a_later_one(lengths: list[int], max_tokens: int) -> None:
    parts = pack(lengths, max_tokens)
    filled = [sum(lengths[row] for row in part) for part in parts]
    for number, part in enumerate(parts):
        assert all(earlier + lengths[row] > max_tokens for earlier in filled[:number] for row in part)


def test_packing_of_a_case_done_by_hand() -> None:
    assert pack([3, 9, 4, 3, 1], max_tokens=8) == [[1], [2, 0, 4], [3]]
    assert pack([5, 6, 3, 2], max_tokens=8) == [[1, 3], [0, 2]]  # best fit: 3 goes beside 5, where it leaves nothing


# --- models ------------------------------------------------------------------------------------------------------

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR = {f"linear_{key}": 2 for key in ("num_key_heads", "num_value_heads")} | {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "shared_expert_intermediate_size": 16,
}
MODELS: dict[str, dict[str, object]] = {
    "Qwen3Config": {"head_dim": 8, "tie_word_embeddings": True},
    "LlamaConfig": {"tie_word_embeddings": False},
    "MistralConfig": {"sliding_window": 4},
    "Gemma2Config": {"head_dim": 8, "sliding_window": 4},
    "Gemma3TextConfig": {"head_dim": 8, "sliding_window": 4},
    "MixtralConfig": {"num_local_experts": 4},
    "Qwen3MoeConfig": {"head_dim": 8, **EXPERTS},
    "Cohere2Config": {"sliding_window": 4},
    "GraniteConfig": {"logits_scaling": 3.0},
    "Llama4TextConfig": {
        "head_dim": 8,
        "intermediate_size_mlp": 48,
        "num_local_experts": 2,
        "attention_chunk_size": 4,
    },
}


def small_model(name: str, **settings: object) -> PreTrainedModel:
    config: PreTrainedConfig = getattr(transformers, name)(**SMALL | MODELS.get(name, {}) | settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


IDS = torch.randint(3, 64, (4, 13), generator=torch.Generator().manual_seed(0))
SIZES = torch.tensor([3, 13, 1, 7])  # longer and shorter than the windows, in no order
WANTED = torch.arange(13).expand(4, 13) < SIZES[:, None]
WANTED[:, 0] = False
WANTED[1, 5] = False


def gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("name", MODELS)
def test_packed_and_padded_give_one_loss_and_gradient_in_every_family(name: str) -> None:
    model = small_model(name)
    policy = Policy(model, tokenizer=None)
    assert (policy.trunk.packs, policy.trunk.has_head) == (True, True)
    results = []
    for lengths in (None, SIZES):
        output = policy.token_logprobs(IDS, wanted=WANTED, lengths=lengths, sampling=Sampling(0.8))
        output.logprobs.square().sum().backward()
        results.append((output.logprobs.detach(), gradients(model)))
    (padded, expected), (packed, found) = results
    torch.testing.assert_close(packed, padded, rtol=1e-6, atol=1e-5)
    assert found.keys() == expected.keys()
    norm = torch.cat([g.flatten() for g in expected.values()]).norm()
    error = torch.cat([(found[key] - g).flatten() for key, g in expected.items()]).norm()
    assert float(error / norm) < 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_logprobs_without_logits_are_those_of_the_models_own_logits(name: str) -> None:
    model = small_model(name)
    with torch.no_grad():
        own = torch.log_softmax(model(input_ids=IDS).logits.float() / 0.8, dim=-1)[:, :-1]
        expected = own.gather(-1, IDS[:, 1:, None])[..., 0]
        ours = Policy(model, tokenizer=None).token_logprobs(IDS, sampling=Sampling(0.8)).logprobs
    torch.testing.assert_close(ours[:, 1:], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["Qwen3Config", "MistralConfig", "Gemma3TextConfig"])
def test_every_attention_gives_the_same_packed_logprobs(name: str, implementation: str) -> None:
    model = small_model(name)
    with torch.no_grad():
        expected = Policy(model, tokenizer=None).token_logprobs(IDS, wanted=WANTED).logprobs
        model.set_attn_implementation(implementation)
        policy = Policy(model, tokenizer=None)
        assert policy.trunk.packs
        packed = policy.token_logprobs(IDS, wanted=WANTED, lengths=SIZES).logprobs
    assert model.config._attn_implementation == ("eager" if implementation == "eager" else "align_sequences")
    torch.testing.assert_close(packed, expected, rtol=1e-5, atol=2e-5)


def state_space() -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, pad_token_id=1)
        config.bos_token_id = config.eos_token_id = 0
        return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("name", ["MambaConfig", "Qwen3NextConfig"])
def test_a_model_whose_state_leaks_between_sequences_is_found_out_runs_padded_and_says_so_once(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = state_space() if name == "MambaConfig" else small_model(name, head_dim=8, **EXPERTS, **LINEAR)
    before = model.config._attn_implementation
    policy = Policy(model, tokenizer=None)
    with torch.no_grad():
        padded = policy.token_logprobs(IDS, wanted=WANTED).logprobs
        asked = policy.token_logprobs(IDS, wanted=WANTED, lengths=SIZES).logprobs
    assert not policy.trunk.packs
    assert torch.equal(asked, padded)
    assert model.config._attn_implementation == before
    messages = [record.getMessage() for record in caplog.records if record.name == "align.model.trunk"]
    assert messages == [f"{type(model).__name__}: its sequences cannot share a row: micro-batches are padded"]


def test_a_model_with_a_head_of_its_own_is_found_out_and_its_logits_are_held(caplog: pytest.LogCaptureFixture) -> None:
    class Doubled(transformers.LlamaForCausalLM):
        def forward(self, *arguments: object, **settings: object) -> object:
            output = super().forward(*arguments, **settings)
            output.logits = output.logits * 2
            return output

    model = Doubled(transformers.LlamaConfig(**SMALL)).eval()
    policy = Policy(model, tokenizer=None)
    with torch.no_grad():
        expected = torch.log_softmax(model(input_ids=IDS).logits, dim=-1)[:, :-1].gather(-1, IDS[:, 1:, None])[..., 0]
        torch.testing.assert_close(policy.token_logprobs(IDS).logprobs[:, 1:], expected, rtol=1e-5, atol=1e-5)
    assert not policy.trunk.has_head
    assert "its head is unknown" in caplog.text


def test_a_model_that_is_not_of_transformers_is_neither_packed_nor_cut_from_its_head() -> None:
    trunk = Trunk(TabularLM(torch.zeros(1, 3)))
    assert (trunk.has_head, trunk.packs) == (False, False)


def test_the_attention_of_packing_is_not_written_into_a_saved_model(policy: Policy, tmp_path: Path) -> None:
    assert policy.trunk.packs
    policy.save(tmp_path)
    assert "align" not in (tmp_path / "config.json").read_text()
    assert Policy.load(tmp_path).model.config._attn_implementation == "sdpa"
