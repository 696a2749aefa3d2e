"""Log-probabilities and entropies of given logits, by way of the real `Policy`."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from align.data.sampling import Sampling
from align.data.token_logprobs import TokenLogprobs
from align.model.policy import Policy
from tests.conformance.peers import FLOAT32, Case, Equal, Verdict, resolve


class FixedLogits(nn.Module):
    """A model whose logits are given."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(logits)
        self.config = SimpleNamespace(vocab_size=logits.shape[-1])

    def forward(self, input_ids: Tensor, logits_to_keep: Tensor, use_cache: bool = False) -> SimpleNamespace:
        """Logits [B, K, V] of the given positions."""
        return SimpleNamespace(logits=self.table[:, logits_to_keep])


def output_of(
    logits: Tensor, labels: Tensor, temperature: float = 1.0, others: Tensor | None = None
) -> tuple[TokenLogprobs, Tensor]:
    """What `Policy` makes of logits [B, T, V], labels [B, T] and other tokens [B, T, K], and the leaf of the logits."""
    model = FixedLogits(logits)
    ids = torch.cat([torch.zeros(len(labels), 1, dtype=torch.long), labels], dim=1)
    output = Policy(model, tokenizer=None).token_logprobs(
        ids,
        sampling=Sampling(temperature),
        with_entropy=True,
        entropy_gradient=True,
        others=None if others is None else torch.cat([others[:, :1], others], dim=1),
    )
    return output, model.table


def entropy_verdict(case: Case) -> Verdict:
    """Entropy in nats, its mean over a mask, its gradient."""
    logits = case.input("logits") if isinstance(case.inputs["logits"], list) else shared_logits(case)
    output, leaf = output_of(logits, torch.zeros(logits.shape[:2], dtype=torch.long))
    ours = output.entropy[:, 1:]
    pairs = {}
    if "entropy" in case.outputs:
        theirs = case.output("entropy")
        pairs["entropy"] = (ours.detach().reshape(theirs.shape), theirs)
    if "loss" in case.outputs:
        pairs["mean"] = (ours[case.mask("response_mask")].mean().detach(), case.output("loss"))
    if "grad_logits" in case.outputs:
        (gradient,) = torch.autograd.grad(ours.sum(), leaf)
        pairs["gradient"] = (gradient, case.output("grad_logits"))
    return Equal(pairs, FLOAT32)


def logprob_verdict(case: Case) -> Verdict:
    """Log-probability of the labels at a temperature, with its gradient."""
    labels = case.input("labels" if "labels" in case.inputs else "index").long()
    output, leaf = output_of(shared_logits(case), labels, case.params.get("temperature", 1.0))
    ours = output.logprobs[:, 1:]
    (gradient,) = torch.autograd.grad(ours.sum(), leaf)
    pairs = {
        "logprobs": (ours.detach(), case.output("logprob")),
        "gradient": (gradient, case.output("grad_logits")),
    }
    return Equal(pairs, FLOAT32)


def shared_logits(case: Case) -> Tensor:
    """The logits of a case [2, 3, 7], whatever shape the peer was given."""
    return resolve(str(case.inputs["logits"]).split(" ")[0])
