"""The sections of a run file that belong to the run as a whole; those of its parts stand beside what they configure."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from align.choices import choices
from align.data.prompts import PromptConfig
from align.demo.judges import JUDGES
from align.model.adapters import AdapterConfig
from align.rules import Rule


class Section(BaseModel):
    """A part of the run file."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class RunSection(Section):
    """The run as a whole."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9._-]+$", description="Name, used for the folder and in W&B.")
    dir: Path | None = Field(
        None, description="Run folder; left out: runs/NAME-DATE-TIME. A stopped run resumes there."
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of everything that is drawn.")
    steps: int = Field(ge=1, description="Optimizer steps.")
    prompts_per_step: int = Field(ge=1, description="Prompts (groups) of one step.")
    group_size: int = Field(1, ge=1, description="Trajectories per prompt.")
    max_staleness: int = Field(0, ge=0, description="Versions a trajectory may be late; 0 is exact on-policy training.")
    trace: bool = Field(False, description="Write trace.json: what each process did when, for ui.perfetto.dev.")

    @property
    def num_trajectories(self) -> int:
        """Trajectories of one step."""
        return self.prompts_per_step * self.group_size


class ModelSection(Section):
    """A model folder."""

    model: Path = Field(description="Hugging Face folder of a causal language model.")


class PolicySection(ModelSection):
    """The policy: its folder, and what of it is trained."""

    adapter: AdapterConfig | None = Field(
        None, description="Trained instead of the weights; left out: all weights are."
    )

    @property
    def engine_adapter(self) -> AdapterConfig | None:
        """The adapter that engines have as such; None where they have one set of weights."""
        return self.adapter if self.adapter and self.adapter.publish == "adapter" else None

    def rules_in_a_run(self, *, transport: str, engine_gpus: int) -> list[Rule]:
        """What an adapter that engines have as such asks of them.

        Args:
            transport: How weights travel, as it is set.
            engine_gpus: GPUs of one engine.
        """
        as_such = self.engine_adapter is not None
        return [
            (
                as_such and transport in ("nccl", "ipc"),
                f"policy.adapter.publish = 'adapter' needs weights.transport = 'object_store' (not {transport!r}): vLLM "
                "takes adapters from files",
            ),
            (
                as_such and engine_gpus > 1,
                "policy.adapter.publish = 'adapter' needs rollout.num_gpus of at most 1: what each of several GPUs holds of it "
                "is not compared with what was published; 'merged' is",
            ),
        ]


class ReferenceSection(ModelSection):
    """The reference: its folder, and whether it follows the policy."""

    refresh_every: int = Field(
        0,
        ge=0,
        description="Steps after which the reference takes the policy's weights; 0 = never. Evaluations measure the KL to the "
        "first reference all the same.",
    )


class EvaluationSection(Section):
    """Evaluations on fixed prompts: sampling, exact KL to the reference, a judge."""

    heldout: PromptConfig | None = Field(None, description="Prompts that are never trained on.")
    every: int = Field(
        10, ge=1, description="Steps between evaluations; the first is before step 1, the last at the end."
    )
    max_prompts: int = Field(64, ge=1, description="Prompts per set.")
    group_size: int = Field(1, ge=1, description="Trajectories per prompt.")
    judge: str | None = Field(
        None,
        description=choices(
            "Judge of finished text; left out: none.",
            {"grammatical": "whether it is a sentence of the demo's language"},
        ),
    )
    num_samples: int = Field(
        8, ge=0, description="Prompts per set whose answers are shown before, after and by the reference."
    )

    def rules_in_a_run(self) -> list[Rule]:
        """What evaluations need in any run."""
        return [
            (
                self.judge is not None and self.judge not in JUDGES,
                f"evaluation.judge is {self.judge!r}; there are: {', '.join(JUDGES)}",
            )
        ]


class CheckpointSection(Section):
    """Checkpoints."""

    every: int = Field(20, ge=1, description="Steps between checkpoints; the last step always has one.")
    keep: int = Field(2, ge=1, description="Newest checkpoints that are kept.")


class DeadlinesSection(Section):
    """Times for the start and the learner's work; those of other roles are in their sections."""

    room_s: float = Field(3600, ge=0, description="Time to wait for room on a cluster that others keep busy.")
    start_s: float = Field(300, gt=0, description="Time for the learner to load the policy.")
    update_s: float = Field(1800, gt=0, description="Time for one update or one part of an evaluation.")
    save_s: float = Field(600, gt=0, description="Time to export weights or write a checkpoint.")
