"""vLLM, which this room alone imports: generate with log-probabilities, load weights or adapters, stamp versions.

Works with vLLM 0.26 to 0.32. The differences are two: 0.32 reports the weight version of every token itself
(`CompletionOutput.weight_versions`), for 0.26 the engine counts tokens at each load; and `finish_weight_update` takes no
version in 0.26.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from vllm import SamplingParams
from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from align.data.sampling import PLAIN, Sampling
from align.data.types import FinishReason, VersionSpan
from align.model.adapters import AdapterConfig
from cluster.actors.engine.adapter import STAGED_FILE, describe_adapter, lora_arguments, lora_request
from cluster.actors.engine.receiver import SHARED_MEMORY, WorkerExtension, read_staged
from cluster.actors.weights import ExportedWeights, fingerprint
from cluster.faults import RunError, WrongWeights

_STAGED = "align-weights-"
NATIVE_VERSIONS = any(f.name == "weight_versions" for f in fields(CompletionOutput))
_OF_THE_FOLDER = "default"  # vLLM's name for the version of weights that were not loaded over
# On CPU the plain name "uni" would be turned into a second process that busy-waits; the qualified name is taken as it is.
_CPU_EXECUTOR = "vllm.v1.executor.uniproc_executor.UniProcExecutor"


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What an engine needs to start.

    Attributes:
        model: Hugging Face folder.
        dtype: Type of weights and activations.
        seed: Engine seed; different for every engine of a run, since equal seeds give equal unseeded samples.
        max_model_len: Longest prompt plus completion, in tokens.
        max_num_seqs: Sequences generated at once.
        kv_cache_bytes: Memory for keys and values; on GPUs None leaves it to `gpu_memory_utilization`.
        transport: "object_store", "nccl" or "ipc".
        on_gpu: Whether the engine runs on a GPU.
        tensor_parallel_size: GPUs of the engine.
        gpu_memory_utilization: Share of a GPU's memory for the engine.
        adapter: What is loaded instead of weights; None for weights.
    """

    model: Path
    dtype: str
    seed: int
    max_model_len: int
    max_num_seqs: int
    kv_cache_bytes: int | None
    transport: str = "object_store"
    on_gpu: bool = False
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.85
    adapter: AdapterConfig | None = None

    def arguments(self) -> dict[str, Any]:
        """vLLM's engine arguments."""
        backend = SHARED_MEMORY if self.transport == "object_store" else self.transport
        common: dict[str, Any] = {
            "model": str(self.model),
            "dtype": self.dtype,
            "seed": self.seed,
            "max_model_len": self.max_model_len,
            "max_num_seqs": self.max_num_seqs,
            "skip_tokenizer_init": True,
            "generation_config": "vllm",  # sampling comes from the run file alone, not from the model folder
            "logprobs_mode": "processed_logprobs",
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
            "worker_extension_cls": f"{WorkerExtension.__module__}.{WorkerExtension.__name__}",
            "weight_transfer_config": {"backend": backend},
        }
        if self.adapter is not None:
            common |= lora_arguments(self.model, self.adapter)
        if self.kv_cache_bytes is not None:
            common["kv_cache_memory_bytes"] = self.kv_cache_bytes
        if self.on_gpu:
            return common | {
                "tensor_parallel_size": self.tensor_parallel_size,
                # In a placement group vLLM would otherwise start Ray actors of its own, for which the group has no room.
                **({"distributed_executor_backend": "mp"} if self.tensor_parallel_size > 1 else {}),
                "gpu_memory_utilization": self.gpu_memory_utilization,
            }
        return common | {
            "enforce_eager": True,
            "distributed_executor_backend": _CPU_EXECUTOR,
            # Per-request seeds with a prompt cut in chunks kill vLLM's CPU engine.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(8192, self.max_model_len),
        }


@dataclass(frozen=True, slots=True)
class CompletionSettings:
    """What a completion is sampled from, and where it ends.

    Attributes:
        max_tokens: Most tokens of it.
        sampling: The distribution.
        stop_token_ids: Tokens that end it besides the model's own end tokens.
    """

    max_tokens: int
    sampling: Sampling = PLAIN
    stop_token_ids: tuple[int, ...] = ()


