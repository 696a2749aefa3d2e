"""What a job needs of the machine that submits it: the resolved run file, the code, prompts, and models that are small."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import tomli_w

import align
import cluster
from cluster.faults import ConfigError
from cluster.spec.config import RunConfig, resolved

RUN_FILE = "run.toml"
MAX_BYTES = 256 << 20
"""Of all that is sent along; Ray takes at most 512 MiB."""
_LEFT_OUT = ("__pycache__", ".*")  # of .git and .env nobody has use; .gitignore would make Ray leave files out


def stage(cfg: RunConfig, folder: Path) -> None:
    """Fill an empty folder with all that is uploaded; nothing else of this machine is.

    Relative paths keep their place in it. Absolute ones are taken to be on storage that the cluster has.

    Raises:
        ConfigError: If the run folder would vanish with the job, or a file cannot be sent along.
    """
    check_run_dir(cfg)
    models = {section.model for section in (cfg.policy, cfg.reference, cfg.critic) if section and section.model}
    named = [*(("prompt file", path) for path in _prompt_files(cfg)), *(("model folder", path) for path in models)]
    sent = [(what, path) for what, path in dict.fromkeys(named) if not path.is_absolute()]
    _check(sent)
    (folder / RUN_FILE).write_text(tomli_w.dumps(resolved(cfg)), encoding="utf-8")
    for package in (align, cluster):
        source = Path(package.__path__[0])
        _copy(source, folder / source.name)
    for _, path in sent:
        _copy(path, folder / path)


def check_run_dir(cfg: RunConfig) -> Path:
    """The run folder, if a job may have it.

    Raises:
        ConfigError: If it would vanish with the job.
    """
    if cfg.run.dir is None or not cfg.run.dir.is_absolute():
        raise ConfigError(
            f"run.dir is {str(cfg.run.dir or 'left out')!r}: a job's working folder vanishes with the job",
            "set run.dir to an absolute path on storage that the whole cluster shares: --set run.dir=/shared/runs/x",
        )
    return cfg.run.dir


def _prompt_files(cfg: RunConfig) -> Iterator[Path]:
    yield from cfg.prompts.files
    if cfg.evaluation.heldout is not None:
        yield from cfg.evaluation.heldout.files


def _check(sent: Sequence[tuple[str, Path]]) -> None:
    for what, path in sent:
        if ".." in path.parts:
            raise ConfigError(f"{what} {path} is outside the folder you submit from", "name it by its absolute path")
        if not path.exists():
            raise ConfigError(f"{what} {path} does not exist (looked in {Path.cwd()})", "correct the path")
    sizes = {(what, path): _num_bytes(path) for what, path in sent}
    if (total := sum(sizes.values())) > MAX_BYTES:
        (what, path), size = max(sizes.items(), key=lambda item: item[1])
        raise ConfigError(
            f"{total >> 20} MiB would be sent along with the job, {size >> 20} MiB of them the {what} {path}; "
            f"at most {MAX_BYTES >> 20} MiB are",
            "put it on storage that the cluster has and name it by its absolute path",
        )


def _num_bytes(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _copy(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        shutil.copytree(path, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*_LEFT_OUT))
    else:
        shutil.copy2(path, target)
