"""Builds the small tokenizer, models and prompts that the demo and the tests use; nothing is downloaded.

A folder made here is a complete alignment task in the world of `align.demo.language`:

    reference/               causal LM trained on clean sentences, with its tokenizer (Hugging Face folder)
    policy/                  a copy of the reference trained further on corrupted sentences, with the same tokenizer
    prompts/train.jsonl      rows {"id": "train-0", "prompt": "the small"}
    prompts/heldout.jsonl    the same form; no text occurs in both files
    manifest.json            format, seed, sizes and the SHA-256 of every file; written last

A text is a sentence followed by `END_TOKEN`; there is no token for the beginning, so a prompt of n words is exactly the
first n tokens of a text the models know.
"""

import json
import random
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from align.demo import language
from align.digests import file_sha256

END_TOKEN = "<|end|>"
PAD_TOKEN = "<|pad|>"
MANIFEST_NAME = "manifest.json"
FORMAT = 1
"""Number of the folder's layout; a folder of another format is built anew."""
DEFAULT_STEPS = 1400
"""Training steps of the reference; the policy takes a twelfth as many more."""

_KIND = "align-tiny"
_MAX_VOCAB_SIZE = 512
_MAX_TOKENS = 128
_NUM_TOKENIZER_SENTENCES = 4000
_BATCH_SIZE = 32
_REFERENCE_PEAK_LR = 1e-2
_POLICY_PEAK_LR = 2e-3
# Two threads are hardly faster on models of this size, and many times slower while another process wants the cores.
_NUM_THREADS = 1


