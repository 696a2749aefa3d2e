"""The section [wandb] of a run file."""

from __future__ import annotations

import pytest

from cluster.record.sinks.wandb.settings import WandbConfig
from tests.harness.wandb_files import API_KEY


def test_a_key_is_no_setting_of_a_run_file() -> None:
    with pytest.raises(ValueError, match="api_key"):
        WandbConfig(api_key=API_KEY)  # type: ignore[call-arg]


def test_a_project_that_wandb_could_not_name_is_refused_by_the_run_file() -> None:
    for name in ("a/b", "what?", "x" * 129, ""):
        with pytest.raises(ValueError, match="project"):
            WandbConfig(project=name)
    assert WandbConfig(project="my project-1").project == "my project-1"
