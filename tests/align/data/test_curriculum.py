"""The curriculum: running pass rates, and how often prompts outside the range are visited."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from align.data.curriculum import CurriculumConfig, PassRates
from align.data.prompts import PromptStream
from align.data.types import Prompt, Ticket


def ticket(number: int, prompt: str = "p") -> Ticket:
    return Ticket(number, Prompt(prompt, "", (1,)), (0,))


def test_a_running_pass_rate_begins_with_the_first_visit_and_moves_by_the_weight_of_the_newest() -> None:
    rates = PassRates(CurriculumConfig(newest_weight=0.25), seed=0)
    for rate in (0.8, 0.0, 1.0):
        rates.update("p", rate)
    assert rates.rates == {"p": pytest.approx(0.75 * (0.75 * 0.8) + 0.25 * 1.0)}


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.floats(0.01, 1))
def test_a_running_pass_rate_stays_between_the_extremes_of_the_visits(visits: list[float], weight: float) -> None:
    rates = PassRates(CurriculumConfig(newest_weight=weight), seed=0)
    for rate in visits:
        rates.update("p", rate)
    assert min(visits) - 1e-12 <= rates.rates["p"] <= max(visits) + 1e-12


@pytest.mark.parametrize("rate", [None, 0.2, 0.5, 0.8])
def test_a_prompt_within_the_range_or_never_visited_is_always_visited(rate: float | None) -> None:
    rates = PassRates(CurriculumConfig(low=0.2, high=0.8), 0, {} if rate is None else {"p": rate})
    assert all(rates.visits(ticket(number)) for number in range(200))


@pytest.mark.parametrize("rate", [0.0, 0.19, 0.81, 1.0])
def test_a_prompt_outside_is_visited_with_the_probability_that_is_set(rate: float) -> None:
    rates = PassRates(CurriculumConfig(low=0.2, high=0.8, visit_probability=0.3), 0, {"p": rate})
    visits = [rates.visits(ticket(number)) for number in range(4000)]
    assert sum(visits) / 4000 == pytest.approx(0.3, abs=0.03)
    assert visits == [rates.visits(ticket(number)) for number in range(4000)], "the same whenever it is asked"
    other = PassRates(rates.cfg, 1, {"p": rate})
    assert visits != [other.visits(ticket(number)) for number in range(4000)], "the seed decides"


def test_the_defaults_visit_every_prompt_and_an_empty_range_is_refused() -> None:
    rates = PassRates(CurriculumConfig(), 0, {"easy": 1.0, "hard": 0.0})
    assert all(rates.visits(ticket(number, prompt)) for number in range(50) for prompt in ("easy", "hard"))
    with pytest.raises(ValidationError, match=r"low = 0\.5 and high = 0\.5 leave no pass rate between them"):
        CurriculumConfig(low=0.5, high=0.5)


def test_a_stream_skips_turns_and_leaves_every_ticket_what_it_is() -> None:
    prompts = [Prompt(f"p{i}", "", (1,)) for i in range(3)]
    plain = PromptStream(prompts, 2, seed=5)
    picky = PromptStream(prompts, 2, seed=5, visits=lambda one: one.number % 4 != 1)
    handed_out = [picky.next() for _ in range(6)]
    assert [one.number for one in handed_out] == [0, 2, 3, 4, 6, 7]
    assert handed_out == [plain.ticket(one.number) for one in handed_out]
    assert picky.cursor == 8
    picky.give_back([plain.ticket(1), handed_out[2]])
    assert [picky.next().number for _ in range(3)] == [1, 3, 8], "a ticket that was handed out is not asked about again"
