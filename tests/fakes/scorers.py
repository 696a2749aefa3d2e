"""Fake scorers behind the real pool of them."""

from __future__ import annotations

from align.data.types import Prompt, Ticket
from cluster.actors.scorer import ScorerConfig, Verdict
from cluster.fleet.scorers import ScorerHandle, ScorerPool
from cluster.loop.rollout import Rollout
from tests.fakes.ray_actors import FakeActor, Method, gives

TICKET = Ticket(5, Prompt("p", "prompt", (1, 2)), (7,))
ROLLOUT = Rollout(TICKET, oldest_version=3, num_tokens=9, num_stopped=1, payload="group 5")


class Scorers:
    """Makes fake scorers; `scripts` says what each new one of a rank does, the last one from then on."""

    def __init__(self, **scripts: Method) -> None:
        self.made: list[FakeActor] = []
        self.warnings: list[str] = []
        self.ready = scripts.get("ready", gives(None))
        self.score = scripts.get("score", gives(("scores", Verdict((0.5,)))))

    def create(self, rank: int) -> FakeActor:
        self.made.append(FakeActor(ready=self.ready, score=self.score))
        return self.made[-1]


def pool(first: list[FakeActor], replacements: Scorers, max_restarts: int = 3, deadline_s: float = 5) -> ScorerPool:
    cfg = ScorerConfig(score_deadline_s=deadline_s, start_deadline_s=deadline_s)
    handles = [ScorerHandle(actor, rank, cfg) for rank, actor in enumerate(first)]
    return ScorerPool(handles, replacements.create, max_restarts, replacements.warnings.append)
