"""Trajectories read from a run folder, where `transcripts` wrote them, step by step: whole or in brief."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow
import pyarrow.parquet

from cluster.faults import ConfigError

Row = dict[str, Any]
_T = TypeVar("_T")
_STEP_FILE = re.compile(r"step_(\d+)\.parquet")
_COMPARED = ("ref_logprobs", "policy_logprobs")
_EXCERPT = 90  # characters of a text on a line


@dataclass(frozen=True, slots=True)
class Brief:
    """What a list says about one trajectory.

    Attributes:
        step: The step that learned from it.
        ticket: Its group.
        repeat: Its number in the group.
        prompt_id: The prompt's name.
        prompt: The prompt.
        excerpt: The completion, shortened to a line.
        finish_reason: Why it ended.
        reward: Sum of its token rewards.
        num_tokens: Sampled tokens.
        staleness: Versions between its oldest token and the step.
        ref_gap: Mean over its tokens of `log mu - log P_ref`, in nats; None without a reference.
        log_ratio: The largest `|log pi - log mu|` of its tokens when the update began, in nats; None if that did not end.
    """

    step: int
    ticket: int
    repeat: int
    prompt_id: str
    prompt: str
    excerpt: str
    finish_reason: str
    reward: float
    num_tokens: int
    staleness: int
    ref_gap: float | None
    log_ratio: float | None


class Trajectories:
    """What a run learned from, step by step, as it is on disk now: a run under way adds to it.

    Args:
        run: The run folder.
    """

    def __init__(self, run: Path) -> None:
        self.run = run

    @property
    def files(self) -> dict[int, Path]:
        """The file of each step, by step."""
        named = ((_STEP_FILE.fullmatch(path.name), path) for path in (self.run / "trajectories").glob("step_*"))
        return dict(sorted((int(match[1]), path) for match, path in named if match))

    def checked(self) -> Trajectories:
        """This.

        Raises:
            ConfigError: If there is no step yet.
        """
        if not self.files:
            raise ConfigError(
                f"{self.run} holds no trajectories", "name a run folder whose first step is over, e.g. runs/demo-…"
            )
        return self

    def rows(self, step: int) -> tuple[Row, ...]:
        """The trajectories of a step, whole.

        Raises:
            ConfigError: If there is no such step, or its file is damaged.
        """
        return _read(_rows_of, self._file(step))

    def briefs(self, step: int) -> tuple[Brief, ...]:
        """The trajectories of a step, in brief.

        Raises:
            ConfigError: If there is no such step, or its file is damaged.
        """
        return _read(_briefs_of, self._file(step))

    def group(self, step: int, ticket: int) -> list[Row]:
        """The trajectories of one ticket.

        Raises:
            ConfigError: If the step did not train it.
        """
        rows = self.rows(step)
        found = [row for row in rows if row["ticket"] == ticket]
        if not found:
            tickets = sorted({row["ticket"] for row in rows})
            raise ConfigError(f"step {step} did not train ticket {ticket}", f"it trained {tickets[0]} to {tickets[-1]}")
        return found

    def tokenizer(self) -> Any:
        """That of the run's policy: the final one, a checkpoint's, or the initial one.

        Raises:
            ConfigError: If none of them is there.
        """
        from align.model.folder import load_tokenizer

        initial = Path(tomllib.loads((self.run / "config.toml").read_text(encoding="utf-8"))["policy"]["model"])
        folders = [self.run / "policy", *sorted(self.run.glob("checkpoints/step_*/policy")), initial]
        folder = next((folder for folder in folders if folder.is_dir()), None)
        if folder is None:
            raise ConfigError(
                f"no tokenizer: neither {self.run} nor {initial} holds one", "run it where the policy's folder is"
            )
        return load_tokenizer(folder)

    def _file(self, step: int) -> Path:
        files = self.files
        if step not in files:
            known = f"there are steps {min(files)} to {max(files)}" if files else "no step is over yet"
            raise ConfigError(f"{self.run} has no step {step}", known)
        return files[step]


def returns(rewards: Sequence[float]) -> list[float]:
    """Sum of the rewards from each token on, not discounted."""
    return list(accumulate(reversed(rewards)))[::-1]


def excerpt(text: str, limit: int = _EXCERPT) -> str:
    """The text on one line; of a long one the end, where answers are."""
    line = " ".join(text.split())
    return line if len(line) <= limit else "…" + line[1 - limit :]


def _read(of: Callable[[Path, int], _T], path: Path) -> _T:
    """By the file's time too: a step that a resumed run wrote again is read again."""
    try:
        return of(path, path.stat().st_mtime_ns)
    except (pyarrow.ArrowException, OSError, KeyError) as error:
        raise ConfigError(
            f"{path} cannot be read: {error}", "the files of other steps are not touched by this"
        ) from None


@lru_cache(maxsize=4)
def _rows_of(path: Path, _modified_ns: int) -> tuple[Row, ...]:
    return tuple(pyarrow.parquet.read_table(path).to_pylist())


@lru_cache(maxsize=2048)
def _briefs_of(path: Path, _modified_ns: int) -> tuple[Brief, ...]:
    """Token columns stay arrays, so that going through a long run takes seconds."""
    names = ("step", "ticket", "repeat", "prompt_id", "prompt", "completion", "finish_reason", "reward")
    table = pyarrow.parquet.read_table(path, columns=[*names, "versions", "behavior_logprobs", *_COMPARED])
    columns = [table.column(name).to_pylist() for name in names]
    versions, starts = _flat(table, "versions")
    oldest = np.minimum.reduceat(versions, starts[:-1]).tolist()  # every trajectory has a token
    compared = [_differences(table, name) for name in _COMPARED]
    gaps = [None if found is None else float(np.mean(found)) for found in compared[0]]
    ratios = [None if found is None else float(np.nanmax(np.abs(found), initial=0.0)) for found in compared[1]]
    more = zip(np.diff(starts).tolist(), oldest, gaps, ratios, strict=True)
    return tuple(
        Brief(
            step, ticket, repeat, prompt_id, prompt, excerpt(said), reason, reward, length, step - 1 - old, *of_tokens
        )
        for (step, ticket, repeat, prompt_id, prompt, said, reason, reward), (length, old, *of_tokens) in zip(
            zip(*columns, strict=True), more, strict=True
        )
    )


def _flat(table: Any, name: str) -> tuple[Any, Any]:
    """The values of a column of lists, one after another, and where each row begins, with the end of the last."""
    lists = table.column(name).combine_chunks()
    return lists.flatten().to_numpy(zero_copy_only=False), lists.offsets.to_numpy()


def _differences(table: Any, name: str) -> list[Any]:
    """Of each row the behaviour's log-probabilities less those of another column [C]; None where it has none."""
    if name not in table.column_names or table.column(name).null_count == table.num_rows:
        return [None] * table.num_rows
    (behavior, starts), (other, other_starts) = _flat(table, "behavior_logprobs"), _flat(table, name)
    return [
        behavior[start:end].astype(np.float64) - other[other_start : other_start + end - start] if there else None
        for start, end, other_start, there in zip(
            starts[:-1], starts[1:], other_starts[:-1], table.column(name).is_valid().to_pylist(), strict=True
        )
    ]
