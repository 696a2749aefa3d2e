"""What the learner's side must do for families of models that transformers holds in another way than their folders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import PreTrainedTokenizerBase

from align.model.policy import Policy
from tests.fakes.families import FAMILIES, WINDOW, random_model, write

TOKEN_IDS = torch.randint(3, 30, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=sorted(FAMILIES))
def folder(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Path:
    """The folder of one family."""
    return write(request.param, tokenizer, tmp_path / request.param)


def test_the_weights_of_every_family_have_the_names_and_values_of_its_folder(folder: Path) -> None:
    stored = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as content:
            stored |= {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    weights = dict(Policy.load(folder).named_weights())
    assert weights.keys() == stored.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, stored[name], rtol=0, atol=0)


def test_a_saved_policy_of_every_family_is_read_back_as_it_was(folder: Path, tmp_path: Path) -> None:
    policy = Policy.load(folder)
    policy.save(tmp_path / "saved")
    with torch.no_grad():
        before = policy.token_logprobs(TOKEN_IDS).logprobs
        after = Policy.load(tmp_path / "saved").token_logprobs(TOKEN_IDS).logprobs
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_the_learner_honours_the_soft_cap_of_attention_scores(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    policy = Policy.load(write("gemma2", tokenizer, tmp_path / "gemma2"))
    with torch.no_grad():
        capped = policy.token_logprobs(TOKEN_IDS).logprobs
        policy.model.set_attn_implementation("sdpa")
        ignored = policy.token_logprobs(TOKEN_IDS).logprobs
    assert float((capped - ignored).abs().max()) > 0.1, "transformers' default honours it now: `attention_of` can go"


def test_the_window_of_a_family_hides_what_is_further_back(tokenizer: PreTrainedTokenizerBase) -> None:
    """Two layers see at most twice the window: a change before that is seen by the family without a window alone."""
    changed = TOKEN_IDS.clone()
    changed[:, 0] = 3 + (changed[:, 0] - 2) % 27
    differences = {}
    for name in ("mistral", "llama"):
        policy = Policy(random_model(name, tokenizer), tokenizer)
        with torch.no_grad():
            pair = [policy.token_logprobs(ids).logprobs[:, 2 * WINDOW + 1 :] for ids in (TOKEN_IDS, changed)]
        differences[name] = float((pair[0] - pair[1]).abs().max())
    assert differences["mistral"] == 0.0
    assert differences["llama"] > 0
