"""A causal language model behind a few verbs: log-probabilities, entropy, logits, sampling, load, save."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.data.sampling import PLAIN, Sampling
from align.data.token_logprobs import TokenLogprobs
from align.model import attention
from align.model.adapters import Adapter, merged, trained_first
from align.model.completions import completions
from align.model.folder import LOCAL, attention_of, checked_model_directory, load_tokenizer, stored
from align.model.head import MAX_LOGITS_BYTES, Head
from align.model.precision import DTYPES, autocast
from align.model.ranks import Ranks, full_tensor, is_sharded, named_shards, shard
from align.model.support import restricted
from align.model.trunk import Trunk


class Policy:
    """A Hugging Face causal language model with its tokenizer.

    Args:
        model: Any `AutoModelForCausalLM`; its parameters are the master weights.
        tokenizer: Its tokenizer.
        compute_dtype: "float32", or "bfloat16" to run matrix products in bfloat16 over float32 master weights (autocast).
    """

    def __init__(self, model: Any, tokenizer: Any, compute_dtype: str = "float32") -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.compute_dtype = compute_dtype
        self.ranks = Ranks()
        self.adapter: Adapter | None = None
        self.max_logits_bytes = MAX_LOGITS_BYTES

    @classmethod
    def load(cls, directory: Path | str, *, device: str = "cpu", compute_dtype: str = "float32") -> Policy:
        """Read a Hugging Face folder; weights become float32 master weights.

        Raises:
            ValueError: If the folder is missing or holds no causal language model.
        """
        from transformers import AutoModelForCausalLM

        directory = checked_model_directory(directory)
        model = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=torch.float32,
            use_safetensors=True,
            attn_implementation=attention_of(directory),
            **LOCAL,
        )
        return cls(model.to(device).eval(), load_tokenizer(directory), compute_dtype)

    def shard(self, ranks: Ranks) -> None:
        """Hold a shard of the parameters from now on; see `align.model.ranks.shard`. Every verb then takes all ranks at once."""
        shard(self.model, ranks)
        self.ranks = ranks

    def save(self, directory: Path, dtype: str = "float32") -> None:
        """Write a Hugging Face folder that transformers and vLLM load.

        Of many ranks the first writes, from its host memory; a device holds one whole parameter at a time.
        """
        every = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        tied = every - {name for name, _ in self.model.named_parameters()}  # gathered twice, it would be written twice
        held = (
            (name, full_tensor(t)) for name, t in trained_first(self.model.state_dict().items()) if name not in tied
        )
        state = {}
        for name, tensor in merged(self.adapter, held):
            if self.ranks.first:
                state[name] = tensor.to("cpu", DTYPES[dtype])
        if not self.ranks.first:
            return
        self.model.save_pretrained(directory, state_dict=state)
        self.tokenizer.save_pretrained(directory)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def vocab_size(self) -> int:
        """Number of logits, which may exceed the tokenizer's vocabulary."""
        return int(self.model.config.vocab_size)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter once (a tied head is not repeated), by its name in a Hugging Face folder.

        Of many ranks the first asks, while the others `help_gather`; one parameter at a time is whole.
        """
        for name, parameter in merged(self.adapter, self._gathered()):
            yield from stored(self.model, name, parameter).items()

    def named_factors(self) -> Iterator[tuple[str, Tensor]]:
        """The adapter alone; see `Adapter.factors`. Of many ranks as `named_weights`."""
        assert self.adapter is not None
        return self.adapter.factors(self._gathered())

    def _gathered(self) -> Iterator[tuple[str, Tensor]]:
        names, shards = zip(*self._shards(), strict=True)
        return zip(names, self.ranks.gather_each(shards), strict=True)

    def _shards(self) -> list[tuple[str, Tensor]]:
        return [(name, p.detach()) for name, p in trained_first(named_shards(self.model))]

    def named_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of all that `named_weights` yields, by name and in its order; gathers nothing."""
        held = ((name, torch.empty(p.shape, device="meta")) for name, p in self._shards())
        parts = (stored(self.model, name, parameter) for name, parameter in merged(self.adapter, held))
        return {name: tuple(tensor.shape) for part in parts for name, tensor in part.items()}

    def help_gather(self) -> None:
        """On every rank but the first: take part in what the first gathers until it calls `ranks.end_gathering`."""
        self.ranks.help_gather([shard for _, shard in self._shards()])

    @cached_property
    def trunk(self) -> Trunk:
        """The model up to its head."""
        return Trunk(self.model)

    @property
    def head(self) -> Head:
        """What makes logits of `states`, and log-probabilities without them."""
        return self.trunk.head(DTYPES[self.compute_dtype], self.max_logits_bytes)

    def states(self, token_ids: Tensor, wanted: Tensor, lengths: Tensor | None = None) -> Tensor:
        """What `head` predicts the wanted tokens from. The one place with the shift by one.

        Args:
            token_ids: [B, T], right-padded.
            wanted: [B, T] bool; not token 0, which nothing predicts.
            lengths: [B] real tokens. If given, and the model can, it runs on them alone: packed into one row, without padding.

        Returns:
            [M, D] for the M wanted tokens, row by row.

        Raises:
            ValueError: If a token 0 is wanted.
        """
        if wanted[:, 0].any():
            raise ValueError("token 0 is predicted by nothing; the first that can be wanted is token 1")
        row, position = wanted.nonzero(as_tuple=True)
        if lengths is not None and self.trunk.packs:
            sizes, order = lengths.sort(descending=True, stable=True)
            real = torch.arange(token_ids.shape[1], device=lengths.device) < sizes[:, None]
            starts = torch.empty_like(lengths).scatter_(0, order, sizes.cumsum(0) - sizes)
            with self._autocast(), attention.packed(sizes.tolist(), token_ids.device) as settings:
                return self.trunk(token_ids[order][real][None], starts[row] + position - 1, **settings)[0]
        first = int(position.min()) if len(position) else 1
        predicting = torch.arange(first - 1, token_ids.shape[1] - 1, device=token_ids.device)
        with self._autocast():
            return self.trunk(token_ids, predicting)[row, position - first]

    def logits(self, token_ids: Tensor, start: int = 1) -> Tensor:
        """Logits of the distributions that tokens `start .. T-1` are drawn from.

        Args:
            token_ids: [B, T].
            start: First token of interest, at least 1.

        Returns:
            [B, T - start, V] float32; entry `t - start` predicts token `t`.
        """
        states = self.states(token_ids, _from(start, token_ids))
        return self.head.logits(states).view(len(token_ids), -1, self.vocab_size)

    def token_logprobs(
        self,
        token_ids: Tensor,
        *,
        start: int = 1,
        wanted: Tensor | None = None,
        lengths: Tensor | None = None,
        sampling: Sampling = PLAIN,
        with_entropy: bool = False,
        entropy_gradient: bool = False,
        others: Tensor | None = None,
    ) -> TokenLogprobs:
        """`log softmax(logits / temperature)[token]` in float32, and on request the entropy of the same distribution.

        Where the sampler truncates, the distribution is renormalised over the tokens that it keeps, and the sampled token.

        Args:
            token_ids: [B, T], right-padded; what stands at padding is meaningless and must be masked by the caller.
            start: First token of interest, unless `wanted` says which.
            wanted: [B, T] bool tokens of interest.
            lengths: [B] real tokens, to compute nothing at padding; see `states`.
            sampling: The sampler's, so that the log-probabilities are those of what sampled.
            with_entropy: Compute the entropy too; it stays 0 otherwise.
            entropy_gradient: Let gradients flow through the entropy.
            others: [B, T, K] tokens whose log-probabilities are asked for too, under the whole distribution.

        Raises:
            ValueError: If one of `others` is not in the vocabulary.
        """
        wanted = _from(start, token_ids) if wanted is None else wanted
        states = self.states(token_ids, wanted, lengths)
        return self.completed(
            states,
            wanted,
            token_ids,
            sampling=sampling,
            with_entropy=with_entropy,
            entropy_gradient=entropy_gradient,
            others=others,
        )

    def completed(
        self,
        states: Tensor,
        wanted: Tensor,
        token_ids: Tensor,
        *,
        sampling: Sampling,
        with_entropy: bool,
        entropy_gradient: bool,
        others: Tensor | None,
    ) -> TokenLogprobs:
        """What `token_logprobs` gives, from `states` [M, D] of the wanted tokens.

        Other tokens and a truncated support need the logits of whole rows, all at once [M, V]; else they are never there.
        """
        targets = token_ids[wanted]
        if others is None and not sampling.truncates:
            values = self.head.logprobs(states, targets, sampling, entropy=with_entropy)
            of_others = outside = None
        else:
            logits = self.head.logits(states) / sampling.temperature
            of_others = None if others is None else _logprobs_of(logits, others[wanted])
            outside = None
            if sampling.truncates:
                logits, outside = restricted(logits, targets, sampling)
            normalizer = torch.logsumexp(logits, dim=-1)
            chosen = logits.gather(-1, targets[:, None]).squeeze(-1) - normalizer
            values = (chosen, _entropy(logits, normalizer) if with_entropy else torch.zeros_like(normalizer))
        logprobs, entropy = values
        entropy = entropy if entropy_gradient else entropy.detach()
        return TokenLogprobs.at(wanted, logprobs, entropy, of_others, outside)

    @torch.no_grad()
    def top_tokens(self, token_ids: Tensor, num_top: int, start: int = 1) -> tuple[Tensor, Tensor]:
        """The `num_top` likeliest tokens for each place and their log-probabilities, at temperature 1.

        Args:
            token_ids: [B, T].
            num_top: K; 0 for the whole vocabulary.
            start: First token of interest.

        Returns:
            Token ids and log-probabilities in float32, likeliest first: [B, T - start, K].
        """
        rows = [torch.log_softmax(row.float(), dim=-1) for row in self.logits(token_ids, start)]
        top = [row.topk(num_top or row.shape[-1], dim=-1) for row in rows]
        return torch.stack([t.indices for t in top]), torch.stack([t.values for t in top])

    def sample(
        self, prompts: Sequence[Sequence[int]], *, max_tokens: int, temperature: float, seed: int
    ) -> list[list[int]]:
        """Sample one completion per prompt with transformers (for references that no engine serves).

        The distribution is `softmax(logits / temperature)`, whatever penalties and cuts the model folder asks for.

        Returns:
            Token ids up to and including the end token.
        """
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        ends = self.end_token_ids()
        with self._autocast():
            return completions(
                self.model, prompts, pad=pad, ends=ends, max_tokens=max_tokens, temperature=temperature, seed=seed
            )

    def end_token_ids(self) -> set[int]:
        """The tokens that end a completion, from the generation config, else from the tokenizer."""
        configured = self.model.generation_config.eos_token_id
        if configured is None:
            configured = self.tokenizer.eos_token_id
        if configured is None:
            return set()
        return set(configured) if isinstance(configured, list) else {configured}

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        # Of a sharded model the cached copies would outlive the layers that they were made for.
        return autocast(self.device, self.compute_dtype, cached=not is_sharded(self.model))


def _logprobs_of(logits: Tensor, others: Tensor) -> Tensor:
    """`log softmax(logits)` [M, V] at the tokens `others` [M, K]; [M, K]."""
    if others.numel() and int(others.max()) >= logits.shape[-1]:
        raise ValueError(
            f"token {int(others.max())} was asked for, but the vocabulary has {logits.shape[-1]} tokens; "
            "policy and reference need the same one"
        )
    return logits.gather(-1, others) - torch.logsumexp(logits, dim=-1, keepdim=True)


def _entropy(logits: Tensor, normalizer: Tensor) -> Tensor:
    """`H = Z - sum_v p(v) * logit(v)` with Z the log-normalizer. [M, V], [M] -> [M]."""
    return normalizer - ((logits - normalizer[:, None]).exp() * logits).sum(dim=-1)


def _from(start: int, token_ids: Tensor) -> Tensor:
    """The tokens `start .. T-1` of each row. [B, T] bool."""
    return (torch.arange(token_ids.shape[1], device=token_ids.device) >= start).expand_as(token_ids)
