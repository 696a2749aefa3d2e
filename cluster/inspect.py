"""`align inspect`: the trajectories of a run, from its Parquet files: by step, prompt and ending, groups, single tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster.faults import ConfigError

Row = dict[str, Any]
_SHOWN = 60  # characters of a text in a table


class Trajectories:
    """What a run learned from, step by step.

    Args:
        run: The run folder.

    Raises:
        ConfigError: If it holds no trajectories.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self.files = {
            int(path.stem.split("_")[1]): path for path in sorted((run / "trajectories").glob("step_*.parquet"))
        }
        if not self.files:
            raise ConfigError(
                f"{run} holds no trajectories", "name a run folder whose first step is over, e.g. runs/demo-…"
            )

    def rows(self, step: int) -> list[Row]:
        """The trajectories of a step.

        Raises:
            ConfigError: If there is no such step.
        """
        if step not in self.files:
            raise ConfigError(
                f"{self.run} has no step {step}", f"there are steps {min(self.files)} to {max(self.files)}"
            )
        rows: list[Row] = pyarrow.parquet.read_table(self.files[step]).to_pylist()
        return rows

    def group(self, step: int, ticket: int) -> list[Row]:
        """The trajectories of one ticket.

        Raises:
            ConfigError: If the step did not train it.
        """
        rows = self.rows(step)
        found = [row for row in rows if row["ticket"] == ticket]
        if not found:
            tickets = sorted({row["ticket"] for row in rows})
            raise ConfigError(f"step {step} did not train ticket {ticket}", f"it trained {tickets[0]} to {tickets[-1]}")
        return found


def view(
    run: Path,
    step: int | None,
    ticket: int | None,
    repeat: int | None,
    prompt: str | None,
    ending: str | None,
    limit: int,
) -> RenderableType:
    """What `align inspect` shows: the more is named, the closer it looks.

    Raises:
        ConfigError: If what is named is not there.
    """
    found = Trajectories(run)
    if step is None:
        if ticket is not None or repeat is not None:
            raise ConfigError("a ticket is looked for in one step", "add --step K; align inspect RUN lists them")
        return overview(found)
    if ticket is None:
        return listing(chosen(found.rows(step), prompt, ending, limit))
    group = found.group(step, ticket)
    if repeat is None:
        return side_by_side(group)
    if not 0 <= repeat < len(group):
        raise ConfigError(f"ticket {ticket} has no repeat {repeat}", f"it has {len(group)}, counted from 0")
    return token_view(group[repeat], _tokenizer(run))


def _tokenizer(run: Path) -> Any:
    """That of the run's policy: the final one, a checkpoint's, or the initial one."""
    import tomllib

    from align.model_folder import load_tokenizer

    initial = Path(tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))["policy"]["model"])
    folders = [run / "policy", *sorted(run.glob("checkpoints/step_*/policy")), initial]
    return load_tokenizer(next(folder for folder in folders if folder.is_dir()))


def staleness(row: Row) -> int:
    """Versions between the oldest token of a trajectory and the step that learned from it."""
    return int(row["step"] - 1 - min(row["versions"]))


def overview(trajectories: Trajectories) -> Table:
    """A line per step: rewards, lengths, endings, staleness."""
    table = Table(title=f"{trajectories.run}: {len(trajectories.files)} steps", box=None)
    for name in ("step", "trajectories", "reward mean", "least", "most", "tokens mean", "stopped", "staleness"):
        table.add_column(name, justify="right")
    for step in trajectories.files:
        rows = trajectories.rows(step)
        rewards = [row["reward"] for row in rows]
        table.add_row(
            str(step),
            str(len(rows)),
            f"{sum(rewards) / len(rows):.4g}",
            f"{min(rewards):.4g}",
            f"{max(rewards):.4g}",
            f"{sum(len(row['token_ids']) for row in rows) / len(rows):.1f}",
            f"{sum(row['finish_reason'] == 'stop' for row in rows) / len(rows):.0%}",
            str(max(map(staleness, rows))),
        )
    return table


