"""What a person sees while a run goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cluster.redaction import redact

if TYPE_CHECKING:
    from cluster.record.alerts import Alert

_COLUMNS = (  # heading, metric, format, width
    ("reward/tok", "reward/token_mean", "{:.4f}", 10),
    ("KL/tok", "kl/behavior_reference", "{:.4f}", 8),
    ("entropy", "policy/entropy", "{:.3f}", 8),
    ("stale", "staleness/max", "{:.0f}", 5),
    ("mismatch", "mismatch/abs_mean", "{:.1e}", 8),
    ("tok/s", "throughput/generated_tokens_per_s", "{:.0f}", 6),
    ("wait s", "time/rollout_wait_s", "{:.2f}", 7),
    ("update s", "time/update_s", "{:.2f}", 8),
    ("publish s", "time/publish_s", "{:.2f}", 9),
)
_OUTCOME_COLUMNS = (("reward", "reward/trajectory_mean", "{:.3f}", 7), *_COLUMNS[2:])
_HEADING_EVERY = 20
_BAR_WIDTH = 60  # columns of a terminal that leave room for a bar beside the numbers


class Console:
    """What a person sees: a line per step, and a bar with the time left where the output is a terminal.

    Args:
        num_steps: Steps of the run, for the time left.
        rich: Rich's console.
        pays_outcomes: Whether rewards judge whole trajectories; without a reference there is no KL to show either.
    """

    def __init__(self, num_steps: int, rich: RichConsole | None = None, pays_outcomes: bool = False) -> None:
        self._columns = _OUTCOME_COLUMNS if pays_outcomes else _COLUMNS
        self._rich = rich or RichConsole(highlight=False, soft_wrap=True)
        self._num_steps = num_steps
        self._lines = 0
        self._first: tuple[int, float] | None = None
        self._progress: Progress | None = None
        self.warnings: list[str] = []

    def say(self, text: str) -> None:
        """A plain line."""
        self._print(text)

    def warn(self, text: str) -> None:
        """Something that a person should know, in yellow; kept for the summary."""
        text = redact(text)
        self.warnings.append(text)
        self._print(f"warning: {text}", "yellow")

    def _print(self, text: str, style: str | None = None) -> None:
        """As it is: neither brackets nor `:names:` of emojis in it mean anything."""
        self._rich.print(text, style=style, markup=False, emoji=False)

    def alert(self, alert: Alert) -> None:
        """A warning; the error that ends a run is its last line anyway."""
        if alert.level == "warn":
            self.warn(f"{alert.title}: {alert.text}")

    def log(self, step: int, wall_s: float, values: Mapping[str, float]) -> None:
        """One line for the step; evaluations get their own."""
        evaluated = {name: value for name, value in values.items() if name.startswith("eval/")}
        if "time/step_s" in values:
            self._step_line(step, wall_s, values)
        if evaluated:
            self.say(f"  evaluation after step {step}: " + _evaluation(evaluated))

    def _step_line(self, step: int, wall_s: float, values: Mapping[str, float]) -> None:
        if self._lines % _HEADING_EVERY == 0:
            heading = " ".join(f"{title:>{width}}" for title, _, _, width in self._columns)
            self._print(f"{'step':>9} {heading} {'left':>6}", "bold")
        self._lines += 1
        cells = " ".join(
            f"{shape.format(values[name]) if name in values else '-':>{width}}"
            for _, name, shape, width in self._columns
        )
        left = _clock(self._time_left(step, wall_s))
        self.say(f"{f'{step}/{self._num_steps}':>9} {cells} {left:>6}")
        if self._rich.is_terminal:
            self._show_bar(step, left)

    def _time_left(self, step: int, wall_s: float) -> float | None:
        if self._first is None:
            self._first = (step, wall_s)
            return None
        first_step, first_wall_s = self._first
        return (wall_s - first_wall_s) / (step - first_step) * (self._num_steps - step)

    def _show_bar(self, step: int, left: str) -> None:
        if self._progress is None:
            steps, left_column = MofNCompleteColumn(), TextColumn("{task.fields[left]} left")
            columns = (TextColumn("steps"), BarColumn(), steps, TimeElapsedColumn(), left_column)
            fits = self._rich.width >= _BAR_WIDTH
            self._progress = Progress(*(columns if fits else (steps, left_column)), console=self._rich, transient=True)
            self._progress.add_task("steps", total=self._num_steps, left="")
            self._progress.start()
        self._progress.update(self._progress.task_ids[0], completed=step, left=left)

    def close(self) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _evaluation(values: Mapping[str, float]) -> str:
    shapes = {
        "kl_per_token": "KL per token {:.4f}",
        "grammatical": "grammatical {:.1%}",
        "accuracy": "accuracy {:.1%}",
        "completion_tokens_mean": "length {:.1f}",
    }
    parts: dict[str, list[str]] = {}
    for name, value in values.items():
        _, which, what = name.split("/")
        if what in shapes:
            parts.setdefault(which, []).append(shapes[what].format(value))
    return "; ".join(f"{which}: {', '.join(texts)}" for which, texts in parts.items())


def _clock(seconds: float | None) -> str:
    return "-" if seconds is None else f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
