"""Three raylets on this machine, as three nodes of a cluster; the environment of the third is the caller's.

`python -m tests.harness.raylets FOLDER KEY=VALUE …` prints the address once all are there, and ends when its input does.
"""

from __future__ import annotations

import sys
from typing import Any

from ray.cluster_utils import Cluster


def main(folder: str, *settings: str) -> None:
    """Start them, say where, wait."""
    where: dict[str, Any] = {"node_ip_address": "127.0.0.1", "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={**where, "temp_dir": folder, "num_cpus": 2})
    try:
        cluster.add_node(**where, num_cpus=2)
        cluster.add_node(**where, num_cpus=2, env_vars=dict(setting.split("=", 1) for setting in settings))
        print(cluster.address, flush=True)
        sys.stdin.read()
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
