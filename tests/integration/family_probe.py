"""Compares a real vLLM engine with the learner's policy, family by family; prints one line of JSON for each.

It runs in a process of its own, since vLLM changes torch in the process that it is imported into. Arguments: the folder with
one model folder per family, then the families, each as NAME or NAME:DTYPE.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

NUM_PROMPTS, PROMPT_TOKENS, MAX_TOKENS = 8, 24, 24


async def probe(folder: Path, dtype: str) -> dict[str, Any]:
    """Differences of log-probability before and after all weights changed and were published."""
    from align.model.policy import Policy
    from cluster.actors.engine.engine import Engine, EngineSettings
    from cluster.actors.weights import export_weights

    started = time.monotonic()
    policy = Policy.load(folder, compute_dtype=dtype)
    engine = Engine(EngineSettings(folder, dtype, 7, max_model_len=64, max_num_seqs=8, kv_cache_bytes=16 << 20))
    try:
        from_disk = await scored(engine, policy)
        await engine.load(export_weights(policy.named_weights(), 0, dtype))
        initial = await sampled(engine, policy)
        perturb(policy)
        unpublished = await scored(engine, policy)
        await engine.load(export_weights(policy.named_weights(), 1, dtype))
        published = await sampled(engine, policy)
    finally:
        engine.shutdown()
    return {
        "from_disk_max": from_disk,
        "initial": initial,
        "unpublished_max": unpublished,
        "published": published,
        "attention": policy.model.config._attn_implementation,
        "seconds": round(time.monotonic() - started, 1),
    }


@torch.no_grad()
def perturb(policy: Any) -> None:
    """Change every weight by a tenth of its size."""
    generator = torch.Generator().manual_seed(3)
    for parameter in policy.model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.add_(0.1 * noise * parameter.square().mean().sqrt())


async def scored(engine: Any, policy: Any) -> float:
    """Largest |engine - policy| of a token of random prompts as long as a whole sequence."""
    rng = np.random.default_rng(1)
    prompts = rng.integers(3, policy.vocab_size, size=(NUM_PROMPTS, PROMPT_TOKENS + MAX_TOKENS)).tolist()
    return max([float(np.abs(logprobs(policy, p) - await engine.score(p)).max()) for p in prompts])


async def sampled(engine: Any, policy: Any) -> dict[str, float]:
    """|behaviour - policy| of sampled tokens."""
    from cluster.actors.engine.engine import CompletionSettings

    rng = np.random.default_rng(0)
    prompts = rng.integers(3, policy.vocab_size, size=(NUM_PROMPTS, PROMPT_TOKENS)).tolist()
    done = await asyncio.gather(*(engine.generate(p, CompletionSettings(MAX_TOKENS), i) for i, p in enumerate(prompts)))
    gaps = [
        np.abs(logprobs(policy, [*prompt, *completion.token_ids])[PROMPT_TOKENS - 1 :] - completion.logprobs)
        for prompt, completion in zip(prompts, done, strict=True)
    ]
    flat = np.concatenate(gaps)
    return {
        "max": float(flat.max()),
        "mean": float(flat.mean()),
        "num_tokens": len(flat),
        "longest": PROMPT_TOKENS + max(map(len, gaps)),
    }


@torch.no_grad()
def logprobs(policy: Any, token_ids: list[int]) -> np.ndarray:
    """Of tokens 1.. [T - 1]."""
    return policy.token_logprobs(torch.tensor([token_ids])).logprobs[0, 1:].numpy()


async def main(folder: Path, cases: list[str]) -> None:
    """One engine after the other; an error is printed in place of the figures."""
    for case in cases:
        name, _, dtype = case.partition(":")
        try:
            found = await probe(folder / name, dtype or "float32")
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps({"case": case, **found}), flush=True)


if __name__ == "__main__":
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "TORCHDYNAMO_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    sys.path.insert(0, str(Path(__file__).parents[2]))
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[2])
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2:]))
