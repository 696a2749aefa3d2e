"""Which Ray a run uses: the cluster that RAY_ADDRESS names, or one of its own, closed to others. Imports no Ray."""

from __future__ import annotations

import os
import secrets


def cluster_address() -> str | None:
    """The cluster that RAY_ADDRESS names, or None for a Ray of the run's own."""
    address = os.environ.get("RAY_ADDRESS", "")
    return None if address in ("", "local") else address


def closed_ray() -> dict[str, str]:
    """Environment of a local Ray: loopback only, and a token that lives as long as the run.

    Ray reads it when it is imported, so it has to be set before.
    """
    return {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # else Ray replaces 127.0.0.1 by the machine's address
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # else every actor yields to whatever else the machine does
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
