"""Run files: every bad input gives one clear ConfigError, and what is resolved loads again as the same run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import tomli_w
from pydantic import BaseModel, ValidationError

from align.algorithm.bundles import BUNDLES
from align.algorithm.config import AlgorithmConfig
from cluster.actors.rollout import engine_settings
from cluster.spec.config import RunConfig, load_config, resolved
from tests.fakes.run_files import config, refused, write
from tests.places import RUNS

RUN_FILES = sorted(RUNS.rglob("*.toml"))


# --- good ones ---------------------------------------------------------------------------------------------------


def test_the_least_run_file_gets_the_defaults(run_file: Path) -> None:
    cfg = load_config(run_file)
    assert (cfg.run.steps, cfg.run.group_size, cfg.run.max_staleness) == (3, 1, 0)
    assert cfg == config()


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.name)
def test_a_run_file_that_we_ship_loads_and_its_resolved_form_is_the_same_run(path: Path, tmp_path: Path) -> None:
    cfg = load_config(path)
    again = tmp_path / "resolved.toml"
    again.write_text(tomli_w.dumps(resolved(cfg)), encoding="utf-8")
    assert load_config(again) == cfg


def test_there_are_run_files_to_ship() -> None:
    assert "demo.toml" in [path.name for path in RUN_FILES]


@pytest.mark.parametrize(
    "sections",
    [
        {"optimizer": {"max_grad_norm": math.inf, "betas": [0.5, 0.9]}},
        {"evaluation": {"heldout": {"files": ["a.jsonl", "b.parquet"]}, "judge": "grammatical"}},
        {"weights": {"canary_warn": 0.25, "canary_stop": 1e-9}, "wandb": {"entity": "team", "tags": ["a", "b"]}},
        {"run": {"dir": "runs/ä b", "max_staleness": 3}, "prompts": {"template": 'a "quoted" {x}\n\ttext \\ 我'}},
        {"rollout": {"num_gpus": 2}, "learner": {"num_gpus": 1}, "scorer": {"num_gpus": 0.25}},
        {"run": {"group_size": 4}, "algorithm": {"name": "dapo", "clip_high": 0.3, "reward_range": [-1.0, 1.0]}},
        {"algorithm": {"name": "reinforce++", "dual_clip": 3.0}},
        {"algorithm": {"name": "ppo", "value_clip": math.inf}, "critic": {"optimizer": {"lr": 1e-4}, "model": "m"}},
        {"reward": {"kind": "composite", "parts": [{"reward": {"alpha": 1.0}}, {"reward": {"kind": "exact_match"}}]}},
        {
            "prompts": {
                "files": [],
                "tasks": {"generator": "reasoning_gym", "dataset": "x", "size": 1, "options": {"a": [1]}},
            }
        },
    ],
)
def test_every_kind_of_value_survives_the_resolved_form(sections: dict[str, Any], tmp_path: Path) -> None:
    cfg = config(**sections)
    path = tmp_path / "resolved.toml"
    path.write_text(tomli_w.dumps(resolved(cfg)), encoding="utf-8")
    assert load_config(path) == cfg


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("run.steps=10", lambda cfg: cfg.run.steps, 10),
        ("optimizer.lr=5e-4", lambda cfg: cfg.optimizer.lr, 5e-4),
        ("run.name=bare-word", lambda cfg: cfg.run.name, "bare-word"),
        ('run.name="quoted"', lambda cfg: cfg.run.name, "quoted"),
        ("run.dir=/tmp/a=b", lambda cfg: cfg.run.dir, Path("/tmp/a=b")),
        ("algorithm.whiten=true", lambda cfg: cfg.algorithm.whiten, True),
        ('wandb.tags=["a", "b"]', lambda cfg: cfg.wandb.tags, ("a", "b")),
        ('evaluation.heldout.files=["h.jsonl"]', lambda cfg: cfg.evaluation.heldout.files, (Path("h.jsonl"),)),
        ('evaluation.heldout={files = ["h.jsonl"]}', lambda cfg: cfg.evaluation.heldout.files, (Path("h.jsonl"),)),
    ],
)
def test_an_override_replaces_a_value(override: str, read: Any, value: Any, run_file: Path) -> None:
    assert read(load_config(run_file, [override])) == value


NOT_SET = {
    "reward_range",
    "max_advantage",
    "dual_clip",
    "gae_lambda",
    "value_clip",
    "kl_target",
    "supervised_min_outcome",
}


@pytest.mark.parametrize("name", ["grpo", "cispo"])
def test_the_resolved_config_shows_the_parts_of_the_bundle(name: str) -> None:
    shown = resolved(config(run={"group_size": 4}, algorithm={"name": name}))["algorithm"]
    assert set(shown) == set(AlgorithmConfig.model_fields) - NOT_SET
    assert {key: shown[key] for key in BUNDLES[name]} == dict(BUNDLES[name])


def test_the_last_override_of_a_key_counts(run_file: Path) -> None:
    assert load_config(run_file, ["run.steps=5", "run.steps=6"]).run.steps == 6


def test_a_config_cannot_be_changed() -> None:
    cfg = config(evaluation={"heldout": {"files": ["h.jsonl"]}}, critic={}, algorithm={"name": "ppo"})
    sections = [cfg, *(value for _, value in cfg if isinstance(value, BaseModel)), cfg.evaluation.heldout]
    assert len(sections) == len(RunConfig.model_fields) + 2
    for section in sections:
        name = next(iter(type(section).model_fields))
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, name, getattr(section, name))


# --- files that cannot be read ------------------------------------------------------------------------------------


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert refused(tmp_path / "none.toml") == f"run file {tmp_path / 'none.toml'} does not exist"


def test_a_directory_is_not_a_run_file(tmp_path: Path) -> None:
    assert "Is a directory" in refused(tmp_path)


def test_a_path_through_a_file_is_not_a_run_file(run_file: Path) -> None:
    assert "Not a directory" in refused(run_file / "inner.toml")


@pytest.mark.parametrize("text", ["[run]\nsteps = \n", "[run]\nsteps = 1\n[run]\n", 'name = "a\n'])
def test_malformed_toml_names_the_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_text(text)
    message = refused(path)
    assert message.startswith(f"run file {path} is not valid TOML")
    assert "at line" in message


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "latin.toml"
    path.write_bytes('[run]\nname = "ü"\n'.encode("latin-1"))
    assert "utf-8" in refused(path)


# --- keys ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("run.step=10", "unknown key 'run.step'; did you mean 'steps'?"),
        ("optimiser.lr=1", "unknown key 'optimiser'; did you mean 'optimizer'?"),
        ("zzz.x=1", "unknown key 'zzz'; there are: run, policy, reference, prompts"),
        ("run.zzz=1", "unknown key 'run.zzz'; there are: name, dir, seed"),
        (
            'evaluation.heldout={files = ["h.jsonl"], colum = "x"}',
            "unknown key 'evaluation.heldout.colum'; did you mean 'column'?",
        ),
        ("reward.alhpa=1", "unknown key 'reward.alhpa'; did you mean 'alpha'?"),
        ('reward={kind = "exact_match", answr = "a"}', "unknown key 'reward.answr'; did you mean 'answer'?"),
        (
            'reward={kind = "composite", parts = [{wieght = 1, reward = {alpha = 1}}]}',
            "unknown key 'reward.parts.0.wieght'; did you mean 'weight'?",
        ),
        (
            'reward={kind = "composite", parts = [{reward = {kind = "overlong", max_tokens = 4, cach = 2}}]}',
            "unknown key 'reward.parts.0.reward.cach'; did you mean 'cache_tokens'?",
        ),
        (
            'evaluation.heldout={tasks = {generator = "sums", sise = 1}}',
            "'evaluation.heldout.tasks.sise'; did you mean 'size'?",
        ),
        ('prompts.colunm="x"', "unknown key 'prompts.colunm'; did you mean 'column'?"),
        ("wandb.api_key=secret", "unknown key 'wandb.api_key'"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(override: str, expected: str, run_file: Path) -> None:
    assert expected in refused(run_file, override)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[run]\nsteps = 1\n[policy]\nmodel = "m"\n[prompts]\nfiles = ["p.jsonl"]\n')
    assert "'run.prompts_per_step' is missing" in refused(path)


def test_an_empty_file_names_every_section_that_is_required(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("")
    message = refused(path)
    assert all(f"'{section}' is missing" in message for section in ("run", "policy", "prompts"))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("run.steps=0", "run.steps: Input should be greater than or equal to 1, got 0"),
        ("run.steps=many", "run.steps: Input should be a valid integer"),
        ("run.steps=1.5", "run.steps: "),
        ("run.seed=-1", "run.seed: Input should be greater than or equal to 0, got -1"),
        ("run.seed=2147483648", "run.seed: Input should be less than 2147483648, got 2147483648"),
        ("run.name=a/b", "run.name: "),
        ("run.max_staleness=-1", "run.max_staleness: "),
        ("optimizer.lr=0", "optimizer.lr: Input should be greater than 0"),
        ("optimizer.lr=nan", "optimizer.lr: "),
        ("optimizer.betas=[1.5, 0.9]", "optimizer.betas.0: Input should be less than 1, got 1.5"),
        ("sampling.temperature=0", "sampling.temperature: "),
        ("algorithm.baseline=median", "algorithm.baseline: Input should be 'none', 'batch_mean'"),
        ("algorithm.name=ppg", "algorithm.name: Input should be 'reinforce'"),
        ('algorithm.name=["grpo"]', "algorithm.name: Input should be 'reinforce'"),
        ("algorithm.clip_low=2", "algorithm.clip_low: Input should be less than or equal to 1, got 2"),
        ("rollout.dtype=float16", "rollout.dtype: "),
        ("weights.canary_stop=0", "weights.canary_stop: "),
        ("run=5", "run: "),
    ],
)
def test_a_value_out_of_range_names_the_key_what_was_expected_and_what_came(
    override: str, expected: str, run_file: Path
) -> None:
    message = refused(run_file, override)
    assert expected in message
    assert "got " in message


@pytest.mark.parametrize("override", ["run.steps", "=5", " =5", "", "--run.steps 5"])
def test_an_override_of_another_form_is_refused(override: str, run_file: Path) -> None:
    assert "is not of the form section.key=value" in refused(run_file, override)


def test_an_override_below_a_value_is_refused(run_file: Path) -> None:
    assert "'steps' is a value, not a section" in refused(run_file, "run.steps.x=1")


DROPS = ["filter.drop_without_signal=true", "algorithm.name=grpo", "run.group_size=2"]

# --- what does not fit together -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["sampling.top_p=0.9", "run.max_staleness=1"], "sampling.top_p < 1 or top_k > 0 needs run.max_staleness = 0"),
        (["sampling.top_k=50", "run.max_staleness=1"], "sampling.top_p < 1 or top_k > 0 needs run.max_staleness = 0"),
        (["sampling.top_k=50", "algorithm.distillation=reverse_kl"], "needs sampling.top_p = 1 and top_k = 0"),
        (["sampling.top_k=50", "algorithm.num_epochs=2"], "needs algorithm.num_epochs = 1 and num_minibatches = 1"),
        (["algorithm.rewards=process"], "algorithm.rewards = 'process' needs run.group_size of at least 2"),
        (["run.max_staleness=1", "algorithm.importance=none"], "'none' needs run.max_staleness = 0"),
        (["algorithm.baseline=group_mean"], "'group_mean' needs run.group_size of at least 2"),
        (["algorithm.name=grpo"], "'group_outcome_mean' needs run.group_size of at least 2"),
        (["algorithm.name=ppo"], "algorithm.baseline = 'critic' (bundle ppo has it) needs a section [critic]"),
        (["critic.warmup_steps=1"], "the section [critic] is read by algorithm.baseline = 'critic' alone"),
        (["algorithm.num_minibatches=3"], "algorithm.num_minibatches (3) is above the 2 trajectories of a step"),
        (
            ["run.group_size=4", "reward.kind=exact_match", "algorithm.num_minibatches=5"],
            "algorithm.num_minibatches (5) is above the 4 trajectories of a step (two of a group where a verifier may fail",
        ),
        (
            ["algorithm.name=rloo", "run.group_size=2", "algorithm.kl_target=6", "algorithm.kl_horizon=3"],
            "algorithm.kl_horizon (3) is below the 4 trajectories of a step",
        ),
        (
            ["run.max_staleness=1", "algorithm.name=grpo", "run.group_size=2", "algorithm.proximal=recomputed"],
            "'none' needs run.max_staleness = 0",
        ),
        (["algorithm.name=rloo"], "'leave_one_out' needs run.group_size of at least 2"),
        (
            ["algorithm.name=dr_grpo", "run.group_size=2"],
            "algorithm: aggregation = 'constant_length' needs loss_length",
        ),
        (["algorithm.surrogate=gspo"], "algorithm: surrogate = 'gspo' has the ratio pi/mu in it: importance must be"),
        (["filter.drop_without_signal=true"], "filter.drop_without_signal needs algorithm.baseline = "),
        (
            ["filter.drop_without_signal=true", "algorithm.name=rloo", "run.group_size=2"],
            "filter.drop_without_signal does not go with algorithm.kl = 'reward'",
        ),
        (
            [*DROPS, "run.max_staleness=2", "filter.max_dropped_batches=2"],
            "filter.max_dropped_batches (2) must be above run.max_staleness (2)",
        ),
        (["reward.kind=overlong", "reward.max_tokens=96", "reward.cache_tokens=32"], "begins above 64 tokens"),
        (["sampling.max_tokens=512"], "sampling.max_tokens (512) leaves no room for a prompt"),
        (["run.group_size=257"], "run.group_size (257) is above rollout.max_num_seqs (256)"),
        (["evaluation.judge=polite"], "evaluation.judge is 'polite'; there are: grammatical"),
        (["weights.transport=nccl"], "weights.transport = 'nccl' needs GPUs"),
        (["weights.transport=nccl", "rollout.num_gpus=1"], "weights.transport = 'nccl' needs GPUs"),
        (["weights.transport=ipc", "learner.num_gpus=1"], "weights.transport = 'ipc' needs GPUs"),
        (["learner.num_ranks=3"], "learner.num_ranks (3) is above the 2 trajectories of a step"),
        (["learner.num_ranks=2", "learner.num_cpus=0"], "num_ranks above 1 needs learner.num_cpus or num_gpus above 0"),
        (["optimizer.offload=true"], "optimizer.offload = true needs learner.num_gpus = 1"),
        (
            ["algorithm.name=ppo", "critic.optimizer.offload=true"],
            "critic.optimizer.offload = true needs learner.num_gpus = 1",
        ),
        (
            ["learner.num_ranks=2", "learner.num_gpus=1", "rollout.num_gpus=1", "weights.transport=ipc"],
            "'ipc' is for a learner on one GPU; with learner.num_ranks above 1 use 'nccl'",
        ),
    ],
)
def test_values_that_contradict_each_other_are_refused(overrides: list[str], expected: str, run_file: Path) -> None:
    assert expected in refused(run_file, *overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["run.max_staleness=1", "algorithm.importance=truncated"],
        ["algorithm.baseline=group_mean", "run.group_size=2"],
        ["algorithm.name=rloo", "run.group_size=2", "run.max_staleness=1"],
        ["algorithm.name=dr_grpo", "run.group_size=2", "algorithm.loss_length=512", "run.max_staleness=1"],
        [*DROPS, "run.max_staleness=2", "filter.max_dropped_batches=3"],
        ["filter.curriculum={high = 0.9}", "reference.refresh_every=5"],
        ["reward.kind=overlong", "reward.max_tokens=95", "reward.cache_tokens=32"],
        ["sampling.max_tokens=511"],
        ["optimizer.offload=true", "optimizer.moments=8bit", "learner.num_gpus=1"],
        ["sampling.top_p=0.9", "sampling.top_k=50"],
        ["algorithm.distillation=reverse_kl", "run.max_staleness=1"],
        ["algorithm.rewards=process", "run.group_size=2"],
        ["run.seed=2147483647"],
        ["run.group_size=256"],
        ["evaluation.judge=grammatical"],
        ["weights.transport=nccl", "rollout.num_gpus=1", "learner.num_gpus=1"],
    ],
)
def test_the_nearest_values_that_fit_together_are_accepted(overrides: list[str], run_file: Path) -> None:
    load_config(run_file, overrides)


@pytest.mark.parametrize(
    ("sections", "reasons"),
    [
        ({}, "the reward"),
        ({"reward": {"kind": "composite", "parts": [{"reward": {"alpha": 1.0}}]}}, "the reward"),
        ({"reward": {"kind": "exact_match"}, "algorithm": {"name": "grpo"}}, "algorithm.kl = 'loss'"),
        ({"algorithm": {"name": "rloo"}}, "the reward and algorithm.kl = 'reward'"),
    ],
)
def test_a_run_without_a_reference_is_refused_with_what_would_read_one(
    sections: dict[str, dict[str, Any]], reasons: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "run.toml", reference=None, run={"group_size": 2}, **sections)
    assert refused(path).endswith(f"run.toml: a [reference] is needed for {reasons}")
    load_config(write(tmp_path / "with.toml", run={"group_size": 2}, **sections))


@pytest.mark.parametrize("algorithm", [{"name": "dapo"}, {"name": "grpo", "kl": "none", "kl_coefficient": 0.0}])
def test_an_outcome_without_kl_needs_no_reference(algorithm: dict[str, Any]) -> None:
    cfg = config(reference=None, run={"group_size": 2}, reward={"kind": "exact_match"}, algorithm=algorithm)
    assert cfg.reference is None


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "reward.kind=exakt",
            "reward.kind is one of: 'reference', 'exact_match', 'reasoning_gym', 'overlong', 'composite'",
        ),
        ("prompts={tasks = {size = 3}}", "'prompts.tasks.generator' is missing"),
        ("prompts={files = []}", "prompts come from files or from tasks: set one of the two"),
    ],
)
def test_a_kind_that_is_not_there_is_named_with_those_that_are(override: str, expected: str, run_file: Path) -> None:
    assert expected in refused(run_file, override)


def test_all_contradictions_are_told_at_once(run_file: Path) -> None:
    message = refused(run_file, "sampling.top_p=0.9", "run.max_staleness=1", "algorithm.baseline=group_mean")
    assert "top_p" in message
    assert "group_mean" in message


def test_contradictions_are_told_in_one_order(run_file: Path) -> None:
    overrides = {
        "run.prompts_per_step": 1,
        "run.max_staleness": 1,
        "policy.adapter.publish": "adapter",
        "reference.refresh_every": 1,
        "reward": '{kind = "overlong", max_tokens = 999, cache_tokens = 1}',
        "sampling.top_p": 0.5,
        "sampling.max_tokens": 512,
        "filter.drop_without_signal": "true",
        "filter.max_dropped_batches": 1,
        "algorithm.rewards": "process",
        "algorithm.importance": "truncated",
        "algorithm.num_minibatches": 2,
        "critic.optimizer.offload": "true",
        "optimizer.offload": "true",
        "evaluation.judge": "polite",
        "rollout.num_gpus": 2,
        "learner.num_ranks": 2,
        "learner.num_cpus": 0,
        "weights.transport": "ipc",
    }
    message = refused(run_file, *(f"{key}={value}" for key, value in overrides.items()))
    expected = [
        "reference.refresh_every moves a reference that only evaluations read",
        "algorithm.rewards = 'process' needs run.group_size",
        "the section [critic] is read by algorithm.baseline = 'critic' alone",
        "algorithm.num_minibatches (2) is above the 1 trajectories",
        "filter.drop_without_signal needs algorithm.baseline",
        "filter.max_dropped_batches (1) must be above",
        "evaluation.judge is 'polite'",
        "weights.transport = 'ipc' needs GPUs",
        "weights.transport = 'ipc' is for one engine",
        "policy.adapter.publish = 'adapter' needs weights.transport",
        "policy.adapter.publish = 'adapter' needs rollout.num_gpus",
        "reward 'overlong' begins above 998 tokens",
        "sampling.top_p < 1 or top_k > 0 needs run.max_staleness",
        "sampling.top_p < 1 or top_k > 0 needs algorithm.num_epochs",
        "sampling.max_tokens (512) leaves no room",
        "learner.num_ranks (2) is above the 1 trajectories",
        "learner.num_ranks above 1 needs learner.num_cpus",
        "weights.transport = 'ipc' is for a learner on one GPU",
        "optimizer.offload = true needs learner.num_gpus",
        "critic.optimizer.offload = true needs learner.num_gpus",
    ]
    places = [message.find(problem) for problem in expected]
    assert -1 not in places
    assert places == sorted(places)


# --- derived values and the schema --------------------------------------------------------------------------------


def test_weights_travel_by_nccl_only_where_both_sides_have_gpus() -> None:
    assert config().transport == "object_store"
    assert config(rollout={"num_gpus": 1}).transport == "object_store"
    assert config(rollout={"num_gpus": 1}, learner={"num_gpus": 1}).transport == "nccl"
    on_one_gpu = config(rollout={"num_gpus": 1}, learner={"num_gpus": 1}, weights={"transport": "ipc"})
    assert on_one_gpu.transport == "ipc"


def test_all_roles_compute_in_the_type_of_the_engine() -> None:
    for dtype in ("float32", "bfloat16"):
        cfg = config(rollout={"dtype": dtype})
        assert (cfg.engine_dtype, cfg.learner_dtype, cfg.scorer_dtype) == (dtype,) * 3
    assert config(rollout={"num_gpus": 1}).engine_dtype == "bfloat16"


@pytest.mark.parametrize(
    ("rollout", "expected"),
    [({}, 256 << 20), ({"num_gpus": 1}, None), ({"kv_cache_bytes": 1 << 30, "num_gpus": 1}, 1 << 30)],
)
def test_an_engine_on_a_gpu_sizes_its_own_cache_unless_told(rollout: dict[str, int], expected: int | None) -> None:
    settings = engine_settings(Path("m"), config(rollout=rollout).rollout, "bfloat16", 0, "object_store", None)
    assert settings["kv_cache_bytes"] == expected


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return RunConfig.model_json_schema()


def test_every_field_of_every_section_is_described(schema: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator.check_schema(schema)
    sections = schema["$defs"]
    assert len(sections) >= len(RunConfig.model_fields) - 1  # policy and reference share one
    undescribed = [
        f"{section}.{name}"
        for section, content in sections.items()
        for name, field in content["properties"].items()
        if len(field.get("description", "")) < 5
    ]
    assert undescribed == []


def test_the_schema_is_json(schema: dict[str, Any]) -> None:
    json.dumps(schema, allow_nan=False)


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.name)
def test_the_schema_accepts_what_we_ship_and_refuses_an_unknown_key(schema: dict[str, Any], path: Path) -> None:
    content = json.loads(json.dumps(resolved(load_config(path))))
    validator = jsonschema.Draft202012Validator(schema)
    validator.validate(content)
    content["run"]["step"] = 1
    with pytest.raises(jsonschema.ValidationError, match="step"):
        validator.validate(content)
