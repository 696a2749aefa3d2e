"""A verdict: what was looked at, how it is, what was found, and the fix."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from cluster.faults import ConfigError, ResourceError, RunError


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was looked at and how it is.

    Attributes:
        item: What was looked at.
        state: "ok", "warn" (the run may suffer) or "fail" (it cannot work).
        found: What was found, in one line.
        fix: A command, or the one thing to do; empty if all is well.
        exit_code: Of a failure: 2 for the run file and what it names, 3 for machines and packages.
        node: The machine of a cluster that it was found on; empty if there is one alone.
    """

    item: str
    state: str
    found: str
    fix: str = ""
    exit_code: int = ResourceError.exit_code
    node: str = ""

    @classmethod
    def of(cls, item: str, good: bool, found: str, fix: str, otherwise: str = "fail") -> Verdict:
        """All is well, or it is `otherwise` and there is a fix."""
        return cls(item, "ok", found) if good else cls(item, otherwise, found, fix)

    def line(self) -> str:
        """For the console; the fix stands below it."""
        where = f" ({self.node})" if self.node else ""
        fix = f"\n     -> {self.fix}" if self.fix else ""
        return f"{self.state:<5}{self.item:<15}{self.found}{where}{fix}"


def checked(item: str, look: Callable[[], Iterable[Verdict]]) -> Iterator[Verdict]:
    """The verdicts of a look; one that ends with one of our errors, or because something cannot be read, is a failure."""
    try:
        yield from look()
    except RunError as error:
        yield Verdict(item, "fail", error.message, error.advice, error.exit_code)
    except (OSError, ValueError) as error:
        yield Verdict(item, "fail", str(error), "correct what it names", ConfigError.exit_code)


def exit_code(verdicts: Iterable[Verdict]) -> int:
    """0 if nothing fails, else the highest code of what does."""
    return max((verdict.exit_code for verdict in verdicts if verdict.state == "fail"), default=0)


def require(verdicts: Iterable[Verdict], warn: Callable[[str], None]) -> None:
    """Let a run go on, or not.

    Args:
        verdicts: Of the looks before it.
        warn: Told of each warning, in one line.

    Raises:
        ConfigError: If only what the run file names is at fault.
        ResourceError: If a machine is.
    """
    failed = []
    for verdict in together(verdicts):
        where = f" ({verdict.node})" if verdict.node else ""
        if verdict.state == "warn":
            warn(f"{verdict.item}: {verdict.found}{where}; {verdict.fix}")
        elif verdict.state == "fail":
            failed.append(verdict)
    if failed:
        *others, last = [f"{v.item}: {v.found}{f' ({v.node})' if v.node else ''}\n  -> {v.fix}" for v in failed]
        message, _, advice = last.partition("\n  -> ")
        kind = ConfigError if exit_code(failed) == ConfigError.exit_code else ResourceError
        raise kind("\n".join([*others, message]), advice)


def together(verdicts: Iterable[Verdict]) -> Iterator[Verdict]:
    """Verdicts as they come, those of nodes merged once all nodes were looked at."""
    for of_nodes, group in itertools.groupby(verdicts, key=lambda verdict: bool(verdict.node)):
        if of_nodes:
            yield from merged(list(group))
        else:
            yield from group


def merged(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Verdicts of several machines with those that say the same made one, in the order in which items first came.

    What is well on several machines is one line, whatever its numbers; what is not is one line for each finding.
    """
    alike: dict[tuple[str, ...], list[Verdict]] = {}
    for verdict in verdicts:
        says = () if verdict.node and verdict.state == "ok" else (verdict.found, verdict.fix)
        alike.setdefault((verdict.item, verdict.state, *says), []).append(verdict)
    items = list(dict.fromkeys(verdict.item for verdict in verdicts))
    groups = sorted(alike.values(), key=lambda group: items.index(group[0].item))
    return [_one(group) for group in groups]


def _one(group: list[Verdict]) -> Verdict:
    nodes = list(dict.fromkeys(verdict.node for verdict in group))
    found = list(dict.fromkeys(verdict.found for verdict in group))
    where = ", ".join(nodes) if len(nodes) <= 3 else f"{nodes[0]} and {len(nodes) - 1} more nodes"
    text = found[0] if len(found) == 1 else f"{found[0]} … {found[-1]}"
    return replace(group[0], found=text, node=where)
