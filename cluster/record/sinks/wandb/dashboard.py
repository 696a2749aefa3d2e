"""The W&B workspace of a project, built from the glossary: a team gets the same panels with one command."""

from __future__ import annotations

import contextlib
import io
from typing import Any

from align.extras import extra
from align.metrics import GLOSSARY
from cluster.faults import ConfigError, DashboardError
from cluster.record.sinks.wandb.access import check_online, entity_of
from cluster.record.sinks.wandb.axes import AXES, axis_of, sections
from cluster.record.sinks.wandb.settings import WandbConfig

NAME = "align"
_FIRST = ("eval", "reward", "kl", "policy", "optimizer")  # sections that are open; the others unfold on a click


def build_workspace(entity: str, project: str) -> Any:
    """A workspace with a panel for each metric of the glossary, in its section and over its axis.

    Raises:
        ConfigError: If the extra `dashboard` is not installed.
    """
    ws, wr = _packages()
    groups = sections()
    order = [*(name for name in _FIRST if name in groups), *(name for name in groups if name not in _FIRST)]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=[
            ws.Section(name=name, panels=[_panel(wr, metric) for metric in groups[name]], is_open=name in _FIRST)
            for name in order
        ],
        settings=ws.WorkspaceSettings(x_axis="step"),
    )


def build_report(entity: str, project: str) -> Any:
    """A report with the same panels, each section under its name, each metric explained in the words of the glossary."""
    _, wr = _packages()
    blocks: list[Any] = []
    for name, metrics in sections().items():
        meanings = "\n".join(f"* `{metric}`: {GLOSSARY[metric].meaning}" for metric in metrics)
        panels = [_panel(wr, metric) for metric in metrics]
        runs = [wr.Runset(entity=entity, project=project)]
        blocks += [wr.H2(name), wr.MarkdownBlock(text=meanings), wr.PanelGrid(runsets=runs, panels=panels)]
    return wr.Report(entity=entity, project=project, title=NAME, description="Every metric, explained.", blocks=blocks)


def _panel(wr: Any, metric: str) -> Any:
    axis, unit = axis_of(metric), GLOSSARY[metric].unit
    title = f"{metric} [{unit}]" if unit else metric
    return wr.LinePlot(title=title, x=axis, y=[metric], title_x=f"{axis}: {AXES[axis]}")


def as_json(workspace: Any) -> str:
    """What would be sent for a workspace."""
    return str(workspace._to_model().model_dump_json(by_alias=True, exclude_none=True))


def save(entity: str | None, project: str, report: bool) -> list[str]:
    """Save the workspace, and a report if asked for; returns their addresses.

    Raises:
        ConfigError: If the extra `dashboard` is not installed.
        TrackingError: Without a key, or with one that the server refuses.
        WrongEntity: If the key may not write there.
        DashboardError: If the server cannot be reached, or refuses what it is sent.
    """
    _packages()
    cfg = WandbConfig(mode="online", project=project, entity=entity)
    warnings: list[str] = []
    if not check_online(cfg, warnings.append):
        found = warnings[0].partition(";")[0] if warnings else "WANDB_MODE is 'offline' or 'disabled'"
        raise DashboardError(found, "correct WANDB_BASE_URL or unset WANDB_MODE; --json FILE needs no server")
    owner = entity_of(cfg)
    if owner is None:
        raise DashboardError("the W&B server does not say who the key belongs to", "name it with --entity")
    views = [build_workspace(owner, project), *([build_report(owner, project)] if report else [])]
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # it prints the addresses that are returned here
            return [str(view.save().url) for view in views]
    except Exception as error:  # of any of the client's kinds
        raise DashboardError(
            f"W&B did not take the dashboard for {owner}/{project}: {error}",
            "the project has to be there: upload a run first, or correct --entity and --project",
        ) from None


def _packages() -> tuple[Any, Any]:
    refusal = "dashboards need another package: {error}"
    try:
        reports, workspaces = (extra(f"wandb_workspaces.{name}", refusal) for name in ("reports.v2", "workspaces"))
    except ValueError as error:
        raise ConfigError(str(error), "pip install 'align[dashboard]'") from None
    return workspaces, reports
