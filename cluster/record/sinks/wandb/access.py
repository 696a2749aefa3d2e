"""Whether the W&B server takes what a run would upload."""

from __future__ import annotations

import os
import socket
from typing import Any
from urllib.parse import urlparse

from cluster.faults import TrackingError, WrongEntity
from cluster.record.sinks.wandb.settings import WandbConfig

_ASK_S = 15


def check_online(cfg: WandbConfig, warn: Any) -> bool:
    """Whether to upload: asked for or a key is set, and a server is there.

    Raises:
        TrackingError: If the server, or the form of the key, says that the key is wrong.
        WrongEntity: If the server says that the key does not belong to the configured entity.
    """
    if cfg.mode in ("offline", "disabled") or os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return False
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb
    from wandb.errors import AuthenticationError

    advice = "set WANDB_API_KEY to a valid key (wandb.ai/authorize), or wandb.mode to 'offline'"
    server = wandb.setup().settings.base_url
    try:
        if not wandb.login(prompt=False, verify=False):
            if cfg.mode == "online":
                raise TrackingError("wandb.mode is 'online', but no W&B key is set", advice)
            return False
        if not _reachable(server):
            warn(
                f"the W&B server {server} cannot be reached; the run is recorded offline (wandb sync uploads it later)"
            )
            return False
        wandb.teardown()  # a session that has its credentials would return them unverified
        wandb.login(prompt=False, verify=True)
    except AuthenticationError as error:
        if "Failed to execute API request" in str(error):  # the server is there but does not answer
            warn(f"the W&B server {server} does not answer; the run is recorded offline (wandb sync uploads it later)")
            return False
        raise TrackingError(f"W&B refused the key: {error}", advice) from None
    if entity := cfg.entity or os.environ.get("WANDB_ENTITY"):
        _check_entity(entity)
    return True


def _check_entity(entity: str) -> None:
    import wandb

    viewer = wandb.Api(timeout=_ASK_S).viewer
    known = list(dict.fromkeys([viewer.entity, viewer.username, *viewer.teams]))
    if entity not in known and not viewer.admin:
        raise WrongEntity(
            f"the W&B key may not write for the entity {entity!r}; it may for {', '.join(known)}",
            "set wandb.entity to one of them, use another key, or set wandb.mode to 'offline'",
        )


def entity_of(cfg: WandbConfig) -> str | None:
    """Where a run that is uploaded goes: what is configured, else the key's own; None if the server does not say."""
    import wandb

    if entity := cfg.entity or os.environ.get("WANDB_ENTITY"):
        return entity
    try:
        return str(wandb.Api(timeout=_ASK_S).default_entity)
    except Exception:  # it is for a link alone
        return None


def _reachable(url: str, timeout_s: float = 3.0) -> bool:
    parsed = urlparse(url)
    port = parsed.port or (443 if parsed.scheme == "https" else 80)
    try:
        with socket.create_connection((parsed.hostname or "", port), timeout=timeout_s):
            return True
    except OSError:
        return False
