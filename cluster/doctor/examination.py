"""The whole examination of `align doctor`, and the short one before a run takes its machines."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from cluster.capacity.machines import ThisMachine
from cluster.capacity.room import Demand, check_cluster, check_machine
from cluster.doctor.answers import answers
from cluster.doctor.machine import machine
from cluster.doctor.storage import disk, shared
from cluster.doctor.tokens import tokens
from cluster.doctor.verdict import Verdict, checked
from cluster.faults import ResourceError
from cluster.fleet.address import closed_ray, cluster_address
from cluster.spec.config import RunConfig
from cluster.spec.inputs import Inputs, load_inputs


def examine(cfg: RunConfig | None, *, quick: bool, say: Callable[[str], None]) -> Iterator[Verdict]:
    """Look at this machine or every node of a cluster, and with a run file at all that it names.

    Args:
        cfg: The run, if there is one.
        quick: Leave out what starts an engine.
        say: Told of what takes long.
    """
    address = cluster_address()
    if address is None:
        yield from checked("machine", machine)
    yield from checked("Ray's token", lambda: token(address))
    inputs: Inputs | None = None
    if cfg is not None:
        loaded: list[Inputs] = []
        yield from checked("inputs", lambda: _inputs(cfg, loaded))
        inputs = loaded[0] if loaded else None  # else there is no model to ask
        yield from checked("W&B", lambda: _wandb(cfg))
    if cfg is not None and inputs is not None:
        yield from of_the_run(cfg, inputs)
    if address is not None or (inputs and not quick):
        yield from checked("Ray", lambda: _with_ray(cfg, inputs, address, quick, say))


def of_the_run(cfg: RunConfig, inputs: Inputs) -> Iterator[Verdict]:
    """What a run file names, as far as it is looked at in a moment."""
    yield from checked("tokenizer", lambda: tokens(cfg, inputs.train))
    yield from checked("reward", lambda: answers(cfg, inputs.train))
    yield from checked("disk", lambda: disk(cfg))


def _with_ray(
    cfg: RunConfig | None, inputs: Inputs | None, address: str | None, quick: bool, say: Callable[[str], None]
) -> Iterator[Verdict]:
    """What takes a Ray: the nodes of a cluster, and the processes of a run."""
    if address is None:
        os.environ.update(closed_ray())
    elif address.startswith("http"):
        advice = (
            f"HOST:6379 on a machine of the cluster; from outside: ray job submit --address {address} -- align doctor"
        )
        raise ResourceError(f"{address} is a dashboard, which runs nothing on the nodes", advice)
    from cluster.fleet.session import ray_session

    with ray_session(address, inputs.weights_bytes if inputs else 0):
        if address is not None:
            yield from on_the_nodes(cfg)
        if cfg is None or inputs is None:
            return
        room = list(checked("room", lambda: _room(cfg, inputs, address)))
        yield from room
        if not quick and all(verdict.state == "ok" for verdict in room):
            from cluster.doctor.agreement import agreement

            say("starting     engine, scorer and learner, one after another: half a minute for a small model …")
            yield from checked("agreement", lambda: agreement(cfg, inputs.train, say))


def before_a_run(cfg: RunConfig, inputs: Inputs, address: str | None) -> Iterator[Verdict]:
    """The short examination: this machine, unless a cluster takes the run, and what the run file names. Under a second."""
    if address is None:
        yield from checked("machine", machine)
    yield from checked("Ray's token", lambda: token(address))
    yield from of_the_run(cfg, inputs)


def on_the_nodes(cfg: RunConfig | None) -> Iterator[Verdict]:
    """Every node of the cluster that was joined."""
    from cluster.doctor.nodes import nodes

    if cfg is None:
        yield from nodes(None)
    else:
        with shared(cfg) as storage:
            yield from nodes(storage)


def token(address: str | None) -> Iterator[Verdict]:
    """Whether strangers are kept out of the cluster, and the token to oneself."""
    if address is None:
        yield Verdict("Ray's token", "ok", "no cluster named; a local Ray gets a token of its own")
        return
    if os.environ.get("RAY_AUTH_MODE") != "token":
        fix = "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=… (and on every node)"
        yield Verdict("Ray's token", "warn", f"off for {address}: who reaches its ports runs code as you", fix)
        return
    given = "RAY_AUTH_TOKEN" in os.environ
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or (None if given else str(Path.home() / ".ray" / "auth_token"))
    if path and (mode := Path(path).stat().st_mode) & 0o077:
        yield Verdict("Ray's token", "warn", f"others may read {path} (mode {mode & 0o777:o})", f"chmod 600 {path}")
        return
    yield Verdict("Ray's token", "ok", f"on for {address}")


def _inputs(cfg: RunConfig, loaded: list[Inputs]) -> Iterator[Verdict]:
    """Models are there and fit each other, prompts can be read, rendered and judged."""
    inputs = load_inputs(cfg)
    loaded.append(inputs)
    longest = max(len(prompt.token_ids) for prompt in (*inputs.train, *inputs.heldout))
    found = f"{len(inputs.train)} prompts to train on, {len(inputs.heldout)} held out, at most {longest} tokens"
    yield Verdict("inputs", "ok", found)


def _wandb(cfg: RunConfig) -> Iterator[Verdict]:
    from cluster.record.sinks.wandb.access import check_online

    warnings: list[str] = []
    online = check_online(cfg.wandb, warnings.append)
    found = "uploads while it runs" if online else "recorded on disk; wandb sync uploads it later"
    fix = "wandb login, or --set wandb.mode=offline"
    yield Verdict.of("W&B", not warnings, warnings[0] if warnings else found, fix, "warn")


def _room(cfg: RunConfig, inputs: Inputs, address: str | None) -> Iterator[Verdict]:
    """Whether the run ever fits; `align plan` says more."""
    from cluster.fleet.session import joined

    if address is None:
        check_machine(cfg, inputs.weights_bytes, ThisMachine.look())
    else:
        check_cluster(cfg, joined(address))
    demand = Demand.of(cfg)
    yield Verdict("room", "ok", f"for the {demand.num_cpus:g} CPUs and {demand.num_gpus:g} GPUs of the run")
