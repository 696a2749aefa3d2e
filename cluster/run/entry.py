"""Entry of a run: check everything that can be checked, start Ray, train, and turn errors into exit codes."""

from __future__ import annotations

import asyncio
import os
import secrets
import time
import traceback

from align.rewards.kinds import reads_reference
from cluster.doctor.verdict import require
from cluster.faults import INTERRUPTED, RunError
from cluster.record.folder import RunFolder
from cluster.record.sinks.console import Console
from cluster.record.sinks.wandb.access import check_online
from cluster.redaction import redact
from cluster.run.memory import MemoryMeter
from cluster.spec.config import RunConfig, resolved
from cluster.spec.inputs import Inputs, load_inputs
from cluster.spec.processor import native_dtype


def train(cfg: RunConfig) -> int:
    """Run to the end; returns the exit code: 0 finished, 130 interrupted, else that of the error (see `cluster.faults`)."""
    started = time.monotonic()
    console = Console(cfg.run.steps, pays_outcomes=not reads_reference(cfg.reward))
    try:
        inputs = load_inputs(cfg)
        online = check_online(cfg.wandb, console.warn)
        if os.environ.get("RAY_ADDRESS", "") in ("", "local"):
            os.environ.update(closed_ray())
        from cluster.doctor.examination import before_a_run, on_the_nodes
        from cluster.fleet.placement import check_machine, cluster_address, ray_session
        from cluster.run.run import Training

        if cluster_address() is None:
            check_machine(cfg, inputs.weights_bytes)
        require(before_a_run(cfg, inputs), console.warn)
        config = resolved(cfg)
        folder = RunFolder(RunFolder.default_path(config), config)
        _announce(cfg, inputs, folder, console)
        with folder.lock(), MemoryMeter() as memory, ray_session(cfg, inputs.weights_bytes) as session:
            require(on_the_nodes(cfg), console.warn)
            folder.write_environment({"ray_session": session, "dtype": cfg.engine_dtype})
            return asyncio.run(Training(cfg, inputs, folder, console, memory, started, online).run())
    except RunError as error:
        console.close()
        console.say(f"error {redact(str(error))}")
        return error.exit_code
    except KeyboardInterrupt:
        console.close()
        console.say("interrupted")
        return INTERRUPTED
    except Exception:  # a bug, of ours or another's; its text leaves the machine in the log of a job
        console.close()
        console.say(redact(traceback.format_exc()))
        return 1


def _announce(cfg: RunConfig, inputs: Inputs, folder: RunFolder, console: Console) -> None:
    native = native_dtype(on_gpu=cfg.rollout.num_gpus > 0)
    reason = native.reason if cfg.rollout.dtype == "auto" else "set by rollout.dtype"
    run = cfg.run
    console.say(f"run folder   {folder.path}" + (" (resumed)" if folder.resumed else ""))
    console.say(f"policy       {cfg.policy.model}")
    if adapter := cfg.policy.adapter:
        published = "merged" if adapter.publish == "merged" else "as an adapter"
        console.say(
            f"adapter      {adapter.kind} of rank {adapter.rank}, scale {adapter.scale:g}; published {published}"
        )
    console.say(f"reference    {cfg.reference.model if cfg.reference else 'none: nothing asks one'}")
    left_out = f" ({inputs.num_left_out} more are among the held-out ones)" if inputs.num_left_out else ""
    console.say(f"prompts      {len(inputs.train)} to train on{left_out}, {len(inputs.heldout)} held out")
    console.say(
        f"each step    {run.prompts_per_step} prompts x {run.group_size} trajectories, staleness at most {run.max_staleness}"
    )
    console.say(f"computes in  {cfg.engine_dtype}: {reason}")
    console.say("starting     Ray, engine, reference and learner …")


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
