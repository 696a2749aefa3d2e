"""The run files for clusters: each passes `align plan` on the cluster that it names, with a model of its published sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.capacity.bill import roles
from cluster.capacity.machines import read_cluster
from cluster.capacity.plan import plan
from cluster.capacity.remedies import check_fit
from cluster.faults import ResourceError
from cluster.spec.config import RunConfig, load_config
from cluster.spec.shape import ModelShape, model_shape
from tests.fakes.published_models import CLUSTERS, GPUS, MODELS
from tests.places import DEPLOY


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models that have a config and no weights."""
    root = tmp_path_factory.mktemp("models")
    for name, (content, _) in MODELS.items():
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(content))
    return root


def loaded(run: str, models: Path, *more: str) -> RunConfig:
    """The run with its models in `models` instead of /shared/models."""
    path = DEPLOY / "runs" / f"{run}.toml"
    cfg = load_config(path)
    sections = [name for name in ("policy", "reference") if getattr(cfg, name)]
    return load_config(path, [*(f"{name}.model={models / getattr(cfg, name).model.name}" for name in sections), *more])


def test_every_run_file_for_a_cluster_is_among_those_that_are_planned() -> None:
    at_scale = {path.stem for path in (DEPLOY / "runs").glob("*.toml") if load_config(path).rollout.num_gpus}
    assert at_scale == set(CLUSTERS)
    assert {path.stem for path in (DEPLOY / "clusters").iterdir()} == {"laptop", *CLUSTERS.values()}


@pytest.mark.parametrize("name", MODELS)
def test_the_models_have_the_sizes_that_they_are_published_with(name: str, models: Path) -> None:
    assert round(model_shape(models / name).num_parameters / 1e9, 1) == MODELS[name][1]


@pytest.mark.parametrize(("run", "cluster"), CLUSTERS.items())
def test_a_run_passes_the_plan_on_the_cluster_that_it_names(run: str, cluster: str, models: Path) -> None:
    assert f"Cluster: deploy/clusters/{cluster}.toml" in (DEPLOY / "runs" / f"{run}.toml").read_text()
    machines = read_cluster(DEPLOY / "clusters" / f"{cluster}.toml").machines()
    assert sum(machine.gpus for machine in machines) == GPUS[cluster]
    assert "fits         every process finds a place" in plan(loaded(run, models), machines, None)


@pytest.mark.parametrize(("run", "cluster"), CLUSTERS.items())
def test_no_micro_batch_is_smaller_than_the_longest_trajectory(run: str, cluster: str, models: Path) -> None:
    cfg = loaded(run, models)
    assert cfg.learner.max_tokens_per_micro_batch >= cfg.rollout.max_model_len


@pytest.mark.parametrize("run", [run for run, cluster in CLUSTERS.items() if cluster != "one_gpu"])
def test_with_one_rank_or_one_machine_fewer_it_would_not_fit(run: str, models: Path) -> None:
    cluster = read_cluster(DEPLOY / "clusters" / f"{CLUSTERS[run]}.toml")
    alone = loaded(run, models, "learner.num_ranks=1")
    shape = model_shape(alone.policy.model)
    with pytest.raises(ResourceError, match="learner"):
        check_fit(alone, lambda cfg: roles(cfg, shape, shape), cluster.machines())
    whole = loaded(run, models)
    with pytest.raises(ResourceError):
        check_fit(
            whole,
            lambda cfg: roles(cfg, shape, shape),
            cluster.machines()[1:] or [cluster.nodes[0].model_copy(update={"gpus": 7})],
        )


def of_one_machine(cfg: RunConfig, shape: ModelShape) -> int:
    """Host memory of as many ranks as Ray may put on one machine, by CPUs and GPUs alone."""
    learner = next(role for role in roles(cfg, shape, shape) if role.name == "learner")
    return min(cfg.learner.num_ranks, 8, int(192 // learner.cpus)) * learner.host_bytes


@pytest.mark.parametrize("run", ["qwen3_32b_two_nodes", "llama_70b_eight_nodes"])
def test_ray_which_knows_no_memory_puts_no_more_ranks_on_a_machine_than_its_memory_has_room_for(
    run: str, models: Path
) -> None:
    cfg = loaded(run, models)
    node = read_cluster(DEPLOY / "clusters" / f"{CLUSTERS[run]}.toml").nodes[0]
    assert (node.cpus, node.gpus) == (192, 8)
    assert of_one_machine(cfg, model_shape(cfg.policy.model)) <= node.memory_gib * 2**30
