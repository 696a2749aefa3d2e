"""Many ranks: one process per rank, the policy sharded over all of them (FSDP2), what each has gathered or added up.

Gradients are **summed**: the losses already carry the denominator of the whole batch. What is logged is collected before it is
reduced. So N ranks take the step that one rank takes, up to the order of the sums.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from align.metrics import Metric

_NOTHING = -1  # instead of a number, when rank 0 has nothing more to gather


class Ranks:
    """This process among the `num_ranks` that hold one learner. Made alone by default; then nothing is communicated.

    Args:
        rank: Number of this process; rank 0 answers for all.
        num_ranks: Processes.
        mesh: Of all processes, [num_ranks]; None for one that is alone.
    """

    def __init__(self, rank: int = 0, num_ranks: int = 1, mesh: DeviceMesh | None = None) -> None:
        self.rank = rank
        self.num_ranks = num_ranks
        self.mesh = mesh

    @property
    def first(self) -> bool:
        """Whether this rank answers for all."""
        return self.rank == 0

    def gather_metrics(self, metrics: Sequence[Metric]) -> list[Metric]:
        """The metrics of all ranks, in the order of the ranks, not yet reduced; every rank gets them.

        They travel as JSON, which carries a float to its last bit and, unlike a pickle, nothing that could be run.
        """
        if self.mesh is None:
            return list(metrics)
        own = json.dumps([(m.name, m.value, m.weight) for m in metrics]).encode()
        sizes = torch.zeros(self.num_ranks, dtype=torch.int64)
        sizes[self.rank] = len(own)
        texts = torch.zeros(self.num_ranks, int(self.sum(sizes).max()), dtype=torch.uint8)
        texts[self.rank, : len(own)] = torch.frombuffer(bytearray(own), dtype=torch.uint8)
        rows = zip(self.sum(texts), sizes.tolist(), strict=True)
        return [Metric(*parts) for row, size in rows for parts in json.loads(bytes(row[:size].tolist()))]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, element by element; every rank gets it."""
        if self.mesh is not None:
            dist.all_reduce(tensor)
        return tensor

    def gather_each(self, tensors: Sequence[Tensor]) -> Iterator[Tensor]:
        """Rank 0: one whole tensor after the other, while the others `help_gather`. It may stop anywhere."""
        for number, tensor in enumerate(tensors):
            self._announce(number)
            yield full_tensor(tensor)

    def end_gathering(self) -> None:
        """Rank 0: there is nothing more to gather; the others go on."""
        self._announce(None)

    def help_gather(self, tensors: Sequence[Tensor]) -> None:
        """Other ranks: take part in every gather that rank 0 begins, until it has none left."""
        while (number := self._announce(None)) is not None:
            full_tensor(tensors[number])

    def _announce(self, number: int | None) -> int | None:
        """What rank 0 announces, on every rank."""
        if self.mesh is None:
            return number
        message = torch.tensor(_NOTHING if number is None else number)
        dist.broadcast(message, src=0)
        return None if message == _NOTHING else int(message)


def shard(model: Any, ranks: Ranks) -> None:
    """Shard the parameters of a model over all ranks, in place: layer by layer, and what is left as one more part.

    Parameters stay float32 and are gathered as float32; bfloat16 products come from autocast, as on one rank, so that the
    number of ranks changes no rounding of a forward pass. A layer is gathered for its forward and its backward pass and freed
    after each; what is left (embeddings, head) stays whole in between, so that a loss may use the head's weight. Gradients
    are summed, not averaged.

    Args:
        model: On any device; the shards are on the mesh's. Only one part at a time is whole there.
        ranks: All ranks; nothing happens if this one is alone.
    """
    if ranks.mesh is None:
        return
    layers = set(getattr(model, "_no_split_modules", None) or ())  # names of classes, by transformers
    parts = [module for module in model.modules() if type(module).__name__ in layers and module is not model]
    for part in (*parts, model):
        fully_shard(part, mesh=ranks.mesh, reshard_after_forward=part is not model)
        assert isinstance(part, FSDPModule)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # else the factor needs an operation that gloo does not have


def is_sharded(model: Any) -> bool:
    """Whether every forward pass of the model waits for other ranks."""
    return isinstance(model, FSDPModule)


def named_shards(model: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Every parameter once, by name; of a sharded model what this rank holds, also after a forward pass without a backward."""
    if isinstance(model, FSDPModule):
        model.reshard()
    yield from model.named_parameters()


def full_tensor(tensor: Tensor) -> Tensor:
    """The tensor itself, or, of a sharded one, all of it; then every rank has to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_shard(tensor: Tensor) -> Tensor:
    """The tensor itself, or, of a sharded one, what this rank holds of it: the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def as_shard(tensor: Tensor, parameter: Tensor) -> Tensor:
    """What this rank holds for its rows of a parameter, as the shard of one tensor of all ranks; a lone number as it is."""
    if isinstance(tensor, DTensor) or not isinstance(parameter, DTensor) or not tensor.dim():
        return tensor
    shape = torch.Size((parameter.shape[0], *tensor.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        tensor, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride
    )


def placed_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, placed as a parameter of the same shape is: on its device, and of a sharded one the own shard."""
    if not isinstance(parameter, DTensor):
        return tensor.to(parameter.device)
    tensor = tensor.to(parameter.device)
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
