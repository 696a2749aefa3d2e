"""Completions by transformers: whose distribution they follow, where they end, and what they leave as it was."""

from __future__ import annotations

from collections import Counter

import torch

from align.model.policy import Policy
from tests.oracles.naive import naive_distribution


def test_equal_seeds_give_equal_samples_and_leave_the_global_generator_alone(policy: Policy) -> None:
    prompts = [[5, 9], [30, 31]]
    torch.manual_seed(123)
    state = torch.get_rng_state()
    first = policy.sample(prompts, max_tokens=8, temperature=1.0, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    assert policy.sample(prompts, max_tokens=8, temperature=1.0, seed=1) == first
    assert policy.sample(prompts, max_tokens=8, temperature=1.0, seed=2) != first


def test_a_sample_ends_with_the_first_end_token_or_at_the_limit(policy: Policy) -> None:
    policy.model.generation_config.eos_token_id = list(range(20))
    completions = policy.sample([[25, 30]] * 64, max_tokens=6, temperature=1.0, seed=0)
    stopped = [c for c in completions if c[-1] < 20]
    assert 0 < len(stopped) < 64
    for completion in completions:
        assert all(token >= 20 for token in completion[:-1])
        assert len(completion) == 6 or completion[-1] < 20


def test_samples_follow_the_naive_distribution_at_the_temperature(policy: Policy) -> None:
    num_samples, temperature = 4000, 1.5
    completions = policy.sample([[5, 9, 30]] * num_samples, max_tokens=1, temperature=temperature, seed=0)
    assert_frequencies(completions, naive_distribution(policy, [5, 9, 30], temperature))


def test_generation_settings_of_the_model_folder_do_not_bend_the_samples(policy: Policy) -> None:
    config = policy.model.generation_config
    config.repetition_penalty, config.top_k, config.min_p, config.no_repeat_ngram_size = 3.0, 2, 0.4, 1
    completions = policy.sample([[5, 9, 30]] * 4000, max_tokens=1, temperature=1.5, seed=0)
    assert_frequencies(completions, naive_distribution(policy, [5, 9, 30], 1.5))
    assert (config.repetition_penalty, config.top_k, config.min_p, config.no_repeat_ngram_size) == (3.0, 2, 0.4, 1)
    assert policy.model.generation_config is config


def assert_frequencies(completions: list[list[int]], probabilities: list[float]) -> None:
    """Every token's share is within five standard deviations of its probability."""
    counts, n = Counter(c[0] for c in completions), len(completions)
    for token, p in enumerate(probabilities):
        assert abs(counts[token] / n - p) < 5 * (p * (1 - p) / n) ** 0.5 + 1 / n, token


def test_padding_on_the_left_does_not_change_what_a_prompt_is_answered(policy: Policy) -> None:
    short, long = [30, 31], [5, 9, 40, 8, 8, 12, 3]
    nearly_greedy = {"max_tokens": 6, "temperature": 1e-4, "seed": 0}
    together = policy.sample([short, long], **nearly_greedy)
    assert together == [policy.sample([p], **nearly_greedy)[0] for p in (short, long)]
    expected = list(short)
    for _ in range(6):
        distribution = naive_distribution(policy, expected)
        expected.append(distribution.index(max(distribution)))
    assert together[0] == expected[2:]
