"""Rewards beyond the reference model: extraction of answers, outcomes on the last token, penalties, sums of rewards."""

from __future__ import annotations

import contextlib
import math
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from align.data.types import Group, Prompt, TokenRewards
from align.rewards.exact_match import ExactMatch, ExactMatchConfig
from align.rewards.extraction import Extraction
from align.rewards.gym import GymRewardConfig, GymVerifier
from align.rewards.kinds import (
    CompositeConfig,
    CompositeReward,
    RewardConfig,
    RewardSection,
    WithReference,
    make_reward,
    reads_reference,
    verifier_of,
)
from align.rewards.outcome import VerifierReward, at_the_end
from align.rewards.overlong import OverlongConfig, OverlongReward, overlong_penalty
from align.rewards.reference import ReferenceRewardConfig
from align.rewards.reward import Reward
from tests.fakes.trajectories import make_group, make_trajectory


def section(**content: Any) -> RewardConfig:
    found: RewardConfig = TypeAdapter(RewardSection).validate_python(content)
    return found


def prompt(**metadata: object) -> Prompt:
    return Prompt("p7", "2 + 3 =", (1,), metadata)


def decode(token_ids: Sequence[int]) -> str:
    """Tokens are code points."""
    return "".join(map(chr, token_ids))


def group_of(question: Prompt, *completions: str) -> Group:
    group = make_group([make_trajectory([1, 1], [ord(c) for c in text]) for text in completions])
    return replace(group, ticket=replace(group.ticket, prompt=question))


# --- extraction ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The answer is 42.", "42"),
        ("12 + 7 = 19", "19"),
        ("19", "19"),
        ("so 3-7", "7"),
        ("so it is -7", "-7"),
        ("so it is **-7**", "-7"),
        ("x−7", "7"),
        ("= −7", "−7"),
        ("about 1,234.50 dollars.", "1,234.50"),
        ("one of 3,4", "4"),
        ("1,2345", "2345"),
        ("5 apples and 6.", "6"),
        ("forty-two", None),
        ("", None),
    ],
)
def test_the_last_number_of_a_text_is_found(text: str, found: str | None) -> None:
    assert Extraction().find(text) == found


@pytest.mark.parametrize(
    ("pattern", "text", "found"),
    [
        (r"answer: (\w+)", "answer: a, no, answer: b", "b"),
        (r"[A-D]", "A or B", "B"),
        (r"(x)|(y)", "y", None),  # the first group took no part in the match
        (r"answer: (\w+)", "it is b", None),
    ],
)
def test_a_pattern_finds_its_last_match_or_the_first_group_of_it(pattern: str, text: str, found: str | None) -> None:
    assert Extraction(extract="regex", pattern=pattern).find(text) == found


@pytest.mark.parametrize(("one", "other"), [("1,000", "1000.0"), ("-7", "−7"), ("+5", "5"), ("007", "7")])
def test_numbers_are_compared_by_value(one: str, other: str) -> None:
    assert Extraction().normalise(one) == Extraction().normalise(other)


@given(st.integers(-(10**9), 10**9), st.text(alphabet="abc .,:=*\n", max_size=8))
def test_a_number_written_at_the_end_is_found_with_its_value(value: int, before: str) -> None:
    found = Extraction().find(f"{before} {value:,}")
    assert found is not None
    assert Extraction().normalise(found) == value


def test_a_number_of_any_length_is_compared_exactly() -> None:
    rule = Extraction()
    assert rule.normalise("9" * 40) != rule.normalise("9" * 39 + "8")


def test_texts_are_compared_without_case_and_surplus_space() -> None:
    rule = Extraction(extract="text")
    assert rule.find(" Paris\n") == " Paris\n"
    assert rule.normalise(" New\n YORK ") == rule.normalise("new york") != rule.normalise("newyork")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"extract": "regex"}, "needs a pattern"),
        ({"pattern": "x"}, "nothing else reads one"),
        ({"extract": "regex", "pattern": "("}, "not a regular expression"),
    ],
)
def test_an_extraction_that_cannot_work_is_refused(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError, match=expected):
        Extraction(**settings)


