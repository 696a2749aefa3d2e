"""Turns a run folder into `report.html`, one page that explains the run, and `curves.svg`, its curves as one picture.

Both are made from the files of the folder alone, so a report can be written again at any time, and a failed or stopped
run has one too. What is missing or damaged is named on the page. Prompts and completions are untrusted text: the
template escapes everything except the drawings of `plots.py`, and the page forbids scripts and requests.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from align.metrics import GLOSSARY, Definition
from cluster.loop.goodput import FATES
from cluster.record.figures import PHASES, ROLES
from cluster.views.numbers import duration, finite, memory, number, percent
from cluster.views.panels import FURTHER_PANELS, PANELS, Panel, non_positive, present
from cluster.views.plots import COLORS, draw_panel, draw_picture
from cluster.views.run_record import RunRecord, read_run

OUTCOMES = (
    ("KL per token to the reference", "held-out prompts", "kl_per_token", ""),
    ("KL per token to the reference", "training prompts", "kl_per_token", "_train"),
    ("Right answers", "held-out prompts", "accuracy", ""),
    ("Right answers", "training prompts", "accuracy", "_train"),
    ("Judged grammatical", "held-out prompts", "grammatical", ""),
    ("Judged grammatical", "training prompts", "grammatical", "_train"),
)
"""(label, which prompts, measure, suffix): the tiles that compare before, after and reference."""

LOOK_FURTHER = (
    (
        "metrics.jsonl",
        "every metric of every step, one JSON object a line",
        "tail -n 1 metrics.jsonl | python -m json.tool",
    ),
    (
        "trajectories",
        "prompts, completions and rewards, as Parquet",
        "python -c \"import pyarrow.dataset as d; print(d.dataset('trajectories').head(3).to_pylist())\"",
    ),
    ("checkpoints", "what a resumed run starts from", "ls -l checkpoints"),
    (
        "policy",
        "the trained policy, as a Hugging Face folder",
        "python -c \"from transformers import pipeline; print(pipeline('text-generation', 'policy')('The'))\"",
    ),
    ("wandb", "the W&B record; this uploads what was written offline", "wandb sync"),
)
"""(path in the run folder, what it holds, a command to run there)."""


def write_report(run_dir: Path, glossary: Mapping[str, Definition] = GLOSSARY) -> Path:
    """Writes `report.html` and, when there is a curve to draw, `curves.svg` into a run folder.

    Args:
        run_dir: folder of a finished, stopped or failed run. Any file in it may be missing or damaged.
        glossary: what each metric means; a metric it lacks is shown by its bare name.

    Returns:
        The path of `report.html`. The same folder always gives the same bytes.

    Raises:
        ValueError: `run_dir` is not a folder.
    """
    if not run_dir.is_dir():
        raise ValueError(f"expected the folder of a run at {run_dir}, found none; give the path that the run printed")
    record = read_run(run_dir)
    picture = run_dir / "curves.svg"
    picture.unlink(missing_ok=True)
    if panels := present(PANELS, record.series):
        picture.write_text(draw_picture(panels, record.series, _target(record)), encoding="utf-8")
    page = run_dir / "report.html"
    # JSON can hold lone surrogates and UTF-8 cannot: they become question marks.
    page.write_bytes(render_page(record, glossary, paths_of(run_dir)).encode("utf-8", errors="replace"))
    return page


def paths_of(run_dir: Path) -> list[tuple[str, str, str]]:
    """The rows of `LOOK_FURTHER` that the folder has."""
    return [row for row in LOOK_FURTHER if (run_dir / row[0]).exists()]


def templates(*folders: Path) -> jinja2.Environment:
    """Templates that escape everything; what a template names and nobody gave is an error."""
    loader = jinja2.FileSystemLoader(folders)
    env = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    env.filters |= {"number": number, "percent": percent}
    return env


def render_page(
    record: RunRecord, glossary: Mapping[str, Definition], paths: Sequence[tuple[str, str, str]], served: bool = False
) -> str:
    """Renders the page.

    Args:
        record: what the run folder holds.
        glossary: what each metric means.
        paths: the rows of `LOOK_FURTHER` that the run folder has.
        served: whether `align inspect --web` serves the page, so that it can link to the others.
    """
    template = templates(Path(__file__).parent).get_template("report.html.j2")
    return template.render(
        record=record,
        summary=record.summary,
        verdict=verdict(record.summary),
        outcomes=_outcomes(record.summary),
        facts=_facts(record.summary),
        spent=_spent(record.summary, glossary),
        charts=_charts((*PANELS, *FURTHER_PANELS), record, glossary),
        definitions=[(name, glossary.get(name), points) for name, points in record.series.items()],
        environment=json.dumps(record.environment, indent=2, ensure_ascii=False),
        paths=paths,
        colors=COLORS,
        served=served,
        has_trajectories=any(path == "trajectories" for path, _, _ in paths),
    )


def _target(record: RunRecord) -> float | None:
    return finite(record.summary.get("grammatical_reference"))


def _charts(panels: Sequence[Panel], record: RunRecord, glossary: Mapping[str, Definition]) -> list[dict[str, Any]]:
    return [
        {
            "panel": panel,
            "svg": Markup(draw_panel(panel, record.series, _target(record))),
            "curves": [
                (index, label, name, glossary.get(name), list(record.series[name].values()))
                for index, (name, label) in enumerate(panel.curves)
                if name in record.series
            ],
            "show": percent if panel.scale == "rate" else number,
            "target": _target(record) if panel.has_target else None,
            "hidden": non_positive(panel, record.series),
        }
        for panel in present(panels, record.series)
    ]


def verdict(summary: Mapping[str, Any]) -> str:
    """The outcome on held-out prompts in one sentence, from whatever the summary holds."""
    parts = []
    before, after = finite(summary.get("kl_per_token_before")), finite(summary.get("kl_per_token_after"))
    if before is not None and after is not None:
        parts.append(f"KL per token to the reference {number(before)} → {number(after)}{_change(before, after)}")
    before, after = finite(summary.get("grammatical_before")), finite(summary.get("grammatical_after"))
    if before is not None and after is not None:
        reference = finite(summary.get("grammatical_reference"))
        of_reference = "" if reference is None else f" (reference {percent(reference)})"
        parts.append(f"grammatical {percent(before)} → {percent(after)}{of_reference}")
    before, after = finite(summary.get("accuracy_before")), finite(summary.get("accuracy_after"))
    if before is not None and after is not None:
        parts.append(f"right answers {percent(before)} → {percent(after)}")
    sentence = "; ".join(parts) or "no evaluation before and after was recorded"
    return f"{sentence[0].upper()}{sentence[1:]}."


def _change(before: float, after: float) -> str:
    """By which factor a positive number fell or rose; nothing where a factor means nothing."""
    if before <= 0 or after <= 0:
        return ""
    factor = max(before / after, after / before)
    if factor < 1.05:
        return " (about the same)"
    times = f"{factor:,.0f}" if factor >= 10 else f"{factor:.1f}"
    return f" ({times} times {'smaller' if after < before else 'larger'})"


def _outcomes(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    tiles = []
    for label, prompts, measure, suffix in OUTCOMES:
        show = number if measure == "kl_per_token" else percent
        keys = [f"{measure}_{moment}{suffix}" for moment in ("before", "after", "reference")]
        before, after, reference = (finite(summary.get(key)) for key in keys)
        if before is not None or after is not None:
            shown = {"before": show(before), "after": show(after), "reference": show(reference)}
            tiles.append({"label": label, "prompts": prompts, "has_reference": reference is not None, **shown})
    return tiles


def _facts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(label, value) of the plain key figures that were recorded."""
    figures = (
        ("Steps", "steps", number),
        ("Wall time", "wall_s", duration),
        ("Tokens generated", "generated_tokens", number),
        ("Tokens trained", "trained_tokens", number),
        ("Peak memory", "peak_rss_bytes", memory),
        ("Mismatch, mean", "mismatch_mean", number),
        ("Mismatch, largest", "mismatch_max", number),
        ("Seed", "seed", str),
    )
    values = [(label, finite(summary.get(key)), show) for label, key, show in figures]
    return [(label, show(value)) for label, value, show in values if value is not None]


def _spent(
    summary: Mapping[str, Any], glossary: Mapping[str, Definition]
) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """(title, rows of label, share and meaning): where the tokens went, where the time of the steps went, and who was idle."""
    fates = {fate: f"goodput/{fate}_tokens" for fate in FATES}
    phases = {phase: f"time/{phase}_s" for phase in PHASES}
    idle = {f"idle_{role}": f"idle/{role}_fraction" for role in ROLES}
    tables = (("Sampled tokens", "goodput", fates), ("Time of the steps", "time", phases), ("Idle", "time", idle))
    spent = []
    for title, key, metrics in tables:
        found = summary.get(key)
        shares = {name: finite(found.get(name)) for name in metrics} if isinstance(found, dict) else {}
        rows = [
            (name.removeprefix("idle_").replace("_", " "), percent(share), definition.meaning if definition else "")
            for name, share in shares.items()
            if share
            for definition in [glossary.get(metrics[name])]
        ]
        if rows:
            spent.append((title, rows))
    return spent
