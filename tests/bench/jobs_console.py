"""What a person sees who submits a run to a cluster, follows, stops and resumes it: a real Ray head, a few real steps.

    python -m tests.bench.jobs_console

Writes deploy/runs/results/jobs_console.txt, which deploy/README.md shows. Ray's own lines of a log are left out, and paths and
ports of the moment have the names that they would have on a cluster.
"""

from __future__ import annotations

import re
import tempfile
import time
from pathlib import Path

from tests.harness.commands import align, last_step, wait_until
from tests.harness.head import Head, ray_head
from tests.places import REPOSITORY

RESULT = REPOSITORY / "deploy" / "runs" / "results" / "jobs_console.txt"
RUN = "submit deploy/runs/demo.toml --set run.dir=/shared/runs/demo --set run.steps=12 --set wandb.entity=team"
NAMES = (
    (r"http://127\.0\.0\.1:\d+", "http://127.0.0.1:8265"),
    (r"(?m)^\S+ \S+\tINFO job_manager.*\n|^Running entrypoint.*\n|^\S+ \S+\tINFO worker\.py.*\n", ""),
    (r"\x1b\[[0-9;]*m", ""),
    (r"(?m) +$", ""),
)


class Session:
    """Commands one after another, written down with their times.

    Args:
        head: The cluster.
        shared: What stands for /shared.
    """

    def __init__(self, head: Head, shared: Path) -> None:
        self.head, self.shared, self.text = head, shared, ""

    def run(self, command: str, expected: int = 0) -> None:
        """Run `align` and write it down; it has to end with the expected exit code."""
        began = time.monotonic()
        arguments = command.replace("/shared", str(self.shared)).split()
        environment = self.head.environment | {"RAY_API_SERVER_ADDRESS": self.head.address}
        code, console = align(*arguments, environment=environment)
        assert code == expected, f"align {command} ended with {code}:\n{console}"
        console = console.replace(str(self.shared), "/shared")
        for pattern, name in NAMES:
            console = re.sub(pattern, name, console)
        seconds = time.monotonic() - began
        self.text += f"$ align {command}\n{console.rstrip()}\n# exit code {code} after {seconds:.0f} s\n\n"


def main() -> None:
    """Play the session and write it down."""
    with tempfile.TemporaryDirectory() as folder, ray_head({"WANDB_MODE": "offline"}) as head:
        shared = Path(folder)
        session = Session(head, shared)
        wait_until(lambda: align("jobs", "list", "--address", head.address, environment=head.environment)[0] == 0, "it")
        time.sleep(6)  # the monitor of a new cluster tells a while later whether it can grow
        session.run(f"{RUN} --set rollout.num_actors=8", expected=3)
        session.run(f"{RUN} --id demo-a")
        wait_until(lambda: last_step(shared / "runs" / "demo") >= 2, "step 2")
        session.run("jobs stop demo-a")
        session.run("jobs logs demo-a --follow", expected=130)
        session.run(f"{RUN} --id demo-b --follow")
        session.run("jobs list")
    RESULT.write_text(session.text.rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
