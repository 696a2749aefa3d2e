"""What a run reads, checked before any model is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.data.prompts import load_prompts
from align.data.types import Prompt
from align.learner.moments import eight_bit_kernels
from align.model.folder import checked_model_directory, text_config
from align.rewards.kinds import verifier_of
from cluster.faults import ConfigError
from cluster.spec.config import RunConfig
from cluster.spec.shape import model_shape


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the run reads, checked before any model is loaded.

    Attributes:
        train: Prompts to train on; none of them reads like a held-out one.
        heldout: Prompts that are never trained on.
        num_left_out: Training prompts that were dropped for that.
        vocab_size: Logits of the policy.
        weights_bytes: Size of the policy's weights on disk.
    """

    train: list[Prompt]
    heldout: list[Prompt]
    num_left_out: int
    vocab_size: int
    weights_bytes: int


def load_inputs(cfg: RunConfig) -> Inputs:
    """Read tokenizers and prompts and check that everything fits together.

    Raises:
        ConfigError: Naming what does not.
    """
    try:
        folders = [checked_model_directory(section.model) for section in (cfg.policy, cfg.reference) if section]
        policy, *reference = map(_load_tokenizer, folders)
        if reference:
            check_vocabularies(policy, *reference, *folders)
        vocab_size = _num_logits(*folders)
        critics = [checked_model_directory(cfg.critic.model)] if cfg.critic and cfg.critic.model else []
        for folder in critics:
            check_vocabularies(policy, _load_tokenizer(folder), folders[0], folder, "critic")
        _check_context(cfg.rollout.max_model_len, *folders, *critics)
        if cfg.refresh_every:
            _check_same_shape(*folders)
        if cfg.policy.adapter:
            shape = model_shape(folders[0], cfg.policy.adapter)
            if cfg.policy.engine_adapter and shape.has_experts and not cfg.rollout.num_gpus:
                raise ValueError(
                    "policy.adapter.publish = 'adapter' needs rollout.num_gpus = 1 for a mixture of experts: with room for "
                    "adapters vLLM has no kernel for experts on CPUs; or publish = 'merged'"
                )
        if any(optimizer.moments == "8bit" for optimizer in cfg.optimizers.values()):
            eight_bit_kernels()
        room = cfg.rollout.max_model_len - cfg.sampling.max_tokens
        train = load_prompts(cfg.prompts, policy, room)
        heldout = load_prompts(cfg.evaluation.heldout, policy, room) if cfg.evaluation.heldout else []
        if verifier := verifier_of(cfg.reward):
            for prompt in (*train, *heldout):
                verifier.check(prompt)
        kept = without(train, heldout)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from None
    return Inputs(
        kept,
        heldout,
        len(train) - len(kept),
        vocab_size,
        sum(f.stat().st_size for f in folders[0].glob("*.safetensors")),
    )


def without(train: list[Prompt], heldout: list[Prompt]) -> list[Prompt]:
    """The training prompts that do not read like a held-out one.

    Raises:
        ValueError: If none is left.
    """
    kept_out = {prompt.text for prompt in heldout}
    kept = [prompt for prompt in train if prompt.text not in kept_out]
    if not kept:
        raise ValueError(f"all {len(train)} training prompts are among the held-out ones; nothing is left to train on")
    return kept


def _load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    if not any(path for pattern in ("tokenizer*", "vocab*", "*.model") for path in folder.glob(pattern)):
        raise ValueError(f"model folder {folder} holds no tokenizer")  # transformers would make an empty one up
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises no narrower class
        raise ValueError(f"model folder {folder}: the tokenizer cannot be read: {error}") from error


def _num_logits(policy_folder: Path, *reference_folders: Path) -> int:
    """Logits of the policy; models of one family pad the same vocabulary to different sizes."""
    own = int(text_config(policy_folder).vocab_size)
    for folder in reference_folders:
        if (other := int(text_config(folder).vocab_size)) < own:
            raise ValueError(
                f"the policy {policy_folder} has {own} logits, the reference {folder} has {other}: the policy could "
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


def check_vocabularies(
    policy: Any, reference: Any, policy_folder: Path, reference_folder: Path, role: str = "reference"
) -> None:
    """Raise ValueError if a token id means something else to the two models."""
    own, other = policy.get_vocab(), reference.get_vocab()
    if own == other:
        return
    differing = sorted(token for token in own.keys() | other.keys() if own.get(token) != other.get(token))
    token = differing[0]
    raise ValueError(
        f"the tokenizers of policy {policy_folder} and {role} {reference_folder} differ in {len(differing)} tokens, e.g. "
        f"{token!r} is {own.get(token)} and {other.get(token)}; the {role} reads token ids, so both need one vocabulary"
    )
