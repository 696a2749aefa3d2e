"""What a run asks of W&B: the section [wandb] of a run file."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from align.choices import choices

ArtifactKind = Literal["environment", "code", "checkpoints", "policy"]


class WandbConfig(BaseModel):
    """Weights & Biases. The key comes from WANDB_API_KEY or netrc, never from a run file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Literal["auto", "online", "offline", "disabled"] = Field(
        "auto",
        description=choices(
            "Where the record goes.",
            {
                "auto": "online when a key is set, else offline",
                "online": "to this machine and, while the run goes on, to the server",
                "offline": "to this machine; it can be synced later",
                "disabled": "nowhere",
            },
        ),
    )
    project: str = Field(
        "align",
        min_length=1,
        max_length=128,
        pattern=r"^[^/\\#?%:]+$",
        description="Project; made at the first upload if it is not there.",
    )
    entity: str | None = Field(None, description="Team or user; left out: the key's own.")
    group: str | None = Field(
        None, description="Runs with the same group stand together, the seeds of one recipe, say."
    )
    tags: tuple[str, ...] = Field((), description="Tags.")
    notes: str | None = Field(None, description="What the run is for, shown beside it.")
    tables: int = Field(
        0, ge=0, description="Steps between tables of trajectories; 0 = none: prompts and answers stay on this machine."
    )
    table_rows: int = Field(
        32, ge=1, le=1000, description="Trajectories per table, taken evenly from the lowest reward to the highest."
    )
    artifacts: tuple[ArtifactKind, ...] = Field(
        ("environment", "code"),
        description=choices(
            "What the run keeps as artifacts.",
            {
                "environment": "config.toml and environment.json",
                "code": "the sources of align and cluster",
                "checkpoints": "references to their folders in the run folder, never copies",
                "policy": "a reference to the folder of the final policy, never a copy",
            },
        ),
    )
    deadline_s: float = Field(15, gt=0, description="Time for the last upload at the end of an online run.")
