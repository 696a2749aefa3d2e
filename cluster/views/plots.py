"""Draws the metrics of a run as small plots: one by one for the page of `report.py`, or all in one picture.

Every text in a drawing is a constant of `panels.py` or a number, so a drawing can be put into a page as it is.
The same series always give the same bytes.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from cluster.views.panels import Panel, Points, Scale

# (light, dark). A drawing is made in the light colours; the page replaces them by variables that it defines.
SERIES_COLORS = (
    ("#2b6cb0", "#74b3f2"),
    ("#c2671c", "#f2a765"),
    ("#2f855a", "#6fcf97"),
    ("#805ad5", "#b79df5"),
    ("#b83b5e", "#f08ca6"),
)
TEXT_COLOR = ("#5d6675", "#a2abb8")
GRID_COLOR = ("#e4e7ec", "#2d333d")
COLORS = (*SERIES_COLORS, TEXT_COLOR, GRID_COLOR)

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": TEXT_COLOR[0],
    "xtick.color": TEXT_COLOR[0],
    "ytick.color": TEXT_COLOR[0],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "axes.edgecolor": GRID_COLOR[0],
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": GRID_COLOR[0],
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.handlelength": 1.4,
    "figure.constrained_layout.h_pad": 0.09,
    "figure.constrained_layout.w_pad": 0.09,
    "lines.linewidth": 1.5,
    "lines.markersize": 3.2,
}
GROUP_ID = re.compile(r'<g id="[^"]*">')
"""Nothing refers to the ids of groups, and they would repeat in a page with several drawings."""
MARKED_POINTS = 24
"""Up to this many points a curve also shows each of them, so that a single step is visible."""


def draw_panel(panel: Panel, series: Mapping[str, Points], target: float | None = None) -> str:
    """Draws one panel for the page: no title and no legend, colours as the variables `--c0`, `--c1`, ...

    Args:
        panel: what to draw.
        series: the points of each metric by name.
        target: what the reference reaches, a dashed line across a panel that has one.
    """
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": panel.title}):
        figure = Figure(figsize=(4.7, 2.0), layout="constrained")
        _draw(figure.add_subplot(), panel, series, target)
        svg = _svg(figure, transparent=True)
    for index, (light, _) in enumerate(COLORS):
        svg = svg.replace(light, f"var(--c{index})")
    return GROUP_ID.sub("<g>", svg[svg.index("<svg") :])


def draw_picture(panels: Sequence[Panel], series: Mapping[str, Points], target: float | None = None) -> str:
    """Draws panels side by side as one SVG file in the light colours on white; `target` as in `draw_panel`."""
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "curves"}):
        figure = Figure(figsize=(4.2 * columns, 3 * rows), layout="constrained", facecolor="white")
        for index, panel in enumerate(panels):
            axes = figure.add_subplot(rows, columns, index + 1)
            _draw(axes, panel, series, target)
            axes.set_title(panel.title, loc="left", pad=20, fontsize=10.5, fontweight="bold", color="#1d232b")
            axes.annotate(panel.unit, (0, 1), (0, 7), "axes fraction", textcoords="offset points", fontsize=8.5)
            if len(axes.get_lines()) > 1:
                axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.09), ncols=3)
        figure.supxlabel("step", fontsize=8.5)
        return _svg(figure, transparent=False)


def _draw(axes: Axes, panel: Panel, series: Mapping[str, Points], target: float | None) -> None:
    finite = []
    for (name, label), (color, _) in zip(panel.curves, SERIES_COLORS, strict=False):
        if name not in series:
            continue
        values = [value if math.isfinite(value) else math.nan for value in series[name].values()]
        marker = "o" if len(values) <= MARKED_POINTS else ""
        axes.plot(list(series[name]), values, color=color, marker=marker, label=label)
        finite += [value for value in values if not math.isnan(value)]
    if target is not None and panel.has_target:
        axes.axhline(target, color=TEXT_COLOR[0], linestyle=(0, (4, 3)), linewidth=1, label="reference")
    steps = {step for name, _ in panel.curves for step in series.get(name, {})}
    if len(steps) == 1:
        axes.set_xlim(min(steps) - 1, max(steps) + 1)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    _scale(axes, panel.scale, finite)


def _scale(axes: Axes, scale: Scale, finite: list[float]) -> None:
    positive = [value for value in finite if value > 0]
    if scale == "rate":
        axes.set_ylim(-0.04, 1.04)
    elif scale == "zero":
        top = max(positive, default=1)
        axes.set_ylim(-0.04 * top, 1.08 * top)
    elif scale == "log" and positive:
        narrow = max(positive) < 30 * min(positive)
        axes.set_yscale("log", nonpositive="mask")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,), numticks=8))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(_percent_tick if scale == "rate" else _number_tick))


def _percent_tick(value: float, _: object) -> str:
    return f"{100 * value:.0f}%"


def _number_tick(value: float, _: object) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _svg(figure: Figure, transparent: bool) -> str:
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=transparent, metadata=nothing)
    return buffer.getvalue()