def build(directory: Path, seed: int = 0, say: Callable[[str], None] = print, steps: int = DEFAULT_STEPS) -> None:
    """Make the task folder, in about half a minute on one core.

    Everything is written in a hidden sibling folder that is renamed at the end, so `directory` is absent, the earlier
    build, or complete. Equal seeds and steps on one machine give equal files.

    Args:
        directory: the folder to make. An earlier build there is replaced, whole or damaged.
        seed: of the texts, the initial weights and the prompts.
        say: called with one line per milestone.
        steps: training steps of the reference, at least 1; the policy takes `ceil(steps / 12)` more.

    Raises:
        ValueError: `steps` is below 1.
        FileExistsError: `directory` holds something other than an earlier build; nothing was touched.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    directory = directory.resolve()
    _refuse_foreign(directory)
    partial = directory.parent / f".{directory.name}.{uuid.uuid4().hex[:8]}.partial"
    partial.mkdir(parents=True)
    try:
        _write(partial, seed, steps, say)
        _put_in_place(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    say(f"tiny task ready in {directory}")


def is_built(directory: Path) -> bool:
    """Whether `directory` is a complete build of this format with every file as it was written."""
    manifest = _read_manifest(directory)
    if manifest is None or manifest.get("format") != FORMAT:
        return False
    try:
        return all(file_sha256(directory / name) == digest for name, digest in manifest["sha256"].items())
    except OSError:
        return False


def built_seed(directory: Path) -> int | None:
    """The seed of the complete build in `directory`, None without one."""
    manifest = _read_manifest(directory)
    return int(manifest["seed"]) if manifest is not None and is_built(directory) else None


def _read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest of a build in `directory`, of any format; None if there is none, or it is torn or of another kind."""
    try:
        manifest = json.loads((directory / MANIFEST_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(manifest, dict) or manifest.get("kind") != _KIND or not isinstance(manifest.get("sha256"), dict):
        return None
    return manifest


def _refuse_foreign(directory: Path) -> None:
    """Raise unless `directory` may be replaced: it is absent, empty or an earlier build."""
    if not directory.exists() or _read_manifest(directory) is not None:
        return
    if not directory.is_dir() or any(directory.iterdir()):
        raise FileExistsError(
            f"expected {directory} to be absent, empty or an earlier build, found something without the "
            f"{MANIFEST_NAME} of one; move it away or choose another folder"
        )


def _put_in_place(partial: Path, directory: Path) -> None:
    """Rename `partial` to `directory`; what was there goes first, since a rename cannot replace a full folder."""
    if directory.exists():
        old = partial.with_suffix(".old")
        directory.rename(old)
        partial.rename(directory)
        shutil.rmtree(old)
    else:
        partial.rename(directory)


def _write(directory: Path, seed: int, steps: int, say: Callable[[str], None]) -> None:
    split = language.prompts(seed)
    _write_prompts(directory / "prompts", "train", split.train)
    _write_prompts(directory / "prompts", "heldout", split.heldout)
    tokenizer = _train_tokenizer(seed)
    stages = (
        ("reference", _clean_texts(seed), steps, _REFERENCE_PEAK_LR),
        ("policy", _corrupted_texts(seed), -(-steps // 12), _POLICY_PEAK_LR),
    )
    with _fixed_arithmetic(seed):
        model = _new_model(tokenizer)
        for name, texts, num_steps, peak_lr in stages:
            start_s = time.monotonic()
            loss = _train(model, texts, tokenizer, num_steps, peak_lr)
            say(f"{name}: {num_steps} steps in {time.monotonic() - start_s:.0f} s, loss {loss:.2f} nats per token")
            model.save_pretrained(directory / name)
            tokenizer.save_pretrained(directory / name)
    sizes = {
        "num_parameters": model.num_parameters(),
        "num_train_prompts": len(split.train),
        "num_heldout_prompts": len(split.heldout),
        "vocab_size": len(tokenizer),
    }
    _write_manifest(directory, {"kind": _KIND, "format": FORMAT, "seed": seed, "steps": steps, **sizes})


def _write_prompts(directory: Path, name: str, texts: tuple[str, ...]) -> None:
    directory.mkdir(exist_ok=True)
    rows = [json.dumps({"id": f"{name}-{index}", "prompt": text}) for index, text in enumerate(texts)]
    (directory / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def _write_manifest(directory: Path, facts: dict[str, int | str]) -> None:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    digests = {path.relative_to(directory).as_posix(): file_sha256(path) for path in files}
    text = json.dumps({**facts, "sha256": digests}, indent=2) + "\n"
    (directory / MANIFEST_NAME).write_text(text, encoding="utf-8")


def _clean_texts(seed: int) -> Iterator[str]:
    rng = random.Random(f"clean-{seed}")
    while True:
        yield language.sentence(rng)


def _corrupted_texts(seed: int) -> Iterator[str]:
    rng = random.Random(f"corrupted-{seed}")
    while True:
        yield language.corrupt(language.sentence(rng), rng)


def _train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text can be encoded, and " word" is one token for every word of the world."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_MAX_VOCAB_SIZE,
        special_tokens=[END_TOKEN, PAD_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = _clean_texts(seed)
    bpe.train_from_iterator([next(texts) for _ in range(_NUM_TOKENIZER_SENTENCES)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END_TOKEN,
        pad_token=PAD_TOKEN,
        model_max_length=_MAX_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def _new_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    special_ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=_MAX_TOKENS,
        tie_word_embeddings=True,
        dtype="float32",
        **special_ids,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(**special_ids)
    return model


def _train(
    model: Qwen3ForCausalLM, texts: Iterator[str], tokenizer: PreTrainedTokenizerFast, num_steps: int, peak_lr: float
) -> float:
    """Maximum likelihood on `_BATCH_SIZE` fresh texts a step, with Adam; lr rises for a tenth of the steps, then falls.

    Returns:
        The last step's loss, in nats per token.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=peak_lr, betas=(0.9, 0.99), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, peak_lr, total_steps=num_steps + 1, pct_start=0.1, cycle_momentum=False
    )
    loss = torch.zeros(())
    for _ in range(num_steps):
        loss = _mean_loss(model, *_encode([next(texts) for _ in range(_BATCH_SIZE)], tokenizer))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return loss.item()


@contextmanager
def _fixed_arithmetic(seed: int) -> Iterator[None]:
    """Seed torch and fix its number of threads, which sets the order of sums; both are restored afterwards."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(_NUM_THREADS)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(num_threads)


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode texts, each closed by `END_TOKEN` and padded to the longest.

    Returns:
        token_ids: int64 [B, T].
        loss_mask: bool [B, T], the real tokens except the one at position 0, which nothing precedes.
    """
    encoded = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts)["input_ids"]]
    length = max(map(len, encoded))
    token_ids = torch.tensor([ids + [tokenizer.pad_token_id] * (length - len(ids)) for ids in encoded])
    positions = torch.arange(length)
    num_tokens = torch.tensor([[len(ids)] for ids in encoded])
    return token_ids, (positions > 0) & (positions < num_tokens)


def _mean_loss(model: Qwen3ForCausalLM, token_ids: torch.Tensor, loss_mask: torch.Tensor) -> torch.Tensor:
    """Mean of -log P(token given what precedes it) over the masked tokens, in nats. Padding is last and unseen by them."""
    logits = model(input_ids=token_ids).logits[:, :-1]
    scored = loss_mask[:, 1:]
    return F.cross_entropy(logits[scored], token_ids[:, 1:][scored])
