"""The reward, asked about real rows before a run asks it: the right answer has to be worth most, and an empty one less."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from align.rewards.exact_match import ExactMatch
from align.rewards.gym import GymVerifier
from align.rewards.kinds import verifier_of
from align.rewards.outcome import Verifier
from align.types import Prompt
from cluster.config import RunConfig
from cluster.doctor.verdict import Verdict
from cluster.faults import ConfigError

_NUM_PROMPTS = 8


def answers(cfg: RunConfig, prompts: Sequence[Prompt]) -> Iterator[Verdict]:
    """Let what verifies answers judge an empty one and the row's own; nothing is asked of a reference model."""
    verifier = verifier_of(cfg.reward)
    if verifier is None:
        yield Verdict("reward", "ok", "it pays token by token and compares with no right answer")
        return
    slowest, num_right, num_empty, rows = 0.0, 0, 0, prompts[:_NUM_PROMPTS]
    for prompt in rows:
        try:
            began = time.perf_counter()
            empty, right = verifier(prompt, ""), _of_the_right_answer(verifier, prompt)
            slowest = max(slowest, (time.perf_counter() - began) / 2)
        except Exception as error:  # code of others
            yield _broken(f"prompt {prompt.id!r}: {type(error).__name__}: {error}")
            return
        if right is not None and not right >= 1:
            yield _broken(
                f"prompt {prompt.id!r}: its own answer {reference_answer(verifier, prompt)!r} gets {right:g} of 1"
            )
            return
        num_right += right is not None
        num_empty += empty >= 1
    if num_empty:
        found = f"an empty answer gets the most there is for {num_empty} of {len(rows)} prompts"
        yield Verdict("reward", "warn", found, "look at reward.extract and reward.pattern")
    most = cfg.scorer.score_deadline_s / cfg.run.group_size
    time_found = f"{1000 * slowest:.2g} ms an answer, at most {most:.3g} s"
    found = f"the right answers of {num_right} of {len(rows)} rows get 1, empty ones less; {time_found}"
    if not num_empty:
        yield Verdict.of("reward", slowest < most, found, "raise scorer.score_deadline_s", "warn")


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


def _of_the_right_answer(verifier: Verifier, prompt: Prompt) -> float | None:
    answer = reference_answer(verifier, prompt)
    return None if answer is None else verifier(prompt, answer)


def _broken(found: str) -> Verdict:
    fix = "correct the row, reward.answer, reward.extract or reward.pattern"
    return Verdict("reward", "fail", found, fix, ConfigError.exit_code)
