"""What a run reads, checked before any model is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.data.prompts import load_prompts
from align.data.types import Prompt
from align.learner.critic import CriticConfig
from align.learner.moments import eight_bit_kernels
from align.model.folder import checked_config
from align.rewards.kinds import verifier_of
from cluster.faults import ConfigError
from cluster.spec.config import RunConfig
from cluster.spec.sections import ModelSection, PolicySection
from cluster.spec.shape import shape_of

_SHAPE = (  # what two configs share if the weights of one are to go into the model of the other
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "tie_word_embeddings"),
)


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


@dataclass(frozen=True, slots=True)
class Model:
    """A model folder as far as it is read here: no weights.

    Attributes:
        role: "policy", "reference" or "critic".
        folder: Where it is.
        config: Its config.
        tokenizer: Its tokenizer.
    """

    role: str
    folder: Path
    config: Any
    tokenizer: Any

    @property
    def text(self) -> Any:
        """The config of the language model, also where it is a part of a larger one."""
        return self.config.get_text_config()

    @property
    def num_logits(self) -> int:
        """Size of the vocabulary, with what it is padded by."""
        return int(self.text.vocab_size)

    @property
    def weights_bytes(self) -> int:
        """Size of the weights on disk."""
        return sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))


def load_inputs(cfg: RunConfig) -> Inputs:
    """Read configs, tokenizers and prompts and check that everything fits together.

    Raises:
        ConfigError: Naming what does not.
    """
    try:
        policy = _checked_policy(cfg)
        if any(optimizer.moments == "8bit" for optimizer in cfg.optimizers.values()):
            eight_bit_kernels()
        train, heldout = _load_prompts(cfg, policy.tokenizer)
        kept = without(train, heldout)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from None
    return Inputs(kept, heldout, len(train) - len(kept), policy.num_logits, policy.weights_bytes)


def _checked_policy(cfg: RunConfig) -> Model:
    """The policy, once it was found to go with the other models of the run, with its adapter and with the engines."""
    policy, *references = _read_models(policy=cfg.policy, reference=cfg.reference)
    for reference in references:
        check_vocabularies(policy, reference)
        _check_logits(policy, reference)
    critics = _read_models(critic=cfg.critic)
    for critic in critics:
        check_vocabularies(policy, critic)
    for model in (policy, *references, *critics):
        _check_context(model, cfg.rollout.max_model_len)
    if cfg.refresh_every:
        for reference in references:
            _check_same_shape(policy, reference)
    if cfg.policy.adapter:
        _check_adapter(policy, cfg.policy, on_gpu=cfg.rollout.num_gpus > 0)
    return policy


def _read_models(**sections: ModelSection | CriticConfig | None) -> list[Model]:
    """The models of these roles, as far as they have a folder: what all folders hold first, their tokenizers then."""
    folders = {role: section.model for role, section in sections.items() if section and section.model}
    held = [(role, folder, checked_config(folder)) for role, folder in folders.items()]
    return [Model(role, folder, config, _load_tokenizer(folder)) for role, folder, config in held]


def _load_prompts(cfg: RunConfig, tokenizer: Any) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to train on and held-out ones; each leaves room for a completion, and has what a verifier needs."""
    room = cfg.rollout.max_model_len - cfg.sampling.max_tokens
    train = load_prompts(cfg.prompts, tokenizer, room)
    heldout = load_prompts(cfg.evaluation.heldout, tokenizer, room) if cfg.evaluation.heldout else []
    if verifier := verifier_of(cfg.reward):
        for prompt in (*train, *heldout):
            verifier.check(prompt)
    return train, heldout


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


def check_vocabularies(policy: Model, other: Model) -> None:
    """Raise ValueError if a token id means something else to the two models."""
    ids, its = policy.tokenizer.get_vocab(), other.tokenizer.get_vocab()
    if ids == its:
        return
    differing = sorted(token for token in ids.keys() | its.keys() if ids.get(token) != its.get(token))
    token = differing[0]
    raise ValueError(
        f"the tokenizers of policy {policy.folder} and {other.role} {other.folder} differ in {len(differing)} tokens, e.g. "
        f"{token!r} is {ids.get(token)} and {its.get(token)}; the {other.role} reads token ids, so both need one vocabulary"
    )


def _check_logits(policy: Model, reference: Model) -> None:
    """Models of one family pad the same vocabulary to different sizes; the reference needs no fewer logits than the policy."""
    if reference.num_logits < policy.num_logits:
        raise ValueError(
            f"the policy {policy.folder} has {policy.num_logits} logits, the reference {reference.folder} has "
            f"{reference.num_logits}: the policy could sample tokens that the reference cannot score; pad the reference's "
            "embeddings"
        )


def _check_context(model: Model, max_model_len: int) -> None:
    """Raise ValueError if a sequence could be longer than a model was made for."""
    context = getattr(model.text, "max_position_embeddings", None)
    if context is not None and max_model_len > context:
        raise ValueError(
            f"rollout.max_model_len is {max_model_len}, the model in {model.folder} takes at most {context} tokens; lower it"
        )


def _check_same_shape(policy: Model, reference: Model) -> None:
    """Raise ValueError if the reference could not take the policy's weights."""
    for name in _SHAPE:
        if (mine := getattr(policy.text, name, None)) != (its := getattr(reference.text, name, None)):
            raise ValueError(
                f"reference.refresh_every lets the reference take the policy's weights, but {name} is {mine} in {policy.folder} "
                f"and {its} in {reference.folder}; take models of one shape, or set it to 0"
            )


def _check_adapter(policy: Model, section: PolicySection, *, on_gpu: bool) -> None:
    """Raise an error if the adapter has nothing to adapt in this model, or engines cannot have it as such."""
    shape = shape_of(policy.folder, policy.config, section.adapter)
    if section.engine_adapter and shape.has_experts and not on_gpu:
        raise ValueError(
            "policy.adapter.publish = 'adapter' needs rollout.num_gpus = 1 for a mixture of experts: with room for "
            "adapters vLLM has no kernel for experts on CPUs; or publish = 'merged'"
        )
