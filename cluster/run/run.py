"""One run from its first process to its report."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from align.data.prompts import PromptStream, derive_seed
from align.metrics import Metric, reduce
from cluster.faults import INTERRUPTED
from cluster.fleet.address import cluster_address
from cluster.fleet.placement import start_workers
from cluster.loop.buffer import Buffer
from cluster.loop.filtering import Filter
from cluster.loop.goodput import Goodput
from cluster.loop.ledger import Ledger
from cluster.loop.loop import Rollout, Run, run_loop
from cluster.loop.quarantine import Quarantine
from cluster.record import checkpoint
from cluster.record.alerts import Alerts
from cluster.record.figures import Samples, read_lines, read_rows, seconds_so_far, summarize_run
from cluster.record.folder import RunFolder, resolved, write_atomically
from cluster.record.sinks.console import Console
from cluster.record.sinks.jsonl import JsonLines
from cluster.record.sinks.prometheus import PrometheusSink
from cluster.record.sinks.sink import Sink, Sinks
from cluster.record.sinks.wandb.access import entity_of
from cluster.record.sinks.wandb.artifacts import WandbArtifacts
from cluster.record.sinks.wandb.identity import known_run_id, whereabouts
from cluster.record.sinks.wandb.sink import WandbSink
from cluster.record.sinks.wandb.tables import TrajectoryTables
from cluster.record.trace import Trace
from cluster.redaction import redact
from cluster.run.evaluation import Evaluator, fixed_tickets, metrics_of
from cluster.run.memory import MemoryMeter
from cluster.run.moving_reference import MovingReference
from cluster.spec.config import RunConfig
from cluster.spec.inputs import Inputs
from cluster.views.report import verdict, write_report


class Training:
    """One run from its first process to its report.

    Args:
        cfg: The run.
        inputs: Checked inputs.
        folder: The run folder.
        console: The console.
        memory: The memory meter.
        started: `time.monotonic()` at the start.
        online: Whether W&B is uploaded to.
    """

    def __init__(
        self,
        cfg: RunConfig,
        inputs: Inputs,
        folder: RunFolder,
        console: Console,
        memory: MemoryMeter,
        started: float,
        online: bool,
    ) -> None:
        self.cfg, self.inputs, self.folder, self.console, self.memory = cfg, inputs, folder, console, memory
        self.started = started
        self.stop = asyncio.Event()
        self.interrupts = 0
        metrics = folder.path / "metrics.jsonl"
        earlier = read_rows(metrics) if metrics.is_file() else []
        self.earlier_s = seconds_so_far(metrics) if earlier else 0.0
        sinks: list[Sink] = [console, JsonLines(metrics)]
        self.sinks = Sinks(sinks, console.warn, started)
        self.alerts = Alerts(cfg.alerts, self.sinks.alert, earlier)
        self.sinks.add(lambda: self.alerts)
        self.wandb = self._record_in_wandb(online, earlier) if cfg.wandb.mode != "disabled" else None
        if cluster_address() is not None:  # a Ray of the run's own serves no metrics
            self.sinks.add(lambda: PrometheusSink(folder.path.name))
        self.samples = Samples(folder.path / "samples.json")
        self.trace = self._open_trace() if cfg.run.trace else None

    def _open_trace(self) -> Trace | None:
        try:
            return Trace(self.folder.path / "trace.json", self.console.warn)
        except OSError as error:
            self.console.warn(f"no trace is written: {error}")
            return None

    def _record_in_wandb(self, online: bool, earlier: list[dict[str, Any]]) -> WandbSink | None:
        """The W&B run with its artifacts and tables; says where it is."""
        cfg, path, sinks = self.cfg, self.folder.path, self.sinks
        record = sinks.add(
            lambda: WandbSink(
                cfg.wandb, path, path.name, resolved(cfg), online, self.console.warn, earlier, self.earlier_s
            )
        )
        if record is None:
            return None
        sinks.add(lambda: WandbArtifacts(record, path, cfg.wandb.artifacts))
        if cfg.wandb.tables:
            folder, every, num_rows = path / "trajectories", cfg.wandb.tables, cfg.wandb.table_rows
            sinks.add(lambda: TrajectoryTables(record, folder, every, num_rows, cfg.algorithm.discount))
        entity = entity_of(cfg.wandb) if online else None
        self.link = whereabouts(cfg.wandb, path, online=online, entity=entity)
        self.console.say(f"W&B          {self.link}")
        return record

    async def run(self) -> int:
        """Train, and write the end of the run whatever happens; see `train` for the exit code."""
        status: str = "failed"
        error: Exception | None = None
        try:
            self._listen()
            status = await self._train()
        except asyncio.CancelledError:
            status = "stopped"
        except Exception as raised:  # the outermost frame: the folder gets its end first, then this is raised
            error = raised
            self.alerts.fail(raised)
        self.alerts.close()
        await asyncio.to_thread(self._finish, status, error)
        if error is not None:
            raise error
        return 0 if status == "finished" else INTERRUPTED

    def _listen(self) -> None:
        """First Ctrl-C (or SIGTERM): stop after the step and save. Second: stop now. Third: die."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()

        def interrupt() -> None:
            self.interrupts += 1
            if self.interrupts == 1 and self.training:
                self.console.warn("stopping: the step in progress ends, a checkpoint is saved; Ctrl-C again stops now")
                self.stop.set()
            elif self.interrupts <= 2 and task is not None:
                task.cancel()
            else:
                os._exit(INTERRUPTED)

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, interrupt)

    training = False

    async def _train(self) -> str:
        cfg = self.cfg
        restored = checkpoint.newest(self.folder.path / "checkpoints")
        state = restored.state if restored else checkpoint.RunState(0, 0, (), 0)
        self.filter = Filter(
            cfg.filter, cfg.run.prompts_per_step, cfg.run.seed, cfg.algorithm.reward_range, state.filter
        )
        leased = deque(sorted(state.leased))
        self.stream = PromptStream(
            self.inputs.train, cfg.run.group_size, cfg.run.seed, state.cursor, leased, self.filter.visits
        )
        canary = [self.stream.ticket(number) for number in range(cfg.weights.canary_sequences)]
        # An adapter goes back onto the weights that it was made for, not onto the checkpoint's, which it is a part of.
        policy = restored.policy if restored and cfg.policy.adapter is None else cfg.policy.model
        self.workers = await start_workers(cfg, self.folder.path, policy, canary, self.console.say, self.console.warn)
        self.reference = MovingReference(
            self.folder.path / "reference",
            cfg.refresh_every,
            self.workers.learner.export_reference,
            self.workers.scorers.load_reference,
        )
        try:
            if restored:
                self.console.say(f"resuming     after step {state.version}, from {restored.path}")
                await self.workers.learner.restore(restored.path.resolve(), state.version)
                if state.reference_version:
                    await self.reference.restore(restored.path, state.reference_version, state.reference_fingerprint)
            return await self._loop(state)
        finally:
            await self.workers.shutdown()

    async def _loop(self, state: checkpoint.RunState) -> str:
        cfg = self.cfg
        self.console.say(f"ready after  {time.monotonic() - self.started:.0f} s")
        metrics = await self.workers.fleet.publish(state.version)
        self.evaluator = self._evaluator()
        if not self.samples.begun:
            await self._evaluate(state.version, metrics)
            if cfg.reference:
                await self._reference_samples()
            self.samples.mark_begun()
        goodput = Goodput.resumed(read_lines(self.folder.path / "metrics.jsonl"), state.version)
        self.run_state = Run(
            prompts=self.stream,
            buffer=Buffer(cfg.run.prompts_per_step, cfg.run.max_staleness),
            fleet=self.workers.fleet,
            scorer=self.workers.scorers,
            quarantine=Quarantine(cfg.quarantine, self.folder.path / "quarantine.jsonl", state.quarantine),
            filter=self.filter,
            learner=self.workers.learner,
            reference=self.reference,
            observer=self,
            ledger=Ledger(state.num_trained, state.num_filtered, state.num_quarantined, goodput),
            max_staleness=cfg.run.max_staleness,
            first_step=state.version + 1,
            last_step=cfg.run.steps,
            stop=self.stop,
        )
        self.training = True
        self.alerts.begin()
        last = await run_loop(self.run_state)
        self.training = False
        self.alerts.close()
        finished = last == cfg.run.steps
        if not finished and last > state.version and last % cfg.checkpoint.every:
            await self._save(last)
        if finished:
            await self.workers.learner.export_policy(self.folder.path.resolve() / "policy")
            self.sinks.artifact("policy", self.folder.path / "policy", last)
        return "finished" if finished else "stopped"

    def after_group(self, rollout: Rollout) -> None:
        """See the loop's `Observer`: into the trace."""
        if self.trace is None:
            return
        ticket = rollout.ticket
        known = {"ticket": ticket.number, "prompt": ticket.prompt.id, "version": rollout.oldest_version}
        for span in rollout.spans:
            self.trace.span(span, f"group {ticket.number}", **known, tokens=rollout.num_tokens)
        self._count_slots(self.trace)

    def _count_slots(self, trace: Trace) -> None:
        buffer = self.run_state.buffer
        used = buffer.num_slots - buffer.num_free
        trace.counter("slots", time.time(), filled=buffer.num_filled, empty=used - buffer.num_filled)

    async def after_step(self, step: int, metrics: list[Metric]) -> None:
        """See the loop's `Observer`: evaluate, save and log."""
        self.alerts.close()
        if self.trace:
            self.trace.step(step, reduce(metrics), time.time())
            self._count_slots(self.trace)
        cfg = self.cfg
        metrics = [*metrics, Metric("memory/rss_bytes", self.memory.peak_bytes)]
        last = step == cfg.run.steps
        if last or step % cfg.checkpoint.every == 0:
            with self._timed("checkpoint", step) as timed:
                await self._save(step)
            metrics.append(Metric("time/checkpoint_s", timed()))
        if last or step % cfg.evaluation.every == 0:
            await self._evaluate(step, metrics)
        else:
            self.sinks.log(step, reduce(metrics))

    async def _evaluate(self, step: int, metrics: list[Metric]) -> None:
        with self._timed("evaluation", step) as timed:
            for name, answers in (await self.evaluator.evaluate()).items():
                metrics = [*metrics, *metrics_of(name, answers)]
                first_answers = answers[:: self.cfg.evaluation.group_size]
                self.samples.add(name, first_answers, self.cfg.evaluation.num_samples)
        metrics.append(Metric("time/eval_s", timed()))
        self.sinks.log(step, reduce(metrics))

    @contextlib.contextmanager
    def _timed(self, name: str, step: int) -> Iterator[Callable[[], float]]:
        """Time the block, for the trace too; gives what says how many seconds it took."""
        began_s, began = time.time(), time.perf_counter()
        elapsed_s = 0.0
        yield lambda: elapsed_s
        elapsed_s = time.perf_counter() - began
        if self.trace:
            self.trace.beside(name, began_s, began_s + elapsed_s, step)

    async def _save(self, step: int) -> None:
        run, reference = self.run_state, self.reference.saved
        state = checkpoint.RunState(
            version=step,
            cursor=run.prompts.cursor,
            leased=tuple(sorted([*run.prompts.returned, *run.ledger.in_flight])),
            num_trained=run.ledger.num_trained,
            num_filtered=run.ledger.num_filtered,
            num_quarantined=run.ledger.num_quarantined,
            quarantine=run.quarantine.state(run.ledger.in_flight),
            filter=run.filter.state(),
            reference_version=reference.version if reference else 0,
            reference_fingerprint=reference.fingerprint if reference else "",
            wandb_id=known_run_id(self.folder.path) or "",
        )

        async def write(directory: Path) -> None:
            await self.workers.learner.save(directory.resolve())
            await self.reference.copy_into(directory)

        saved = await checkpoint.save(self.folder.path / "checkpoints", state, self.cfg.checkpoint.keep, write)
        self.sinks.artifact("checkpoints", saved.path, step)

    def _evaluator(self) -> Evaluator:
        cfg, num = self.cfg, self.cfg.evaluation.max_prompts
        first = [self.stream.ticket(n).prompt for n in range(min(num, len(self.inputs.train)))]
        sets = {"heldout": self.inputs.heldout[:num], "train": first}
        seed = derive_seed(cfg.run.seed, "evaluation")
        tickets = {
            name: fixed_tickets(prompts, cfg.evaluation.group_size, seed) for name, prompts in sets.items() if prompts
        }
        bytes_per_group = 4 * self.inputs.vocab_size * cfg.sampling.max_tokens * cfg.evaluation.group_size
        return Evaluator(tickets, self.workers, bytes_per_group if cfg.reference else None)

    async def _reference_samples(self) -> None:
        """Answers of the reference: to all prompts where a judge counts them, else to those that are shown."""
        cfg, seed = self.cfg.evaluation, derive_seed(self.cfg.run.seed, "reference")
        for name, tickets in self.evaluator.sets.items():
            asked = tickets if cfg.judge else tickets[: cfg.num_samples]
            if not asked:
                continue
            prompts = [ticket.prompt for _ in range(cfg.group_size) for ticket in asked]
            texts = await self.workers.scorers.sample(prompts, self.cfg.sampling.max_tokens, seed)
            self.samples.add_reference(name, [prompt.text for prompt in prompts], texts, cfg.judge)

    def _finish(self, status: str, error: Exception | None) -> None:
        """Summary, report, and the last words on the console."""
        self.sinks.close()
        if self.trace:
            self.trace.close()
        path = self.folder.path
        summary = summarize_run(read_rows(path / "metrics.jsonl"), self.samples.content)
        summary |= {
            "name": self.cfg.run.name,
            "seed": self.cfg.run.seed,
            "status": status,
            "wall_s": round(self.earlier_s + time.monotonic() - self.started, 1),
            "warnings": self.console.warnings,
        }
        if error is not None:
            summary["error"] = redact(str(error)) or type(error).__name__
        write_atomically(path / "summary.json", json.dumps(summary, indent=2))
        report = write_report(path)
        self.console.say("")
        self.console.say(f"{status} after {summary['steps']} steps and {summary['wall_s']:.0f} s. {verdict(summary)}")
        uploaded = self.wandb is not None and self.wandb.uploaded
        in_wandb = self.link if uploaded else whereabouts(self.cfg.wandb, path, online=False)
        self.console.say(_how_to_look(path, report, status, in_wandb))


def _how_to_look(path: Path, report: Path, status: str, in_wandb: str) -> str:
    lines = [
        ("report", f"open {report} in a browser"),
        ("figures", f"cat {path}/summary.json; a line per step in {path}/metrics.jsonl"),
        ("trajectories", f"{path}/trajectories/*.parquet (pandas.read_parquet)"),
        *([("trace", f"{path}/trace.json (open it in ui.perfetto.dev)")] if (path / "trace.json").is_file() else []),
        ("checkpoints", f"{path}/checkpoints/step_*/policy (Hugging Face folders)"),
        ("W&B", in_wandb),
    ]
    if status == "finished":
        lines.append(("policy", f"{path}/policy (a Hugging Face folder for transformers and vLLM)"))
        if (path / "policy_adapter").is_dir():
            lines.append(("adapter", f"{path}/policy_adapter (a PEFT folder, for the policy that the run began with)"))
    else:
        lines.append(("resume", f"align train {path}/config.toml --set run.dir={path}"))
    if status == "failed":
        session = json.loads((path / "environment.json").read_text())["ray_session"]
        lines.append(("logs", f"{session}/logs (every process of the run)"))
    return "\n".join(f"  {name:<13} {text}" for name, text in lines)
