"""What calls for attention and what does not, by a clock that the test turns."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from cluster.faults import ActorLost, RunError
from cluster.record.alerts import Alert, AlertConfig, Alerts


class FakeClock:
    """Runs what is due when the test moves it on."""

    def __init__(self) -> None:
        self.now = 0.0
        self.due: list[FakeTimer] = []

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> FakeTimer:
        timer = FakeTimer(self.now + delay_s, callback)
        self.due.append(timer)
        return timer

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for timer in [timer for timer in self.due if timer.when <= self.now]:
            self.due.remove(timer)
            if not timer.cancelled:
                timer.callback()


class FakeTimer:
    def __init__(self, when: float, callback: Callable[[], None]) -> None:
        self.when, self.callback, self.cancelled = when, callback, False

    def cancel(self) -> None:
        self.cancelled = True


class Watched:
    """Alerts with a clock, and what they told."""

    def __init__(self, earlier: list[dict[str, Any]] | None = None, **limits: Any) -> None:
        self.clock, self.told = FakeClock(), list[Alert]()
        self.alerts = Alerts(AlertConfig(**limits), self.told.append, earlier or [], self.clock.call_later)
        self.step = len(earlier or [])

    def log(self, values: Mapping[str, float] | None = None, step_s: float = 1.0) -> None:
        self.clock.sleep(step_s)
        self.step += 1
        self.alerts.log(self.step, self.clock.now, {"time/step_s": step_s, **(values or {})})

    @property
    def causes(self) -> list[str]:
        return [alert.cause for alert in self.told]


# --- stall --------------------------------------------------------------------------------------------------------


def test_no_step_for_long_is_told_once_and_again_after_a_step() -> None:
    run = Watched(stall_min_s=60)
    run.alerts.begin()
    run.clock.sleep(59)
    assert run.told == []
    run.clock.sleep(1)
    assert run.causes == ["stall"]
    assert (run.told[0].level, run.told[0].step) == ("warn", 0)
    assert run.told[0].text.startswith("no step for 60 s after step 0 (none has ended yet)")
    run.clock.sleep(1000)
    assert run.causes == ["stall"], "told once"
    run.log(step_s=0)
    run.clock.sleep(60)
    assert run.causes == ["stall", "stall"]


def test_steps_that_come_in_time_are_no_stall_however_long_the_run() -> None:
    run = Watched(stall_min_s=60)
    run.alerts.begin()
    for _ in range(20):
        run.log(step_s=59)
    assert run.told == []


def test_while_the_run_evaluates_no_step_is_due() -> None:
    run = Watched(stall_min_s=60)
    run.alerts.begin()
    run.log(step_s=20)
    run.alerts.close()
    run.clock.sleep(3600)
    assert run.told == []
    run.log(step_s=20)
    run.clock.sleep(run.alerts.stall_s)
    assert run.causes == ["stall"]


def test_slow_steps_raise_the_limit_to_a_multiple_of_their_median() -> None:
    run = Watched(stall_min_s=60, stall_factor=10)
    run.alerts.begin()
    for step_s in (20, 20, 20, 20, 50):  # the median is 20 s
        run.log(step_s=step_s)
    assert run.alerts.stall_s == 200
    run.clock.sleep(199)
    assert run.told == []
    run.clock.sleep(1)
    assert run.told[0].text.startswith("no step for 200 s after step 5 (the median is 20 s)")


def test_before_training_and_after_its_end_no_step_is_due() -> None:
    run = Watched(stall_min_s=60)
    run.alerts.log(0, 0.0, {"eval/heldout/kl_per_token": 1.0})  # an evaluation before training
    run.clock.sleep(1000)
    run.alerts.begin()
    run.alerts.close()
    run.clock.sleep(1000)
    assert run.told == []


def test_the_timer_of_an_event_loop_is_used_where_none_is_given() -> None:
    async def wait_for_alert() -> Alert:
        told: asyncio.Queue[Alert] = asyncio.Queue()
        Alerts(AlertConfig(stall_min_s=0.01), told.put_nowait).begin()
        return await asyncio.wait_for(told.get(), 10)

    assert asyncio.run(wait_for_alert()).cause == "stall"


# --- collapse -----------------------------------------------------------------------------------------------------

FALLING = [
    ("policy/entropy", "entropy", {"entropy_fraction": 0.1}),
    ("trajectory/completion_tokens_mean", "length", {"length_fraction": 0.1}),
]


@pytest.mark.parametrize(("metric", "cause", "limit"), FALLING)
def test_a_fall_under_a_share_of_the_start_is_told_once_and_again_after_a_recovery(
    metric: str, cause: str, limit: dict[str, float]
) -> None:
    run = Watched(window=2, **limit)
    for value in (10.0, 10.0, 1.1, 1.1):
        run.log({metric: value})
    assert run.told == []
    for value in (0.8, 0.8, 0.8):  # means of two: 0.95, 0.8, 0.8
        run.log({metric: value})
    assert run.causes == [cause]
    assert run.told[0].step == 5
    assert "10 at the start, 0.95 at step 5" in run.told[0].text
    for value in (5.0, 5.0, 0.5, 0.5):
        run.log({metric: value})
    assert run.causes == [cause, cause]


def test_one_value_that_falls_out_of_a_window_is_no_collapse() -> None:
    run = Watched(window=5, entropy_fraction=0.1)
    for value in [1.0] * 9 + [0.0] + [1.0] * 5:
        run.log({"policy/entropy": value})
    assert run.told == []


def test_kl_far_above_its_start_is_an_explosion() -> None:
    run = Watched(window=1, kl_factor=3, kl_min=1)
    for value in (0.5, 0.9, 1.4, 1.6):
        run.log({"kl/behavior_reference": value})
    assert run.causes == ["kl"]
    assert "0.5 at the start, 1.6 nats per token at step 4, above 1.5" in run.told[0].text


def test_kl_that_starts_at_nothing_may_grow_to_its_least_limit() -> None:
    run = Watched(window=1, kl_factor=3, kl_min=1)
    for value in (0.0, 0.01, 0.5, 1.0):
        run.log({"kl/policy_reference": value})
    assert run.told == []
    run.log({"kl/policy_reference": 1.01})
    assert run.causes == ["kl"]


def test_a_share_of_0_is_never_fallen_under() -> None:
    run = Watched(window=1, entropy_fraction=0, length_fraction=0)
    for value in (1.0, 0.0, 0.0):
        run.log({"policy/entropy": value, "trajectory/completion_tokens_mean": value})
    assert run.told == []


def test_the_fall_of_entropy_in_a_healthy_run_is_not_told_of() -> None:
    """SmolLM2 on sums, as it was measured: entropy fell to a twentieth while accuracy rose to nine in ten."""
    run = Watched()
    for value in [2.35] * 5 + [0.13] * 5:
        run.log({"policy/entropy": value})
    assert run.told == []


def test_a_resumed_run_measures_against_the_start_of_the_run_and_repeats_nothing() -> None:
    entropies = (10.0, 10.0, 0.5, 0.5)
    earlier = [{"step": n + 1, "time/step_s": 7.0, "policy/entropy": value} for n, value in enumerate(entropies)]
    run = Watched([{"step": 0, "eval/heldout/kl_per_token": 1.0}, *earlier], window=2, entropy_fraction=0.1)
    assert run.alerts.stall_s == 600
    run.log({"policy/entropy": 0.5})
    assert run.told == []
    for value in (5.0, 5.0, 0.5, 0.5):
        run.log({"policy/entropy": value})
    assert run.causes == ["entropy"]


# --- failure ------------------------------------------------------------------------------------------------------


def test_a_failure_carries_the_code_and_the_message_of_the_error() -> None:
    run = Watched()
    run.log()
    run.alerts.fail(ActorLost("learner", 0, "update", "the node left"))
    run.alerts.fail(ValueError("a bug"))
    first, second = run.told
    assert (first.cause, first.level, first.step, first.title) == ("failure", "error", 1, "failed: ACTOR_LOST")
    assert first.text.startswith("[ACTOR_LOST] learner 0 was lost during update: the node left")
    assert (second.title, second.text) == ("failed: ValueError", "ValueError: a bug")


def test_a_failure_tells_no_secret_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary_0123456789")
    run = Watched()
    run.alerts.fail(RunError("GET https://me:canary-password@hub/x?token=hf_canary_0123456789 failed"))
    assert run.told[0].text == "[RUN] GET https://[…]@hub/x?token=[HF_TOKEN] failed"


def test_an_alert_is_of_bounded_length() -> None:
    run = Watched()
    run.alerts.fail(ValueError("x" * 10_000))
    assert len(run.told[0].text) == 1000
