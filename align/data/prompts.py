"""Prompts: read from files, put through a template, tokenized, checked, and handed out in a seeded order."""

from __future__ import annotations

import functools
import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from align.choices import choices
from align.data.tasks import GENERATORS, TaskSection, task_rows
from align.data.types import Prompt, Ticket

Row = Mapping[str, Any]


class PromptConfig(BaseModel):
    """Where prompts come from and how a row becomes text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    files: tuple[Path, ...] = Field((), description="JSONL, Parquet or CSV files, by their ending.")
    tasks: TaskSection | None = Field(
        None, description=choices("Or questions made on the spot; `generator` says which.", GENERATORS)
    )
    column: str = Field(
        "prompt", description="Column with the text, or with chat messages (a list of role and content)."
    )
    template: str | None = Field(
        None, description="Text with {column} fields, filled from the row; it replaces the text of a plain prompt."
    )
    system: str | None = Field(
        None, description="System prompt, put before chat messages; makes a plain text a chat too."
    )
    chat: bool = Field(False, description="Wrap plain text as one user message through the model's chat template.")

    @model_validator(mode="after")
    def _one_source(self) -> PromptConfig:
        if bool(self.files) == (self.tasks is not None):
            raise ValueError("prompts come from files or from tasks: set one of the two")
        return self

    @property
    def source(self) -> str:
        """Where they come from, for a message."""
        return f"tasks of {self.tasks.generator}" if self.tasks else ", ".join(map(str, self.files))


def read_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Rows of a file with their place ("file.jsonl line 17").

    Raises:
        ValueError: If the file is missing, of another kind, not UTF-8, or a line is broken.
    """
    if not path.is_file():
        raise ValueError(f"prompt file {path} does not exist (looked in {Path.cwd()})")
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet, ".csv": _read_csv}
    if path.suffix not in readers:
        raise ValueError(f"prompt file {path}: expected one of {', '.join(readers)}, got {path.suffix or 'no ending'}")
    return readers[path.suffix](path)


def _read_jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    for number, raw in enumerate(path.read_bytes().splitlines(), start=1):
        place = f"{path} line {number}"
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{place} is not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8"
            ) from None
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{place} is not JSON: {error.msg} at column {error.colno}: {line[:80]!r}") from None
        if not isinstance(row, dict):
            raise ValueError(f'{place}: expected an object like {{"prompt": "…"}}, got {type(row).__name__}')
        yield place, row


def _read_parquet(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"prompt file {path} is not a Parquet file: {error}") from None
    for number, row in enumerate(table.to_pylist(), start=1):
        yield f"{path} row {number}", row


def _read_csv(path: Path) -> Iterator[tuple[str, Row]]:
    import csv
    import io

    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt file {path} is not UTF-8 ({error.reason} at byte {error.start})") from None
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        for row in reader:
            place = f"{path} line {reader.line_num}"
            if None in row or None in row.values():
                raise ValueError(f"{place} has another number of fields than the header {reader.fieldnames}")
            yield place, row
    except csv.Error as error:
        raise ValueError(f"{path} line {reader.reader.line_num} cannot be read: {error}") from None


def load_prompts(cfg: PromptConfig, tokenizer: Any, max_prompt_tokens: int) -> list[Prompt]:
    """Read, render and tokenize all prompts.

    Args:
        cfg: Files and rendering.
        tokenizer: The policy's tokenizer.
        max_prompt_tokens: The longest prompt that leaves room for a completion.

    Raises:
        ValueError: Naming file and line, for anything that cannot be used as it stands.
    """
    prompts: list[Prompt] = []
    places: dict[str, str] = {}
    for place, row in _rows(cfg):
        prompt = _prompt(place, row, cfg, tokenizer, default_id=f"prompt-{len(prompts)}")
        if len(prompt.token_ids) > max_prompt_tokens:
            raise ValueError(
                f"{place}: the prompt has {len(prompt.token_ids)} tokens, at most {max_prompt_tokens} fit beside the "
                "completion; shorten it, lower sampling.max_tokens, or raise rollout.max_model_len"
            )
        if prompt.id in places:
            raise ValueError(f"{place}: id {prompt.id!r} was used at {places[prompt.id]} already")
        places[prompt.id] = place
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"no prompt in {cfg.source}: the file is empty; one row per prompt is expected")
    return prompts


