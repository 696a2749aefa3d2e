"""Adam with its schedule, the gradient clip, and its state on disk."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import load_file, save_file
from torch import Tensor

from align.ranks import like, named_shards, whole

DecayRate = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(BaseModel):
    """Adam, its schedule and the gradient clip."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    lr: float = Field(1e-5, gt=0, allow_inf_nan=False, description="Peak learning rate of Adam.")
    betas: tuple[DecayRate, DecayRate] = Field((0.9, 0.95), description="Adam's decay rates, each in [0, 1).")
    eps: float = Field(1e-8, gt=0, description="Adam's epsilon.")
    weight_decay: float = Field(
        0.0, ge=0, description="Decoupled weight decay (AdamW) of matrices; norms and biases have none."
    )
    max_grad_norm: float = Field(1.0, gt=0, description="Gradient norm limit; inf for none.")
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up from 0.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="After warm-up, towards min_lr_ratio."
    )
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="Learning rate at the last step over the peak.")


def lr_factor(step: int, num_steps: int, cfg: OptimizerConfig) -> float:
    """Learning rate of step 1..num_steps over the peak: linear warm-up, then constant, linear or cosine decay."""
    if step <= cfg.warmup_steps:
        return step / (cfg.warmup_steps + 1)
    if cfg.schedule == "constant":
        return 1.0
    progress = (step - cfg.warmup_steps - 1) / max(num_steps - cfg.warmup_steps - 1, 1)
    left = 1.0 - min(progress, 1.0) if cfg.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * left


class Optimizer:
    """AdamW over the trained parameters of a model; knows nothing of where the gradient came from.

    Args:
        model: The network; its parameters that require a gradient are trained.
        cfg: Adam, schedule and clip.
        num_steps: Length of the run, for the schedule.
    """

    def __init__(self, model: Any, cfg: OptimizerConfig, num_steps: int) -> None:
        self.model = model
        self.cfg = cfg
        self.num_steps = num_steps
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in self.parameters if p.dim() > 1], "weight_decay": cfg.weight_decay},
            {"params": [p for p in self.parameters if p.dim() <= 1], "weight_decay": 0.0},  # norms and biases
        ]
        self.adam = torch.optim.AdamW([g for g in groups if g["params"]], lr=cfg.lr, betas=cfg.betas, eps=cfg.eps)

    def clip(self) -> float:
        """Scale the gradient to at most `max_grad_norm`; returns its norm before."""
        return float(whole(torch.nn.utils.clip_grad_norm_(self.parameters, self.cfg.max_grad_norm)))

    def lr(self, step: int) -> float:
        """Learning rate of step 1..num_steps."""
        return self.cfg.lr * lr_factor(step, self.num_steps, self.cfg)

    def step(self, step: int) -> None:
        """Apply Adam to the gradient, at the learning rate of step 1..num_steps."""
        for group in self.adam.param_groups:
            group["lr"] = self.lr(step)
        self.adam.step()

    def zero_grad(self) -> None:
        """Forget the gradient."""
        self.adam.zero_grad(set_to_none=True)

    def save(self, path: Path, state: Tensor, write: bool = True) -> None:
        """Write Adam's moments and step counts by parameter name, and its owner's own state, as safetensors.

        Args:
            path: The file.
            state: The owner's.
            write: False on a rank that only takes part in gathering the moments.
        """
        tensors = {"owner": state}
        for name, parameter in self._named_parameters():
            for key, value in self.adam.state[parameter].items():
                full = whole(value)
                if write:
                    tensors[f"{key}.{name}"] = full.cpu()
        if write:
            save_file(tensors, path)

    def load(self, path: Path) -> Tensor:
        """Take up what `save` wrote; returns the owner's state.

        Raises:
            ValueError: If the file holds state of a parameter that the policy does not train.
        """
        tensors = load_file(path)
        owned: Tensor = tensors.pop("owner")
        keys = ("step", "exp_avg", "exp_avg_sq")
        known = {f"{key}.{name}" for name, _ in self._named_parameters() for key in keys}
        if foreign := sorted(set(tensors) - known):
            raise ValueError(f"{path} holds state of {foreign[0]}, which this policy does not train; restore its own")
        for name, parameter in self._named_parameters():
            state = {key: tensors[f"{key}.{name}"] for key in keys if f"{key}.{name}" in tensors}
            if state:
                self.adam.state[parameter] = {k: v if k == "step" else like(v, parameter) for k, v in state.items()}
        return owned

    def _named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, p) for name, p in named_shards(self.model) if p.requires_grad)