@dataclass(slots=True)
class Completion:
    """Sampled tokens with the log-probability of each under the distribution that sampled it.

    Spans count from the first sampled token.
    """

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[VersionSpan] = field(default_factory=list)
    finish_reason: FinishReason = FinishReason.ABORT


class Engine:
    """One asynchronous vLLM engine, token ids in and out. Many requests may run at once; vLLM batches them.

    Args:
        settings: See `EngineSettings`.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.version = -1
        self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**settings.arguments()))
        self._request_numbers = itertools.count()
        self._running: dict[str, Completion] = {}
        self._connected = False
        self._watched = False
        self._adapter = lora_request() if settings.adapter else None
        self._whole = True  # the serving weights are those of one version, not half replaced

    async def generate(self, prompt_ids: Sequence[int], settings: CompletionSettings, seed: int) -> Completion:
        """Sample one completion.

        Raises:
            vllm.exceptions.VLLMValidationError: If the prompt does not fit or holds an unknown token.
            vllm.v1.engine.exceptions.EngineDeadError: If the engine died.
        """
        request_id = str(next(self._request_numbers))
        completion = self._running[request_id] = Completion()
        if not NATIVE_VERSIONS:
            completion.versions.append(VersionSpan(self.version, 0, 0))
        try:
            prompt = {"prompt_token_ids": list(prompt_ids)}
            params = _sampling_params(settings, seed)
            async for output in self._llm.generate(prompt, params, request_id, lora_request=self._adapter):
                _extend(completion, output)
        finally:
            del self._running[request_id]
        return completion

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probability of tokens 1.. of a sequence at temperature 1 (for the canary)."""
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        request_id = f"canary-{next(self._request_numbers)}"
        final: RequestOutput | None = None
        prompt = {"prompt_token_ids": list(token_ids)}
        async for output in self._llm.generate(prompt, params, request_id, lora_request=self._adapter):
            final = output
        if final is None or final.prompt_logprobs is None:
            raise WrongWeights("the engine returned no prompt log-probabilities", "check the vLLM version")
        scored = zip(token_ids[1:], final.prompt_logprobs[1:], strict=True)
        return [by_token[token].logprob for token, by_token in scored if by_token is not None]

    async def load(self, weights: ExportedWeights) -> None:
        """Replace the serving weights, or the adapter; requests in flight continue on the new ones, with fresh keys and values.

        Staging and the fingerprint come before the engine is touched, so bad bytes leave the old weights serving.

        Raises:
            WrongWeights: If the staged bytes, or the bytes that the worker loaded, are not the published ones.
        """
        staged = self._stage(weights)
        try:
            await (self._load_adapter(staged) if self._adapter else self._load_weights(staged))
        finally:
            shutil.rmtree(staged.parent)
        await self.commit(weights.version, weights.fingerprint)

    async def _load_weights(self, staged: Path) -> None:
        if not self._connected:
            await self.init_weight_transfer_engine({})
        await self.begin_update()
        await self.start_weight_update()
        await self.update_weights({"path": str(staged)})
        await self.finish_weight_update()

    async def _load_adapter(self, staged: Path) -> None:
        assert self.settings.adapter is not None
        describe_adapter(staged.parent, self.settings.adapter.rank)
        await self.begin_update()
        self._whole = False
        await self._llm.add_lora(lora_request(staged.parent))

    async def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Open the worker's end of the transport; an end that was open is closed before."""
        if self._connected and hasattr(self._llm, "shutdown_weight_transfer_engine"):
            await self._llm.shutdown_weight_transfer_engine()
        await self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=init_info))
        self._connected = True

    async def begin_update(self) -> None:
        """Stop between two engine steps; requests in flight wait.

        A step between start and finish would run on half-built layers and kill the engine; the cache is cleared since
        its keys and values belong to the old weights.
        """
        if not self._watched and not self._adapter:
            await self._llm.collective_rpc("align_watch")
            self._watched = True
        await self._llm.pause_generation(mode="keep", clear_cache=True)

    async def start_weight_update(self) -> None:
        """Take the layers apart. From here on the old weights are gone."""
        self._whole = False
        await self._llm.start_weight_update()

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive weights, all or a part of them."""
        await self._llm.update_weights(WeightTransferUpdateRequest(update_info=update_info))

    async def finish_weight_update(self) -> None:
        """Put the layers together again."""
        await self._llm.finish_weight_update()

    async def commit(self, version: int, published: str) -> None:
        """Serve what was loaded, if it is what was published.

        Args:
            version: Policy version of the weights.
            published: Fingerprint of the weights as the learner sent them.

        Raises:
            WrongWeights: If a worker loaded anything else; the engine stays stopped and has to be replaced.
        """
        check = "align_adapter_fingerprint" if self._adapter else "align_loaded_fingerprint"
        for loaded in await self._llm.collective_rpc(check):
            if loaded != published:
                raise WrongWeights(
                    f"version {version}: the worker loaded {loaded}, published was {published}",
                    "the engine cannot be trusted any more; it has to be replaced",
                )
        if NATIVE_VERSIONS:
            await self._llm.update_weight_version(str(version))
        else:
            for completion in self._running.values():
                end = len(completion.token_ids)
                completion.versions.append(VersionSpan(version, end, end))
        self.version, self._whole = version, True
        await self._llm.resume_generation()

    async def abandon_update(self) -> bool:
        """Give up an update. Serves on if the old weights are still there; returns whether they are."""
        if self._whole:
            await self._llm.resume_generation()
        return self._whole

    def _stage(self, weights: ExportedWeights) -> Path:
        folder = _staging_folder(weights.num_bytes) / f"{_STAGED}{os.getpid()}-{weights.version}"
        path = folder / STAGED_FILE
        try:
            folder.mkdir()
            save_file(weights.tensors(), path)
            staged = fingerprint(read_staged(path).items())
            if staged != weights.fingerprint:
                raise WrongWeights(
                    f"version {weights.version} arrived damaged: fingerprint {staged}, published was {weights.fingerprint}",
                    "the old weights still serve; memory or network of the node is at fault",
                )
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return path

    def shutdown(self) -> None:
        """End the engine's processes."""
        with contextlib.suppress(Exception):
            self._llm.shutdown()


