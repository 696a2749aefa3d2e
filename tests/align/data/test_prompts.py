"""Prompts from files, every way a file can be wrong, and the order in which prompts are handed out."""

from __future__ import annotations

import copy
import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import PreTrainedTokenizerFast

from align.data.prompts import PromptConfig, PromptStream, derive_seed, load_prompts
from align.data.tasks import SumsConfig
from align.data.types import Prompt

Write = Callable[[str, str | bytes], Path]
ROWS = [
    {"id": "park", "prompt": "我今天去了公园", "answer": "玩"},
    {"id": "quoted", "prompt": 'a "b", c', "answer": ""},
    {"id": "lines", "prompt": "a\nb\u2028c\x85d\x0be", "answer": "two\r\nlines"},
]
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a file into the test's folder."""

    def write_file(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write_file


@pytest.fixture(scope="session")
def chat_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The character tokenizer with a chat template."""
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = CHAT
    return chatty


def jsonl(*rows: Any) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def load(path: Path, tokenizer: Any, max_prompt_tokens: int = 100, **settings: Any) -> list[Prompt]:
    return load_prompts(PromptConfig(files=(path,), **settings), tokenizer, max_prompt_tokens)


# --- what is read ------------------------------------------------------------------------------------------------


def test_jsonl_parquet_and_csv_give_the_same_prompts(
    tmp_path: Path, write: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    with (tmp_path / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)
    expected = [
        Prompt(r["id"], r["prompt"], tuple(tokenizer.encode(r["prompt"])), {"answer": r["answer"]}) for r in ROWS
    ]
    assert len(expected[0].token_ids) == 7
    assert load(write("rows.jsonl", jsonl(*ROWS)), tokenizer) == expected
    assert load(tmp_path / "rows.parquet", tokenizer) == expected
    assert load(tmp_path / "rows.csv", tokenizer) == expected


def test_an_unquoted_csv_field_ends_at_a_line_feed_and_at_no_other_separator(
    write: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write("rows.csv", "prompt,answer\r\na\u2028b,c\x85d\r\ne,f\r\n")
    assert [(p.text, p.metadata) for p in load(path, tokenizer)] == [
        ("a\u2028b", {"answer": "c\x85d"}),
        ("e", {"answer": "f"}),
    ]


def test_a_csv_file_may_begin_with_a_byte_order_mark(write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    assert [p.text for p in load(write("rows.csv", "\ufeffprompt\nabc\n"), tokenizer)] == ["abc"]


def test_several_files_follow_each_other_and_prompts_without_id_are_numbered_over_all(
    write: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    files = (write("a.jsonl", jsonl({"prompt": "a"}, {"prompt": "b"})), write("b.csv", "prompt\nc\n"))
    prompts = load_prompts(PromptConfig(files=files), tokenizer, 10)
    assert [(p.id, p.text) for p in prompts] == [("prompt-0", "a"), ("prompt-1", "b"), ("prompt-2", "c")]


def test_blank_lines_are_skipped_but_counted(write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write("rows.jsonl", '{"prompt": "a"}\n\n  \n{"prompt": 4}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl line 4"):
        load(path, tokenizer)


@pytest.mark.parametrize(
    ("row", "settings", "expected"),
    [
        ({"prompt": "hi"}, {}, "hi"),
        ({"question": "hi"}, {"column": "question"}, "hi"),
        ({"prompt": "hi", "name": "bo"}, {"template": "{name}: {prompt}."}, "bo: hi."),
        ({"prompt": "hi"}, {"chat": True}, "<user>hi<assistant>"),
        ({"prompt": "hi"}, {"system": "be kind"}, "<system>be kind<user>hi<assistant>"),
        ({"prompt": "hi"}, {"template": "say {prompt}", "chat": True}, "<user>say hi<assistant>"),
        (
            {"prompt": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]},
            {"system": "be kind"},
            "<system>be kind<user>hi<assistant>yes<assistant>",
        ),
        ({"prompt": [{"role": "user", "content": "hi"}]}, {}, "<user>hi<assistant>"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else None,
)
def test_a_row_becomes_the_text_that_the_model_reads(
    write: Write, chat_tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], settings: dict[str, Any], expected: str
) -> None:
    (prompt,) = load(write("rows.jsonl", jsonl(row)), chat_tokenizer, **settings)
    assert prompt.text == expected
    assert chat_tokenizer.decode(prompt.token_ids) == expected


def test_chat_messages_in_parquet_equal_those_in_jsonl(
    tmp_path: Path, write: Write, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    row = {"prompt": [{"role": "user", "content": "hi"}]}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "rows.parquet")
    from_parquet = load(tmp_path / "rows.parquet", chat_tokenizer)
    assert from_parquet == load(write("rows.jsonl", jsonl(row)), chat_tokenizer)


def test_a_chat_template_writes_its_own_special_tokens(write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    """Text of a template is encoded without special tokens, plain text with them."""
    from tokenizers.processors import TemplateProcessing

    beginning = copy.deepcopy(tokenizer)
    beginning.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|pad|> $A", special_tokens=[("<|pad|>", tokenizer.pad_token_id)]
    )
    beginning.chat_template = CHAT
    path = write("rows.jsonl", jsonl({"prompt": "hi"}))
    (plain,), (chat,) = load(path, beginning), load(path, beginning, chat=True)
    assert plain.token_ids == (tokenizer.pad_token_id, *tokenizer.encode("hi"))
    assert chat.token_ids == tuple(tokenizer.encode("<user>hi<assistant>"))


# --- what is refused ---------------------------------------------------------------------------------------------

GOOD = '{"prompt": "a"}\n'
BROKEN = [
    ("rows.jsonl", GOOD * 16 + '{"prompt": \n' + GOOD, {}, r"rows\.jsonl line 17 is not JSON: .* at column \d+"),
    ("rows.jsonl", GOOD.encode() + b'{"prompt": "\xff"}\n', {}, r"rows\.jsonl line 2 is not UTF-8 .* byte 12"),
    ("rows.jsonl", GOOD + '["a"]\n', {}, r'rows\.jsonl line 2: expected an object like .*"prompt".* got list'),
    ("rows.jsonl", GOOD + '{"text": "a", "id": 1}\n', {}, r"line 2: no column 'prompt' .* the row has text, id"),
    ("rows.jsonl", GOOD + '{"prompt": 5}\n', {}, r"line 2: column 'prompt' is neither text nor a list of messages"),
    ("rows.jsonl", '{"prompt": null}\n', {}, r"line 1: column 'prompt' is neither text nor a list of messages"),
    ("rows.jsonl", '{"prompt": []}\n', {}, r"line 1: column 'prompt' is neither text nor a list of messages"),
    ("rows.jsonl", '{"prompt": [{"role": "user"}]}\n', {}, r"line 1: column 'prompt' is neither text nor a list"),
    ("rows.jsonl", GOOD + '{"prompt": "a\\udc00"}\n', {}, r"rows\.jsonl line 2: the prompt cannot be tokenized: "),
    ("rows.jsonl", GOOD + '{"prompt": ""}\n', {}, r"line 2: the prompt has no tokens; give column 'prompt' some text"),
    ("rows.jsonl", GOOD + '{"prompt": "123456"}\n', {}, r"line 2: the prompt has 6 tokens, at most 5 fit"),
    (
        "rows.jsonl",
        '{"id": "x", "prompt": "a"}\n{"id": "x", "prompt": "b"}\n',
        {},
        r"line 2: id 'x' was used at .*rows\.jsonl line 1 already",
    ),
    ("rows.jsonl", GOOD, {"chat": True}, r"line 1 holds chat messages, but .* has no chat template"),
    ("rows.jsonl", GOOD, {"template": "{prompt} {answer}"}, r"line 1: the template asks for 'answer', the row has pr"),
    ("rows.jsonl", GOOD, {"template": "{prompt"}, r"line 1: the template .* cannot be filled: expected '}'"),
    ("rows.jsonl", GOOD, {"template": "{}"}, r"line 1: the template .* cannot be filled: "),
    ("rows.jsonl", GOOD, {"template": "{prompt.answer}"}, r"line 1: the template .* cannot be filled: 'str' object"),
    ("rows.jsonl", GOOD, {"template": "{prompt:d}"}, r"line 1: the template .* cannot be filled: Unknown format code"),
    ("rows.jsonl", "", {}, r"no prompt in .*rows\.jsonl: the file is empty"),
    ("rows.jsonl", "\n\n", {}, r"no prompt in .*rows\.jsonl: the file is empty"),
    ("rows.csv", "", {}, r"no prompt in .*rows\.csv: the file is empty"),
    ("rows.csv", "prompt\n", {}, r"no prompt in .*rows\.csv: the file is empty"),
    ("rows.csv", "prompt,answer\na,b\nc\n", {}, r"rows\.csv line 3 has another number of fields than the header"),
    ("rows.csv", "prompt,answer\na,b,c\n", {}, r"rows\.csv line 2 has another number of fields than the header"),
    ("rows.csv", b"prompt\n\xff\n", {}, r"rows\.csv is not UTF-8 .* byte 7"),
    ("rows.csv", "prompt\n" + "a" * 200_000 + "\n", {}, r"rows\.csv line 2 cannot be read: field larger than"),
    ("rows.parquet", "prompt", {}, r"rows\.parquet is not a Parquet file"),
    ("rows.parquet", "", {}, r"rows\.parquet is not a Parquet file"),
    ("rows.txt", "a\n", {}, r"rows\.txt: expected one of \.jsonl, \.parquet, \.csv, got \.txt"),
    ("rows", "a\n", {}, r"expected one of .*, got no ending"),
]


@pytest.mark.parametrize(("name", "content", "settings", "message"), BROKEN, ids=range(len(BROKEN)))
def test_what_cannot_be_used_is_refused_by_file_and_line(
    write: Write,
    tokenizer: PreTrainedTokenizerFast,
    name: str,
    content: str | bytes,
    settings: dict[str, Any],
    message: str,
) -> None:
    path = write(name, content)
    with pytest.raises(ValueError, match=message) as caught:
        load(path, tokenizer, max_prompt_tokens=5, **settings)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_refused_with_the_folder_it_was_looked_for_in(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ValueError, match=rf"nowhere\.jsonl does not exist \(looked in {Path.cwd()}\)"):
        load(tmp_path / "nowhere.jsonl", tokenizer)


def test_an_id_used_in_another_file_is_refused(write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    row = jsonl({"id": "x", "prompt": "a"})
    files = (write("a.jsonl", row), write("b.jsonl", row))
    with pytest.raises(ValueError, match=r"b\.jsonl line 1: id 'x' was used at .*a\.jsonl line 1 already"):
        load_prompts(PromptConfig(files=files), tokenizer, 10)


def test_a_prompt_of_exactly_the_limit_is_taken(write: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    (prompt,) = load(write("rows.jsonl", jsonl({"prompt": "abcde"})), tokenizer, max_prompt_tokens=5)
    assert len(prompt.token_ids) == 5


def test_a_config_needs_one_source_and_refuses_unknown_keys() -> None:
    with pytest.raises(ValidationError, match="set one of the two"):
        PromptConfig(files=())
    with pytest.raises(ValidationError, match="set one of the two"):
        PromptConfig(files=(Path("a.jsonl"),), tasks=SumsConfig(size=1))
    with pytest.raises(ValidationError, match="colunm"):
        PromptConfig(files=(Path("a.jsonl"),), colunm="text")  # type: ignore[call-arg]


# --- the order ---------------------------------------------------------------------------------------------------


def stream(num_prompts: int = 7, group_size: int = 2, seed: int = 3) -> PromptStream:
    return PromptStream([Prompt(f"p{i}", "", (1,)) for i in range(num_prompts)], group_size, seed)


def test_every_prompt_goes_out_once_per_epoch_and_epochs_differ_in_order() -> None:
    source = stream()
    epochs = [[source.next().prompt.id for _ in range(7)] for _ in range(4)]
    for epoch in epochs:
        assert sorted(epoch) == [f"p{i}" for i in range(7)]
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_order_depends_on_the_seed_and_on_nothing_else() -> None:
    def order(seed: int) -> list[str]:
        source = stream(seed=seed)
        return [source.next().prompt.id for _ in range(14)]

    assert order(3) == order(3)
    assert order(3) != order(4)


def test_a_ticket_is_the_same_whoever_asks_and_whenever() -> None:
    source = stream()
    handed_out = [source.next() for _ in range(20)]
    assert [ticket.number for ticket in handed_out] == list(range(20))
    late = stream()
    assert [late.ticket(number) for number in reversed(range(20))] == handed_out[::-1]


def test_a_stream_goes_on_from_its_cursor() -> None:
    first = stream()
    for _ in range(5):
        first.next()
    resumed = stream()
    resumed.cursor = first.cursor
    assert [resumed.next() for _ in range(9)] == [first.next() for _ in range(9)]


def test_tickets_given_back_go_out_first_and_lowest_first() -> None:
    source = stream()
    tickets = [source.next() for _ in range(6)]
    source.give_back([tickets[4]])
    source.give_back([tickets[5], tickets[1]])
    assert [source.next() for _ in range(4)] == [tickets[1], tickets[4], tickets[5], source.ticket(6)]


def test_every_trajectory_of_a_run_has_its_own_seed() -> None:
    source = stream(group_size=8)
    seeds = [seed for _ in range(50) for seed in source.next().seeds]
    assert len(set(seeds)) == len(seeds) == 400
    assert not set(seeds) & set(stream(group_size=8, seed=4).next().seeds)


@given(st.lists(st.one_of(st.integers(), st.text(), st.none())))
def test_a_derived_seed_is_a_63_bit_number_that_its_parts_decide(parts: list[object]) -> None:
    seed = derive_seed(*parts)
    assert 0 <= seed < 2**63
    assert derive_seed(*parts) == seed
    assert derive_seed(*parts, "more") != seed


def test_derived_seeds_are_fixed_for_all_time_and_fill_their_range() -> None:
    assert derive_seed(1, 23) != derive_seed(12, 3)
    assert derive_seed(0, 0, "prompt-0", 0) == 7_104_953_176_786_704_221
    seeds = [derive_seed("range", i) for i in range(1000)]
    assert sum(seed >= 2**62 for seed in seeds) / 1000 == pytest.approx(0.5, abs=0.08)


def test_a_seed_is_derived_from_any_id_that_json_can_hold() -> None:
    assert derive_seed(1, "\ud83d") != derive_seed(1, "\ud83e")
