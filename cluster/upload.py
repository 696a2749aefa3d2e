"""What a job needs of the machine that submits it: the resolved run file, the code, prompts, and models that are small."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import tomli_w

import align
import cluster
from cluster.config import RunConfig
from cluster.faults import ConfigError
from cluster.folder import resolved

RUN_FILE = "run.toml"
MAX_MODEL_BYTES = 256 << 20


def stage(cfg: RunConfig, folder: Path) -> None:
    """Fill an empty folder with all that is uploaded; nothing else of this machine is.

    Relative paths keep their place in it. Absolute ones are taken to be on storage that the cluster has.

    Raises:
        ConfigError: If the run folder would vanish with the job, or a file cannot be sent along.
    """
    if cfg.run.dir is None or not cfg.run.dir.is_absolute():
        raise ConfigError(
            f"run.dir is {str(cfg.run.dir or 'left out')!r}: a job's working folder vanishes with the job",
            "set run.dir to an absolute path on storage that the whole cluster shares: --set run.dir=/shared/runs/x",
        )
    (folder / RUN_FILE).write_text(tomli_w.dumps(resolved(cfg)), encoding="utf-8")
    for package in (align, cluster):
        source = Path(package.__path__[0])
        shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in _prompt_files(cfg):
        _copy(path, folder, "prompt file")
    for path in {section.model for section in (cfg.policy, cfg.reference, cfg.critic) if section and section.model}:
        _copy_model(path, folder)


def _prompt_files(cfg: RunConfig) -> Iterator[Path]:
    yield from cfg.prompts.files
    if cfg.evaluation.heldout is not None:
        yield from cfg.evaluation.heldout.files


def _copy_model(path: Path, folder: Path) -> None:
    if path.is_absolute():
        return
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    if size > MAX_MODEL_BYTES:
        raise ConfigError(
            f"model folder {path} has {size >> 20} MiB; at most {MAX_MODEL_BYTES >> 20} MiB are sent along with a job",
            "put it on storage that the cluster has and name it by its absolute path",
        )
    _copy(path, folder, "model folder")


def _copy(path: Path, folder: Path, what: str) -> None:
    if path.is_absolute():
        return
    if ".." in path.parts:
        raise ConfigError(f"{what} {path} is outside the folder you submit from", "name it by its absolute path")
    if not path.exists():
        raise ConfigError(f"{what} {path} does not exist (looked in {Path.cwd()})", "correct the path")
    target = folder / path
    target.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        shutil.copytree(path, target, dirs_exist_ok=True)
    else:
        shutil.copy2(path, target)
