"""The pages of `align inspect --web` as pictures for cluster/README.md: `python -m tests.bench.screenshots runs/demo-…`.

Needs Chromium and its driver (Debian: `apt-get install chromium chromium-driver`).
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from cluster.record.trajectories import Trajectories
from cluster.views.selection import ORDERS
from cluster.views.web.server import Server
from tests.harness.browser import MISSING, chromium, open_page, resize, screenshot
from tests.places import RESULTS

STEP = 3
WIDTH, HEIGHT = 1280, 940


def main(run: Path) -> None:
    """Write inspect_steps.png and inspect_tokens.png: the steps of a run, and the longest trajectory of step 3."""
    if MISSING:
        sys.exit(MISSING)
    longest = min(Trajectories(run).briefs(STEP), key=ORDERS["longest"].key)
    targets = {
        "inspect_steps.png": "/",
        "inspect_tokens.png": f"/step/{STEP}/ticket/{longest.ticket}/repeat/{longest.repeat}?colour=reward",
    }
    with Server(run, 0) as server, chromium() as browser:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        resize(browser, WIDTH, HEIGHT)
        for name, target in targets.items():
            open_page(browser, server.url + target)
            screenshot(browser, RESULTS / name)
        server.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
