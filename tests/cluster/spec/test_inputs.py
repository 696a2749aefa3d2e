"""What a run reads: everything that does not fit is one ConfigError before any model is loaded."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from align.model.adapters import AdapterConfig
from align.model.folder import read_config
from cluster.faults import ConfigError
from cluster.spec.config import RunConfig
from cluster.spec.inputs import Model, check_vocabularies, load_inputs
from tests.fakes.models import VOCAB_SIZE
from tests.fakes.run_files import config, write_prompts


class FakeTokenizer:
    def __init__(self, **vocab: int) -> None:
        self.vocab = vocab

    def get_vocab(self) -> dict[str, int]:
        return self.vocab


def fake_model(role: str, **vocab: int) -> Model:
    return Model(role, Path("absent") / role, config=None, tokenizer=FakeTokenizer(**vocab))


@pytest.fixture
def cfg(model_folder: Path, tmp_path: Path) -> RunConfig:
    """A run whose inputs are in order: 64 tokens of context, 32 of them for the completion."""
    return make_config(model_folder, model_folder, write_prompts(tmp_path / "train.jsonl", "a cat", "a dog"))


def make_config(policy: Path, reference: Path, prompts: Path, **sections: dict[str, Any]) -> RunConfig:
    return config(
        policy={"model": policy},
        reference={"model": reference},
        prompts={"files": [prompts]},
        sampling={"max_tokens": 32},
        rollout={"max_model_len": 64},
        **sections,
    )


def refused(cfg: RunConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        load_inputs(cfg)
    return caught.value.message


# --- what fits ----------------------------------------------------------------------------------------------------


def test_inputs_that_fit_are_read(cfg: RunConfig, model_folder: Path) -> None:
    inputs = load_inputs(cfg)
    assert [prompt.text for prompt in inputs.train] == ["a cat", "a dog"]
    assert inputs.heldout == []
    assert inputs.vocab_size == VOCAB_SIZE
    assert inputs.weights_bytes == (model_folder / "model.safetensors").stat().st_size


def test_held_out_prompts_are_read_by_their_own_settings(model_folder: Path, tmp_path: Path) -> None:
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text('{"question": "why"}\n')
    evaluation = {"heldout": {"files": [heldout], "column": "question"}}
    train = write_prompts(tmp_path / "train.jsonl", "a cat")
    inputs = load_inputs(make_config(model_folder, model_folder, train, evaluation=evaluation))
    assert [prompt.text for prompt in inputs.heldout] == ["why"]


def test_a_prompt_may_use_all_the_room_that_completions_leave_and_no_more(model_folder: Path, tmp_path: Path) -> None:
    fits, too_long = (write_prompts(tmp_path / f"{n}.jsonl", "a" * n) for n in (32, 33))
    assert len(load_inputs(make_config(model_folder, model_folder, fits)).train[0].token_ids) == 32
    message = refused(make_config(model_folder, model_folder, too_long))
    assert message.startswith(f"{too_long} line 1: the prompt has 33 tokens, at most 32 fit")


def sums(size: int, seed: int) -> dict[str, Any]:
    """Generated sums of one-digit numbers, in letters that the tokenizer of the tests knows or not."""
    return {"tasks": {"generator": "sums", "size": size, "seed": seed, "max_digits": 1}, "template": "{answer}"}


def outcome_config(folder: Path, prompts: dict[str, Any], **sections: dict[str, Any]) -> RunConfig:
    """A run without a reference, paid for exact answers."""
    return RunConfig.model_validate(
        {
            "run": {"steps": 1, "prompts_per_step": 1},
            "policy": {"model": folder},
            "reward": {"kind": "exact_match"},
            "prompts": prompts,
            "sampling": {"max_tokens": 32},
            "rollout": {"max_model_len": 64},
            **sections,
        }
    )


def test_a_run_without_a_reference_reads_the_policy_alone(model_folder: Path) -> None:
    inputs = load_inputs(outcome_config(model_folder, sums(10, seed=1)))
    assert (len(inputs.train), inputs.vocab_size, inputs.num_left_out) == (10, VOCAB_SIZE, 0)


def test_a_training_prompt_that_reads_like_a_held_out_one_is_left_out_and_counted(model_folder: Path) -> None:
    cfg = outcome_config(model_folder, sums(100, seed=1), evaluation={"heldout": sums(10, seed=2)})
    inputs = load_inputs(cfg)
    kept_out = {prompt.text for prompt in inputs.heldout}
    assert len(inputs.heldout) == 10
    assert not kept_out & {prompt.text for prompt in inputs.train}
    assert 0 < inputs.num_left_out == 100 - len(inputs.train)
    assert len(load_inputs(outcome_config(model_folder, sums(100, seed=1))).train) == 100


def test_training_prompts_that_are_all_held_out_are_refused(model_folder: Path) -> None:
    cfg = outcome_config(model_folder, sums(10, seed=1), evaluation={"heldout": sums(20, seed=1)})
    assert refused(cfg).startswith("all 10 training prompts are among the held-out ones")


@pytest.mark.parametrize("where", ["train", "heldout"])
def test_a_prompt_without_an_answer_to_compare_with_is_refused(where: str, model_folder: Path, tmp_path: Path) -> None:
    unanswered = {"files": [write_prompts(tmp_path / "unanswered.jsonl", "a cat")]}
    if where == "train":
        cfg = outcome_config(model_folder, unanswered)
    else:
        cfg = outcome_config(model_folder, sums(3, seed=1), evaluation={"heldout": unanswered})
    assert "prompt 'prompt-0' has no column 'answer' (reward.answer)" in refused(cfg)


# --- models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["policy", "reference"])
def test_a_missing_model_folder_is_named(role: str, cfg: RunConfig, model_folder: Path, tmp_path: Path) -> None:
    folders = {"policy": model_folder, "reference": model_folder, role: tmp_path / "none"}
    message = refused(make_config(folders["policy"], folders["reference"], cfg.prompts.files[0]))
    assert f"model folder {tmp_path / 'none'} does not exist" in message


def test_a_model_that_is_not_causal_is_refused(cfg: RunConfig, model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bert"
    shutil.copytree(model_folder, folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    message = refused(make_config(model_folder, folder, cfg.prompts.files[0]))
    assert f"model folder {folder} holds BertModel, which is not a causal language model" in message


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model_type": "no_such_type"}'])
def test_a_damaged_model_config_is_named(text: str, cfg: RunConfig, model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(model_folder, folder)
    (folder / "config.json").write_text(text)
    assert str(folder) in refused(make_config(folder, model_folder, cfg.prompts.files[0]))


@pytest.mark.parametrize("damage", [None, "", "{}", '{"model": 3}'])
def test_a_folder_without_a_usable_tokenizer_is_named(
    damage: str | None, cfg: RunConfig, model_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "no-tokenizer"
    shutil.copytree(model_folder, folder)
    for path in folder.glob("token*"):
        if damage is None:
            path.unlink()
        elif path.name == "tokenizer.json":
            path.write_text(damage)
    message = refused(make_config(folder, model_folder, cfg.prompts.files[0]))
    problem = "holds no tokenizer" if damage is None else ": the tokenizer cannot be read: "
    assert message.startswith(f"model folder {folder}") and problem in message


def test_what_every_folder_holds_is_looked_at_before_any_tokenizer(
    cfg: RunConfig, model_folder: Path, tmp_path: Path
) -> None:
    policy, nowhere = tmp_path / "no-tokenizer", tmp_path / "none"
    shutil.copytree(model_folder, policy)
    for path in policy.glob("token*"):
        path.unlink()
    assert f"model folder {nowhere} does not exist" in refused(make_config(policy, nowhere, cfg.prompts.files[0]))
    critic = {"algorithm": {"name": "ppo"}, "critic": {"model": nowhere}}
    assert "holds no tokenizer" in refused(make_config(policy, model_folder, cfg.prompts.files[0], **critic))
    assert f"model folder {nowhere} does not" in refused(
        make_config(model_folder, model_folder, cfg.prompts.files[0], **critic)
    )


def test_each_folder_is_read_once(cfg: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []

    def reading(directory: Path) -> Any:
        read.append(directory)
        return read_config(directory)

    monkeypatch.setattr("align.model.folder.read_config", reading)
    following = cfg.reference.model_copy(update={"refresh_every": 2})
    adapted = cfg.policy.model_copy(update={"adapter": AdapterConfig(rank=2)})
    load_inputs(cfg.model_copy(update={"policy": adapted, "reference": following}))
    assert read == [cfg.policy.model, cfg.reference.model]


def changed(model_folder: Path, folder: Path, **settings: int) -> Path:
    """A copy of the model folder with other settings in its config.json; only that file is read here."""
    shutil.copytree(model_folder, folder)
    content = json.loads((folder / "config.json").read_text())
    assert settings.keys() <= content.keys()
    (folder / "config.json").write_text(json.dumps(content | settings))
    return folder


@pytest.mark.parametrize("role", ["policy", "reference"])
def test_a_context_longer_than_a_model_was_made_for_is_refused(
    role: str, cfg: RunConfig, model_folder: Path, tmp_path: Path
) -> None:
    just_fits = changed(model_folder, tmp_path / "64", max_position_embeddings=64)
    too_small = changed(model_folder, tmp_path / "63", max_position_embeddings=63)
    folders = {"policy": model_folder, "reference": model_folder}
    load_inputs(make_config(*(folders | {role: just_fits}).values(), cfg.prompts.files[0]))
    message = refused(make_config(*(folders | {role: too_small}).values(), cfg.prompts.files[0]))
    assert message == f"rollout.max_model_len is 64, the model in {too_small} takes at most 63 tokens; lower it"


def test_a_reference_with_fewer_logits_than_the_policy_is_refused_and_one_with_more_is_not(
    cfg: RunConfig, model_folder: Path, tmp_path: Path
) -> None:
    fewer = changed(model_folder, tmp_path / "fewer", vocab_size=VOCAB_SIZE - 1)
    more = changed(model_folder, tmp_path / "more", vocab_size=VOCAB_SIZE + 64)
    message = refused(make_config(model_folder, fewer, cfg.prompts.files[0]))
    assert f"the policy {model_folder} has 64 logits, the reference {fewer} has 63" in message
    assert load_inputs(make_config(model_folder, more, cfg.prompts.files[0])).vocab_size == VOCAB_SIZE


@pytest.mark.parametrize("role", ["policy", "reference"])
def test_code_of_a_model_folder_is_not_run_even_if_the_terminal_says_yes(
    role: str, cfg: RunConfig, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, marker = tmp_path / "custom", tmp_path / "the code ran"
    questions: list[object] = []
    write_model_with_code(model_folder, folder, marker)
    monkeypatch.setattr("builtins.input", lambda *question: (questions.append(question), "y")[1])
    folders = {"policy": model_folder, "reference": model_folder, role: folder}
    message = refused(make_config(*folders.values(), cfg.prompts.files[0]))
    assert str(folder) in message
    assert "custom code" in message
    assert not marker.exists()
    assert questions == []


def write_model_with_code(model_folder: Path, folder: Path, marker: Path) -> None:
    """A model of a type that only code beside it knows; the code leaves a marker."""
    shutil.copytree(model_folder, folder)
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    content = {"model_type": "own_type", "architectures": ["OwnModel"], "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(content))
    code = f"""