# --- exact match --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "completion", "score"),
    [("5", "It is 5.", 1), (5, "5.0", 1), ("5", "5 + 1 = 6", 0), ("5", "five", 0), ("1,234", "1234", 1)],
)
def test_an_answer_is_right_if_it_equals_the_prompts(answer: object, completion: str, score: float) -> None:
    assert ExactMatch(ExactMatchConfig())(prompt(answer=answer), completion) == score


def test_the_column_and_the_rule_are_configured() -> None:
    verifier = ExactMatch(ExactMatchConfig(answer="capital", extract="text"))
    verifier.check(prompt(capital="Paris"))
    assert verifier(prompt(capital="Paris"), "paris ") == 1
    assert verifier(prompt(capital="Paris"), "It is Paris") == 0


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"solution": "5"}, r"'p7' has no column 'answer' \(reward\.answer\).*: solution"),
        ({}, "no other column"),
        ({"answer": None}, "has no column 'answer'"),
        ({"answer": "five"}, "'p7', column 'answer': 'five' is not a number; set reward.extract"),
        ({"answer": "5 or 6"}, "is not a number"),
    ],
)
def test_a_prompt_whose_answers_cannot_be_compared_is_named_before_the_run(
    metadata: dict[str, object], expected: str
) -> None:
    with pytest.raises(ValueError, match=expected):
        ExactMatch(ExactMatchConfig()).check(prompt(**metadata))


# --- outcomes -----------------------------------------------------------------------------------------------------


def test_the_outcome_is_paid_at_the_last_sampled_token_and_nowhere_else() -> None:
    reward = VerifierReward(ExactMatch(ExactMatchConfig()), decode)
    right, wrong, short = reward(group_of(prompt(answer="5"), "it is 5", "6", "5"))
    assert right.rewards.tolist() == [0] * 8 + [1]
    assert wrong.rewards.tolist() == [0, 0, 0]
    assert short.rewards.tolist() == [0, 0, 1]
    assert right.ref_logprobs is None


def test_tokens_after_the_last_sampled_one_and_trajectories_without_any_are_not_paid() -> None:
    trajectory = make_trajectory([1], [2, 3])
    mask = np.array([False, True, False])
    middle = replace(trajectory, loss_mask=mask, versions=(replace(trajectory.versions[0], start=1, end=2),))
    assert at_the_end(middle, 0.5).rewards.tolist() == [0, 0.5, 0]
    assert at_the_end(make_trajectory([1, 2], []), 1.0).rewards.tolist() == [0, 0]


@dataclass
class ScriptedVerifier:
    """Does to each completion what the script says: a function that returns, raises or hangs."""

    script: dict[str, Callable[[], Any]]

    def check(self, prompt: Prompt) -> None:
        pass

    def __call__(self, prompt: Prompt, completion: str) -> float:
        value: float = self.script[completion]()
        return value


def hang() -> None:
    while True:
        with contextlib.suppress(Exception):  # as code does that knows no deadline
            time.sleep(5)


def backtrack() -> None:
    re.match(r"(a|a)*$", "a" * 40 + "b")


def score(*script: Callable[[], Any], deadline_s: float = 5) -> tuple[TokenRewards, ...]:
    names = [chr(ord("a") + index) * 3 for index in range(len(script))]
    verifier = ScriptedVerifier(dict(zip(names, script, strict=True)))
    return VerifierReward(verifier, decode, deadline_s)(group_of(prompt(), *names))


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda: math.nan, "returned nan, expected a finite number"),
        (lambda: -math.inf, "returned -inf, expected a finite number"),
        (lambda: 1e300, "returned 1e\\+300, expected a finite number"),
        (lambda: "0.5", "returned '0.5', expected a number"),
        (lambda: None, "TypeError: float"),
        (sys.exit, "SystemExit"),
        (hang, r"in hang\n(.*\n)*.*TimeoutError: no answer within 0.05 s"),
        (backtrack, r"in backtrack\n(.*\n)*.*TimeoutError: no answer within 0.05 s"),
    ],
)
def test_a_verifier_that_fails_on_a_trajectory_leaves_its_traceback_and_judges_the_others(
    act: Callable[[], Any], said: str
) -> None:
    first, failed, last = score(lambda: 0.25, act, lambda: np.float64(0.75), deadline_s=0.05)
    assert [first.failure, last.failure] == [None, None]
    assert (first.rewards.sum(), failed.rewards.sum(), last.rewards.sum()) == (0.25, 0, 0.75)
    assert failed.failure is not None
    assert re.search(said, failed.failure), failed.failure


