"""The dashboard holds every metric of the glossary once, and reaches a server or says why not."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from align.metrics import GLOSSARY
from cluster.record.sinks.wandb.axes import axis_of, section_of
from tests.fakes.wandb_server import fake_wandb
from tests.harness.wandb_files import API_KEY, run_python

pytest.importorskip("wandb_workspaces", reason="the extra 'dashboard' is not installed")
pytestmark = pytest.mark.integration

ALIGN = "import sys; sys.argv = ['align', 'dashboard', *{arguments!r}]; from cluster.cli import main; main()"


def dashboard(folder: Path, *arguments: str, **environment: str) -> tuple[int, str, str]:
    done = run_python(ALIGN.format(arguments=arguments), folder, **environment)
    return done.returncode, done.stdout, done.stderr


def panels_in(tree: Any) -> list[dict[str, Any]]:
    """The settings of all line plots below, wherever they are."""
    if isinstance(tree, list):
        return [panel for item in tree for panel in panels_in(item)]
    if not isinstance(tree, dict):
        return []
    if tree.get("viewType") == "Run History Line Plot":
        return [tree["config"]]
    return [panel for item in tree.values() for panel in panels_in(item)]


def shown(tree: Any) -> list[tuple[str, str]]:
    return [(metric, panel["xAxis"]) for panel in panels_in(tree) for metric in panel["metrics"]]


EXPECTED = sorted((name, axis_of(name)) for name in GLOSSARY)


def test_the_workspace_shows_each_metric_once_in_its_section_over_its_axis(tmp_path: Path) -> None:
    code, out, err = dashboard(tmp_path, "--entity", "team", "--project", "rl", "--json", "out.json")
    assert (code, out) == (0, "out.json is written\n"), err
    view = json.loads((tmp_path / "out.json").read_text())
    assert sorted(shown(view)) == EXPECTED
    found = view["spec"]["section"]["panelBankConfig"]["sections"]
    by_section = {section["name"]: [metric for metric, _ in shown(section)] for section in found}
    assert {name: section_of(name) for name in GLOSSARY} == {
        metric: name for name, metrics in by_section.items() for metric in metrics
    }
    assert (view["entity"], view["project"]) == ("team", "rl")


def test_the_report_shows_and_explains_each_metric_once(tmp_path: Path) -> None:
    with fake_wandb() as server:
        code, out, err = dashboard(tmp_path, "--report", WANDB_API_KEY=API_KEY, WANDB_BASE_URL=server.url)
        assert code == 0, err
        (sent,) = server.sent("upsertView")
    assert len(out.splitlines()) == 2
    report = json.loads(sent["spec"])
    assert sorted(shown(report)) == EXPECTED
    text = json.dumps(report, ensure_ascii=False)
    for definition in GLOSSARY.values():
        assert json.dumps(definition.meaning, ensure_ascii=False)[1:-1] in text


def test_one_command_saves_the_workspace_for_the_keys_own_entity(tmp_path: Path) -> None:
    with fake_wandb() as server:
        code, out, err = dashboard(tmp_path, "--project", "rl", WANDB_API_KEY=API_KEY, WANDB_BASE_URL=server.url)
        assert code == 0, err
        (sent,) = server.sent("UpsertView2")
        assert (sent["entityName"], sent["projectName"], sent["displayName"]) == ("me", "rl", "align")
        assert sorted(shown(json.loads(sent["spec"]))) == EXPECTED
        assert out.startswith(f"{server.url}/me/rl?nw=")


def test_what_the_server_refuses_is_told_with_the_project_and_the_remedy(tmp_path: Path) -> None:
    with fake_wandb() as server:
        server.refuses = {"UpsertView2": "project not found"}
        code, _, err = dashboard(tmp_path, "--project", "wrong", WANDB_API_KEY=API_KEY, WANDB_BASE_URL=server.url)
    assert code == 2
    assert "[DASHBOARD] W&B did not take the dashboard for me/wrong: " in err
    assert "project not found" in err
    assert "-> the project has to be there" in err
    assert "Traceback" not in err


def test_without_a_key_a_server_or_the_right_entity_nothing_is_saved_and_the_remedy_named(tmp_path: Path) -> None:
    code, _, err = dashboard(tmp_path)
    assert (code, "no W&B key is set" in err, "-> set WANDB_API_KEY" in err) == (2, True, True), err
    with socket.socket() as bound:  # a port that nobody listens on
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        code, _, err = dashboard(tmp_path, WANDB_API_KEY=API_KEY, WANDB_BASE_URL=url)
    assert (code, f"[DASHBOARD] the W&B server {url} cannot be reached" in err) == (2, True), err
    with fake_wandb() as server:
        code, _, err = dashboard(tmp_path, "--entity", "teem", WANDB_API_KEY=API_KEY, WANDB_BASE_URL=server.url)
    assert (code, "[WANDB_ENTITY]" in err) == (2, True), err
