"""A run folder for the tests of the pages, with completions that attack them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from align.algorithm.config import AlgorithmConfig
from align.algorithm.objective import Objective
from align.data.batching import collate
from align.data.types import FinishReason, Group, Prompt, ScoredGroup, Ticket, TokenRewards, Trajectory, VersionSpan
from align.learner.learner import UpdateStats
from cluster.record import transcripts
from cluster.record.folder import RunFolder
from cluster.spec.config import resolved
from tests.fakes.run_files import config

PIECES = (
    *("<script>document.title='owned'</script>", "<img src=x onerror=\"document.title='owned'\">", "{{ 7 * 1234567 }}"),
    *("'\" onload='document.title=1' x='", "</a></td></main>", "&lt;b&gt;", "\n", " word", "\u202eright to left"),
)
"""The tokens: token t is the t-th piece."""
HOSTILE = "".join(PIECES)


def hostile_tokenizer() -> PreTrainedTokenizerFast:
    """One token per piece."""
    tokenizer = Tokenizer(models.WordLevel({piece: t for t, piece in enumerate(PIECES)}, unk_token=PIECES[-1]))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def scored(ticket: int, prompt: str, lengths: list[int], version: int = 0, with_reference: bool = True) -> ScoredGroup:
    """A group whose trajectory of n tokens has the first n tokens and the rewards 0, -1, 2, -3, ... times its number."""
    trajectories, scores = [], []
    for repeat, n in enumerate(lengths):
        reason = FinishReason.LENGTH if repeat % 2 else FinishReason.STOP
        logprobs = [-0.1 * (t % 9 + 1) for t in range(n)]
        trajectories.append(
            Trajectory.from_completion(
                [3, 4], [t % len(PIECES) for t in range(n)], logprobs, [VersionSpan(version, 0, n)], reason, repeat
            )
        )
        signs = np.where(np.arange(n) % 2, -1, 1)
        rewards = np.asarray([0, 0, *(signs * np.arange(n) * (repeat + 1) / 10)], np.float32)
        scores.append(TokenRewards(rewards, rewards - 1 if with_reference else None))
    number = Ticket(ticket, Prompt(f"prompt-{ticket}", prompt, (3, 4)), tuple(range(len(lengths))))
    return ScoredGroup(Group(number, tuple(trajectories)), tuple(scores))


def write(folder: Path, model: Path, **sections: dict[str, object]) -> Path:
    """A run of three steps; the last one learned from a stale group. Every completion begins like `HOSTILE`."""
    cfg = config(policy={"model": str(model)}, run={"steps": 4, "name": "quiet"}, **sections)
    RunFolder(folder, resolved(cfg))
    told = (folder / "config.toml").read_text().replace('"quiet"', json.dumps(HOSTILE))  # no run has it; a file may
    (folder / "config.toml").write_text(told)
    long = len(PIECES)
    steps = {
        1: [scored(0, HOSTILE, [long, 3]), scored(1, "a quiet prompt", [2, 5])],
        2: [scored(2, "a quiet prompt", [long, 4], version=1), scored(3, "another", [1, 1], version=1)],
        3: [scored(4, "another", [9, 8], version=0)],
    }
    for step, groups in steps.items():
        add_step(folder, step, groups)
    (folder / "metrics.jsonl").write_text('{"step": 1, "optimizer/grad_norm": 0.125}\n')
    samples = {"begun": True, "sets": {"train": [{"prompt": HOSTILE, "before": "x", "after": "y"}]}}
    (folder / "samples.json").write_text(json.dumps(samples))
    return folder


def add_step(folder: Path, step: int, groups: list[ScoredGroup], ended: bool = True) -> None:
    """One more step is over, or has begun its update."""
    batch = collate(groups)
    ratios = (batch.versions - step + 1) / 10  # none for fresh tokens
    stats = UpdateStats(
        [], 0, False, Objective(AlgorithmConfig()).advantages(batch)[0], batch.behavior_logprobs + ratios
    )
    path = folder / "trajectories" / f"step_{step:05d}.parquet"
    transcripts.write(path, groups, hostile_tokenizer(), step, stats if ended else None)


def save_tokenizer(folder: Path) -> None:
    """The policy's folder, as far as the pages need it."""
    hostile_tokenizer().save_pretrained(folder / "policy")