def test_a_deadline_that_was_kept_leaves_no_alarm_behind() -> None:
    before = signal.getsignal(signal.SIGALRM)
    score(lambda: 1.0)
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_composite_fails_where_one_of_its_parts_does() -> None:
    good, bad = (ScriptedVerifier({"abc": act}) for act in (lambda: 1.0, lambda: 1 / 0))
    parts: list[tuple[float, Reward]] = [(1.0, VerifierReward(good, decode)), (2.0, VerifierReward(bad, decode))]
    (whole,) = CompositeReward(parts)(group_of(prompt(), "abc"))
    assert "ZeroDivisionError" in str(whole.failure)
    (kept,) = CompositeReward(parts[:1])(group_of(prompt(), "abc"))
    assert kept.failure is None


# --- the overlong penalty -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_tokens", "penalty"),
    [(0, 0.0), (16384, 0.0), (16385, -1 / 4096), (18432, -0.5), (20480, -1.0), (20481, -1.0), (10**6, -1.0)],
)
def test_the_penalty_has_the_values_of_the_paper(num_tokens: int, penalty: float) -> None:
    assert overlong_penalty(num_tokens, max_tokens=20480, cache_tokens=4096) == penalty


@given(st.integers(1, 50), st.integers(1, 50), st.integers(0, 120))
def test_the_penalty_never_rises_with_length_and_stays_between_minus_one_and_zero(
    free: int, cache: int, num_tokens: int
) -> None:
    one, more = (overlong_penalty(n, free + cache, cache) for n in (num_tokens, num_tokens + 1))
    assert -1 <= more <= one <= 0
    assert one - more <= 1 / cache + 1e-12


def test_the_penalty_counts_sampled_tokens_and_is_paid_at_the_last() -> None:
    scores = OverlongReward(OverlongConfig(max_tokens=4, cache_tokens=2))(group_of(prompt(), "ab", "abc", "abcd"))
    assert [score.rewards.tolist() for score in scores] == [[0] * 4, [0, 0, 0, 0, -0.5], [0, 0, 0, 0, 0, -1]]


def test_a_cache_longer_than_the_whole_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"cache_tokens \(5\) is above max_tokens \(4\)"):
        OverlongConfig(max_tokens=4, cache_tokens=5)


# --- sums of rewards ----------------------------------------------------------------------------------------------


def reference_of(cfg: ReferenceRewardConfig) -> Any:
    """Log-probabilities -1, -2, ... along the completion; the reward is alpha times them."""

    def score(group: Group) -> tuple[TokenRewards, ...]:
        refs = [np.where(t.loss_mask, -np.cumsum(t.loss_mask), 0).astype(np.float32) for t in group.trajectories]
        return tuple(TokenRewards(np.float32(cfg.alpha) * ref, ref) for ref in refs)

    return score


def test_a_composite_is_the_weighted_sum_and_keeps_the_references_log_probabilities() -> None:
    parts = [
        {"weight": 2.0, "reward": {"kind": "exact_match"}},
        {"reward": {"kind": "overlong", "max_tokens": 2, "cache_tokens": 2}},
        {"weight": 0.5, "reward": {"kind": "reference", "alpha": 3.0}},
    ]
    cfg = section(kind="composite", parts=parts)
    (score,) = make_reward(cfg, decode, reference_of)(group_of(prompt(answer=5), "5"))
    assert score.rewards.tolist() == [0, 0, 2 * 1 - 0.5 + 0.5 * 3 * -1]
    assert score.ref_logprobs is not None
    assert score.ref_logprobs.tolist() == [0, 0, -1]
    assert score.rewards.dtype == np.float32


