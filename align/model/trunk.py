"""A causal language model up to its head: the hidden states, of padded rows or of sequences packed into one row."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import torch
from torch import Tensor

from align.model import attention
from align.model.head import MAX_LOGITS_BYTES, Head

_TRIAL_LENGTHS = (5, 3)
_TRIAL_TOLERANCE = 1e-3  # of the largest logit; states that leak from sequence to sequence change logits by far more


class Trunk:
    """Runs a model and stops before its head.

    What a model is able to is tried, not looked up: a forward pass over eight tokens shows whether its head is the one known
    here, and another whether sequences packed into one row stay apart. Neither holds for every model: a head may scale in
    ways of its own, and state-space layers carry their state from one sequence into the next.

    Args:
        model: Any `AutoModelForCausalLM`, perhaps wrapped. Its attention becomes `align.model.attention` where it was `sdpa`.

    Attributes:
        has_head: Whether `head` is the model's; otherwise hidden states are logits.
        packs: Whether sequences may be packed.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.has_head = False
        with torch.no_grad():
            self.has_head = self._knows_head()
            self.packs = self._keeps_apart()
        lacking = [
            *([] if self.has_head else ["its head is unknown: all logits of a micro-batch are held"]),
            *([] if self.packs else ["its sequences cannot share a row: micro-batches are padded"]),
        ]
        if lacking:
            logging.getLogger(__name__).warning("%s: %s", type(model).__name__, "; ".join(lacking))

    def head(self, dtype: torch.dtype, max_bytes: int) -> Head:
        """What makes logits of the hidden states."""
        if not self.has_head:
            return Head(max_bytes=max_bytes)
        module, scale, cap = self.model.get_output_embeddings(), *_logit_settings(self.model)
        return Head(module.weight, module.bias, scale, cap, dtype, max_bytes)

    def __call__(self, token_ids: Tensor, keep: Tensor, **settings: Any) -> Tensor:
        """Hidden states (or logits) at the positions `keep` [K]. [B, T] -> [B, K, D].

        The whole model is called, so that whatever wraps it (adapters, sharding) does its part; its head gets nothing to do.
        """
        given: list[Tensor] = []

        def take(_: Any, arguments: tuple[Tensor]) -> tuple[Tensor]:
            given.append(arguments[0])
            return (arguments[0][:, :0],)

        with contextlib.ExitStack() as stack:
            if self.has_head:
                stack.callback(self.model.get_output_embeddings().register_forward_pre_hook(take).remove)
            output = self.model(input_ids=token_ids, logits_to_keep=keep, use_cache=False, **settings)
        logits: Tensor = output.logits
        return given[0] if given else logits

    def checkpoint_activations(self) -> None:
        """Keep each layer's input alone for the backward pass, which repeats the forward pass of the layer.

        Raises:
            ValueError: If the model has no layers that transformers can do this with.
        """
        from transformers.modeling_layers import GradientCheckpointingLayer

        layers = [module for module in self.model.modules() if isinstance(module, GradientCheckpointingLayer)]
        if not layers:
            raise ValueError(
                f"learner.activation_checkpointing: {type(self.model).__name__} has no layers that support it"
            )
        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in layers:
            layer.training = True  # the layer alone, which asks for it; what is inside, dropout too, stays as it was

    def _knows_head(self) -> bool:
        embeddings = getattr(self.model, "get_output_embeddings", lambda: None)()
        if not isinstance(embeddings, torch.nn.Linear):
            return False
        ids, keep = self._trial_ids()
        expected = self(ids, keep)
        self.has_head = True
        return _agree(self.head(embeddings.weight.dtype, MAX_LOGITS_BYTES).logits(self(ids, keep)), expected)

    def _keeps_apart(self) -> bool:
        if not hasattr(self.model, "set_attn_implementation"):
            return False
        ids, keep = self._trial_ids()
        apart = torch.cat(
            [self(row, keep[: row.shape[1]]) for row in torch.split(ids, list(_TRIAL_LENGTHS), dim=1)], dim=1
        )
        before = self.model.config._attn_implementation
        try:
            if before == "sdpa":
                attention.enable(self.model)
            with attention.packed(_TRIAL_LENGTHS, ids.device) as settings:
                if _agree(self(ids, keep, **settings), apart):
                    return True
        except (TypeError, ValueError, RuntimeError):  # a model that takes no positions, or no other attention
            pass
        if self.model.config._attn_implementation != before:
            self.model.set_attn_implementation(before)
        return False

    def _trial_ids(self) -> tuple[Tensor, Tensor]:
        device = next(self.model.parameters()).device
        keep = torch.arange(sum(_TRIAL_LENGTHS), device=device)
        return (7 * keep + 3)[None] % self.model.config.get_text_config().vocab_size, keep


def _logit_settings(model: Any) -> tuple[float, float | None]:
    """Scale and soft cap of the logits, as far as config names are known; the trial judges them.

    `logit_scale`: Cohere; `logits_scaling`: Granite, which divides; `final_logit_softcapping`: Gemma 2 and later.
    """
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1.0)
    return float(scale), getattr(config, "final_logit_softcapping", None)


def _agree(logits: Tensor, expected: Tensor) -> bool:
    if logits.shape != expected.shape:
        return False
    limit = _TRIAL_TOLERANCE * float(expected.abs().max())
    return bool(((logits.float() - expected.float()).abs() <= limit).all())
