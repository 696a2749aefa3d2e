"""Entry of a run: check everything that can be checked, start Ray, train, and turn errors into exit codes."""

from __future__ import annotations

import asyncio
import os
import time
import traceback

from align.rewards.kinds import reads_reference
from cluster.capacity.machines import ThisMachine
from cluster.capacity.room import check_cluster, check_machine
from cluster.doctor.examination import before_a_run, on_the_nodes
from cluster.doctor.verdict import require
from cluster.faults import INTERRUPTED, RunError
from cluster.fleet.address import closed_ray, cluster_address
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
        return _train(cfg, console, started)
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


def _train(cfg: RunConfig, console: Console, started: float) -> int:
    """Each check is asked once, on the way down: inputs, W&B, this machine, what the run names; a cluster once it is joined."""
    inputs = load_inputs(cfg)
    online = check_online(cfg.wandb, console.warn)
    if (address := cluster_address()) is None:
        os.environ.update(closed_ray())
        check_machine(cfg, inputs.weights_bytes, ThisMachine.look())
    require(before_a_run(cfg, inputs, address), console.warn)
    from cluster.fleet.session import joined, ray_session  # only now: Ray reads the environment when it is imported
    from cluster.run.run import Training

    config = resolved(cfg)
    folder = RunFolder(RunFolder.default_path(config), config)
    _announce(cfg, inputs, folder, console)
    with folder.lock(), MemoryMeter() as memory, ray_session(address, inputs.weights_bytes) as session:
        if address is not None:
            check_cluster(cfg, joined(address))
            require(on_the_nodes(cfg), console.warn)
        folder.write_environment({"ray_session": session, "dtype": cfg.engine_dtype})
        return asyncio.run(Training(cfg, inputs, folder, console, memory, started, online).run())


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
