"""What doctor finds about the tokenizer and the reward of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import GenerationConfig, PreTrainedTokenizerFast

from align.data.types import Prompt
from cluster.doctor.answers import answers, reference_answer
from cluster.doctor.tokens import end_token_ids, tokens
from cluster.doctor.verdict import Verdict
from cluster.spec.config import RunConfig
from tests.fakes.models import character_tokenizer, random_qwen3
from tests.fakes.run_files import config

TEMPLATE = (
    "{% for m in messages %}<|turn|>{{ m.role }}:{{ m.content }}<|close|>{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    """The character tokenizer with tokens for turns; it ends a text with another token than a turn."""
    tokenizer = character_tokenizer()
    tokenizer.add_tokens([AddedToken("<|turn|>", special=True), AddedToken("<|close|>", special=True)])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def folder_with(tokenizer: PreTrainedTokenizerFast, folder: Path, end_ids: Any = 0) -> Path:
    """A model folder; weights are not looked at."""
    random_qwen3(seed=0).config.save_pretrained(folder)
    GenerationConfig(eos_token_id=end_ids, pad_token_id=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def looks(folder: Path, texts: list[str], **sections: Any) -> dict[str, Verdict]:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    prompts = [
        Prompt(str(i), text, tuple(tokenizer.encode(text, add_special_tokens=False))) for i, text in enumerate(texts)
    ]
    return {v.item: v for v in tokens(config(policy={"model": str(folder)}, **sections), prompts)}


def test_prompts_that_the_tokenizer_does_not_know_are_counted(tmp_path: Path) -> None:
    found = looks(folder_with(character_tokenizer(), tmp_path), ["abc", "a€c", "££"])
    assert (found["tokenizer"].state, found["tokenizer"].found) == (
        "warn",
        "2 of 3 prompts have characters that it does not know",
    )


def test_a_tokenizer_that_changes_text_is_a_warning(tmp_path: Path) -> None:
    from tokenizers import normalizers

    lossy = character_tokenizer()
    lossy.backend_tokenizer.normalizer = normalizers.Replace("b", "")
    folder = folder_with(lossy, tmp_path)
    assert looks(folder, ["acd"])["tokenizer"].found == "1 prompts survive it"
    assert "'abc' comes back as 'ac'" in looks(folder, ["abc"])["tokenizer"].found


def test_a_beginning_that_is_there_twice_is_a_warning(tmp_path: Path) -> None:
    tokenizer = character_tokenizer()
    tokenizer.bos_token = "<"
    found = looks(folder_with(tokenizer, tmp_path), ["<<abc"])
    assert found["tokenizer"].found == "prompt '0' begins with '<' twice"


def test_end_tokens_are_those_of_the_generation_config_else_of_the_config(tmp_path: Path) -> None:
    folder = folder_with(character_tokenizer(), tmp_path, [0, 2])
    assert end_token_ids(folder) == {0, 2}
    (folder / "generation_config.json").unlink()
    assert end_token_ids(folder) == {0}


def test_an_engine_that_stops_at_nothing_or_at_another_token_than_the_tokenizers_is_a_warning(tmp_path: Path) -> None:
    none = looks(folder_with(character_tokenizer(), tmp_path / "none", end_ids=None), ["abc"])["end tokens"]
    assert (none.state, none.fix) == ("warn", "--set sampling.stop_token_ids=[0]")
    other = folder_with(character_tokenizer(), tmp_path / "other", end_ids=2)
    found = looks(other, ["abc"])["end tokens"]
    assert found.state == "warn"
    assert found.found == "the engine stops at '<|unk|>' (2), the tokenizer's own is '<|end|>' (0)"
    assert looks(other, ["abc"], sampling={"stop_token_ids": [0]})["end tokens"].state == "ok"


def test_a_chat_whose_turns_end_with_a_token_that_the_engine_goes_on_after_is_a_warning(
    tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = folder_with(chat_tokenizer, tmp_path)
    close = chat_tokenizer.convert_tokens_to_ids("<|close|>")
    chat = "<|turn|>user:abc<|close|><|turn|>assistant:"
    found = looks(folder, [chat])["chat template"]
    assert found.state == "warn"
    assert found.found == (
        f"prompts end with '<|turn|>assistant:', answers with '<|close|>' ({close}), at which the engine does not stop"
    )
    assert found.fix.startswith(f"--set sampling.stop_token_ids=[{close}]")
    assert looks(folder, [chat], sampling={"stop_token_ids": [close]})["chat template"].state == "ok"
    plain = looks(folder, ["abc"])["chat template"]
    assert (plain.state, plain.found) == ("ok", "there is one; these prompts are plain text")


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (TEMPLATE.partition("{% if add")[0], "an answer is written after"),
        (TEMPLATE.replace("<|turn|>assistant:{%", "<|turn|>model:{%"), "the prompt ends with"),
        (TEMPLATE.replace("<|close|>", "."), "which is no special token"),
        (
            "{% if messages|length > 1 %}{{ raise_exception('one turn') }}{% endif %}",
            "it refuses a question and its answer: one turn",
        ),
    ],
)
def test_a_template_that_does_not_open_or_close_an_answer_is_a_warning(
    template: str, problem: str, tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    chat_tokenizer.chat_template = template
    try:
        found = looks(folder_with(chat_tokenizer, tmp_path), ["abc"], prompts={"chat": True})["chat template"]
    finally:
        chat_tokenizer.chat_template = TEMPLATE
    assert found.state == "warn"
    assert problem in found.found


@pytest.mark.parametrize(
    "template",
    [
        TEMPLATE.replace("<|turn|>assistant:{%", "<|turn|>assistant:<think>{%"),
        TEMPLATE.replace("{{ m.content }}", "{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}"),
    ],
)
def test_a_template_may_open_a_thought_at_the_end_of_a_prompt_or_before_an_answer(
    template: str, tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    chat_tokenizer.chat_template = template
    close = chat_tokenizer.convert_tokens_to_ids("<|close|>")
    try:
        folder = folder_with(chat_tokenizer, tmp_path, end_ids=[0, close])
        found = looks(folder, ["abc"], prompts={"chat": True})["chat template"]
    finally:
        chat_tokenizer.chat_template = TEMPLATE
    assert found.state == "ok", found


# --- rewards ----------------------------------------------------------------------------------------------------------


def rewarded(**reward: Any) -> RunConfig:
    return config(reward={"kind": "exact_match", **reward}, reference=None, algorithm={"name": "reinforce"})


def rows(*expected: object) -> list[Prompt]:
    return [Prompt(str(i), "q", (3,), {"answer": answer}) for i, answer in enumerate(expected)]


def judged(cfg: RunConfig, prompts: list[Prompt]) -> Verdict:
    (verdict,) = answers(cfg, prompts)
    return verdict


def test_the_rows_own_answers_get_the_most_and_empty_ones_less() -> None:
    verdict = judged(rewarded(), rows("12", "1,000", "-3"))
    assert verdict.state == "ok"
    assert verdict.found.startswith("the right answers of 3 of 3 rows get 1, empty ones less; ")
    assert verdict.found.endswith("at most 10 s")


def test_a_row_whose_own_answer_is_not_worth_the_most_fails_the_run_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align.rewards.exact_match.ExactMatch.__call__", lambda self, prompt, completion: 0.5)
    verdict = judged(rewarded(), rows("12"))
    assert (verdict.state, verdict.exit_code) == ("fail", 2)
    assert verdict.found == "prompt '0': its own answer '12' gets 0.5 of 1"


def test_a_reward_that_raises_is_a_failure_and_one_that_pays_for_nothing_a_warning() -> None:
    broken = judged(rewarded(), rows("twelve"))
    assert (broken.state, broken.exit_code) == ("fail", 2)
    assert "prompt '0', answer '': ValueError: 'twelve' is not a number" in broken.found
    (warning,) = answers(rewarded(extract="text"), rows(""))
    assert (warning.state, warning.found) == ("warn", "an empty answer gets the most there is for 1 of 1 prompts")


def test_an_answer_that_needs_words_around_it_is_not_judged_alone() -> None:
    from align.rewards.kinds import verifier_of

    cfg = rewarded(extract="regex", pattern=r"answer: (\d+)")
    verifier = verifier_of(cfg.reward)
    assert verifier is not None
    assert reference_answer(verifier, rows("12")[0]) is None
    assert judged(cfg, rows("12")).found.startswith("the right answers of 0 of 1 rows get 1")


def test_a_reward_slower_than_its_deadline_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 2.0, 9.0])
    monkeypatch.setattr("cluster.doctor.answers.time.perf_counter", lambda: next(times))
    cfg = rewarded().model_copy(update={"scorer": rewarded().scorer.model_copy(update={"score_deadline_s": 5})})
    verdict = judged(cfg, rows("12"))
    assert (verdict.state, verdict.fix) == ("warn", "raise scorer.score_deadline_s and quarantine.deadline_s")
