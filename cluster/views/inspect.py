"""`align inspect` in the terminal: the trajectories of a run by step, prompt, ending and order; groups; single tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster.faults import ConfigError
from cluster.record.trajectories import Brief, Row, Trajectories, excerpt, returns
from cluster.views.credit import PULL, PULL_MEANING, Credit, CreditUnknown, step_credits
from cluster.views.rows import Rows
from cluster.views.selection import ORDERS, Selection, Summary, ends

_SHOWN = 60  # characters of a text in a table
_SAID = "prompt -> completion"
_LEAST_ANSWER = 20  # columns of the console that an answer takes beside others
PULLED = "pull"
"""The order by what moved the loss, beside `ORDERS`."""


def view(
    run: Path, selection: Selection, ticket: int | None, repeat: int | None, order: str | None, limit: int
) -> RenderableType:
    """What `align inspect` shows: the more is named, the closer it looks.

    Args:
        run: The run folder.
        selection: Which trajectories; nothing asked for is a line per step.
        ticket: The group of this ticket.
        repeat: One trajectory of the group.
        order: One of `ORDERS`, "pull", or None for the lowest and the highest rewards.
        limit: Trajectories in a list.

    Raises:
        ConfigError: If what is named is not there.
    """
    found, step = Trajectories(run).checked(), selection.first_step
    if order not in (None, PULLED, *ORDERS):
        raise ConfigError(f"there is no order {order!r}", f"choose {', '.join(ORDERS)} or {PULLED}")
    if step is None:
        if ticket is not None or repeat is not None:
            raise ConfigError("a ticket is looked for in one step", "add --step K; align inspect RUN lists them")
        if order == PULLED:
            raise ConfigError("what moved the loss is a question to one step", "add --step K")
        return (
            overview(found) if selection == Selection() and order is None else listing(found, selection, order, limit)
        )
    if ticket is not None:
        return _of_group(found, step, ticket, repeat)
    found.briefs(step)  # whether it is there
    return movers(found, step, limit) if order == PULLED else listing(found, selection, order, limit)


def _of_group(found: Trajectories, step: int, ticket: int, repeat: int | None) -> RenderableType:
    group = found.group(step, ticket)
    if repeat is None:
        return SideBySide(group)
    if not 0 <= repeat < len(group):
        raise ConfigError(f"ticket {ticket} has no repeat {repeat}", f"it has {len(group)}, counted from 0")
    try:
        credit = step_credits(found, step)[ticket, repeat]
    except CreditUnknown:
        credit = None
    return token_view(group[repeat], found.tokenizer(), credit)


def overview(trajectories: Trajectories) -> Rows:
    """A line per step: rewards, lengths, endings, staleness."""
    headings = ("step", "trajectories", "reward mean", "least", "most", "tokens mean", "stopped", "staleness")
    table = Rows(headings, title=f"{trajectories.run}: {len(trajectories.files)} steps")
    for step in trajectories.files:
        line = Summary.of(trajectories.briefs(step))
        table.add(
            str(step),
            str(line.num),
            f"{line.reward_mean:.4g}",
            f"{line.reward_min:.4g}",
            f"{line.reward_max:.4g}",
            f"{line.tokens_mean:.1f}",
            f"{line.endings.get('stop', 0) / line.num:.0%}",
            str(line.staleness_max),
        )
    return table


def listing(trajectories: Trajectories, selection: Selection, order: str | None, limit: int) -> Rows:
    """A line per trajectory."""
    found = selection.of(trajectories)
    shown = ends(found, limit) if order is None else sorted(found, key=ORDERS[order].key)[:limit]
    headings = ("step", "ticket", "repeat", "reward", "tokens", "ending", "staleness", _SAID)
    table = Rows(headings, [_SAID], caption=f"{len(shown)} of {len(found)} trajectories")
    for brief in shown:
        numbers = (brief.step, brief.ticket, brief.repeat, f"{brief.reward:.4g}", brief.num_tokens)
        table.add(*map(str, numbers), brief.finish_reason, str(brief.staleness), _said(brief))
    return table


def movers(trajectories: Trajectories, step: int, limit: int) -> Rows:
    """The trajectories that moved the loss of a step the most.

    Raises:
        ConfigError: If that cannot be told from what is on disk.
    """
    try:
        credits = step_credits(trajectories, step)
    except CreditUnknown as unknown:
        raise ConfigError(f"what moved step {step} is not known", str(unknown)) from None
    headings = ("ticket", "repeat", "reward", "pull", "share", _SAID)
    table = Rows(headings, [_SAID], caption=f"{PULL}. {PULL_MEANING}")
    total = sum(credit.pull for credit in credits.values())
    by_key = {(brief.ticket, brief.repeat): brief for brief in trajectories.briefs(step)}
    for key, credit in sorted(credits.items(), key=lambda item: -item[1].pull)[:limit]:
        share = f"{credit.pull / total:.1%}" if total else "-"
        brief = by_key[key]
        table.add(*map(str, key), f"{brief.reward:.4g}", f"{credit.pull:.3g}", share, _said(brief))
    return table


def _said(brief: Brief) -> Text:
    prompt, said = excerpt(brief.prompt, _SHOWN), excerpt(brief.excerpt, _SHOWN)
    return Text(prompt) + Text(" -> ", "dim") + Text(said, "bold")


class SideBySide:
    """The completions of a group beside each other, with their rewards less the group's mean; on a narrow console below.

    Args:
        rows: Of one ticket.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows
        self._mean = sum(row["reward"] for row in rows) / len(rows)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """See rich's protocol for what it prints."""
        title, caption = Text(self._rows[0]["prompt"]), f"mean reward {self._mean:.4g}"
        beside = options.max_width >= _LEAST_ANSWER * len(self._rows)
        table = Table(title=title, caption=caption, show_lines=True, show_header=beside)
        if beside:
            for row in self._rows:
                table.add_column(f"repeat {row['repeat']}", overflow="fold")
            for cells in zip(*map(self._told, self._rows), strict=True):
                table.add_row(*cells)
        else:
            table.add_column(no_wrap=True)
            table.add_column(overflow="fold")
            for row in self._rows:
                table.add_row(f"repeat {row['repeat']}", Text("\n").join(self._told(row)))
        yield table

    def _told(self, row: Row) -> list[Text]:
        reward = f"reward {row['reward']:.4g} ({row['reward'] - self._mean:+.4g})"
        return [Text(row["completion"]), Text(reward), Text(f"{len(row['token_ids'])} tokens, {row['finish_reason']}")]


