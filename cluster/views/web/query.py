"""What the address of a list says: which trajectories, in which order, which page."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlencode

from cluster.views.selection import ORDERS, Selection

PER_PAGE = 50


class BadQuery(ValueError):
    """A value in the address cannot be used."""


@dataclass(frozen=True, slots=True)
class Query:
    """A list as its address names it.

    Attributes:
        selection: Which trajectories.
        order: One of `ORDERS`, or "" for the run's own.
        page: Counted from 1.
    """

    selection: Selection
    order: str = ""
    page: int = 1

    @staticmethod
    def parse(values: Mapping[str, str]) -> Query:
        """Read what a form sends; an empty field asks for nothing.

        Raises:
            BadQuery: If a value is not of its kind.
        """
        given = {name: value for name, value in values.items() if value}
        fields = {name: _value(name, read, given) for name, read in _READ.items()}
        order = given.get("order", "")
        if order and order not in ORDERS:
            raise BadQuery(f"order = {order!r} is none of {', '.join(ORDERS)}")
        page = _value("page", int, given)
        return Query(Selection(**fields), order, max(1, page or 1))

    def address(self, **changes: Any) -> str:
        """Address of this list with some values changed."""
        values = {**asdict(self.selection), "order": self.order, "page": self.page, **changes}
        kept = {k: v for k, v in values.items() if v not in (None, "") and (k, v) != ("page", 1)}
        return "/trajectories" + (f"?{urlencode(kept)}" if kept else "")


_READ: dict[str, Callable[[str], Any]] = {
    "first_step": int,
    "last_step": int,
    "prompt": str,
    "ending": str,
    "min_reward": float,
    "max_reward": float,
    "min_staleness": int,
    "max_staleness": int,
}


def _value(name: str, read: Callable[[str], Any], given: Mapping[str, str]) -> Any:
    if name not in given:
        return None
    try:
        value = read(given[name])
    except ValueError:
        value = math.nan
    if isinstance(value, float) and math.isnan(value):
        kind = "a whole number" if read is int else "a number"
        raise BadQuery(f"{name} = {given[name]!r} is not {kind}")
    return value