def _rows(cfg: PromptConfig) -> Iterator[tuple[str, Row]]:
    return task_rows(cfg.tasks) if cfg.tasks else (pair for path in cfg.files for pair in read_rows(path))


def _prompt(place: str, row: Row, cfg: PromptConfig, tokenizer: Any, default_id: str) -> Prompt:
    content = _content(place, row, cfg)
    plain = isinstance(content, str)
    text = content if isinstance(content, str) else _chat_text(place, content, tokenizer)
    try:
        token_ids = tokenizer.encode(text, add_special_tokens=plain)
    except (TypeError, UnicodeError) as error:  # a lone half of a surrogate pair, which JSON can hold
        raise ValueError(f"{place}: the prompt cannot be tokenized: {error}") from None
    if not token_ids:
        raise ValueError(f"{place}: the prompt has no tokens; give column {cfg.column!r} some text")
    metadata = {key: value for key, value in row.items() if key not in (cfg.column, "id")}
    own_id = row.get("id")
    return Prompt(default_id if own_id is None else str(own_id), text, tuple(token_ids), metadata)


def _content(place: str, row: Row, cfg: PromptConfig) -> str | list[dict[str, str]]:
    """The row as plain text, or as chat messages."""
    if cfg.template is not None:
        try:
            value: Any = cfg.template.format_map(row)
        except KeyError as error:
            raise ValueError(
                f"{place}: the template asks for {error}, the row has {', '.join(map(str, row))}"
            ) from None
        except (ValueError, AttributeError, IndexError, TypeError) as error:
            raise ValueError(f"{place}: the template {cfg.template!r} cannot be filled: {error}") from None
    elif cfg.column in row:
        value = row[cfg.column]
    else:
        raise ValueError(f"{place}: no column {cfg.column!r} (prompts.column); the row has {', '.join(map(str, row))}")
    if isinstance(value, str):
        if not (cfg.chat or cfg.system):
            return value
        value = [{"role": "user", "content": value}]
    if not _are_messages(value):
        raise ValueError(f"{place}: column {cfg.column!r} is neither text nor a list of messages with role and content")
    system = [{"role": "system", "content": cfg.system}] if cfg.system else []
    return [*system, *value]


def _are_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
        )
    )


def _chat_text(place: str, messages: list[dict[str, str]], tokenizer: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{place} holds chat messages, but the policy's tokenizer has no chat template; use plain text"
        )
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        raise ValueError(f"{place}: the model's chat template refuses the messages: {error}") from None


def derive_seed(*parts: object) -> int:
    """A seed in [0, 2^63) from anything printable: the first 8 bytes of BLAKE2b over the parts."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass
class PromptStream:
    """Hands out tickets in a seeded order, epoch after epoch; every ticket is the same whoever asks and whenever.

    Args:
        prompts: The prompts.
        group_size: Trajectories per ticket.
        seed: The run's seed.
        cursor: Number of the next new ticket.
        returned: Numbers of tickets that were given back; they go out first, lowest first.
        visits: Asked once for every new ticket, whether it goes out; its number is spent either way.
    """

    prompts: Sequence[Prompt]
    group_size: int
    seed: int
    cursor: int = 0
    returned: deque[int] = field(default_factory=deque)
    visits: Callable[[Ticket], bool] = lambda _: True

    def next(self) -> Ticket:
        """The next ticket: one that was given back, else a new one that is to be visited."""
        if self.returned:
            return self.ticket(self.returned.popleft())
        while True:
            self.cursor += 1
            ticket = self.ticket(self.cursor - 1)
            if self.visits(ticket):
                return ticket

    def give_back(self, tickets: Iterable[Ticket]) -> None:
        """Return tickets that were not rolled out."""
        self.returned = deque(sorted([*self.returned, *(t.number for t in tickets)]))

    def ticket(self, number: int) -> Ticket:
        """Ticket `number`: prompt `order[number % N]` of epoch `number // N`, with seeds from (seed, number, repeat)."""
        epoch, position = divmod(number, len(self.prompts))
        prompt = self.prompts[_order(self.seed, epoch, len(self.prompts))[position]]
        seeds = tuple(derive_seed(self.seed, number, prompt.id, repeat) for repeat in range(self.group_size))
        return Ticket(number, prompt, seeds)


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, num_prompts: int) -> tuple[int, ...]:
    """The order of the prompts in an epoch."""
    return tuple(np.random.default_rng([seed, epoch]).permutation(num_prompts).tolist())
