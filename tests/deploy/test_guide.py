"""deploy/README.md names every file that is there, and nothing that is not."""

from __future__ import annotations

import re

import pytest

from align.metrics import GLOSSARY
from tests.fakes.published_models import CLUSTERS
from tests.places import DEPLOY

GUIDE = (DEPLOY / "README.md").read_text()


def test_every_path_of_the_guide_exists() -> None:
    named = set(re.findall(r"(?<![\w/])((?:deploy|runs|clusters|grafana|kuberay)/[\w./-]+\w)", GUIDE))
    assert len(named) > 20
    real = {name for name in named if not re.search(r"/[XY]\.toml$", name)}
    assert {name for name in real if not (DEPLOY / name.removeprefix("deploy/")).exists()} == set()


@pytest.mark.parametrize("pattern", ["docker/*.Dockerfile", "ray/*.yaml", "slurm/*", "bare/*", "clusters/*.toml"])
def test_every_way_to_start_is_in_the_guide(pattern: str) -> None:
    files = sorted(DEPLOY.glob(pattern))
    assert files
    assert [str(path) for path in files if str(path.relative_to(DEPLOY)) not in GUIDE] == []


def test_every_run_for_a_cluster_is_in_the_guide_beside_its_cluster() -> None:
    for run, cluster in CLUSTERS.items():
        assert f"| `runs/{run}.toml` | `clusters/{cluster}.toml` |" in GUIDE


def test_the_metrics_that_are_to_be_watched_exist() -> None:
    named = set(
        re.findall(
            r"`((?:time|mismatch|weights|staleness|policy|optimizer|fleet|importance|kl|throughput)/\w+)`", GUIDE
        )
    )
    assert len(named) >= 10 and named <= set(GLOSSARY)


def test_no_file_for_deploying_names_a_registry() -> None:
    images = re.findall(r"image: *(\S+)", "\n".join(path.read_text() for path in DEPLOY.rglob("*.yaml")))
    assert set(images) == {"align:cuda", "redis:7.4.2-bookworm"}