from pathlib import Path
from transformers import Qwen3Config, Qwen3ForCausalLM
Path({str(marker)!r}).touch()
class OwnConfig(Qwen3Config):
    model_type = "own_type"
class OwnModel(Qwen3ForCausalLM):
    config_class = OwnConfig
"""
    (folder / "own.py").write_text(code)


# --- prompts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "does not exist"),
        ("", "the file is empty"),
        ('{"prompt": "a"}\n{"prompt": \n', "line 2 is not JSON"),
        ('{"question": "a"}\n', "line 1: no column 'prompt'"),
        ('{"prompt": ""}\n', "line 1: the prompt has no tokens"),
        ('{"prompt": "a"}\n{"prompt": "\\ud83d"}\n', "line 2: the prompt cannot be tokenized"),
        ('{"prompt": "a", "id": "x"}\n{"prompt": "b", "id": "x"}\n', "line 2: id 'x' was used at"),
    ],
)
@pytest.mark.parametrize("where", ["train", "heldout"])
def test_a_prompt_file_that_cannot_be_used_is_named_with_the_line(
    where: str, content: str | None, expected: str, model_folder: Path, tmp_path: Path
) -> None:
    bad, good = tmp_path / "bad.jsonl", write_prompts(tmp_path / "good.jsonl", "a cat")
    if content is not None:
        bad.write_text(content)
    if where == "train":
        message = refused(make_config(model_folder, model_folder, bad))
    else:
        message = refused(make_config(model_folder, model_folder, good, evaluation={"heldout": {"files": [bad]}}))
    assert str(bad) in message
    assert expected in message


# --- vocabularies -------------------------------------------------------------------------------------------------


def test_equal_vocabularies_pass_whatever_their_order() -> None:
    check_vocabularies(fake_model("policy", a=0, b=1), fake_model("reference", b=1, a=0))


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ({"a": 0, "b": 2, "c": 1}, "differ in 2 tokens, e.g. 'b' is 1 and 2"),
        ({"a": 0, "b": 1}, "differ in 1 tokens, e.g. 'c' is 2 and None"),
        ({"a": 0, "b": 1, "c": 2, "d": 3}, "differ in 1 tokens, e.g. 'd' is None and 3"),
    ],
)
def test_a_token_that_means_something_else_to_the_reference_is_named(reference: dict[str, int], expected: str) -> None:
    with pytest.raises(ValueError, match=expected) as caught:
        check_vocabularies(fake_model("policy", a=0, b=1, c=2), fake_model("reference", **reference))
    assert "policy absent/policy and reference absent/reference" in str(caught.value)


def test_models_with_other_vocabularies_are_refused(cfg: RunConfig, model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(model_folder, folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(content), encoding="utf-8")
    message = refused(make_config(model_folder, folder, cfg.prompts.files[0]))
    assert "differ in 2 tokens, e.g. 'a' is 3 and 4" in message


def test_a_reference_that_is_to_follow_the_policy_has_its_shape(model_folder: Path, tmp_path: Path) -> None:
    wider = tmp_path / "wider"
    shutil.copytree(model_folder, wider)
    settings = json.loads((wider / "config.json").read_text())
    (wider / "config.json").write_text(json.dumps({**settings, "intermediate_size": 64}))
    train = write_prompts(tmp_path / "train.jsonl", "a cat")
    load_inputs(make_config(model_folder, wider, train))

    def following(reference: Path) -> RunConfig:
        return config(
            policy={"model": model_folder},
            reference={"model": reference, "refresh_every": 2},
            prompts={"files": [train]},
            sampling={"max_tokens": 32},
            rollout={"max_model_len": 64},
        )

    load_inputs(following(model_folder))
    assert f"intermediate_size is 48 in {model_folder} and 64 in {wider}" in refused(following(wider))


@pytest.mark.parametrize("section", ["optimizer", "critic.optimizer"])
def test_8_bits_without_the_package_are_refused_before_any_model_is_loaded(
    section: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    settings = {"moments": "8bit"}
    sections = {
        "optimizer": {"optimizer": settings},
        "critic.optimizer": {"algorithm": {"name": "ppo"}, "critic": {"optimizer": settings}},
    }[section]
    train = write_prompts(tmp_path / "train.jsonl", "a cat")
    assert "pip install 'align[optim8bit]'" in refused(make_config(model_folder, model_folder, train, **sections))