def chosen(rows: Sequence[Row], prompt: str | None, finish_reason: str | None, limit: int) -> list[Row]:
    """The rows that match, lowest reward first; of more than `limit` the lowest and the highest halves."""
    found = [
        row
        for row in rows
        if (prompt is None or prompt in row["prompt"] or prompt == row["prompt_id"])
        and (finish_reason is None or row["finish_reason"] == finish_reason)
    ]
    found.sort(key=lambda row: row["reward"])
    half = limit // 2
    return found if len(found) <= limit else found[: limit - half] + (found[-half:] if half else [])


def listing(rows: Sequence[Row]) -> Table:
    """A line per trajectory."""
    table = Table(box=None)
    for name in ("ticket", "repeat", "reward", "tokens", "ending", "staleness"):
        table.add_column(name, justify="right")
    table.add_column("prompt -> completion")
    for row in rows:
        text = Text(_short(row["prompt"])) + Text(" -> ", "dim") + Text(_short(row["completion"]), "bold")
        numbers = (row["ticket"], row["repeat"], f"{row['reward']:.4g}", len(row["token_ids"]), row["finish_reason"])
        table.add_row(*map(str, numbers), str(staleness(row)), text)
    return table


def side_by_side(rows: Sequence[Row]) -> Table:
    """The completions of a group beside each other, with their rewards less the group's mean."""
    mean = sum(row["reward"] for row in rows) / len(rows)
    table = Table(title=Text(rows[0]["prompt"]), caption=f"mean reward {mean:.4g}", show_lines=True)
    for row in rows:
        table.add_column(f"repeat {row['repeat']}")
    table.add_row(*(Text(row["completion"]) for row in rows))
    table.add_row(*(f"reward {row['reward']:.4g} ({row['reward'] - mean:+.4g})" for row in rows))
    table.add_row(*(f"{len(row['token_ids'])} tokens, {row['finish_reason']}" for row in rows))
    return table


def token_view(row: Row, tokenizer: Any) -> Group:
    """The tokens of a trajectory, coloured by reward, and a line for each."""
    texts = [tokenizer.decode([token]) for token in row["token_ids"]]
    least, most = min(row["rewards"]), max(row["rewards"])
    running = Text(row["prompt"], "dim")
    for text, reward in zip(texts, row["rewards"], strict=True):
        running.append(text, _colour(reward, least, most))
    return Group(running, Text(), _token_table(row, texts))


def _token_table(row: Row, texts: Sequence[str]) -> Table:
    least, most = min(row["rewards"]), max(row["rewards"])
    table = Table(box=None, caption=f"return: rewards from the token on; red {least:.3g} to green {most:.3g}")
    for name in ("", "token", "log-prob", "reference", "reward", "return", "version"):
        table.add_column(name, justify="left" if name == "token" else "right")
    ref = row["ref_logprobs"] or [None] * len(texts)
    for number, (text, reward, togo) in enumerate(zip(texts, row["rewards"], _returns(row["rewards"]), strict=True)):
        table.add_row(
            str(number),
            repr(text),
            f"{row['behavior_logprobs'][number]:.3f}",
            "-" if ref[number] is None else f"{ref[number]:.3f}",
            Text(f"{reward:.3f}", _colour(reward, least, most)),
            f"{togo:.3f}",
            str(row["versions"][number]),
        )
    return table


def _returns(rewards: Sequence[float]) -> Iterator[float]:
    """Sum of the rewards from each token on."""
    left = sum(rewards)
    for reward in rewards:
        yield left
        left -= reward


def _colour(value: float, least: float, most: float) -> str:
    share = (value - least) / (most - least) if most > least else 1.0
    return f"rgb({round(220 * (1 - share))},{round(180 * share)},60)"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else "…" + line[-_SHOWN + 1 :]
