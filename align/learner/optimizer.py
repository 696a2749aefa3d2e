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
from torch.optim.adamw import adamw

from align.choices import choices
from align.learner.moments import Moments
from align.model.ranks import as_shard, full_tensor, named_shards, own_shard, placed_like
from align.rules import Rule

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
        "constant",
        description=choices(
            "The learning rate after the warm-up.",
            {
                "constant": "stays at its peak",
                "linear": "falls by the same amount each step, to min_lr_ratio of the peak",
                "cosine": "falls along half a cosine, to min_lr_ratio of the peak",
            },
        ),
    )
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="Learning rate at the last step over the peak.")
    moments: Literal["float32", "8bit"] = Field(
        "float32",
        description=choices(
            "How Adam's two moments are kept between steps.",
            {
                "float32": "as they are, 8 bytes per trained number",
                "8bit": "rounded block by block, 2 bytes and a little per trained number (the extra optim8bit)",
            },
        ),
    )
    offload: bool = Field(
        False,
        description="Keep the moments in host memory between steps, on a GPU: the same numbers, for two copies a step.",
    )

    def rules_in_a_run(self, section: str, *, on_gpu: bool) -> list[Rule]:
        """What this optimizer, of a section by this name, asks of the learner."""
        return [
            (
                self.offload and not on_gpu,
                f"{section}.offload = true needs learner.num_gpus = 1: of a learner on a CPU the moments are in host memory "
                "anyway",
            )
        ]


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
        self.moments = Moments(eight_bits=cfg.moments == "8bit", offload=cfg.offload)

    def clip(self) -> float:
        """Scale the gradient to at most `max_grad_norm`; returns its norm before."""
        return float(full_tensor(torch.nn.utils.clip_grad_norm_(self.parameters, self.cfg.max_grad_norm)))

    def lr(self, step: int) -> float:
        """Learning rate of step 1..num_steps."""
        return self.cfg.lr * lr_factor(step, self.num_steps, self.cfg)

    def step(self, step: int) -> None:
        """Apply Adam to the gradient, at the learning rate of step 1..num_steps."""
        for group in self.adam.param_groups:
            group["lr"] = self.lr(step)
        if self.moments.as_adam_has_them:
            self.adam.step()
        else:
            self._step_one_by_one()

    @torch.no_grad()
    def _step_one_by_one(self) -> None:
        """Adam's step with the moments of one parameter at a time taken from where they are kept, and put back."""
        for group in self.adam.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                own = own_shard(parameter)
                state = self.moments.for_step(self.adam.state[parameter], own)
                adamw(
                    [own],
                    [own_shard(parameter.grad)],
                    [state["exp_avg"]],
                    [state["exp_avg_sq"]],
                    [],
                    [state["step"]],
                    amsgrad=False,
                    beta1=beta1,
                    beta2=beta2,
                    lr=group["lr"],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    maximize=False,
                )
                self.adam.state[parameter] = self.moments.to_store(state)

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
                full = full_tensor(as_shard(value, parameter))
                if write:
                    tensors[f"{key}.{name}"] = full.cpu()
        if write:
            save_file(tensors, path)

    def load(self, path: Path) -> Tensor:
        """Take up what `save` wrote; returns the owner's state.

        Raises:
            ValueError: If the file holds state of a parameter that the policy does not train, or moments kept in another form.
        """
        tensors = load_file(path)
        owned: Tensor = tensors.pop("owner")
        for name, parameter in self._named_parameters():
            keys = ("step", *self.moments.keys(parameter))
            state = {key: tensors.pop(f"{key}.{name}") for key in keys if f"{key}.{name}" in tensors}
            if len(state) == len(keys):
                self.adam.state[parameter] = {k: self._placed(k, v, parameter) for k, v in state.items()}
            elif state:
                raise ValueError(
                    f"{path} keeps the moments of {name} in another form than this run; set optimizer.moments as it was when it "
                    "was written"
                )
        if tensors:
            raise ValueError(f"{path} holds state of {min(tensors)}, which this policy does not train; restore its own")
        return owned

    def _placed(self, key: str, value: Tensor, parameter: Tensor) -> Tensor:
        """What was saved, where it is kept."""
        if key == "step":
            return value
        placed = placed_like(value, parameter)
        return placed if self.moments.as_adam_has_them else self.moments.moved_to_store(own_shard(placed))

    def _named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, p) for name, p in named_shards(self.model) if p.requires_grad)
