"""Measures a real vLLM engine that is given weights; `test_engine.py` judges it."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from align.data.sampling import Sampling
from align.model.support import restricted


async def probe(model_dir: Path) -> dict[str, Any]:
    """All measurements on one engine, and those on an engine with a trap."""
    from cluster.actors.engine.engine import Engine

    settings = settings_of(model_dir)
    engine = Engine(settings)
    weights = Weights(model_dir)
    await engine.load(weights.export(0))
    found: dict[str, Any] = {}
    found |= await agreement(engine, weights)
    found |= await truncated_sampling(engine, weights)
    found |= await seeds(engine)
    found |= await long_prompts(engine)
    found |= await damaged_bytes(engine, weights)
    found |= await in_flight(engine, weights)
    found |= await prefix_cache(engine, weights)
    engine.shutdown()
    found |= await stale_head(settings, Weights(model_dir))
    return found


def settings_of(model_dir: Path, dtype: str = "float32", **more: Any) -> Any:
    """Of an engine with room for 64 sequences of 512 tokens, if nothing else is said."""
    from cluster.actors.engine.engine import EngineSettings

    room = {"max_model_len": 512, "max_num_seqs": 64, "kv_cache_bytes": 64 << 20}
    return EngineSettings(model_dir, dtype, seed=7, **room | more)


class Weights:
    """The learner's side: a transformers model whose weights are changed and exported."""

    def __init__(self, model_dir: Path, dtype: str = "float32") -> None:
        from align.model.policy import Policy

        self.policy = Policy.load(model_dir, compute_dtype=dtype)
        self.generator = torch.Generator().manual_seed(3)

    def export(self, version: int) -> Any:
        from cluster.actors.weights import export_weights

        return export_weights(self.policy.named_weights(), version, self.policy.compute_dtype)

    @torch.no_grad()
    def change(self, by: float = 0.05) -> None:
        """Every weight by this share of the size that those of its matrix have."""
        for parameter in self.policy.model.parameters():
            noise = torch.randn(parameter.shape, generator=self.generator)
            parameter.add_(by * noise * parameter.square().mean().sqrt())

    @torch.no_grad()
    def logprobs(self, token_ids: list[int], temperature: float = 1.0) -> np.ndarray:
        """Log-probabilities of tokens 1.. [T - 1]."""
        ids = torch.tensor([token_ids])
        return self.policy.token_logprobs(ids, sampling=Sampling(temperature)).logprobs[0, 1:].numpy()

    @torch.no_grad()
    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """[T - 1, V], entry t - 1 predicts token t."""
        return self.policy.logits(torch.tensor([token_ids]))[0]


