"""What a run reads, checked before any model is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.policy import checked_model_directory, text_config
from align.prompts import load_prompts
from align.types import Prompt
from cluster.config import RunConfig
from cluster.faults import ConfigError


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the run reads, checked before any model is loaded."""

    train: list[Prompt]
    heldout: list[Prompt]
    vocab_size: int
    weights_bytes: int


def load_inputs(cfg: RunConfig) -> Inputs:
    """Read tokenizers and prompts and check that everything fits together.

    Raises:
        ConfigError: Naming what does not.
    """
    try:
        folders = [checked_model_directory(section.model) for section in (cfg.policy, cfg.reference)]
        policy, reference = map(_load_tokenizer, folders)
        check_vocabularies(policy, reference, *folders)
        vocab_size = _num_logits(*folders)
        _check_context(cfg.rollout.max_model_len, *folders)
        if cfg.refresh_every:
            _check_same_shape(*folders)
        room = cfg.rollout.max_model_len - cfg.sampling.max_tokens
        train = load_prompts(cfg.prompts, policy, room)
        heldout = load_prompts(cfg.evaluation.heldout, policy, room) if cfg.evaluation.heldout else []
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from None
    return Inputs(train, heldout, vocab_size, sum(f.stat().st_size for f in folders[0].glob("*.safetensors")))


def _load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    if not any(path for pattern in ("tokenizer*", "vocab*", "*.model") for path in folder.glob(pattern)):
        raise ValueError(f"model folder {folder} holds no tokenizer")  # transformers would make an empty one up
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises no narrower class
        raise ValueError(f"model folder {folder}: the tokenizer cannot be read: {error}") from error


def _num_logits(policy_folder: Path, reference_folder: Path) -> int:
    """Logits of the policy; models of one family pad the same vocabulary to different sizes."""
    own, other = (int(text_config(folder).vocab_size) for folder in (policy_folder, reference_folder))
    if other < own:
        raise ValueError(
            f"the policy {policy_folder} has {own} logits, the reference {reference_folder} has {other}: the policy could "
            "sample tokens that the reference cannot score; pad the reference's embeddings"
        )
    return own


def _check_context(max_model_len: int, *folders: Path) -> None:
    """Raise ValueError if a sequence could be longer than a model was made for."""
    for folder in folders:
        context = getattr(text_config(folder), "max_position_embeddings", None)
        if context is not None and max_model_len > context:
            raise ValueError(
                f"rollout.max_model_len is {max_model_len}, the model in {folder} takes at most {context} tokens; lower it"
            )


_SHAPE = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "tie_word_embeddings"),
)


def _check_same_shape(policy_folder: Path, reference_folder: Path) -> None:
    """Raise ValueError if the reference could not take the policy's weights."""
    own, other = (text_config(folder) for folder in (policy_folder, reference_folder))
    for name in _SHAPE:
        if (mine := getattr(own, name, None)) != (its := getattr(other, name, None)):
            raise ValueError(
                f"reference.refresh_every lets the reference take the policy's weights, but {name} is {mine} in {policy_folder} "
                f"and {its} in {reference_folder}; take models of one shape, or set it to 0"
            )


def check_vocabularies(policy: Any, reference: Any, policy_folder: Path, reference_folder: Path) -> None:
    """Raise ValueError if a token id means something else to the two models."""
    own, other = policy.get_vocab(), reference.get_vocab()
    if own == other:
        return
    differing = sorted(token for token in own.keys() | other.keys() if own.get(token) != other.get(token))
    token = differing[0]
    raise ValueError(
        f"the tokenizers of policy {policy_folder} and reference {reference_folder} differ in {len(differing)} tokens, e.g. "
        f"{token!r} is {own.get(token)} and {other.get(token)}; the reference scores token ids, so both need one vocabulary"
    )
