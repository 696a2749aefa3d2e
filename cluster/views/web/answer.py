"""What a request is answered with, and what a browser may do with it."""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus

_NOTHING_ELSE = "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
POLICY = f"default-src 'none'; style-src 'self'; img-src data:; {_NOTHING_ELSE}"
REPORT_POLICY = f"default-src 'none'; style-src 'unsafe-inline'; {_NOTHING_ELSE}"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request is answered with."""

    status: HTTPStatus
    headers: dict[str, str]
    body: bytes

    @staticmethod
    def page(html: str, status: HTTPStatus = HTTPStatus.OK, policy: str = POLICY) -> Answer:
        """A page; what UTF-8 cannot hold becomes a question mark."""
        headers = {"Content-Type": "text/html; charset=utf-8", "Content-Security-Policy": policy}
        return Answer(status, headers, html.encode("utf-8", errors="replace"))

    @staticmethod
    def text(status: HTTPStatus, text: str, kind: str = "plain") -> Answer:
        """Text that is no page."""
        return Answer(status, {"Content-Type": f"text/{kind}; charset=utf-8"}, text.encode())
