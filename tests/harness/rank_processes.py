"""Runs a function on several ranks, each in a process of its own, with gloo on 127.0.0.1."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from align.learner.meeting import Meeting, host, join
from align.model.ranks import Ranks

DEADLINE_S = 240
_context = multiprocessing.get_context(
    "forkserver"
)  # imports once; a fork of this process could not run backward passes
_context.set_forkserver_preload(
    ["tests.harness.rank_processes", "tests.conftest", "transformers.models.qwen3.modeling_qwen3", "peft"]
)


def on_ranks(num_ranks: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(ranks, *arguments)` returns on every rank; it and its answer have to be picklable, without tensors.

    Raises:
        AssertionError: With the traceback of every rank that failed.
    """
    store, meeting = host("127.0.0.1", DEADLINE_S)
    pipes = [_context.Pipe(duplex=False) for _ in range(num_ranks)]
    processes = [
        _context.Process(target=_run, args=(sender, meeting, rank, num_ranks, work, arguments))
        for rank, (_, sender) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    try:
        answers = [receiver.recv() if receiver.poll(DEADLINE_S) else (None, "no answer") for receiver, _ in pipes]
    finally:
        for process in processes:
            process.kill()
            process.join()
        del store
    errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(answers) if error]
    assert not errors, "\n".join(errors)
    return [answer for answer, _ in answers]


def _run(
    sender: Connection,
    meeting: Meeting,
    rank: int,
    num_ranks: int,
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    try:
        ranks: Ranks = join(meeting, rank, num_ranks, address="127.0.0.1", device="cpu", timeout_s=DEADLINE_S)
        sender.send((work(ranks, *arguments), ""))
        torch.distributed.barrier()  # a rank that goes at once would break what the others still do
    except Exception:
        sender.send((None, traceback.format_exc()))
