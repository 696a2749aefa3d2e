"""The pages: each is made from the run folder at the moment it is asked for, so a run under way shows what it has.

No address names a file: what is served is what a route makes. Everything shown is data of the run and escaped.
"""

from __future__ import annotations

import re
import threading
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from align.data.types import FinishReason
from align.metrics import GLOSSARY
from cluster.faults import ConfigError
from cluster.record.history import read_rows
from cluster.record.trajectories import Brief, Row, Trajectories, excerpt
from cluster.views import report
from cluster.views.credit import PULL, PULL_MEANING, Credits, CreditUnknown, step_credits
from cluster.views.numbers import number
from cluster.views.run_record import read_run
from cluster.views.selection import ORDERS, Selection, Summary, extremes
from cluster.views.status import state
from cluster.views.web.answer import REPORT_POLICY, Answer
from cluster.views.web.colours import MEASURES
from cluster.views.web.moved import moved
from cluster.views.web.notation import exact, minus, scientific
from cluster.views.web.query import PER_PAGE, BadQuery, Query
from cluster.views.web.tokens import Colouring, Token, tokens

FOLDER = Path(__file__).parent


class Pages:
    """The pages of one run.

    Args:
        run: The run folder.

    Raises:
        ConfigError: If it holds no run.
    """

    def __init__(self, run: Path) -> None:
        if not (run / "config.toml").is_file():
            raise ConfigError(f"{run} holds no run", "name a run folder, e.g. runs/demo-…")
        self.run = run
        self.found = Trajectories(run)
        self._drawing = threading.Lock()  # matplotlib's settings are the whole process's
        self.templates = report.templates(FOLDER, FOLDER.parent)
        self.templates.filters |= {
            "excerpt": excerpt,
            "exact": exact,
            "scientific": scientific,
            "tick": lambda value: minus(f"{value:.2g}"),
            "number": lambda value: minus(number(value)),
        }

    def answer(self, target: str) -> Answer:
        """Answer a GET of this path and query."""
        address = urlsplit(target)
        values = dict(parse_qsl(address.query))
        try:
            made = self._route(address.path, values)
        except ConfigError as error:
            return self._sorry(HTTPStatus.NOT_FOUND, error.message, error.advice)
        except BadQuery as error:
            return self._sorry(HTTPStatus.BAD_REQUEST, str(error), "Correct the address.")
        return made if isinstance(made, Answer) else Answer.page(made)

    def _route(self, path: str, values: Mapping[str, str]) -> str | Answer:
        for route, make in _ROUTES.items():
            if match := route.fullmatch(path):
                return make(self, values, *map(int, match.groups()))
        raise ConfigError("There is no such page.", "The steps are a good place to start.")

    def _sorry(self, status: HTTPStatus, what: str, advice: str) -> Answer:
        return Answer.page(self._render("sorry", what=what, advice=advice), status)

    def _render(self, name: str, **content: Any) -> str:
        cfg = tomllib.loads((self.run / "config.toml").read_text(encoding="utf-8"))
        return self.templates.get_template(f"{name}.html.j2").render(
            run=self.run,
            run_name=cfg["run"]["name"],
            num_steps=cfg["run"]["steps"],
            steps=list(self.found.files),
            state=state(self.run),
            now=time.strftime("%H:%M:%S"),
            page=name,
            **content,
        )

    def style(self, _: Mapping[str, str]) -> Answer:
        """The one style sheet."""
        sheets = (FOLDER.parent / "style.css", FOLDER / "inspect.css")
        return Answer.text(HTTPStatus.OK, "".join(sheet.read_text(encoding="utf-8") for sheet in sheets), "css")

    def report(self, _: Mapping[str, str]) -> Answer:
        """report.html with links to the other pages, from the folder as it is now."""
        record = read_run(self.run)
        with self._drawing:
            html = report.render_page(record, GLOSSARY, report.paths_of(self.run), served=True)
        return Answer.page(html, policy=REPORT_POLICY)

    def overview(self, _: Mapping[str, str]) -> str:
        """A line per step, and the extremes of the run."""
        briefs = Selection().of(self.found)
        by_step: dict[int, list[Brief]] = {}
        for brief in briefs:
            by_step.setdefault(brief.step, []).append(brief)
        lines = [(step, Summary.of(of_step), self._metrics.get(step, {})) for step, of_step in by_step.items()]
        return self._render(
            "overview", lines=lines, extremes=extremes(briefs), query=Query(Selection()), orders=ORDERS, endings=ENDINGS
        )

    @property
    def _metrics(self) -> dict[int, dict[str, Any]]:
        path = self.run / "metrics.jsonl"
        return {row["step"]: row for row in (read_rows(path) if path.is_file() else [])}

    def listing(self, values: Mapping[str, str]) -> str:
        """The trajectories that an address selects."""
        query = Query.parse(values)
        briefs = query.selection.of(self.found)
        if query.order:
            briefs.sort(key=ORDERS[query.order].key)
        num_pages = max(1, -(-len(briefs) // PER_PAGE))
        page = min(query.page, num_pages)
        return self._render(
            "listing",
            query=query,
            briefs=briefs[(page - 1) * PER_PAGE : page * PER_PAGE],
            summary=Summary.of(briefs) if briefs else None,
            extremes=extremes(briefs),
            at=page,
            num_pages=num_pages,
            orders=ORDERS,
            endings=ENDINGS,
        )

    def step(self, _: Mapping[str, str], step: int) -> str:
        """What moved the loss at a step, and its groups."""
        briefs = self.found.briefs(step)
        credits, unknown = self._credits(step)
        groups: dict[int, list[Brief]] = {}
        for brief in briefs:
            groups.setdefault(brief.ticket, []).append(brief)
        return self._render(
            "step",
            step=step,
            summary=Summary.of(briefs),
            metrics=self._metrics.get(step, {}),
            extremes=extremes(briefs),
            groups=[(of_ticket[0], Summary.of(of_ticket)) for of_ticket in groups.values()],
            moved=moved(self.found.rows(step), credits, self._tokenizer) if credits else None,
            unknown=unknown,
            formula=PULL,
            meaning=PULL_MEANING,
        )

    def _credits(self, step: int) -> tuple[Credits, str]:
        """Those of a step, or why they are not known."""
        try:
            return step_credits(self.found, step), ""
        except CreditUnknown as unknown:
            return {}, str(unknown)

    @cached_property
    def _tokenizer(self) -> Any:
        """None where the folder of the policy is not at hand."""
        try:
            return self.found.tokenizer()
        except ConfigError:
            return None

    def group(self, values: Mapping[str, str], step: int, ticket: int) -> str:
        """All trajectories of a prompt beside each other."""
        rows = self.found.group(step, ticket)
        shown, content = self._shown(step, rows, values)
        tickets = list(dict.fromkeys(brief.ticket for brief in self.found.briefs(step)))
        return self._render(
            "group",
            columns=list(zip(rows, shown, strict=True)),
            mean=sum(row["reward"] for row in rows) / len(rows),
            neighbours=neighbours(tickets, ticket),
            **content,
        )

    def trajectory(self, values: Mapping[str, str], step: int, ticket: int, repeat: int) -> str:
        """One trajectory token by token."""
        rows = self.found.group(step, ticket)
        repeats = [row["repeat"] for row in rows]
        if repeat not in repeats:
            raise ConfigError(f"ticket {ticket} has no repeat {repeat}", f"it has {len(rows)}, counted from 0")
        row = rows[repeats.index(repeat)]
        (shown,), content = self._shown(step, [row], values)
        parts = [(f"Reward: {name}", number(v)) for name, v in (row.get("reward_parts") or {}).items() if v is not None]
        content |= {"parts": parts, "neighbours": neighbours(repeats, repeat)}
        return self._render("trajectory", row=row, tokens=shown, **content)

    def _shown(
        self, step: int, rows: Sequence[Row], values: Mapping[str, str]
    ) -> tuple[list[list[Token]], dict[str, Any]]:
        """Tokens of each row, and what a page with them needs."""
        credits, unknown = self._credits(step)
        shown = [tokens(row, self._tokenizer, credits.get((row["ticket"], row["repeat"]))) for row in rows]
        return shown, {
            "step": step,
            "ticket": rows[0]["ticket"],
            "colouring": Colouring.of([token for of_row in shown for token in of_row], values.get("colour")),
            "measures": MEASURES,
            "unknown": unknown,
            "has_text": self._tokenizer is not None,
        }

    def sample(self, _: Mapping[str, str], number: int) -> Answer:
        """On to the trajectories of a training prompt of the report."""
        samples = read_run(self.run).samples.get("train", [])
        if number >= len(samples) or not isinstance(samples[number].get("prompt"), str):
            raise ConfigError(f"the report has no training sample {number}", f"it has {len(samples)}, counted from 0")
        target = "/trajectories?" + urlencode({"prompt": samples[number]["prompt"]}, errors="replace")
        return Answer(HTTPStatus.SEE_OTHER, {"Location": target}, b"")


ENDINGS = tuple(reason.value for reason in FinishReason if reason is not FinishReason.ABORT)
_ROUTES: dict[re.Pattern[str], Callable[..., str | Answer]] = {
    re.compile(r"/"): Pages.overview,
    re.compile(r"/style\.css"): Pages.style,
    re.compile(r"/report"): Pages.report,
    re.compile(r"/sample/(\d{1,9})"): Pages.sample,
    re.compile(r"/trajectories"): Pages.listing,
    re.compile(r"/step/(\d{1,9})"): Pages.step,
    re.compile(r"/step/(\d{1,9})/ticket/(\d{1,9})"): Pages.group,
    re.compile(r"/step/(\d{1,9})/ticket/(\d{1,9})/repeat/(\d{1,9})"): Pages.trajectory,
}


def neighbours(numbers: Sequence[int], number: int) -> tuple[int | None, int | None]:
    """The ones before and after a number."""
    at = numbers.index(number)
    return numbers[at - 1] if at else None, numbers[at + 1] if at + 1 < len(numbers) else None
