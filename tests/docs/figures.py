"""What the committed runs printed and reached: their consoles, and the figures of their `summary.json`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.docs.documents import table
from tests.docs.tables import result
from tests.places import RESULTS

FIRST_WORDS = ("ready", "evaluation after step 0:", "step", "1/", "2/")
LAST_WORDS = ("100/", "evaluation after step 100:", "finished")


def console(name: str) -> str:
    """What a command printed, as it was captured."""
    return f"```\n{(RESULTS / f'{name}.txt').read_text(encoding='utf-8')}```"


def short_console() -> str:
    """A dozen lines of the demo: its beginning, an evaluation on the way, its end."""
    lines = (RESULTS / "demo_console.txt").read_text(encoding="utf-8").splitlines()
    groups = [FIRST_WORDS, ("evaluation after step 20:",), LAST_WORDS]
    shown = ["\n".join(line for line in lines if line.strip().startswith(words)) for words in groups]
    return "```\n" + "\n  …\n".join(shown) + "\n```"


def figures(name: str, *, length: bool = False) -> str:
    """The figures of a committed run.

    Args:
        name: Of the run.
        length: Whether the length of completions is among them.
    """
    rows = [f"| {words} | {value} |" for words, value in _figures(result(name), length)]
    return table("| figure | value |", rows)


def _figures(summary: dict[str, Any], length: bool) -> Iterator[tuple[str, str]]:
    sets = {"": ("held-out prompts", "held-out sums"), "_train": ("trained prompts", "trained sums")}
    kl, grammatical, accuracy = (
        {end: [summary.get(f"{name}_{when}{end}") for when in ("before", "after")] for end in sets}
        for name in ("kl_per_token", "grammatical", "accuracy")
    )
    for end, (prompts, _) in sets.items():
        if kl[end][0] is not None:
            yield f"KL per token, {prompts}", "{:.3g} → {:.3g}".format(*kl[end])
    for end, (prompts, _) in sets.items():
        if grammatical[end][0] is not None:
            reference = summary[f"grammatical_reference{end}"]
            yield f"grammatical, {prompts}", "{:.1%} → {:.1%} (reference {:.1%})".format(*grammatical[end], reference)
    for end, (_, sums) in sets.items():
        if accuracy[end][0] is not None:
            yield f"right answers, {sums}", "{:.1%} → {:.1%}".format(*accuracy[end])
    if length:
        first, last = (summary["evaluations"][i]["eval/heldout/completion_tokens_mean"] for i in (0, -1))
        yield "completion length, held-out prompts", f"{first:.1f} → {last:.1f} tokens"
    yield "engine and learner differ by", f"{summary['mismatch_mean']:.1e} mean, {summary['mismatch_max']:.1e} largest"
    yield "tokens generated", f"{summary['generated_tokens']:,}"
    yield "peak memory, all processes", f"{summary['peak_rss_bytes'] / 2**30:.1f} GiB"
    yield "time", f"{summary['wall_s']:.0f} s"
