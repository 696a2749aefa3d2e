"""Writes dashboard.json and alerts.yml beside this file, from align.metrics.GLOSSARY: python deploy/grafana/generate.py"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from align.metrics import GLOSSARY
from cluster.record.sinks.prometheus import gauge_name

HERE = Path(__file__).parent
NOTE = "# Made by deploy/grafana/generate.py from align/metrics.py; change those.\n"

UNITS = {"s": "s", "bytes": "bytes", "tokens/s": "suffix: tokens/s"}
FIRST = (
    "reward",
    "eval",
    "kl",
    "policy",
)  # sections that a person looks at first; the others follow in the glossary's order

# Name, expression with metrics in [brackets], how long, what happened, what to do. Thresholds are starting points.
ALERTS = (
    ("AlignStalled", "changes([weights/version][30m]) == 0", "5m", "No step in 30 minutes.",
     "align jobs logs ID says what is waited for; a long evaluation or a very long step is no fault: raise the window."),
    ("AlignRewardsFail", "[reward/quarantined_fraction] > 0.02", "10m", "A verifier fails on more than 2% of trajectories.",
     "quarantine.jsonl in the run folder has the tracebacks; more than quarantine.max_fraction end the run."),
    ("AlignUpdatesSkipped", "delta([optimizer/skipped_updates][1h]) > 0", "0m", "An update was not finite and left out.",
     "Look at optimizer/grad_norm and the rewards before it; several in a row end the run."),
    ("AlignActorsLost", "delta([fleet/restarts][1h]) > 0", "0m", "A rollout actor was lost and replaced.",
     "Expected on spot machines; else look for its node. rollout.max_restarts ends the run."),
    ("AlignMismatch", "[mismatch/abs_mean] > 0.15", "10m", "Engine and learner disagree at equal version.",
     "0.15 nats is the limit of a bfloat16 engine (weights.canary_warn); in float32 it stays below 1e-4."),
    ("AlignCanary", "[weights/canary_gap] > 0.15", "0m", "The canary is above the warning of a bfloat16 engine.",
     "The run stops at weights.canary_stop."),
    ("AlignCollapse", "[policy/entropy] < 0.05", "30m", "The policy is almost deterministic.",
     "Compare transcripts; lower optimizer.lr, or charge KL or entropy."),
    ("AlignLearnerWaits", "[time/rollout_wait_s] / [time/step_s] > 0.7", "1h", "The learner waits most of a step.",
     "More rollout actors, or run.max_staleness one higher: see the guide in deploy/README.md."),
    ("AlignActorsWait", "[time/rollout_wait_s] / [time/step_s] < 0.02 and [staleness/max] > 0", "1h",
     "The learner never waits: rollout actors do.", "Fewer rollout actors, more ranks of the learner, or shorter micro-batches."),
    ("AlignPublishSlow", "[time/publish_s] / [time/step_s] > 0.3", "1h", "Publishing takes a third of a step.",
     "Check weights.transport (nccl between GPUs) and the network between nodes."),
    ("AlignNothingToLearn", "[filter/pass_rate] < 0.02 or [filter/pass_rate] > 0.98", "1h", "Almost all groups end alike.",
     "Prompts are too hard or too easy for this policy: other prompts, or filter.curriculum."),
)  # fmt: skip


def expression(template: str) -> str:
    """The expression with every `[section/name]` as the name that Ray serves it under; a range as `[30m]` stays.

    Raises:
        KeyError: If a metric is not in the glossary.
    """
    parts = template.split("[")
    text = parts[0]
    for part in parts[1:]:
        name, rest = part.split("]", 1)
        if "/" in name:
            GLOSSARY[name]
        text += ("ray_" + gauge_name(name) if "/" in name else f"[{name}]") + rest
    return text


def dashboard() -> dict[str, Any]:
    """A row for every section of the glossary, a panel for every metric."""
    sections: dict[str, list[str]] = {name: [] for name in FIRST}
    for name in GLOSSARY:
        sections.setdefault(name.split("/")[0], []).append(name)
    panels: list[dict[str, Any]] = []
    y = 0
    for section, names in sections.items():
        panels.append(_row(section, y, len(panels) + 1))
        for number, name in enumerate(names):
            place = {"h": 7, "w": 8, "x": 8 * (number % 3), "y": y + 1 + 7 * (number // 3)}
            panels.append(_panel(name, place, len(panels) + 1))
        y += 1 + 7 * -(-len(names) // 3)
    return {
        "uid": "align",
        "title": "Align",
        "tags": ["align"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": [_data_source(), _runs()]},
        "panels": panels,
    }


def _row(section: str, y: int, number: int) -> dict[str, Any]:
    return {"id": number, "type": "row", "title": section, "collapsed": False, "panels": [],
            "gridPos": {"h": 1, "w": 24, "x": 0, "y": y}}  # fmt: skip


def _panel(name: str, place: dict[str, int], number: int) -> dict[str, Any]:
    definition = GLOSSARY[name]
    return {
        "id": number,
        "type": "timeseries",
        "title": name,
        "description": definition.meaning,
        "datasource": {"type": "prometheus", "uid": "${source}"},
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": UNITS.get(definition.unit, "short")}, "overrides": []},
        # One line per run: after a restart the same run comes from another process.
        "targets": [
            {"refId": "A", "expr": f'max by (run) (ray_{gauge_name(name)}{{run=~"$run"}})', "legendFormat": "{{run}}"}
        ],
    }


def _data_source() -> dict[str, Any]:
    return {"name": "source", "label": "Data source", "type": "datasource", "query": "prometheus"}


def _runs() -> dict[str, Any]:
    query = f"label_values(ray_{gauge_name('weights/version')}, run)"
    return {"name": "run", "label": "Run", "type": "query", "query": query, "refresh": 2, "multi": True,
            "includeAll": True, "datasource": {"type": "prometheus", "uid": "${source}"}}  # fmt: skip


def alerts() -> dict[str, Any]:
    """Alert rules, as Prometheus reads them."""
    rules = [
        {
            "alert": name,
            "expr": expression(template),
            "for": how_long,
            "labels": {"severity": "warning"},
            "annotations": {"summary": f"{{{{ $labels.run }}}}: {what}", "description": advice},
        }
        for name, template, how_long, what, advice in ALERTS
    ]
    return {"groups": [{"name": "align", "rules": rules}]}


def files() -> dict[str, str]:
    """Contents by name."""
    return {
        "dashboard.json": json.dumps(dashboard(), indent=1) + "\n",
        "alerts.yml": NOTE + yaml.safe_dump(alerts(), sort_keys=False, width=200),
    }


if __name__ == "__main__":
    for name, content in files().items():
        (HERE / name).write_text(content, encoding="utf-8")
