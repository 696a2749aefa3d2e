"""Log-probabilities and entropies from hidden states, never holding the logits of more than a chunk of tokens.

A vocabulary of 150,000 makes the logits of a batch larger than its model. Tokens are taken in chunks and the vocabulary in
blocks that stay in the processor's cache; of a chunk only `exp(logit - max)` is held. Two ways to the gradient:

* `token_loss`: the loss of a token is a function of its own log-probability, so its derivative is known as soon as the
  chunk's logits are, and the gradients of hidden states and weights are formed at once: three matrix products, as many as
  with the logits held.
* `logprobs`: for any other loss the backward pass computes the logits again, a fourth product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from align.data.sampling import PLAIN, Sampling

TokenLoss = Callable[[slice, Tensor, Tensor], Tensor]
"""(tokens of the chunk, their log-probabilities [C], their entropies [C]) -> their part of the loss, a scalar."""
MAX_LOGITS_BYTES = 128 * 2**20
_BLOCK_BYTES = 2**20  # of logits on a CPU, about half of a core's second-level cache
_NEGLIGIBLE = -200.0  # log of a probability that is 0 in float32; stands for minus infinity where that would give nan


@dataclass(frozen=True, slots=True)
class Head:
    """The last layer: `z = cap * tanh(y / cap)`, or `z = y` without a cap, with `y = scale * (W h + b)`.

    Attributes:
        weight: [V, D], or None if what comes as hidden states are the logits z already ([N, V], D = V).
        bias: [V] or None.
        scale: Of the logits (Cohere's `logit_scale`, Granite's `1 / logits_scaling`).
        cap: Soft limit of the logits (Gemma's `final_logit_softcapping`), or None.
        dtype: Of the matrix products; sums and what follows are float32.
        max_bytes: Of float32 logits held at a time. Memory and speed only.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None
    dtype: torch.dtype = torch.float32
    max_bytes: int = MAX_LOGITS_BYTES

    def logits(self, hidden: Tensor) -> Tensor:
        """All logits at once. [N, D] -> [N, V] float32."""
        if self.weight is None:
            return hidden.float()
        bias = None if self.bias is None else self.bias.to(self.dtype)
        y = self.scale * torch.nn.functional.linear(hidden.to(self.dtype), self.weight.to(self.dtype), bias).float()
        return y if self.cap is None else self.cap * torch.tanh(y / self.cap)

    def logprobs(
        self, hidden: Tensor, targets: Tensor, sampling: Sampling = PLAIN, *, entropy: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the targets and entropies, in nats, under `softmax(z / temperature)`; both carry gradients.

        Args:
            hidden: [N, D].
            targets: [N] int64 below V.
            sampling: Its temperature. A distribution that truncates needs the logits of whole rows: see `support.restricted`.
            entropy: Compute the entropies; they are 0 otherwise.

        Returns:
            [N], [N] float32.

        Raises:
            ValueError: If the distribution truncates.
        """
        sweep = _Sweep(self, targets, sampling, entropy)
        return _Recomputed.apply(hidden, self.weight, self.bias, sweep)  # type: ignore[no-any-return, no-untyped-call]

    def token_loss(
        self, hidden: Tensor, targets: Tensor, loss: TokenLoss, sampling: Sampling = PLAIN
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A loss that is a sum over tokens, its gradient formed on the way.

        Args:
            hidden: [N, D].
            targets: [N] int64 below V.
            loss: Called once for each chunk of tokens, in order; differentiable in the log-probabilities, perhaps in the
                entropies too.
            sampling: As for `logprobs`.

        Returns:
            The loss, to be differentiated once; log-probabilities [N] and entropies [N], without gradient.

        Raises:
            ValueError: If the distribution truncates.
        """
        sweep = _Sweep(self, targets, sampling, True)
        return _Formed.apply(hidden, self.weight, self.bias, sweep, loss)  # type: ignore[no-any-return, no-untyped-call]


class _Gradients:
    """Sums of the gradients of hidden states, weight and bias; None for what needs none."""

    def __init__(self, needed: tuple[bool, ...], hidden: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
        of = (hidden, weight, bias)
        self.hidden, self.weight, self.bias = (
            torch.zeros(t.shape, dtype=torch.float32, device=t.device) if need and t is not None else None
            for need, t in zip(needed, of, strict=False)
        )

    def times(self, of_loss: Tensor | float) -> list[Tensor | None]:
        """The sums times what the loss itself is multiplied by; autograd rounds them to their tensors' types."""
        return [None if g is None else g.mul_(of_loss) for g in (self.hidden, self.weight, self.bias)]


class _Sweep:
    """The arithmetic of one call: chunks of tokens, blocks of the vocabulary.

    With `inner * (W h + b)` before and `outer * tanh` after: without a cap, `z / temperature = inner * (W h + b)`.
    """

    def __init__(self, head: Head, targets: Tensor, sampling: Sampling, entropy: bool) -> None:
        if sampling.truncates:
            raise ValueError(
                f"{sampling} keeps some tokens of a row; a head that goes block by block never has the row"
            )
        temperature = sampling.temperature
        self.head, self.targets, self.entropy = head, targets, entropy
        self.inner = head.scale / temperature if head.cap is None else head.scale / head.cap
        self.outer = None if head.cap is None else head.cap / temperature

    def chunks(self, hidden: Tensor, weight: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
        """Slices of tokens with their scaled hidden states [C, D]."""
        vocab = hidden.shape[1] if weight is None else weight.shape[0]
        size = max(1, min(len(hidden), self.head.max_bytes // (4 * vocab)))
        self.block = vocab if hidden.is_cuda else max(256, _BLOCK_BYTES // (4 * size))
        self.bounds = [(lo, min(lo + self.block, vocab)) for lo in range(0, vocab, self.block)]
        for start in range(0, len(hidden), size):
            span = slice(start, min(start + size, len(hidden)))
            yield span, (hidden[span].float() * self.inner).to(self.head.dtype)

    def logits(
        self, h: Tensor, weight: Tensor | None, bias: Tensor | None, lo: int, hi: int, out: Tensor | None = None
    ) -> Tensor:
        """`z / temperature` [C, hi - lo] float32 of one block, in `out` if given."""
        if weight is None:
            y = h[:, lo:hi].float() if out is None else out.copy_(h[:, lo:hi])
        elif self.head.dtype == torch.float32:
            y = torch.mm(h, weight[lo:hi].T, out=out)
        else:
            y = torch.mm(h, weight[lo:hi].to(h.dtype).T).float()
        if bias is not None:
            y = y.add_(bias[lo:hi], alpha=self.inner)
        return y if self.outer is None else y.tanh_().mul_(self.outer)

    def statistics(
        self, span: slice, h: Tensor, weight: Tensor | None, bias: Tensor | None, exponentials: list[Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Log-probabilities, entropies and log-normalizers [C] of a chunk; `exp(z - max)` of each block goes to `exponentials`.

        Returns:
            The three, and for each block what makes probabilities of its exponentials [C].
        """
        peaks, sums, moments, chosen = [], [], [], torch.zeros(len(h), device=h.device)
        for number, (lo, hi) in enumerate(self.bounds):
            z = self.logits(h, weight, bias, lo, hi, None if exponentials is None else exponentials[number])
            place = self.targets[span] - lo
            inside = (place >= 0) & (place < hi - lo)
            chosen += z.gather(1, place.clamp(0, hi - lo - 1)[:, None])[:, 0].where(inside, 0.0)
            peaks.append(z.amax(dim=1))
            z -= peaks[-1][:, None]
            shifted = z.clone() if self.entropy else None
            sums.append(z.exp_().sum(dim=1))
            moments.append(sums[-1] if shifted is None else shifted.mul_(z).sum(dim=1))
            if exponentials is not None and not z.is_set_to(exponentials[number]):
                exponentials[number].copy_(z)
        peak = torch.stack(peaks).amax(dim=0)
        factors = [torch.exp(p - peak) for p in peaks]
        total = torch.stack([s * f for s, f in zip(sums, factors, strict=True)]).sum(dim=0)
        normalizer = peak + total.log()
        entropy = torch.zeros_like(normalizer)
        if self.entropy:
            parts = [f * (m + (p - peak) * s) for f, m, p, s in zip(factors, moments, peaks, sums, strict=True)]
            entropy = total.log() - torch.stack(parts).sum(dim=0) / total
        return chosen - normalizer, entropy, normalizer, [f / total for f in factors]

    def add_gradients(
        self,
        into: _Gradients,
        span: slice,
        h: Tensor,
        weight: Tensor | None,
        blocks: Iterator[tuple[Tensor, Tensor]],
        of_logprob: Tensor,
        of_entropy: Tensor | None,
        values: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        """Add `dL/dy` of a chunk, times what its hidden states and weights contribute, to the sums.

        `dL/dz_v = g * (1[v = target] - p_v) - e * p_v * (log p_v + H)` for the derivatives g of the log-probability and e of
        the entropy H; a cap adds the factor `1 - (z / outer)^2`.

        Args:
            blocks: For each block `exp(z - peak)` [C, block], overwritten, and what makes probabilities of its rows [C].
            values: Log-probabilities, entropies and normalizers [C].
        """
        logprob, entropy, normalizer = values
        for (lo, hi), (exponentials, to_probability) in zip(self.bounds, blocks, strict=True):
            slopes, row_scale = exponentials, -to_probability * of_logprob
            if of_entropy is not None or self.outer is not None:
                log_p = exponentials.log().add_(to_probability.log()[:, None]).clamp_(min=_NEGLIGIBLE)
                per_probability = of_logprob[:, None].expand_as(log_p)
                if of_entropy is not None:
                    per_probability = per_probability + of_entropy[:, None] * (log_p + entropy[:, None])
                if self.outer is not None:
                    per_probability = per_probability * self._slope(log_p + normalizer[:, None])
                slopes, row_scale = exponentials.mul_(per_probability), -to_probability
            self._add(into, span, h, weight, slice(lo, hi), slopes, row_scale)
        direct = of_logprob if self.outer is None else of_logprob * self._slope(logprob + normalizer)
        self._add_targets(into, span, h, weight, direct)

    def _slope(self, z: Tensor) -> Tensor:
        """`dz/dy` from z, both over the temperature."""
        assert self.outer is not None
        return self.outer * (1 - (z / self.outer).square())

    def _add(
        self,
        into: _Gradients,
        span: slice,
        h: Tensor,
        weight: Tensor | None,
        part: slice,
        slopes: Tensor,
        row_scale: Tensor,
    ) -> None:
        """Add a block of `dL/dy`, `row_scale * slopes`; rows are scaled on the narrow side of each product."""
        rounded = slopes.to(h.dtype)
        if into.hidden is not None:
            if weight is None:
                into.hidden[span, part] += slopes * (row_scale * self.inner)[:, None]
            else:
                product = torch.mm(rounded, weight[part].to(h.dtype)).float()
                into.hidden[span] += product * (row_scale * self.inner)[:, None]
        if into.weight is not None:
            scaled = (h * row_scale[:, None]).to(h.dtype)
            if h.dtype == torch.float32:
                into.weight[part].addmm_(rounded.T, scaled)
            else:
                into.weight[part] += torch.mm(rounded.T, scaled).float()
        if into.bias is not None:
            into.bias[part] += torch.mv(slopes.T, row_scale * self.inner)

    def _add_targets(self, into: _Gradients, span: slice, h: Tensor, weight: Tensor | None, direct: Tensor) -> None:
        """Add the part of `dL/dy` that only the targets have."""
        targets = self.targets[span]
        if into.hidden is not None:
            if weight is None:
                into.hidden[span].scatter_add_(1, targets[:, None], (direct * self.inner)[:, None])
            else:
                into.hidden[span] += weight[targets].float() * (direct * self.inner)[:, None]
        if into.weight is not None:
            into.weight.index_add_(0, targets, h.float() * direct[:, None])
        if into.bias is not None:
            into.bias.index_add_(0, targets, direct * self.inner)


class _Formed(torch.autograd.Function):
    """A loss by token; the gradient is formed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor | None, bias: Tensor | None, sweep: _Sweep, loss: TokenLoss
    ) -> tuple[Tensor, Tensor, Tensor]:
        gradients = _Gradients(ctx.needs_input_grad, hidden, weight, bias)
        logprobs, entropies = (torch.zeros(len(hidden), device=hidden.device) for _ in range(2))
        total, memory = torch.zeros((), dtype=torch.float64, device=hidden.device), None
        for span, h in sweep.chunks(hidden, weight):
            if memory is None:
                memory = torch.empty(len(h) * sweep.bounds[-1][1], device=h.device)
            exponentials = [memory[len(h) * lo : len(h) * hi].view(len(h), hi - lo) for lo, hi in sweep.bounds]
            logprob, entropy, normalizer, to_probability = sweep.statistics(span, h, weight, bias, exponentials)
            logprobs[span], entropies[span] = logprob, entropy
            with torch.enable_grad():
                leaves = (logprob.detach().requires_grad_(), entropy.detach().requires_grad_())
                part = loss(span, *leaves)
            of_logprob, of_entropy = torch.autograd.grad(part, leaves, allow_unused=True)
            total += part.detach()
            of_logprob = torch.zeros_like(logprob) if of_logprob is None else of_logprob
            blocks = zip(exponentials, to_probability, strict=True)
            values = (logprob, entropy, normalizer)
            sweep.add_gradients(gradients, span, h, weight, blocks, of_logprob, of_entropy, values)
        ctx.gradients = gradients
        ctx.mark_non_differentiable(logprobs, entropies)
        return total.float(), logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.gradients
        del ctx.gradients  # the last owner's tensors become .grad without a copy
        return *gradients.times(grads[0]), None, None


class _Recomputed(torch.autograd.Function):
    """Log-probabilities and entropies; the backward pass computes the logits of each block again."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor | None, bias: Tensor | None, sweep: _Sweep
    ) -> tuple[Tensor, Tensor]:
        values = torch.zeros(3, len(hidden), device=hidden.device)
        for span, h in sweep.chunks(hidden, weight):
            values[0, span], values[1, span], values[2, span], _ = sweep.statistics(span, h, weight, bias, None)
        ctx.save_for_backward(hidden, weight, bias, values)
        ctx.sweep = sweep
        ctx.set_materialize_grads(False)
        return values[0].clone(), values[1].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, values = ctx.saved_tensors
        sweep, (of_logprob, of_entropy) = ctx.sweep, grads
        of_logprob = torch.zeros_like(values[0]) if of_logprob is None else of_logprob
        gradients = _Gradients(ctx.needs_input_grad, hidden, weight, bias)
        for span, h in sweep.chunks(hidden, weight):
            logprob, entropy, normalizer = values[:, span].unbind()
            ones = torch.ones_like(logprob)
            blocks = (
                (sweep.logits(h, weight, bias, lo, hi).sub_(normalizer[:, None]).exp_(), ones)
                for lo, hi in sweep.bounds
            )
            of = None if of_entropy is None else of_entropy[span]
            sweep.add_gradients(
                gradients, span, h, weight, blocks, of_logprob[span], of, (logprob, entropy, normalizer)
            )
        return *gradients.times(1.0), None
