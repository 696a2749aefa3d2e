"""A causal language model behind a few verbs: log-probabilities, entropy, logits, sampling, load, save."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.ranks import Ranks, is_sharded, named_shards, shard, whole
from align.support import restricted

_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}  # no network, no code from folders
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Per-token quantities, indexed by the token they are about.

    Attributes:
        logprobs: [B, T] log-probability of each token given those before it; 0 before `start`.
        entropy: [B, T] entropy in nats of the distribution the token was drawn from; with gradient only on request.
        of_others: [B, T, K] log-probabilities of other tokens at the same places, or None if none were asked for.
        outside: [B, T] bool, tokens outside the support of this policy's own truncated distribution; None if nothing truncates.
    """

    logprobs: Tensor
    entropy: Tensor
    of_others: Tensor | None = None
    outside: Tensor | None = None


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
            attn_implementation=_attention(directory),
            **_LOCAL,
        )
        return cls(model.to(device).eval(), load_tokenizer(directory), compute_dtype)

    def shard(self, ranks: Ranks) -> None:
        """Hold a shard of the parameters from now on; see `align.ranks.shard`. Every verb then takes all ranks at once."""
        shard(self.model, ranks)
        self.ranks = ranks

    def save(self, directory: Path, dtype: str = "float32") -> None:
        """Write a Hugging Face folder that transformers and vLLM load.

        Of many ranks the first writes, from its host memory; a device holds one whole parameter at a time.
        """
        every = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        tied = every - {name for name, _ in self.model.named_parameters()}  # gathered twice, it would be written twice
        state = {}
        for name, tensor in self.model.state_dict().items():
            if name not in tied:
                full = whole(tensor)
                if self.ranks.first:
                    state[name] = full.to("cpu", DTYPES[dtype])
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

        Of many ranks the first asks, while the others `follow`; one parameter at a time is whole.
        """
        names, parameters = zip(*named_shards(self.model), strict=True)
        for name, parameter in zip(names, self.ranks.lead([p.detach() for p in parameters]), strict=True):
            yield from self._stored(name, parameter).items()

    def named_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of all that `named_weights` yields, by name and in its order; gathers nothing."""
        stored = (self._stored(n, torch.empty(p.shape, device="meta")) for n, p in named_shards(self.model))
        return {name: tuple(tensor.shape) for parts in stored for name, tensor in parts.items()}

    def follow(self) -> None:
        """On every rank but the first: take part in `named_weights` until the first calls `ranks.release`."""
        self.ranks.follow([p.detach() for _, p in named_shards(self.model)])

    def _stored(self, name: str, parameter: Tensor) -> dict[str, Tensor]:
        """A parameter as folders and vLLM know it.

        transformers holds the experts of a mixture in one tensor, others know each by itself. The parts are views or copies.
        """
        from transformers import PreTrainedModel
        from transformers.core_model_loading import revert_weight_conversion

        held = {name: parameter}
        stored: dict[str, Tensor] = (
            revert_weight_conversion(self.model, held) if isinstance(self.model, PreTrainedModel) else held
        )
        return stored

    def logits(self, token_ids: Tensor, start: int = 1) -> Tensor:
        """Logits of the distributions that tokens `start .. T-1` are drawn from. The one place with the shift by one.

        Args:
            token_ids: [B, T].
            start: First token of interest, at least 1.

        Returns:
            [B, T - start, V]; entry `t - start` predicts token `t`.
        """
        if start < 1:
            raise ValueError("token 0 is predicted by nothing; start is at least 1")
        predicting = torch.arange(start - 1, token_ids.shape[1] - 1, device=token_ids.device)
        with self._autocast():
            output = self.model(input_ids=token_ids, logits_to_keep=predicting, use_cache=False)
        return output.logits  # type: ignore[no-any-return]

    def token_logprobs(
        self,
        token_ids: Tensor,
        *,
        start: int = 1,
        temperature: float = 1.0,
        with_entropy: bool = False,
        entropy_gradient: bool = False,
        others: Tensor | None = None,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> TokenLogprobs:
        """`log softmax(logits / temperature)[token]` in float32, and on request the entropy of the same distribution.

        With `top_k` or `top_p` the distribution is renormalised over the tokens that they keep, and the sampled token.

        Args:
            token_ids: [B, T], right-padded; what stands at padding is meaningless and must be masked by the caller.
            start: First token of interest.
            temperature: The sampler's temperature, so that the log-probabilities are those of what sampled.
            with_entropy: Compute the entropy too; it stays 0 otherwise.
            entropy_gradient: Let gradients flow through the entropy, which holds [B, T, V] probabilities until the backward pass.
            others: [B, T, K] tokens whose log-probabilities are asked for too, under the whole distribution.
            top_k: The sampler's; 0 for all tokens.
            top_p: The sampler's; 1 for all tokens.

        Raises:
            ValueError: If one of `others` is not in the vocabulary.
        """
        logits = self.logits(token_ids, start).float() / temperature
        of_others = None if others is None else _logprobs_of(logits, others[:, start:], start)
        outside = None
        if top_k or top_p < 1:
            flat, out = restricted(logits.flatten(0, 1), token_ids[:, start:].flatten(), top_k, top_p)
            logits, outside = flat.view_as(logits), torch.nn.functional.pad(out.view(logits.shape[:2]), (start, 0))
        normalizer = torch.logsumexp(logits, dim=-1)
        chosen = logits.gather(-1, token_ids[:, start:, None]).squeeze(-1) - normalizer
        entropy = torch.zeros_like(normalizer)
        if with_entropy:
            with contextlib.nullcontext() if entropy_gradient else torch.no_grad():
                entropy = torch.stack([_entropy(row, z) for row, z in zip(logits, normalizer, strict=True)])
        pad = (start, 0)
        return TokenLogprobs(
            torch.nn.functional.pad(chosen, pad), torch.nn.functional.pad(entropy, pad), of_others, outside
        )

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

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[Sequence[int]], *, max_tokens: int, temperature: float, seed: int
    ) -> list[list[int]]:
        """Sample one completion per prompt with transformers (for references that no engine serves).

        The distribution is `softmax(logits / temperature)`, whatever penalties and cuts the model folder asks for.

        Returns:
            Token ids up to and including the end token.
        """
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        longest = max(map(len, prompts))
        ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=self.device)
        attention = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        with torch.random.fork_rng(), self._autocast(), self._plain_generation(pad):
            torch.manual_seed(seed)
            output = self.model.generate(
                ids,
                attention_mask=attention,
                max_new_tokens=max_tokens,
                do_sample=True,
                temperature=temperature,
                top_k=0,
                top_p=1.0,
                synced_gpus=is_sharded(self.model),  # no rank stops before the others
            )
        return [self._until_end(row.tolist()) for row in output[:, longest:]]

    def end_token_ids(self) -> set[int]:
        """The tokens that end a completion, from the generation config, else from the tokenizer."""
        configured = self.model.generation_config.eos_token_id
        if configured is None:
            configured = self.tokenizer.eos_token_id
        if configured is None:
            return set()
        return set(configured) if isinstance(configured, list) else {configured}

    @contextlib.contextmanager
    def _plain_generation(self, pad: int) -> Iterator[None]:
        """The model without its folder's generation settings; `generate` falls back on them for all it is not told."""
        from transformers import GenerationConfig

        configured = self.model.generation_config
        self.model.generation_config = GenerationConfig(
            eos_token_id=sorted(self.end_token_ids()) or None, pad_token_id=pad
        )
        try:
            yield
        finally:
            self.model.generation_config = configured

    def _until_end(self, completion: list[int]) -> list[int]:
        ends = self.end_token_ids()
        stop = next((i + 1 for i, token in enumerate(completion) if token in ends), len(completion))
        return completion[:stop]

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.compute_dtype == "float32":
            return contextlib.nullcontext()
        # Of a sharded model the cached copies would outlive the layers that they were made for.
        cached = not is_sharded(self.model)
        return torch.autocast(self.device.type, dtype=DTYPES[self.compute_dtype], cache_enabled=cached)


