"""The reward, asked about real rows before a run asks it: the right answer has to be worth most, and an empty one less."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from align.data.types import Prompt
from align.rewards.exact_match import ExactMatch
from align.rewards.gym import GymVerifier
from align.rewards.kinds import verifier_of
from align.rewards.outcome import Verifier, verify
from cluster.doctor.verdict import Verdict
from cluster.faults import ConfigError
from cluster.spec.config import RunConfig

_NUM_PROMPTS = 8


def answers(cfg: RunConfig, prompts: Sequence[Prompt]) -> Iterator[Verdict]:
    """Let what verifies answers judge an empty one and the row's own; nothing is asked of a reference model."""
    verifier = verifier_of(cfg.reward)
    if verifier is None:
        yield Verdict("reward", "ok", "it pays token by token and compares with no right answer")
        return
    slowest, num_right, num_empty, rows = 0.0, 0, 0, prompts[:_NUM_PROMPTS]
    for prompt in rows:
        right = reference_answer(verifier, prompt)
        for completion in dict.fromkeys(["", *([] if right is None else [right])]):
            began = time.perf_counter()
            value, failure = verify(verifier, prompt, completion, cfg.quarantine.deadline_s)
            slowest = max(slowest, time.perf_counter() - began)
            if failure is not None:
                yield _broken(f"prompt {prompt.id!r}, answer {completion!r}: {failure.strip().splitlines()[-1]}")
                return
            if completion == "":
                num_empty += value >= 1
            elif value < 1:
                yield _broken(f"prompt {prompt.id!r}: its own answer {right!r} gets {value:g} of 1")
                return
        num_right += right is not None
    if num_empty:
        found = f"an empty answer gets the most there is for {num_empty} of {len(rows)} prompts"
        yield Verdict("reward", "warn", found, "look at reward.extract and reward.pattern")
    most = min(cfg.quarantine.deadline_s, cfg.scorer.score_deadline_s / cfg.run.group_size)
    time_found = f"{1000 * slowest:.2g} ms an answer, at most {most:.3g} s"
    found = f"the right answers of {num_right} of {len(rows)} rows get 1, empty ones less; {time_found}"
    if not num_empty:
        yield Verdict.of(
            "reward", slowest < most, found, "raise scorer.score_deadline_s and quarantine.deadline_s", "warn"
        )


def reference_answer(verifier: Verifier, prompt: Prompt) -> str | None:
    """The answer that came with the prompt, as a completion; None if there is none or it lacks the words around it."""
    match verifier:
        case ExactMatch():
            answer = prompt.metadata.get(verifier.cfg.answer)
        case GymVerifier():
            entry = prompt.metadata["entry"]
            answer = entry.get("answer") if isinstance(entry, dict) else None
        case _:
            return None
    text = None if answer is None else str(answer)
    return text if text is not None and verifier.cfg.find(text) == text else None


def _broken(found: str) -> Verdict:
    fix = "correct the row, reward.answer, reward.extract or reward.pattern"
    return Verdict("reward", "fail", found, fix, ConfigError.exit_code)
