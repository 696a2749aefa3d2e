"""Metrics for Prometheus: the sink, and the dashboard and alert rules that are generated from the glossary."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import yaml

from align.metrics import GLOSSARY
from cluster.record.sinks.prometheus import PrometheusSink, gauge_name
from tests.places import DEPLOY

GRAFANA = DEPLOY / "grafana"
SERVED = {"ray_" + gauge_name(name) for name in GLOSSARY}


class Gauges:
    """Ray's gauges, as a Prometheus would see them."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, str], float] = {}
        self.descriptions: dict[str, str] = {}

    def new(self, name: str, description: str, tag_keys: tuple[str, ...]) -> Any:
        assert re.fullmatch(r"[a-z_][a-z0-9_]*", name) and tag_keys == ("run",)
        assert name not in self.descriptions, "made twice"
        self.descriptions[name] = description
        return _Gauge(self, name)


class _Gauge:
    def __init__(self, gauges: Gauges, name: str) -> None:
        self.gauges, self.name = gauges, name

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.gauges.values[self.name, tags["run"]] = value


# --- the sink ------------------------------------------------------------------------------------------------------


def test_the_newest_value_of_every_metric_is_served_under_its_own_name_and_the_runs() -> None:
    gauges = Gauges()
    sink = PrometheusSink("demo", gauges.new)
    sink.log(1, 1.0, {"time/step_s": 2.0, "eval/heldout/accuracy": 0.5})
    sink.log(2, 3.0, {"time/step_s": 1.5})
    assert gauges.values == {("align_time_step_s", "demo"): 1.5, ("align_eval_heldout_accuracy", "demo"): 0.5}
    assert gauges.descriptions["align_time_step_s"] == GLOSSARY["time/step_s"].meaning


def test_what_a_run_does_not_measure_is_not_served() -> None:
    gauges = Gauges()
    PrometheusSink("demo", gauges.new).log(1, 1.0, {"time/step_s": 2.0})
    assert list(gauges.descriptions) == ["align_time_step_s"]


def test_outside_of_a_ray_session_there_is_nobody_who_would_serve() -> None:
    with pytest.raises(RuntimeError, match="need a Ray session"):
        PrometheusSink("demo")


def test_no_two_metrics_are_served_under_one_name() -> None:
    assert len(SERVED) == len(GLOSSARY)


# --- dashboard and alerts ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", GRAFANA / "generate.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def used(expression: str) -> set[str]:
    return set(re.findall(r"ray_align_\w+", expression))


def panels(dashboard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    return (panel for panel in dashboard["panels"] if panel["type"] != "row")


def test_the_committed_files_are_those_that_the_glossary_makes(generate: ModuleType) -> None:
    for name, content in generate.files().items():
        assert (GRAFANA / name).read_text() == content, (
            f"run python deploy/grafana/generate.py: {name} is of an old glossary"
        )


def test_the_dashboard_has_a_panel_for_every_metric_and_none_for_anything_else() -> None:
    dashboard = json.loads((GRAFANA / "dashboard.json").read_text())
    shown = list(panels(dashboard))
    assert [panel["title"] for panel in shown if panel["title"] not in GLOSSARY] == []
    assert {panel["title"] for panel in shown} == set(GLOSSARY) and len(shown) == len(GLOSSARY)
    for panel in shown:
        (target,) = panel["targets"]
        assert used(target["expr"]) == {"ray_" + gauge_name(panel["title"])}
        assert panel["description"] == GLOSSARY[panel["title"]].meaning


def test_no_two_panels_overlap_or_have_one_id() -> None:
    dashboard = json.loads((GRAFANA / "dashboard.json").read_text())
    cells = [
        (x, y)
        for panel in dashboard["panels"]
        for box in [panel["gridPos"]]
        for x in range(box["x"], box["x"] + box["w"])
        for y in range(box["y"], box["y"] + box["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_every_alert_reads_metrics_that_are_served_and_says_what_to_do() -> None:
    (group,) = yaml.safe_load((GRAFANA / "alerts.yml").read_text())["groups"]
    names = [rule["alert"] for rule in group["rules"]]
    assert len(set(names)) == len(names) >= 8
    for rule in group["rules"]:
        assert used(rule["expr"]) and used(rule["expr"]) <= SERVED
        assert "[" not in re.sub(r"\[\d+[mh]\]", "", rule["expr"])
        assert re.fullmatch(r"\d+[smh]", rule["for"])
        assert "{{ $labels.run }}" in rule["annotations"]["summary"] and rule["annotations"]["description"]


def test_an_alert_on_a_metric_that_is_not_in_the_glossary_cannot_be_made(generate: ModuleType) -> None:
    assert generate.expression("delta([fleet/restarts][1h]) > 0") == "delta(ray_align_fleet_restarts[1h]) > 0"
    with pytest.raises(KeyError):
        generate.expression("[fleet/restart] > 0")


def test_prometheus_is_told_of_the_rules() -> None:
    content = yaml.safe_load((GRAFANA / "prometheus.yml").read_text())
    assert content["rule_files"] == ["alerts.yml"]