def _sampling_params(settings: CompletionSettings, seed: int) -> SamplingParams:
    sampling = settings.sampling
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_tokens=settings.max_tokens,
        stop_token_ids=list(settings.stop_token_ids),
        seed=seed,
        logprobs=0,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY if NATIVE_VERSIONS else RequestOutputKind.DELTA,
    )


def _staging_folder(num_bytes: int) -> Path:
    """A folder with room for the weights, in shared memory if it has it; what dead processes left there goes first."""
    for folder in (Path("/dev/shm"), Path(tempfile.gettempdir())):
        if os.access(folder, os.W_OK):
            for left in folder.glob(f"{_STAGED}*"):
                if not Path("/proc", left.name.removeprefix(_STAGED).split("-")[0]).exists():
                    shutil.rmtree(left, ignore_errors=True)
            if shutil.disk_usage(folder).free > num_bytes + (16 << 20):
                return folder
    raise RunError(
        f"no room for {num_bytes / 2**20:.0f} MiB of weights in /dev/shm or {tempfile.gettempdir()}",
        "give the container more shared memory, or point TMPDIR to a folder with room",
    )


def _extend(completion: Completion, output: RequestOutput) -> None:
    """Add what one output of vLLM brings."""
    new = output.outputs[0]
    completion.token_ids.extend(new.token_ids)
    completion.logprobs.extend(
        by_token[token].logprob for token, by_token in zip(new.token_ids, new.logprobs or [], strict=True)
    )
    if NATIVE_VERSIONS:
        completion.versions = [VersionSpan(_number(s.version), s.start, s.end) for s in new.weight_versions or []]
    else:
        last = completion.versions[-1]
        completion.versions[-1] = VersionSpan(last.version, last.start, len(completion.token_ids))
    if new.finish_reason is not None:
        completion.finish_reason = FinishReason(new.finish_reason)


def _number(version: str) -> int:
    """The policy version of a token; -1, as in `Engine.version`, for the weights of the model folder, before any load."""
    return -1 if version == _OF_THE_FOLDER else int(version)
