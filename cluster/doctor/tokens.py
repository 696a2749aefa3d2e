"""The tokenizer: text comes back from tokens, and what ends an answer is what the engine stops at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from align.data.prompts import PromptConfig
from align.data.types import Prompt
from align.model.folder import LOCAL, load_tokenizer, text_config
from cluster.doctor.verdict import Verdict
from cluster.spec.config import RunConfig

_NUM_PROMPTS = 64
_USER = {"role": "user", "content": "one two"}
_ANSWER = "three"


def tokens(cfg: RunConfig, prompts: Sequence[Prompt]) -> Iterator[Verdict]:
    """Look at the policy's tokenizer with prompts of the run."""
    tokenizer = load_tokenizer(cfg.policy.model)
    yield _round_trip(tokenizer, prompts[:_NUM_PROMPTS])
    ends = end_token_ids(cfg.policy.model) | set(cfg.sampling.stop_token_ids)
    yield _ends(tokenizer, ends)
    try:
        yield _chat_template(tokenizer, cfg.prompts, prompts[0].text, ends)
    except TemplateError as error:
        found = f"it refuses a question and its answer: {error}"
        yield Verdict("chat template", "warn", found, "take the template that the model was trained with")


def end_token_ids(folder: Path) -> set[int]:
    """The tokens that the engine stops at by itself: those of the generation config or, where there is none, of the config."""
    from transformers import GenerationConfig

    try:
        ids = GenerationConfig.from_pretrained(folder, **LOCAL).eos_token_id
    except OSError:
        ids = GenerationConfig.from_model_config(text_config(folder)).eos_token_id
    return set() if ids is None else set(ids) if isinstance(ids, list) else {ids}


def _round_trip(tokenizer: Any, prompts: Sequence[Prompt]) -> Verdict:
    changed, unknown = [], 0
    for prompt in prompts:
        ids = tokenizer.encode(prompt.text, add_special_tokens=False)
        unknown += tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids
        back = tokenizer.decode(ids)
        if back.strip() != prompt.text.strip():  # some drop the space that they begin a text with
            changed.append(f"{prompt.text[:30]!r} comes back as {back[:30]!r}")
        if (bos := tokenizer.bos_token_id) is not None and prompt.token_ids[:2] == (bos, bos):
            fix = f"take {tokenizer.bos_token!r} out of the prompts: the tokenizer adds it"
            return Verdict("tokenizer", "warn", f"prompt {prompt.id!r} begins with {tokenizer.bos_token!r} twice", fix)
    looked = f"{len(prompts)} prompts"
    if unknown:
        found = f"{unknown} of {looked} have characters that it does not know"
        return Verdict("tokenizer", "warn", found, "take the tokenizer that belongs to the model, or other prompts")
    found = f"{len(changed)} of {looked} do not survive it: {changed[0]}" if changed else f"{looked} survive it"
    return Verdict.of("tokenizer", not changed, found, "take the tokenizer that belongs to the model", "warn")


def _ends(tokenizer: Any, ends: set[int]) -> Verdict:
    """The learner's own end token has to be among those of the engine."""
    if not ends:
        found = "the model folder names none, so that the engine goes on to sampling.max_tokens"
        own = tokenizer.eos_token_id
        fix = f"--set sampling.stop_token_ids=[{'…' if own is None else own}]"
        return Verdict("end tokens", "warn", found, fix)
    found = f"the engine stops at {_names(tokenizer, ends)}"
    if (own := tokenizer.eos_token_id) is None or own in ends:
        return Verdict("end tokens", "ok", found)
    return Verdict("end tokens", "warn", f"{found}, the tokenizer's own is {_names(tokenizer, {own})}", _stop_at(own))


def _chat_template(tokenizer: Any, cfg: PromptConfig, text: str, ends: set[int]) -> Verdict:
    """The prompt ends where an answer begins, and the engine stops at what ends an answer."""
    if not getattr(tokenizer, "chat_template", None):
        return Verdict("chat template", "ok", "none, and these prompts are plain text")
    without, asked = (
        tokenizer.apply_chat_template([_USER], tokenize=False, add_generation_prompt=adds) for adds in (False, True)
    )
    opening = asked.removeprefix(without)
    if not (cfg.chat or cfg.system or (opening and text.endswith(opening))):
        return Verdict("chat template", "ok", "there is one; these prompts are plain text")
    turn = {"role": "assistant", "content": _ANSWER}
    before, _, ending = tokenizer.apply_chat_template([_USER, turn], tokenize=False).rpartition(_ANSWER)
    written = before.removeprefix(without)
    # One may go on where the other stops: with an empty thought before an answer, or an opened one at the prompt's end.
    if not opening or not written or not (written.startswith(opening) or opening.startswith(written)):
        found = f"an answer is written after {written[-40:]!r}, the prompt ends with {opening[-40:]!r}"
        return Verdict("chat template", "warn", found, "take the template that the model was trained with")
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    end = next((i for i in tokenizer.encode(ending, add_special_tokens=False) if i in special), None)
    if end is None:
        found = f"it ends an answer with {ending!r}, which is no special token: nothing tells the engine to stop"
        return Verdict("chat template", "warn", found, "take the template that the model was trained with")
    found = f"prompts end with {opening!r}, answers with {_names(tokenizer, {end})}"
    if end not in ends:
        return Verdict("chat template", "warn", f"{found}, at which the engine does not stop", _stop_at(end))
    return Verdict("chat template", "ok", found)


def _names(tokenizer: Any, ids: set[int]) -> str:
    return ", ".join(
        f"{token!r} ({i})" for i, token in zip(sorted(ids), tokenizer.convert_ids_to_tokens(sorted(ids)), strict=True)
    )


def _stop_at(end: int) -> str:
    return f"--set sampling.stop_token_ids=[{end}], or answers run on to sampling.max_tokens"