def test_a_composite_without_a_reference_has_no_reference_log_probabilities() -> None:
    reward = CompositeReward([(1.0, OverlongReward(OverlongConfig(max_tokens=4, cache_tokens=2)))])
    assert [score.ref_logprobs for score in reward(group_of(prompt(), "ab", "c"))] == [None, None]


def test_log_probabilities_for_a_kl_term_leave_the_rewards_as_they_are() -> None:
    own = VerifierReward(ExactMatch(ExactMatchConfig()), decode)
    (score,) = WithReference(own, reference_of(ReferenceRewardConfig(alpha=9)))(group_of(prompt(answer=5), "=5"))
    assert score.rewards.tolist() == [0, 0, 0, 1]
    assert score.ref_logprobs is not None
    assert score.ref_logprobs.tolist() == [0, 0, -1, -2]


# --- kinds --------------------------------------------------------------------------------------------------------


def test_a_section_without_a_kind_is_the_reference_models() -> None:
    assert section(alpha=1.0) == ReferenceRewardConfig(alpha=1.0)
    composite = section(kind="composite", parts=[{"reward": {"alpha": 1.0}}])
    assert isinstance(composite, CompositeConfig)
    assert composite.parts[0].reward == ReferenceRewardConfig(alpha=1.0)


@pytest.mark.parametrize(
    "content",
    [
        {"kind": "exakt"},
        {"kind": "exact_match", "alpha": 1.0},
        {"answer": "x"},
        {"kind": "composite", "parts": []},
        {"kind": "composite", "parts": [{"reward": {"kind": "composite", "parts": []}}]},
    ],
)
def test_a_section_of_no_kind_is_refused(content: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        section(**content)


EXACT: dict[str, Any] = {"kind": "exact_match"}
PENALTY: dict[str, Any] = {"kind": "overlong", "max_tokens": 4, "cache_tokens": 2}


@pytest.mark.parametrize(
    ("content", "reads", "verifier"),
    [
        ({}, True, None),
        (EXACT, False, ExactMatch),
        ({"kind": "reasoning_gym"}, False, GymVerifier),
        (PENALTY, False, None),
        ({"kind": "composite", "parts": [{"reward": PENALTY}, {"reward": EXACT}]}, False, ExactMatch),
        ({"kind": "composite", "parts": [{"reward": PENALTY}, {"reward": {}}]}, True, None),
    ],
)
def test_what_a_reward_needs_and_what_verifies_answers(
    content: dict[str, Any], reads: bool, verifier: type | None
) -> None:
    cfg = section(**content)
    assert reads_reference(cfg) is reads
    assert type(verifier_of(cfg)) is (verifier or type(None))


def test_a_reward_that_reads_no_reference_never_asks_for_one() -> None:
    def never(cfg: ReferenceRewardConfig) -> Any:
        raise AssertionError("no reference is there")

    cfg = section(kind="composite", parts=[{"reward": PENALTY}, {"reward": EXACT}])
    (score,) = make_reward(cfg, decode, never)(group_of(prompt(answer=5), "55=5"))
    assert score.rewards.tolist() == [0, 0, 0, 0, 0, 1 - 1]


# --- reasoning-gym ------------------------------------------------------------------------------------------------


def test_the_score_is_that_of_the_task_which_made_the_prompt() -> None:
    gym = pytest.importorskip("reasoning_gym", reason="the extra 'tasks' is not installed")
    entry = gym.create_dataset("chain_sum", seed=1, size=1, max_terms=2)[0]
    question = prompt(answer=entry["answer"], entry=entry)
    verifier = GymVerifier(GymRewardConfig())
    verifier.check(question)
    assert verifier(question, f"It is {entry['answer']}.") == 1
    assert verifier(question, f"It is {int(entry['answer']) + 1}.") == 0
    assert verifier(question, "I do not know.") == 0


def test_a_prompt_from_elsewhere_cannot_be_scored_by_reasoning_gym() -> None:
    with pytest.raises(ValueError, match="'p7' was not made by reasoning-gym"):
        GymVerifier(GymRewardConfig()).check(prompt(answer="5"))
