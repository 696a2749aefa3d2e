"""Where W&B shows a run, as far as that is known before it starts. wandb is loaded by the question alone."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path

from cluster.record.sinks.wandb.settings import WandbConfig

_IDENTITY = "wandb_id"


def known_run_id(run_dir: Path) -> str | None:
    """The W&B id of a run that began before: of its folder, else of its newest checkpoint; None for a new run."""
    if (identity := run_dir / _IDENTITY).is_file():
        return identity.read_text()
    for state in sorted(run_dir.glob("checkpoints/step_*/state.json"), reverse=True):
        try:
            found = json.loads(state.read_text())["state"]["wandb_id"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # torn, or of an older format
        if found:
            return str(found)
    return None


def claim_run_id(run_dir: Path) -> str:
    """The W&B id of the run in this folder, one for all its processes: a known one, WANDB_RUN_ID, or a new one."""
    identity = known_run_id(run_dir) or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
    (run_dir / _IDENTITY).write_text(identity)
    return identity


def whereabouts(
    cfg: WandbConfig, run_dir: Path, *, online: bool, run_id: str | None = None, entity: str | None = None
) -> str:
    """One line for a person: the address of the run, or where its record lies.

    Args:
        cfg: Mode, project, entity.
        run_dir: The run folder; it need not exist yet, or be seen from here.
        online: Whether the run is (or, asked before the start, should be) uploaded while it goes on.
        run_id: The W&B id of the run, where this process chose it; left out: that of the folder, if it has one.
        entity: Of the key, if the server was asked; left out: wandb.entity, then WANDB_ENTITY.
    """
    if cfg.mode == "disabled":
        return "not recorded (wandb.mode is 'disabled')"
    if not online:
        return f"recorded in {run_dir}/wandb; upload it with: wandb sync {run_dir}/wandb/offline-run-*"
    site = site_url()
    entity = cfg.entity or os.environ.get("WANDB_ENTITY") or entity
    run_id = run_id or known_run_id(run_dir)
    if entity is None:
        return f"{site}/home, project {cfg.project}, run {run_dir.name} (set wandb.entity for a link before the start)"
    if run_id is None:
        return f"{site}/{entity}/{cfg.project}, run {run_dir.name}"
    return f"{site}/{entity}/{cfg.project}/runs/{run_id}"


def site_url() -> str:
    """Where people look at what is uploaded to the configured server."""
    import wandb
    from wandb.util import app_url

    return str(app_url(wandb.setup().settings.base_url))
