"""Compares a real vLLM engine with the learner's policy, family by family; `test_families.py` judges it.

Arguments: the folder with one model folder per family, then the families, each as NAME or NAME:DTYPE.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from tests.harness.probes import one_by_one
from tests.integration.engine_probe import Weights, settings_of

NUM_PROMPTS, PROMPT_TOKENS, MAX_TOKENS = 8, 24, 24


async def probe(folder: Path, dtype: str) -> dict[str, Any]:
    """Differences of log-probability before and after all weights changed and were published."""
    from cluster.actors.engine.engine import Engine

    started = time.monotonic()
    weights = Weights(folder, dtype)
    room = {"max_model_len": 64, "max_num_seqs": 8, "kv_cache_bytes": 16 << 20}
    engine = Engine(settings_of(folder, dtype, **room))
    try:
        from_disk = await scored(engine, weights)
        await engine.load(weights.export(0))
        initial = await sampled(engine, weights)
        weights.change(0.1)
        unpublished = await scored(engine, weights)
        await engine.load(weights.export(1))
        published = await sampled(engine, weights)
    finally:
        engine.shutdown()
    return {
        "from_disk_max": from_disk,
        "initial": initial,
        "unpublished_max": unpublished,
        "published": published,
        "attention": weights.policy.model.config._attn_implementation,
        "seconds": round(time.monotonic() - started, 1),
    }


async def scored(engine: Any, weights: Weights) -> float:
    """Largest |engine - policy| of a token of random prompts as long as a whole sequence."""
    rng = np.random.default_rng(1)
    prompts = rng.integers(3, weights.policy.vocab_size, size=(NUM_PROMPTS, PROMPT_TOKENS + MAX_TOKENS)).tolist()
    return max([float(np.abs(weights.logprobs(p) - await engine.score(p)).max()) for p in prompts])


async def sampled(engine: Any, weights: Weights) -> dict[str, float]:
    """|behaviour - policy| of sampled tokens."""
    from cluster.actors.engine.engine import CompletionSettings

    rng = np.random.default_rng(0)
    prompts = rng.integers(3, weights.policy.vocab_size, size=(NUM_PROMPTS, PROMPT_TOKENS)).tolist()
    done = await asyncio.gather(*(engine.generate(p, CompletionSettings(MAX_TOKENS), i) for i, p in enumerate(prompts)))
    gaps = [
        np.abs(weights.logprobs([*prompt, *completion.token_ids])[PROMPT_TOKENS - 1 :] - completion.logprobs)
        for prompt, completion in zip(prompts, done, strict=True)
    ]
    flat = np.concatenate(gaps)
    return {
        "max": float(flat.max()),
        "mean": float(flat.mean()),
        "num_tokens": len(flat),
        "longest": PROMPT_TOKENS + max(map(len, gaps)),
    }


async def of_case(folder: Path, case: str) -> dict[str, Any]:
    """Of NAME or NAME:DTYPE."""
    name, _, dtype = case.partition(":")
    return await probe(folder / name, dtype or "float32")


if __name__ == "__main__":
    models = Path(sys.argv[1])
    print(json.dumps(asyncio.run(one_by_one(sys.argv[2:], lambda case: of_case(models, case)))))
