"""What somebody should be told of while a run goes on: no step for long, a collapse, a failure. Each once per cause."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from cluster.faults import RunError
from cluster.record.trend import Trend
from cluster.redaction import redact

_MAX_CHARS = 1000


class AlertConfig(BaseModel):
    """When a run calls for attention: on the console, in events.jsonl and in W&B. No alert ends a run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stall_min_s: float = Field(
        600, gt=0, description="Time without a step, in s, below which nothing counts as a stall."
    )
    stall_factor: float = Field(
        10, ge=1, description="A stall is no step for this many times the median step, and stall_min_s at least."
    )
    window: int = Field(
        5,
        ge=1,
        description="Steps that are averaged: the first ones are the start, the last ones are compared with it.",
    )
    entropy_fraction: float = Field(
        0.02, ge=0, lt=1, description="Collapse: policy/entropy below this share of its start; 0 = no such alert."
    )
    length_fraction: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="Collapse: mean completion length below this share of its start; 0 = no such alert.",
    )
    kl_factor: float = Field(
        3,
        ge=1,
        description="Explosion: KL to the reference per token above this many times its start, and above kl_min.",
    )
    kl_min: float = Field(1, gt=0, description="KL in nats per token below which nothing counts as an explosion.")


@dataclass(frozen=True, slots=True)
class Alert:
    """One thing that somebody should know.

    Attributes:
        cause: "stall", "entropy", "length", "kl" or "failure".
        level: "warn" while the run goes on, "error" when it ended.
        step: The last step that was trained.
        title: A few words.
        text: What was seen, against what, and what to do.
    """

    cause: str
    level: Literal["warn", "error"]
    step: int
    title: str
    text: str


class Timer(Protocol):
    """What `call_later` of an event loop returns."""

    def cancel(self) -> None:
        """Do not call."""
        ...


CallLater = Callable[[float, Callable[[], None]], Timer]


def _call_later(delay_s: float, callback: Callable[[], None]) -> Timer:
    return asyncio.get_running_loop().call_later(delay_s, callback)


class Alerts:
    """Watches the metrics and the clock, and tells of each cause once; a cause that is over can be told again.

    The clock is a timer that every step winds up anew, so that nothing polls.

    Args:
        cfg: The limits.
        tell: Told of every alert.
        earlier: Rows of metrics.jsonl from earlier processes of the run: their start is the run's start, and what they told
            is not told again.
        call_later: Of the event loop.
    """

    def __init__(
        self,
        cfg: AlertConfig,
        tell: Callable[[Alert], None],
        earlier: Iterable[Mapping[str, Any]] = (),
        call_later: CallLater = _call_later,
    ) -> None:
        self._cfg, self._call_later = cfg, call_later
        self._trends = {name: Trend(cfg.window) for name in ("entropy", "length", "kl")}
        self._step_times: deque[float] = deque(maxlen=100)
        self._told: set[str] = set()
        self._timer: Timer | None = None
        self._step = 0
        self._tell: Callable[[Alert], None] = lambda alert: None
        for row in earlier:
            if "time/step_s" in row:
                self._observe(row["step"], row)
        self._tell = tell

    def begin(self) -> None:
        """Training begins: from now on a step is due."""
        self._wind_up()

    def log(self, step: int, wall_s: float, values: Mapping[str, float]) -> None:
        """See `cluster.record.sinks.sink.Sink`: this is one."""
        if "time/step_s" in values:  # else it is an evaluation before the first step
            self._observe(step, values)
            self._told.discard("stall")
            self._wind_up()

    def close(self) -> None:
        """No step is due until the next one is logged: an evaluation, or the end, has deadlines of its own."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def fail(self, error: Exception) -> None:
        """The run ended with an error."""
        what = str(error) if isinstance(error, RunError) else f"{type(error).__name__}: {error}"
        title = f"failed: {error.code if isinstance(error, RunError) else type(error).__name__}"
        self._tell(Alert("failure", "error", self._step, title, redact(what)[:_MAX_CHARS]))

    @property
    def stall_s(self) -> float:
        """Time without a step that is a stall."""
        typical_s = median(self._step_times) if self._step_times else 0.0
        return max(self._cfg.stall_min_s, self._cfg.stall_factor * typical_s)

    def _wind_up(self) -> None:
        self.close()
        self._timer = self._call_later(self.stall_s, self._stalled)

    def _stalled(self) -> None:
        typical = f"the median is {median(self._step_times):.0f} s" if self._step_times else "none has ended yet"
        text = (
            f"no step for {self.stall_s:.0f} s after step {self._step} ({typical}); every wait has a deadline and ends by "
            "itself. The logs of the Ray session (environment.json) say what its processes do"
        )
        self._judge("stall", True, "stalled", text)

    def _observe(self, step: int, values: Mapping[str, Any]) -> None:
        self._step = step
        self._step_times.append(values["time/step_s"])
        self._fall("entropy", values.get("policy/entropy"), self._cfg.entropy_fraction, "entropy of the policy")
        length = values.get("trajectory/completion_tokens_mean")
        self._fall("length", length, self._cfg.length_fraction, "mean completion length")
        self._rise(values.get("kl/behavior_reference", values.get("kl/policy_reference")))

    def _fall(self, cause: str, value: float | None, fraction: float, what: str) -> None:
        trend = self._trends[cause]
        if value is None or not trend.add(value):
            return
        text = (
            f"{trend} at step {self._step}, below alerts.{cause}_fraction = {fraction:g} of it. align inspect shows what the "
            "policy answers; a KL or entropy term, or a lower optimizer.lr, holds it"
        )
        self._judge(cause, trend.now < fraction * trend.start, f"collapse: {what}", text)

    def _rise(self, value: float | None) -> None:
        trend, cfg = self._trends["kl"], self._cfg
        if value is None or not trend.add(value):
            return
        limit = max(cfg.kl_min, cfg.kl_factor * trend.start)
        text = (
            f"{trend} nats per token at step {self._step}, above {limit:.3g} (alerts.kl_factor, alerts.kl_min). A lower "
            "optimizer.lr or a larger algorithm.kl_coefficient holds it"
        )
        self._judge("kl", trend.now > limit, "explosion: KL to the reference", text)

    def _judge(self, cause: str, bad: bool, title: str, text: str) -> None:
        if not bad:
            self._told.discard(cause)
        elif cause not in self._told:
            self._told.add(cause)
            self._tell(Alert(cause, "warn", self._step, title, text))
