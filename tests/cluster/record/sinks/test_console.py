"""What a person reads while a run goes on."""

from __future__ import annotations

from tests.fakes.consoles import console
from tests.fakes.metrics import STEP


def test_a_step_is_one_line_under_a_heading() -> None:
    sink, file = console()
    sink.log(1, 3.0, STEP)
    heading, line = file.getvalue().splitlines()
    names = (
        "step",
        "reward/tok",
        "KL/tok",
        "entropy",
        "stale",
        "mismatch",
        "tok/s",
        "wait",
        "update",
        "publish",
        "left",
    )
    places = [heading.index(name) for name in names]
    assert places == sorted(places)
    assert line.split() == [
        "1/10", "-1.2500", "0.5000", "2.345", "1", "1.5e-06", "1234", "0.25", "1.50", "0.75", "-"
    ]  # fmt: skip


def test_a_run_that_pays_outcomes_shows_them_and_no_kl() -> None:
    sink, file = console(pays_outcomes=True)
    sink.log(1, 3.0, STEP | {"reward/trajectory_mean": 0.125})
    heading, line = file.getvalue().splitlines()
    assert heading.split()[:3] == ["step", "reward", "entropy"]
    assert line.split()[:3] == ["1/10", "0.125", "2.345"]


def test_values_stand_under_their_headings() -> None:
    sink, file = console()
    sink.log(1, 3.0, STEP)
    heading, line = file.getvalue().splitlines()
    for title, value in (("reward/tok", "-1.2500"), ("mismatch", "1.5e-06"), ("publish s", "0.75"), ("left", "-")):
        assert heading.index(title) + len(title) == line.rindex(value) + len(value)


def test_the_time_left_follows_from_the_steps_since_the_first() -> None:
    sink, file = console(num_steps=100)
    for step, wall_s in ((41, 100.0), (42, 110.0), (44, 124.0)):
        sink.log(step, wall_s, STEP)
    left = [line.split()[-1] for line in file.getvalue().splitlines()[1:]]
    assert left == [
        "-",
        "9:40",
        "7:28",
    ]  # 58 steps of 10 s, 56 steps of 8 s; the start-up before step 41 does not count


def test_a_value_that_is_missing_is_a_dash() -> None:
    sink, file = console()
    sink.log(1, 3.0, {name: value for name, value in STEP.items() if name != "mismatch/abs_mean"})
    assert file.getvalue().splitlines()[1].split()[5] == "-"


def test_the_heading_comes_again_after_twenty_lines() -> None:
    sink, file = console(num_steps=50)
    for step in range(1, 42):
        sink.log(step, float(step), STEP)
    headings = [number for number, line in enumerate(file.getvalue().splitlines()) if "reward/tok" in line]
    assert headings == [0, 21, 42]


def test_an_evaluation_has_a_line_of_its_own() -> None:
    sink, file = console()
    evaluation = {
        "eval/heldout/kl_per_token": 0.12345,
        "eval/heldout/grammatical": 0.875,
        "eval/heldout/completion_tokens_mean": 7.25,
        "eval/heldout/accuracy": 0.5,
        "eval/train/kl_per_token": 0.5,
    }
    sink.log(0, 1.0, evaluation)
    sink.log(1, 2.0, STEP | evaluation)
    before, _, step_line, after = file.getvalue().splitlines()
    assert before == (
        "  evaluation after step 0: heldout: KL per token 0.1235, grammatical 87.5%, length 7.2, accuracy 50.0%; "
        "train: KL per token 0.5000"
    )
    assert step_line.split()[0] == "1/10"
    assert after == before.replace("step 0", "step 1")


def test_a_warning_is_shown_and_kept() -> None:
    sink, file = console()
    sink.warn("the engine [is] slow")
    assert file.getvalue() == "warning: the engine [is] slow\n"
    assert sink.warnings == ["the engine [is] slow"]


def test_a_long_line_is_not_broken() -> None:
    sink, file = console()
    sink.say("word " * 100)
    assert file.getvalue() == "word " * 100 + "\n"


def test_a_terminal_gets_a_bar_with_the_time_left_that_goes_away() -> None:
    sink, file = console(terminal=True)
    sink.log(1, 1.0, STEP)
    sink.log(2, 2.0, STEP)
    sink.close()
    assert "2/10" in file.getvalue()
    assert "0:08 left" in file.getvalue()
    sink.close()  # twice does no harm


def test_names_that_look_like_markup_or_emojis_are_shown_as_they_are() -> None:
    sink, file = console(terminal=True)
    sink.say("see /data/:x:/[red]")
    sink.warn(":warning: in [/data]")
    assert "see /data/:x:/[red]" in file.getvalue()
    assert "warning: :warning: in [/data]" in file.getvalue()


def test_a_narrow_terminal_has_room_for_the_numbers_beside_no_bar() -> None:
    sink, file = console(num_steps=100_000, terminal=True, width=40)
    sink.log(12345, 1.0, STEP)
    sink.log(12346, 100.0, STEP)
    sink.close()
    assert "144629:06 left" in file.getvalue()
    assert "…" not in file.getvalue()
