"""One run from its first process to its report."""

from __future__ import annotations

import asyncio
import time

from cluster.faults import INTERRUPTED
from cluster.fleet.placement import Workers, start_workers
from cluster.loop.buffer import Buffer
from cluster.loop.loop import Run, run_loop
from cluster.loop.rollout import Rollout
from cluster.record.folder import RunFolder
from cluster.record.sinks.console import Console
from cluster.run.ending import EndStatus, write_end
from cluster.run.evaluation import Evaluator
from cluster.run.interrupts import Interrupts
from cluster.run.memory import MemoryMeter
from cluster.run.milestones import Milestones
from cluster.run.moving_reference import MovingReference
from cluster.run.progress import Progress
from cluster.run.recording import Recording
from cluster.spec.config import RunConfig
from cluster.spec.inputs import Inputs


class Training:
    """One run: open its record, listen to interrupts, restore, start, loop, save or export, and write its end.

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
        self._cfg, self._inputs, self._path, self._console, self._memory = cfg, inputs, folder.path, console, memory
        self.recording = Recording(cfg, folder.path, console, started, online)
        self._interrupts = Interrupts(console.warn)

    async def run(self) -> int:
        """Train, and write the end of the run whatever happens; see `train` for the exit code."""
        status: EndStatus = "failed"
        error: Exception | None = None
        try:
            self._interrupts.listen()
            status = await self._train()
        except asyncio.CancelledError:
            status = "stopped"
        except Exception as raised:  # the outermost frame: the folder gets its end first, then this is raised
            error = raised
            self.recording.alerts.fail(raised)
        self.recording.alerts.close()
        await asyncio.to_thread(write_end, self._cfg, self.recording, self._console, status, error)
        if error is not None:
            raise error
        return 0 if status == "finished" else INTERRUPTED

    async def _train(self) -> EndStatus:
        """From the newest checkpoint to the last step; the workers end with it."""
        cfg, path = self._cfg, self._path
        progress = Progress(cfg, path, self._inputs.train)
        workers = await start_workers(
            cfg, path, progress.policy, progress.canary, self._console.say, self._console.warn
        )
        learner = workers.learner
        load, folder = workers.scorers.load_reference, path / "reference"
        reference = MovingReference(folder, cfg.refresh_every, learner.export_reference, load)
        try:
            if progress.restored:
                self._console.say(f"resuming     after step {progress.version}, from {progress.restored.path}")
            await progress.restore(learner, reference)
            return await self._steps(progress, workers, reference)
        finally:
            await workers.shutdown()

    async def _steps(self, progress: Progress, workers: Workers, reference: MovingReference) -> EndStatus:
        """Evaluate, train step after step, and keep what came out."""
        cfg, recording, learner = self._cfg, self.recording, workers.learner
        self._console.say(f"ready after  {time.monotonic() - recording.started:.0f} s")
        published = await workers.fleet.publish(progress.version)

        async def save(step: int) -> None:
            recording.artifact("checkpoints", await progress.save(step, learner, reference), step)

        buffer: Buffer[Rollout] = Buffer(cfg.run.prompts_per_step, cfg.run.max_staleness)
        evaluator = Evaluator.of_run(cfg, self._inputs, progress.prompts, workers)
        milestones = Milestones(cfg, recording, evaluator, save, buffer, self._memory)
        await milestones.before_training(progress.version, published)
        last = await self._loop(
            Run(
                prompts=progress.prompts,
                buffer=buffer,
                fleet=workers.fleet,
                scorer=workers.scorers,
                quarantine=progress.quarantine,
                filter=progress.filter,
                learner=learner,
                reference=reference,
                observer=milestones,
                ledger=progress.ledger,
                max_staleness=cfg.run.max_staleness,
                first_step=progress.version + 1,
                last_step=cfg.run.steps,
                stop=self._interrupts.stop,
            )
        )
        if last == cfg.run.steps:
            await learner.export_policy(self._path.resolve() / "policy")
            recording.artifact("policy", self._path / "policy", last)
            return "finished"
        if last > progress.version and last % cfg.checkpoint.every:
            await save(last)
        return "stopped"

    async def _loop(self, run: Run) -> int:
        """The loop, while interrupts wait for the end of a step and a step that does not come is told of."""
        self._interrupts.in_training = True
        self.recording.alerts.begin()
        last = await run_loop(run)
        self._interrupts.in_training = False
        self.recording.alerts.close()
        return last