def _logprobs_of(logits: Tensor, others: Tensor, start: int) -> Tensor:
    """`log softmax(logits)` [B, T - start, V] at the tokens `others` [B, T - start, K]; [B, T, K], 0 before `start`."""
    if others.numel() and int(others.max()) >= logits.shape[-1]:
        raise ValueError(
            f"token {int(others.max())} was asked for, but the vocabulary has {logits.shape[-1]} tokens; "
            "policy and reference need the same one"
        )
    wanted = logits.gather(-1, others) - torch.logsumexp(logits, dim=-1, keepdim=True)
    return torch.nn.functional.pad(wanted, (0, 0, start, 0))


def _entropy(logits: Tensor, normalizer: Tensor) -> Tensor:
    """`H = Z - sum_v p(v) * logit(v)` with Z the log-normalizer. [T, V], [T] -> [T]."""
    probabilities = (logits - normalizer[:, None]).exp_()
    return normalizer - (probabilities * logits).sum(dim=-1)


def _attention(directory: Path) -> str | None:
    """Which attention transformers is to use; None leaves it the choice.

    Its default, torch's fused one, ignores the soft cap that Gemma 2 puts on attention scores, without a word.
    """
    return "eager" if getattr(text_config(directory), "attn_logit_softcapping", None) else None


def text_config(directory: Path) -> Any:
    """The config of a folder's language model, also where it is a part of a larger model."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(directory, **_LOCAL).get_text_config()


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a Hugging Face folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory, **_LOCAL)


def checked_model_directory(directory: Path | str) -> Path:
    """The folder, if it holds a causal language model.

    Raises:
        ValueError: Naming what is missing and how to get it.
    """
    directory = Path(directory)
    if not (directory / "config.json").is_file():
        state = "has no config.json" if directory.is_dir() else "does not exist"
        raise ValueError(f"model folder {directory} {state}; make one with `align models --help`, or correct the path")
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        config = AutoConfig.from_pretrained(directory, **_LOCAL)
    except (ValueError, OSError, KeyError) as error:
        raise ValueError(f"model folder {directory}: config.json cannot be read: {error}") from error
    # The type alone would let in a BERT encoder or a classifier: their types have a causal architecture too.
    architecture = (config.architectures or [None])[0]
    causal = type(config) in AutoModelForCausalLM._model_mapping
    if not causal or architecture not in (None, *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        architecture = architecture or type(config).__name__
        raise ValueError(f"model folder {directory} holds {architecture}, which is not a causal language model")
    if not list(directory.glob("*.safetensors")):
        raise ValueError(f"model folder {directory} holds no *.safetensors weights; only safetensors are read")
    return directory
