"""What log-probabilities without logits save: time and memory of loss and gradient of a head, each way in fresh processes.

    python -m tests.bench.head [--hidden-size 128] [--runs 5]

Four ways to one loss, `sum_t a_t * log p_t / N` with the entropies as a statistic, and its gradient in hidden states and weight:

* `naive`: all logits, `log_softmax`, autograd.
* `recompute`: the usual remedy, chunks of tokens under `torch.utils.checkpoint`, each with `log_softmax`.
* `recomputed`: `Head.logprobs`, our own for losses by trajectory: the backward pass computes the logits again.
* `formed`: `Head.token_loss`, our own for losses by token: the gradient is formed in the forward pass.

Every run of every way is a process of its own, and the ways take turns, so that a disturbance of the machine hits all. Memory is
the high-water mark of resident memory during loss and gradient (VmHWM, cleared before) less what was resident before, when
weight and hidden states were there: it contains both gradients. `cpu_s` is the process's own time (user and system), which other
work on the machine disturbs less than the clock (`time_s`); with one thread they are equal on a machine at rest.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from align.model.head import Head

RESULT = Path("deploy/runs/results/head.json")
NUM_TOKENS, VOCAB = 2048, 151_936
CHUNK = 220
"""Tokens of a chunk of `recompute`: as many as `Head` takes at this vocabulary."""
WAYS = ("naive", "recompute", "recomputed", "formed")

Way = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    log_p = torch.log_softmax(hidden @ weight.T, dim=-1)
    with torch.no_grad():
        entropy = -(log_p.exp() * log_p).sum(dim=-1)
    return log_p.gather(1, targets[:, None])[:, 0], entropy


def naive(hidden: Tensor, weight: Tensor, targets: Tensor, advantages: Tensor) -> Tensor:
    logprobs, _ = _logprobs(hidden, weight, targets)
    return (advantages * logprobs).sum()


def recompute(hidden: Tensor, weight: Tensor, targets: Tensor, advantages: Tensor) -> Tensor:
    parts = []
    for start in range(0, len(hidden), CHUNK):
        chunk = slice(start, start + CHUNK)
        parts.append(checkpoint(_logprobs, hidden[chunk], weight, targets[chunk], use_reentrant=False)[0])
    return (advantages * torch.cat(parts)).sum()


def recomputed(hidden: Tensor, weight: Tensor, targets: Tensor, advantages: Tensor) -> Tensor:
    return (advantages * Head(weight).logprobs(hidden, targets)[0]).sum()


def formed(hidden: Tensor, weight: Tensor, targets: Tensor, advantages: Tensor) -> Tensor:
    return Head(weight).token_loss(hidden, targets, lambda chunk, lp, _: (advantages[chunk] * lp).sum())[0]


def measure(name: str, hidden_size: int, num_threads: int) -> dict[str, float]:
    """Seconds, bytes and, against float64 on some tokens and words, the error of the gradient; in this process."""
    torch.set_num_threads(num_threads)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(NUM_TOKENS, hidden_size, generator=generator)
    weight = torch.randn(VOCAB, hidden_size, generator=generator).mul_(2 / hidden_size**0.5)
    targets = torch.randint(0, VOCAB, (NUM_TOKENS,), generator=generator)
    advantages = torch.randn(NUM_TOKENS, generator=generator) / NUM_TOKENS
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    torch.mm(hidden.detach()[:8], weight.detach()[:8].T)  # the library's threads and buffers are there
    before = _clear_high_water()
    started, cpu_started = time.perf_counter(), time.process_time()
    globals()[name](*leaves, targets, advantages).backward()
    elapsed, cpu_elapsed = time.perf_counter() - started, time.process_time() - cpu_started
    return {"time_s": elapsed, "cpu_s": cpu_elapsed, "peak_bytes": _high_water() - before} | _errors(
        *leaves, targets, advantages
    )


def _errors(hidden: Tensor, weight: Tensor, targets: Tensor, advantages: Tensor) -> dict[str, float]:
    """Largest error of the hidden states' gradient over its largest entry, from 32 tokens in float64."""
    some = slice(0, 32)
    exact = hidden.detach()[some].double().requires_grad_()
    (advantages[some].double() * _logprobs(exact, weight.detach().double(), targets[some])[0]).sum().backward()
    assert exact.grad is not None and hidden.grad is not None
    return {"gradient_error": float((hidden.grad[some] - exact.grad).abs().max() / exact.grad.abs().max())}


def _clear_high_water() -> int:
    """Start a new high-water mark; returns the bytes resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _high_water()


def _high_water() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.hidden_size, arguments.threads)))
        return
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    settings = ["--hidden-size", str(arguments.hidden_size), "--threads", str(arguments.threads)]
    for _ in range(arguments.runs):
        for way in WAYS:
            command = [sys.executable, "-m", "tests.bench.head", "--one", way, *settings]
            runs[way].append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
            print(way, runs[way][-1], flush=True)
    median = {way: {key: statistics.median(r[key] for r in found) for key in found[0]} for way, found in runs.items()}
    report = {
        "load_average": os.getloadavg()[0],
        "device": f"CPU, {_cpu()}, {arguments.threads} thread(s)",
        "command": f"python -m tests.bench.head {' '.join(settings)} --runs {arguments.runs}",
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "num_tokens": NUM_TOKENS,
        "vocab_size": VOCAB,
        "hidden_size": arguments.hidden_size,
        "median": median,
        "peak_of_naive_over_formed": median["naive"]["peak_bytes"] / median["formed"]["peak_bytes"],
        "cpu_of_recompute_over_formed": median["recompute"]["cpu_s"] / median["formed"]["cpu_s"],
        "cpu_of_recomputed_over_formed": median["recomputed"]["cpu_s"] / median["formed"]["cpu_s"],
        "cpu_of_naive_over_formed": median["naive"]["cpu_s"] / median["formed"]["cpu_s"],
        "runs": runs,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps({key: value for key, value in report.items() if key != "runs"}, indent=2))


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
