"""A causal language model behind a few verbs: log-probabilities, entropy, logits, sampling, load, save."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align import attention
from align.head import MAX_LOGITS_BYTES, Head
from align.trunk import Trunk

_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}  # no network, no code from folders
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Per-token quantities, indexed by the token they are about.

    Attributes:
        logprobs: [B, T] log-probability of each token given those before it; 0 where not wanted.
        entropy: [B, T] entropy in nats of the distribution the token was drawn from; with gradient only on request.
    """

    logprobs: Tensor
    entropy: Tensor

    @classmethod
    def at(cls, places: Tensor, logprobs: Tensor, entropy: Tensor) -> TokenLogprobs:
        """Numbers [M] of the tokens at M places [B, T] bool; 0 elsewhere."""
        blank = torch.zeros(places.shape, device=places.device)
        return cls(blank.masked_scatter(places, logprobs), blank.masked_scatter(places, entropy))


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
        self.max_logits_bytes = MAX_LOGITS_BYTES

    @classmethod
    def load(cls, directory: Path | str, *, device: str = "cpu", compute_dtype: str = "float32") -> Policy:
        """Read a Hugging Face folder; weights become float32 master weights.

        Raises:
            ValueError: If the folder is missing or holds no causal language model.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        directory = checked_model_directory(directory)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, use_safetensors=True, **_LOCAL)
        tokenizer = AutoTokenizer.from_pretrained(directory, **_LOCAL)
        return cls(model.to(device).eval(), tokenizer, compute_dtype)

    def save(self, directory: Path, dtype: str = "float32") -> None:
        """Write a Hugging Face folder that transformers and vLLM load."""
        state = {name: tensor.to(DTYPES[dtype]) for name, tensor in self.model.state_dict().items()}
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
        """Every parameter once (a tied head is not repeated), by its Hugging Face name."""
        for name, parameter in self.model.named_parameters():
            yield name, parameter.detach()

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
        temperature: float = 1.0,
        with_entropy: bool = False,
        entropy_gradient: bool = False,
    ) -> TokenLogprobs:
        """`log softmax(logits / temperature)[token]` in float32, and on request the entropy of the same distribution.

        Args:
            token_ids: [B, T], right-padded; what stands at padding is meaningless and must be masked by the caller.
            start: First token of interest, unless `wanted` says which.
            wanted: [B, T] bool tokens of interest.
            lengths: [B] real tokens, to compute nothing at padding; see `states`.
            temperature: The sampler's temperature, so that the log-probabilities are those of what sampled.
            with_entropy: Compute the entropy too; it stays 0 otherwise.
            entropy_gradient: Let gradients flow through the entropy.
        """
        wanted = _from(start, token_ids) if wanted is None else wanted
        states = self.states(token_ids, wanted, lengths)
        targets = token_ids[wanted]
        logprobs, entropy = self.head.logprobs(states, targets, temperature=temperature, entropy=with_entropy)
        entropy = entropy if entropy_gradient else entropy.detach()
        return TokenLogprobs.at(wanted, logprobs, entropy)

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
        return torch.autocast(self.device.type, dtype=DTYPES[self.compute_dtype])


def _from(start: int, token_ids: Tensor) -> Tensor:
    """The tokens `start .. T-1` of each row. [B, T] bool."""
    return (torch.arange(token_ids.shape[1], device=token_ids.device) >= start).expand_as(token_ids)


def text_config(directory: Path) -> Any:
    """The config of a folder's language model, also where it is a part of a larger model."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(directory, **_LOCAL).get_text_config()


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