def prompts(num: int, length: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return rng.integers(3, 60, size=(num, length)).tolist()


async def agreement(engine: Any, weights: Weights) -> dict[str, Any]:
    """|behaviour - policy| log-probability at equal version, temperature 1 and 0.7."""
    from cluster.actors.engine.engine import CompletionSettings

    differences = []
    reasons = set()
    for temperature in (1.0, 0.7):
        sampling = CompletionSettings(32, Sampling(temperature))
        done = await asyncio.gather(*(engine.generate(p, sampling, i) for i, p in enumerate(prompts(32, 8))))
        for prompt, completion in zip(prompts(32, 8), done, strict=True):
            expected = weights.logprobs([*prompt, *completion.token_ids], temperature)[len(prompt) - 1 :]
            differences.append(np.abs(expected - completion.logprobs))
            reasons.add(completion.finish_reason.value)
    flat = np.concatenate(differences)
    return {"mismatch_mean": float(flat.mean()), "mismatch_max": float(flat.max()), "finish_reasons": sorted(reasons)}


async def truncated_sampling(engine: Any, weights: Weights) -> dict[str, Any]:
    """With top-k and top-p the reported log-probabilities are those of the truncated distribution."""
    from cluster.actors.engine.engine import CompletionSettings

    worst, worst_full, worst_learner = 0.0, 0.0, 0.0
    sampling = CompletionSettings(16, Sampling(0.7, top_k=10, top_p=0.8))
    for i, prompt in enumerate(prompts(8, 8, seed=1)):
        completion = await engine.generate(prompt, sampling, i)
        logits = weights.logits([*prompt, *completion.token_ids])[len(prompt) - 1 :] / 0.7
        for row, token, reported in zip(logits, completion.token_ids, completion.logprobs, strict=True):
            worst = max(worst, abs(_truncated_logprob(row, token, 10, 0.8) - reported))
            worst_full = max(worst_full, abs(float(torch.log_softmax(row, -1)[token]) - reported))
            limited, _ = restricted(row[None], torch.tensor([token]), Sampling(1.0, 10, 0.8))
            worst_learner = max(worst_learner, abs(float(torch.log_softmax(limited[0], -1)[token]) - reported))
    return {
        "truncated_max": worst,
        "truncated_against_full_max": worst_full,
        "truncated_against_learner_max": worst_learner,
    }


def _truncated_logprob(logits: torch.Tensor, token: int, top_k: int, top_p: float) -> float:
    """The slow way: keep the k likeliest, then the fewest of them that hold top_p, renormalise."""
    order = sorted(range(len(logits)), key=lambda v: -float(logits[v]))[:top_k]
    kept_probabilities = torch.softmax(logits[order].double(), -1).tolist()
    kept, held = [], 0.0
    for v, p in zip(order, kept_probabilities, strict=True):
        kept.append(v)
        held += p
        if held >= top_p:
            break
    return float(torch.log_softmax(logits[kept].double(), -1)[kept.index(token)])


async def seeds(engine: Any) -> dict[str, Any]:
    """Equal seeds repeat bit for bit whatever runs beside them; other seeds give other tokens."""
    from cluster.actors.engine.engine import CompletionSettings

    prompt, sampling = prompts(1, 6, seed=2)[0], CompletionSettings(24)
    alone = await engine.generate(prompt, sampling, 5)
    crowd = await asyncio.gather(*(engine.generate(prompt, sampling, seed) for seed in range(32)))
    same = crowd[5].token_ids == alone.token_ids and crowd[5].logprobs == alone.logprobs
    return {"seed_repeats": same, "distinct_of_32": len({tuple(c.token_ids) for c in crowd})}


async def long_prompts(engine: Any) -> dict[str, Any]:
    """More prompt tokens at once than one engine step takes, each request with a seed of its own."""
    from cluster.actors.engine.engine import CompletionSettings

    many = prompts(48, 300, seed=4)
    done = await asyncio.gather(*(engine.generate(p, CompletionSettings(4), i) for i, p in enumerate(many)))
    return {"long_prompts_done": sum(len(c.token_ids) > 0 for c in done), "long_prompts": len(many)}


async def damaged_bytes(engine: Any, weights: Weights) -> dict[str, Any]:
    """One bit of one weight flips on the way: refused, and the old version goes on serving."""
    from cluster.faults import WrongWeights

    exported = weights.export(1)
    arrays = {name: array.copy() for name, array in exported.arrays.items()}
    some = arrays[sorted(arrays)[0]].view(np.uint32).reshape(-1)
    some[len(some) // 2] ^= 1
    staged_before = set(Path("/dev/shm").glob("align-weights-*"))
    sequence = prompts(1, 40, seed=5)[0]
    before = await engine.score(sequence)
    try:
        await engine.load(dataclasses.replace(exported, arrays=arrays))
        refused = ""
    except WrongWeights as error:
        refused = str(error)
    return {
        "damaged_refused": refused,
        "damaged_version": engine.version,
        "damaged_still_serves": await engine.score(sequence) == before,
        "staged_files_left": [p.name for p in set(Path("/dev/shm").glob("align-weights-*")) - staged_before],
    }


async def in_flight(engine: Any, weights: Weights) -> dict[str, Any]:
    """A load while 16 requests run: every token's log-probability is that of the version its span names."""
    from cluster.actors.engine.engine import CompletionSettings

    before = Weights.__new__(Weights)
    before.policy = _copy(weights.policy)
    weights.change(0.5)
    running = [
        asyncio.create_task(engine.generate(p, CompletionSettings(300), i))
        for i, p in enumerate(prompts(16, 6, seed=6))
    ]
    await asyncio.sleep(0.15)
    await engine.load(weights.export(1))
    done = await asyncio.gather(*running)
    by_version: dict[int, Weights] = {0: before, 1: weights}
    worst, spans = 0.0, set()
    for prompt, completion in zip(prompts(16, 6, seed=6), done, strict=True):
        spans.add(tuple(span.version for span in completion.versions))
        for span in completion.versions:
            expected = by_version[span.version].logprobs([*prompt, *completion.token_ids])[len(prompt) - 1 :]
            difference = np.abs(expected[span.start : span.end] - completion.logprobs[span.start : span.end])
            worst = max(worst, float(difference.max(initial=0.0)))
    return {"in_flight_max": worst, "in_flight_spans": sorted(spans), "in_flight_version": engine.version}


def _copy(policy: Any) -> Any:
    import copy

    from align.model.policy import Policy

    return Policy(copy.deepcopy(policy.model), policy.tokenizer)


async def prefix_cache(engine: Any, weights: Weights) -> dict[str, Any]:
    """The same long prompt before and after a load, with the cache cleared as the engine does it, and not cleared."""
    from cluster.actors.engine.engine import CompletionSettings

    prompt = prompts(1, 400, seed=8)[0]

    async def gap_after_load(version: int) -> float:
        await engine.generate(prompt, CompletionSettings(1), 0)
        weights.change(0.5)
        await engine.load(weights.export(version))
        completion = await engine.generate(prompt, CompletionSettings(8), 0)
        expected = weights.logprobs([*prompt, *completion.token_ids])[len(prompt) - 1 :]
        return float(np.abs(expected - completion.logprobs).max())

    cleared = await gap_after_load(2)
    pause = engine._llm.pause_generation

    async def pause_without_clearing(**_: Any) -> None:
        await pause(mode="keep", clear_cache=False)

    engine._llm.pause_generation = pause_without_clearing
    stale = await gap_after_load(3)
    engine._llm.pause_generation = pause
    return {"prefix_cleared": cleared, "prefix_kept": stale}


async def stale_head(settings: Any, weights: Weights) -> dict[str, Any]:
    """An engine that does not pack its tied head again: the fingerprint matches, the canary does not."""
    from cluster.actors.engine.engine import Engine
    from cluster.fleet.canary import canary_gap
    from tests.integration.traps import TrapSettings

    plain = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    engine = Engine(TrapSettings(**plain))
    sequences = prompts(4, 20, seed=9)
    weights.change(0.05)
    exported = weights.export(1)
    await engine.load(exported)  # the fingerprint of the loaded bytes matches
    gap = canary_gap([await engine.score(s) for s in sequences], [weights.logprobs(s).tolist() for s in sequences])
    staged = engine._stage(exported)
    naive = (await engine._llm.collective_rpc("naive_load", args=(str(staged),)))[0]
    shutil.rmtree(staged.parent)
    died = await update_without_pause(engine)
    engine.shutdown()
    return {"stale_head_gap": gap, "naive_load_error": naive, "unpaused_update_kills": died}


async def update_without_pause(engine: Any) -> bool:
    """Begin an update while a request runs, without stopping the engine first; whether that kills it."""
    from vllm.v1.engine.exceptions import EngineDeadError

    from cluster.actors.engine.engine import CompletionSettings

    running = asyncio.create_task(engine.generate(prompts(1, 6)[0], CompletionSettings(400), 0))
    await asyncio.sleep(0.1)
    try:
        await engine._llm.start_weight_update()
        await running
    except EngineDeadError:
        return True
    return False


if __name__ == "__main__":
    print(json.dumps(asyncio.run(probe(Path(sys.argv[1])))))
