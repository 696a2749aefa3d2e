"""Tables of trajectories for W&B, made from the Parquet files of the run folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.record.sinks.wandb.sink import WandbSink

TABLE = "trajectory/samples"
COLUMNS = ("prompt", "completion", "reward", "return", "version", "staleness", "finish_reason", "tokens", "ticket")
_READ = ("prompt", "completion", "reward", "reward_parts", "rewards", "versions", "finish_reason", "ticket")
_MAX_CHARS = 4000  # of a prompt or completion


class TrajectoryTables:
    """Every so many steps a table of what the step learned from, with a bounded number of rows.

    Args:
        record: The W&B run, which has logged the step before.
        folder: Of the Parquet files.
        every: Steps between tables.
        num_rows: Most rows of a table.
        discount: Of the returns.
    """

    def __init__(self, record: WandbSink, folder: Path, every: int, num_rows: int, discount: float) -> None:
        self._record, self._folder, self._every = record, folder, every
        self._num_rows, self._discount = num_rows, discount

    def log(self, step: int, wall_s: float, values: Mapping[str, float]) -> None:
        """See `Sink`."""
        import wandb

        if "time/step_s" in values and step % self._every == 0:
            columns, rows = table(self._folder / f"step_{step:05d}.parquet", step, self._num_rows, self._discount)
            self._record.run.log({TABLE: wandb.Table(columns, rows)}, step=step)

    def close(self) -> None:
        """See `Sink`; the tables are part of the record."""


def table(path: Path, step: int, num_rows: int, discount: float) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows: trajectories taken evenly from the lowest reward to the highest.

    Beside COLUMNS there is one for each part of a composite reward. `return` is that of the first sampled token,
    `sum_t discount^t R_t`; `version` the oldest that sampled a token, `staleness` how late it was trained.

    Args:
        path: Parquet file of the step, from `cluster.record.transcripts`.
        step: The step, which version `step - 1` was updated by.
        num_rows: Most rows.
        discount: Of the returns.
    """
    import pyarrow.parquet

    found = pyarrow.parquet.read_table(path, columns=list(_READ))
    order = found["reward"].to_numpy().argsort(kind="stable")
    last = len(order) - 1
    chosen = order if last < num_rows else order[[last * k // max(num_rows - 1, 1) for k in range(num_rows)]]
    rows = found.take(chosen).to_pylist()
    parts = sorted({name for row in rows for name in row["reward_parts"] or ()})
    return [*COLUMNS, *(f"reward {name}" for name in parts)], [_row(row, step, discount, parts) for row in rows]


def _row(row: Mapping[str, Any], step: int, discount: float, parts: list[str]) -> list[Any]:
    version = min(row["versions"])
    return [
        row["prompt"][-_MAX_CHARS:],  # the end is the question
        row["completion"][:_MAX_CHARS],
        row["reward"],
        sum(reward * discount**t for t, reward in enumerate(row["rewards"])),
        version,
        step - 1 - version,
        row["finish_reason"],
        len(row["versions"]),
        row["ticket"],
        *((row["reward_parts"] or {}).get(name) for name in parts),
    ]