def token_view(row: Row, tokenizer: Any, credit: Credit | None) -> Group:
    """The tokens of a trajectory, coloured by reward, and a line for each."""
    texts = [tokenizer.decode([token]) for token in row["token_ids"]]
    least, most = min(row["rewards"]), max(row["rewards"])
    running = Text(row["prompt"], "dim")
    for text, reward in zip(texts, row["rewards"], strict=True):
        running.append(text, _colour(reward, least, most))
    return Group(running, Text(), _token_table(row, texts, credit))


def _token_table(row: Row, texts: Sequence[str], credit: Credit | None) -> Rows:
    least, most = min(row["rewards"]), max(row["rewards"])
    headings = ("", "token", "log-prob", "reference", "reward", "return", "advantage", "version")
    table = Rows(headings, ["token"], caption=f"return: rewards from the token on; red {least:.3g} to green {most:.3g}")
    ref = row["ref_logprobs"] or [None] * len(texts)
    advantages = credit.advantages if credit else [None] * len(texts)
    togo = returns(row["rewards"])
    for number, (text, reward) in enumerate(zip(texts, row["rewards"], strict=True)):
        table.add(
            str(number),
            repr(text),
            _number(row["behavior_logprobs"][number]),
            _number(ref[number]),
            Text(_number(reward), _colour(reward, least, most)),
            _number(togo[number]),
            _number(advantages[number]),
            str(row["versions"][number]),
        )
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _colour(value: float, least: float, most: float) -> str:
    share = (value - least) / (most - least) if most > least else 1.0
    return f"rgb({round(220 * (1 - share))},{round(180 * share)},60)"
