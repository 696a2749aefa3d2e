"""What a run does beside training, before the first step and after each: trace, checkpoint, evaluation, log."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from align.metrics import Metric
from cluster.loop.buffer import Buffer
from cluster.loop.rollout import Rollout
from cluster.run.evaluation import Evaluator, metrics_of
from cluster.run.memory import MemoryMeter
from cluster.run.recording import Recording
from cluster.spec.config import RunConfig


class Milestones:
    """See the loop's `Observer`; training waits while this evaluates and saves.

    Args:
        cfg: The run.
        recording: Its record.
        evaluator: Its evaluations.
        save: Writes a checkpoint of a step.
        buffer: The buffer of the loop, for the trace.
        memory: The memory meter.
    """

    def __init__(
        self,
        cfg: RunConfig,
        recording: Recording,
        evaluator: Evaluator,
        save: Callable[[int], Awaitable[None]],
        buffer: Buffer[Rollout],
        memory: MemoryMeter,
    ) -> None:
        self._cfg, self._recording, self._evaluator = cfg, recording, evaluator
        self._save, self._buffer, self._memory = save, buffer, memory

    async def before_training(self, version: int, metrics: list[Metric]) -> None:
        """Answers of the policy and of the reference before the first step; once in all processes of a run."""
        samples = self._recording.samples
        if samples.begun:
            return
        await self._evaluate(version, metrics)
        if self._cfg.reference:
            await self._evaluator.sample_reference(self._cfg, samples)
        samples.mark_begun()

    def after_group(self, rollout: Rollout) -> None:
        """Into the trace."""
        self._recording.timeline.group(rollout, self._buffer)

    async def after_step(self, step: int, metrics: list[Metric]) -> None:
        """Save, evaluate and log; each when its turn has come, and the last step always."""
        self._recording.alerts.close()
        self._recording.timeline.step(step, metrics, self._buffer)
        cfg = self._cfg
        metrics = [*metrics, Metric("memory/rss_bytes", self._memory.peak_bytes)]
        last = step == cfg.run.steps
        if last or step % cfg.checkpoint.every == 0:
            with self._recording.timeline.timed("checkpoint", step) as timed:
                await self._save(step)
            metrics.append(Metric("time/checkpoint_s", timed()))
        if last or step % cfg.evaluation.every == 0:
            await self._evaluate(step, metrics)
        else:
            self._recording.log(step, metrics)

    async def _evaluate(self, step: int, metrics: list[Metric]) -> None:
        """Log the step with the figures of an evaluation."""
        with self._recording.timeline.timed("evaluation", step) as timed:
            for name, answers in (await self._evaluator.evaluate()).items():
                metrics = [*metrics, *metrics_of(name, answers)]
                first_answers = answers[:: self._cfg.evaluation.group_size]
                self._recording.samples.add(name, first_answers, self._cfg.evaluation.num_samples)
        metrics.append(Metric("time/eval_s", timed()))
        self._recording.log(step, metrics)
