"""`align inspect`, on folders written as a run writes them."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from align.data.types import ScoredGroup
from cluster.faults import ConfigError
from cluster.record import transcripts
from cluster.record.folder import RunFolder
from cluster.record.trajectories import Trajectories
from cluster.spec.config import resolved
from cluster.views.inspect import token_view, view
from cluster.views.selection import Selection, ends
from tests.fakes.models import character_tokenizer
from tests.fakes.run_files import config
from tests.fakes.trajectories import make_scored, make_trajectory


def shown(renderable: RenderableType, width: int = 160) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def scored(number: int, rewards: list[list[float]], version: int) -> ScoredGroup:
    """A group whose completions have these token rewards, sampled by one version."""
    trajectories = [
        make_trajectory([3, 4], [5 + i for i in range(len(r))], [-1.5] * len(r), version=version) for r in rewards
    ]
    return make_scored(trajectories, rewards, number)


@pytest.fixture
def run(tmp_path: Path, model_folder: Path) -> Path:
    """A run of two steps: tickets 0 and 1, then 2 and 3; the second step learned from the version before last."""
    folder = tmp_path / "run"
    cfg = config(policy={"model": str(model_folder)}, run={"steps": 3})
    RunFolder(folder, resolved(cfg))
    tokenizer = character_tokenizer()
    first = [scored(0, [[1.0, 2.0], [-4.0]], version=0), scored(1, [[0.5], [0.25, 0.25]], version=0)]
    second = [scored(2, [[1.0], [3.0]], version=0), scored(3, [[-1.0], [7.0]], version=1)]
    for step, groups in ((1, first), (2, second)):
        transcripts.write(folder / "trajectories" / f"step_{step:05d}.parquet", groups, tokenizer, step)
    return folder


def look(run: Path, step: int | None = None, width: int = 160, **more: object) -> str:
    options = {"ticket": None, "repeat": None, "order": None, "limit": 20} | more
    wanted = {name: options.pop(name) for name in list(options) if name in Selection.__slots__}
    return shown(view(run, Selection(step, step, **wanted), **options), width)  # type: ignore[arg-type]


def test_the_overview_has_a_line_per_step_with_its_extremes(run: Path) -> None:
    lines = [line.split() for line in look(run).splitlines() if line.split()[:1] in (["1"], ["2"])]
    assert [line[:5] for line in lines] == [["1", "4", "0", "-4", "3"], ["2", "4", "2.5", "-1", "7"]]
    assert [line[-1] for line in lines] == ["0", "1"], "the largest staleness of the step"


def test_a_step_lists_the_lowest_and_the_highest_rewards(run: Path) -> None:
    briefs = Trajectories(run).briefs(2)
    assert [brief.reward for brief in ends(briefs, 20)] == [-1, 1, 3, 7]
    assert [brief.reward for brief in ends(briefs, 2)] == [-1, 7]
    assert [brief.reward for brief in ends(briefs, 3)] == [-1, 1, 7]
    assert [brief.staleness for brief in briefs] == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("wanted", "rewards"),
    [
        ({}, [3, -4, 0.5, 0.5, 1, 3, -1, 7]),
        ({"first_step": 2}, [1, 3, -1, 7]),
        ({"last_step": 1, "max_reward": 0.5}, [-4, 0.5, 0.5]),
        ({"prompt": "prompt-3"}, [-1, 7]),
        ({"prompt": "no such prompt"}, []),
        ({"ending": "length"}, []),
        ({"min_reward": 1, "max_reward": 3}, [3, 1, 3]),
        ({"min_staleness": 1}, [1, 3]),
        ({"max_staleness": 0, "min_reward": 0.5}, [3, 0.5, 0.5, 7]),
    ],
)
def test_a_selection_takes_what_is_within_all_its_limits(
    run: Path, wanted: dict[str, object], rewards: list[float]
) -> None:
    found = Selection(**wanted).of(Trajectories(run))  # type: ignore[arg-type]
    assert [brief.reward for brief in found] == rewards


def test_a_list_goes_over_all_steps_in_the_order_that_is_asked_for(run: Path) -> None:
    lines = [
        line.split() for line in look(run, order="highest", limit=3).splitlines() if line.split()[:1] in (["1"], ["2"])
    ]
    assert [line[:4] for line in lines] == [["2", "3", "1", "7"], ["1", "0", "0", "3"], ["2", "2", "1", "3"]]
    assert "3 of 8 trajectories" in look(run, order="highest", limit=3)


def test_what_moved_a_step_comes_with_its_formula_and_the_strongest_first(run: Path) -> None:
    text = look(run, 1, order="pull")
    lines = [line.split() for line in text.splitlines() if line.split()[:1] in (["0"], ["1"])]
    # equal probabilities: the returns add up to 3 + 2, 4, 1/2 + 1/4 and 1/2 of 10.25
    assert [(line[:3], line[4]) for line in lines] == [
        (["0", "0", "3"], "48.8%"),
        (["0", "1", "-4"], "39.0%"),
        (["1", "1", "0.5"], "7.3%"),
        (["1", "0", "0.5"], "4.9%"),
    ]
    assert "pull = w × A × (1 − p)" in text


def test_a_group_is_shown_side_by_side_with_what_each_has_over_the_mean(run: Path) -> None:
    text = look(run, 1, ticket=0)
    assert "repeat 0" in text and "repeat 1" in text
    assert "reward 3 (+3.5)" in text and "reward -4 (-3.5)" in text
    assert "mean reward -0.5" in text


def test_a_trajectory_is_shown_token_by_token_with_its_returns(run: Path) -> None:
    lines = [line.split() for line in look(run, 1, ticket=0, repeat=0).splitlines()]
    numbers = [[float(word) for word in line[-6:] if word != "-"] for line in lines if line[:1] in (["0"], ["1"])]
    # log-prob, reward, return, advantage, version; no reference
    assert numbers == [[-1.5, 1.0, 3.0, 3.0, 0.0], [-1.5, 2.0, 2.0, 2.0, 0.0]]


@pytest.mark.parametrize(
    ("step", "more", "message"),
    [
        (9, {}, "has no step 9"),
        (1, {"ticket": 2}, "did not train ticket 2"),
        (1, {"ticket": 0, "repeat": 2}, "has no repeat 2"),
        (None, {"ticket": 0}, "a ticket is looked for in one step"),
        (None, {"order": "pull"}, "a question to one step"),
        (1, {"order": "sideways"}, "there is no order 'sideways'"),
    ],
)
def test_what_is_not_there_is_said(run: Path, step: int | None, more: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        look(run, step, **more)


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no trajectories"):
        look(tmp_path)


# --- narrow consoles ----------------------------------------------------------------------------------------------

NARROW = [40, 60, 80]
MARKUP = "/data/[red]runs[/red]/:x:/" + "long" * 45
"""A path that rich would take for markup and an emoji, if it was asked to."""


@pytest.fixture
def wide_run(tmp_path: Path, model_folder: Path) -> Path:
    """A run with a long path and large numbers: steps of five digits, tickets of seven, groups of 16."""
    folder = tmp_path / MARKUP.removeprefix("/")
    RunFolder(folder, resolved(config(policy={"model": str(model_folder)}, run={"steps": 20_000})))
    groups = [scored(1234567, [[-12345.678 - 1000 * k] for k in range(16)], version=12000)]
    transcripts.write(folder / "trajectories" / "step_12345.parquet", groups, character_tokenizer(), 12345)
    return folder


def words(text: str) -> list[str]:
    return text.replace(",", " ").split()


@pytest.mark.parametrize("width", NARROW)
def test_a_narrow_console_shows_the_whole_path_and_every_figure_of_a_step(wide_run: Path, width: int) -> None:
    text = look(wide_run, width=width)
    assert f"{wide_run}: 1 steps".replace(" ", "") in "".join(text.split())
    assert {"12345", "16", "-1.985e+04", "-2.735e+04", "-1.235e+04", "1.0", "100%", "344"} <= set(words(text))
    assert "…" not in text


@pytest.mark.parametrize("width", NARROW)
@pytest.mark.parametrize("order", [None, "pull"])
def test_a_narrow_console_shows_every_figure_of_a_trajectory_in_a_list(
    wide_run: Path, width: int, order: str | None
) -> None:
    text = look(wide_run, 12345, width=width, order=order)
    figures = {"1234567", "15", "-2.735e+04"} | ({"stop", "344"} if order is None else {"10.0%"} - {"10.0%"})
    assert figures <= set(words(text))
    assert "…" not in text


@pytest.mark.parametrize("width", NARROW)
def test_a_group_that_is_too_large_for_the_console_stands_below_each_other(wide_run: Path, width: int) -> None:
    text = look(wide_run, 12345, width=width, ticket=1234567)
    for repeat in range(16):
        assert f"repeat {repeat} " in text
    assert "-2.735e+04" in text and "(-7500)" in text
    assert "…" not in text


@pytest.mark.parametrize("width", NARROW)
def test_a_narrow_console_shows_every_number_of_a_token(wide_run: Path, width: int) -> None:
    text = look(wide_run, 12345, width=width, ticket=1234567, repeat=15)
    assert {"-1.500", "-27345.678", "12000"} <= set(words(text))
    assert "…" not in text


def test_a_token_that_looks_like_markup_is_shown_as_it_is() -> None:
    class Brackets:
        def decode(self, token_ids: list[int]) -> str:
            return ["[red]", "[/b]", ":x:"][token_ids[0]]

    rows = {"token_ids": [0, 1, 2], "rewards": [0.0] * 3, "behavior_logprobs": [0.0] * 3, "versions": [0] * 3}
    text = shown(token_view(rows | {"prompt": "[i]", "ref_logprobs": None}, Brackets(), None))
    assert all(repr(token) in text for token in ("[red]", "[/b]", ":x:"))
    assert "[i][red][/b]:x:" in text
