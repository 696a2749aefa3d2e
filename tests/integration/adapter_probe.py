"""Measures a real vLLM engine that is given adapters alone, as `engine_probe.py` does one that is given weights.

Arguments: a model folder; or several, of which the agreement alone is measured.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from align.model.adapters import AdapterConfig
from tests.harness.probes import one_by_one
from tests.integration.engine_probe import (
    Weights,
    agreement,
    damaged_bytes,
    in_flight,
    prefix_cache,
    prompts,
    settings_of,
)

CONFIG = AdapterConfig(rank=3, alpha=4.0, rslora=True, publish="adapter")


class AdapterWeights(Weights):
    """The learner's side: the adapter is changed and exported, and the model has it."""

    def __init__(self, model_dir: Path) -> None:
        from align.model.adapters import Adapter

        super().__init__(model_dir)
        self.policy.adapter = Adapter(self.policy.model, CONFIG)

    def export(self, version: int) -> Any:
        from cluster.actors.weights import export_weights

        return export_weights(self.policy.named_factors(), version, self.policy.compute_dtype)

    @torch.no_grad()
    def change(self, by: float = 0.05) -> None:
        for parameter in self.policy.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=self.generator) * by * 0.5)


async def probe(model_dir: Path) -> dict[str, Any]:
    """All measurements on one engine."""
    weights = AdapterWeights(model_dir)
    engine = new_engine(model_dir)
    try:
        first = weights.export(0)
        await engine.load(first)
        found: dict[str, Any] = {"bytes": first.num_bytes, "model_bytes": model_bytes(weights)}
        found["initial_mean"] = (await agreement(engine, weights))["mismatch_mean"]
        found |= await damaged_bytes(engine, weights)
        found |= await in_flight(engine, weights)
        found |= await agreement(engine, weights)
        found |= await together(engine, weights)
        found |= await prefix_cache(engine, weights)
        found |= await other_scale(engine, weights)
        found |= await other_places(engine, weights)
    finally:
        engine.shutdown()
    return found


def new_engine(model_dir: Path) -> Any:
    from cluster.actors.engine.engine import Engine

    return Engine(settings_of(model_dir, adapter=CONFIG))


def model_bytes(weights: Weights) -> int:
    return sum(weight.nbytes for _, weight in weights.policy.named_weights())


async def together(engine: Any, weights: Weights) -> dict[str, Any]:
    """Prompts of several lengths scored at once, as for the canary."""
    sequences = [sequence[:length] for sequence, length in zip(prompts(4, 40, seed=5), (40, 7, 23, 31), strict=True)]
    scored = await asyncio.gather(*(engine.score(sequence) for sequence in sequences))
    pairs = zip(scored, sequences, strict=True)
    gaps = [np.abs(weights.logprobs(sequence) - found).max() for found, sequence in pairs]
    return {"together_max": float(max(gaps))}


async def other_scale(engine: Any, weights: Weights) -> dict[str, Any]:
    """An engine that is told another alpha, so that vLLM scales by itself what has its scale already."""
    from cluster.actors.engine import engine as module
    from cluster.faults import WrongWeights

    describe = module.describe_adapter

    def describe_twice(folder: Path, rank: int) -> None:
        describe(folder, rank)
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 2 * rank}))

    module.describe_adapter = describe_twice
    try:
        await engine.load(weights.export(4))
        refused = ""
    except WrongWeights as error:
        refused = str(error)
    module.describe_adapter = describe
    await engine.load(weights.export(5))
    served = await engine.score(prompts(1, 20, seed=9)[0])
    return {"other_scale_refused": refused, "other_scale_then": engine.version, "other_scale_served": len(served)}


async def other_places(engine: Any, weights: Weights) -> dict[str, Any]:
    """An adapter for a layer that vLLM does not have."""
    from cluster.actors.weights import export_weights

    renamed = ((name.replace("o_proj", "w_proj"), tensor) for name, tensor in weights.policy.named_factors())
    try:
        await engine.load(export_weights(renamed, 6, "float32"))
        refused = ""
    except Exception as error:
        refused = str(error)
    return {"other_places_refused": refused}


async def of_family(model_dir: Path) -> dict[str, Any]:
    """Agreement alone."""
    weights = AdapterWeights(model_dir)
    engine = new_engine(model_dir)
    try:
        weights.change()
        await engine.load(weights.export(0))
        return await agreement(engine, weights)
    finally:
        engine.shutdown()


async def main(folders: list[str]) -> dict[str, Any]:
    if len(folders) == 1:
        return await probe(Path(folders[0]))
    return await one_by_one(folders, lambda folder: of_family(Path(folder)))


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(sys.argv[1:]))))
