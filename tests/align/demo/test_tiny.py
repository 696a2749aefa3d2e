"""The small models and prompts: contents of the folder, determinism, and what an interrupted build leaves."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.demo import language, tiny


def _quiet(line: str) -> None:
    """Swallow the milestones."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny") / "task"
    tiny.build(directory, seed=1, say=_quiet, steps=24)
    return directory


def _contents(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def _prompt_rows(directory: Path, name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (directory / "prompts" / f"{name}.jsonl").read_text().splitlines()]


def test_a_finished_build_is_recognised_and_leaves_no_other_folder(built: Path) -> None:
    assert tiny.is_built(built)
    assert list(built.parent.iterdir()) == [built]


def test_the_seed_of_a_build_is_known_while_the_build_is_whole(built: Path, tmp_path: Path) -> None:
    assert tiny.built_seed(built) == 1
    assert tiny.built_seed(tmp_path) is None
    damaged = tmp_path / "damaged"
    shutil.copytree(built, damaged)
    (damaged / "prompts" / "train.jsonl").write_text("")
    assert tiny.built_seed(damaged) is None


def test_the_manifest_lists_every_other_file_and_the_sizes(built: Path) -> None:
    manifest = json.loads((built / "manifest.json").read_text())
    assert set(manifest["sha256"]) == set(_contents(built)) - {"manifest.json"}
    model = AutoModelForCausalLM.from_pretrained(built / "policy")
    assert manifest["num_parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert (manifest["format"], manifest["seed"], manifest["steps"]) == (tiny.FORMAT, 1, 24)
    assert (manifest["num_train_prompts"], manifest["num_heldout_prompts"]) == (512, 128)


def test_the_prompt_files_hold_the_worlds_split_under_distinct_ids(built: Path) -> None:
    split = language.prompts(1)
    train, heldout = _prompt_rows(built, "train"), _prompt_rows(built, "heldout")
    assert tuple(row["prompt"] for row in train) == split.train
    assert tuple(row["prompt"] for row in heldout) == split.heldout
    assert len({row["id"] for row in train + heldout}) == len(train) + len(heldout)


@pytest.mark.parametrize("name", ["reference", "policy"])
def test_config_and_generation_config_agree_with_the_tokenizer(built: Path, name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(built / name)
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<|end|>", "<|pad|>", None)
    for file in ("config.json", "generation_config.json"):
        settings = json.loads((built / name / file).read_text())
        assert settings["eos_token_id"] == tokenizer.eos_token_id
        assert settings["pad_token_id"] == tokenizer.pad_token_id != tokenizer.eos_token_id
        assert settings.get("bos_token_id") is None
    model = AutoModelForCausalLM.from_pretrained(built / name)
    assert model.config.vocab_size == len(tokenizer) <= 512
    assert model.config.tie_word_embeddings
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_prompt_is_encoded_as_the_first_tokens_of_its_sentence(built: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(built / "policy")
    words = ["the", "small", "child", "that", "two", "dogs", "chase", "sings", "."]
    whole = tokenizer(" ".join(words))["input_ids"]
    assert len(whole) == len(words)
    for num_words in range(1, language.MAX_PROMPT_WORDS + 1):
        assert tokenizer(" ".join(words[:num_words]))["input_ids"] == whole[:num_words]


def test_any_text_survives_the_tokenizer(built: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(built / "policy")
    text = "Two cats, 我今天去了公园 !  naïve"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_loss_mask_covers_the_real_tokens_except_the_first(built: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(built / "policy")
    token_ids, loss_mask = tiny._encode(["the cat sleeps .", "a dog ."], tokenizer)
    assert token_ids[0].tolist() == [*tokenizer("the cat sleeps .")["input_ids"], tokenizer.eos_token_id]
    assert token_ids[1, 3:].tolist() == [tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert loss_mask.tolist() == [[False, True, True, True, True], [False, True, True, True, False]]


def test_each_model_prefers_the_kind_of_text_it_was_trained_on(tmp_path: Path) -> None:
    tiny.build(tmp_path / "task", say=_quiet, steps=70)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "task" / "reference")

    def mean_loss(name: str, texts: Callable[[int], Iterator[str]]) -> float:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "task" / name)
        source = texts(99)
        with torch.no_grad():
            return float(tiny._mean_loss(model, *tiny._encode([next(source) for _ in range(100)], tokenizer)))

    clean, corrupted = tiny._clean_texts, tiny._corrupted_texts
    assert mean_loss("reference", clean) < 3.0 < math.log(len(tokenizer))
    assert mean_loss("reference", clean) < mean_loss("policy", clean)
    assert mean_loss("policy", corrupted) < mean_loss("reference", corrupted)


def test_equal_seeds_give_equal_files_whatever_the_callers_threads_and_random_state(
    built: Path, tmp_path: Path
) -> None:
    num_threads = torch.get_num_threads()
    torch.manual_seed(123)
    state = torch.get_rng_state()
    torch.set_num_threads(num_threads + 1)
    try:
        tiny.build(tmp_path / "again", seed=1, say=_quiet, steps=24)
        assert torch.get_num_threads() == num_threads + 1
    finally:
        torch.set_num_threads(num_threads)
    assert torch.equal(torch.get_rng_state(), state)
    assert _contents(tmp_path / "again") == _contents(built)


def test_another_seed_gives_another_task(built: Path, tmp_path: Path) -> None:
    tiny.build(tmp_path / "other", seed=2, say=_quiet, steps=1)
    ours, other = _contents(built), _contents(tmp_path / "other")
    assert ours["prompts/train.jsonl"] != other["prompts/train.jsonl"]
    assert ours["reference/model.safetensors"] != other["reference/model.safetensors"]


def test_milestones_are_told_in_order(tmp_path: Path) -> None:
    lines: list[str] = []
    tiny.build(tmp_path / "task", say=lines.append, steps=5)
    assert [line.split(" ")[:2] for line in lines[:2]] == [["reference:", "5"], ["policy:", "1"]]
    assert lines[2:] == [f"tiny task ready in {tmp_path / 'task'}"]


class _Interruption(BaseException):
    """Stands for Ctrl-C."""


def _interrupt(line: str) -> None:
    if line.startswith("policy"):
        raise _Interruption


def test_an_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(_Interruption):
        tiny.build(tmp_path / "task", say=_interrupt, steps=1)
    assert list(tmp_path.iterdir()) == []
    assert not tiny.is_built(tmp_path / "task")


def test_an_interrupted_rebuild_keeps_the_earlier_build(tmp_path: Path) -> None:
    tiny.build(tmp_path / "task", say=_quiet, steps=1)
    earlier = _contents(tmp_path / "task")
    with pytest.raises(_Interruption):
        tiny.build(tmp_path / "task", seed=5, say=_interrupt, steps=1)
    assert _contents(tmp_path / "task") == earlier
    assert [path.name for path in tmp_path.iterdir()] == ["task"]


def test_damage_is_noticed_and_a_rebuild_repairs_it(tmp_path: Path) -> None:
    directory = tmp_path / "task"
    tiny.build(directory, say=_quiet, steps=1)
    good = _contents(directory)
    weights = directory / "policy" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert not tiny.is_built(directory)
    (directory / "stray.txt").write_text("left from before")
    tiny.build(directory, say=_quiet, steps=1)
    assert tiny.is_built(directory)
    assert _contents(directory) == good
    assert [path.name for path in tmp_path.iterdir()] == ["task"]


@pytest.mark.parametrize(
    "damage", ["", "[]", "{}", '{"format": 1, "sha256": {}}', '{"kind": "align-tiny", "format": 1}']
)
def test_a_torn_or_foreign_manifest_means_not_built_and_not_to_be_replaced(tmp_path: Path, damage: str) -> None:
    (tmp_path / "manifest.json").write_text(damage)
    assert not tiny.is_built(tmp_path)
    with pytest.raises(FileExistsError, match="absent, empty or an earlier build"):
        tiny.build(tmp_path, say=_quiet, steps=1)


def test_a_missing_file_or_another_format_means_not_built(tmp_path: Path) -> None:
    directory = tmp_path / "task"
    tiny.build(directory, say=_quiet, steps=1)
    manifest = (directory / "manifest.json").read_text()
    (directory / "manifest.json").write_text(manifest.replace('"format": 1', '"format": 0'))
    assert not tiny.is_built(directory)
    (directory / "manifest.json").write_text(manifest)
    assert tiny.is_built(directory)
    (directory / "prompts" / "heldout.jsonl").unlink()
    assert not tiny.is_built(directory)


def test_a_folder_of_something_else_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("ten years of work")
    with pytest.raises(FileExistsError, match=r"manifest\.json"):
        tiny.build(tmp_path, say=_quiet, steps=1)
    with pytest.raises(FileExistsError, match=r"expected .*thesis"):
        tiny.build(tmp_path / "thesis.txt", say=_quiet, steps=1)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_link_is_followed_and_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "task")
    for _ in range(2):
        tiny.build(tmp_path / "link", say=_quiet, steps=1)
        assert tiny.is_built(tmp_path / "task")
    assert {path.name for path in tmp_path.iterdir()} == {"link", "task"}
    assert (tmp_path / "link").is_symlink()


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "task").mkdir()
    tiny.build(tmp_path / "task", say=_quiet, steps=1)
    assert tiny.is_built(tmp_path / "task")


def test_a_build_without_steps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        tiny.build(tmp_path / "task", say=_quiet, steps=0)
