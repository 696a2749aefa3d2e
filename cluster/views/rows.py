"""Rows of figures and texts for a console of any width, of which nothing is ever cut off."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

_LEAST_TEXT = 20  # columns of the console that a text folds into, beside figures
_PADDING = 2


class Rows:
    """A table, as long as the console is wide enough for its figures.

    On a narrower one headings break at their spaces, then each row becomes a paragraph. Cells are text as it is: brackets and
    colons in them mean nothing to rich.

    Args:
        headings: Of the columns.
        texts: Headings of the columns of text, which folds; the others hold figures, which are never broken.
        title: Above all.
        caption: Below all.
    """

    def __init__(
        self, headings: Sequence[str], texts: Collection[str] = (), title: str = "", caption: str = ""
    ) -> None:
        self._headings, self._texts = headings, texts
        self._title, self._caption = Text(title, "table.title"), Text(caption, "table.caption")
        self._rows: list[list[Text]] = []

    def add(self, *cells: str | Text) -> None:
        """Add a row."""
        self._rows.append([cell if isinstance(cell, Text) else Text(cell) for cell in cells])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """See rich's protocol for what it prints."""
        for headings in (self._headings, [heading.replace(" ", "\n") for heading in self._headings]):
            if self._least_width(headings) <= options.max_width:
                yield self._table(headings)
                return
        yield from filter(None, [self._title, *map(self._paragraph, self._rows), self._caption])

    def _least_width(self, headings: Sequence[str]) -> int:
        columns = zip(headings, self._is_text, *self._rows, strict=True)
        return sum(
            min(_width(heading, cells), _LEAST_TEXT if is_text else 10**6) + _PADDING
            for heading, is_text, *cells in columns
        )

    @property
    def _is_text(self) -> list[bool]:
        return [heading in self._texts for heading in self._headings]

    def _table(self, headings: Sequence[str]) -> Table:
        table = Table(title=self._title or None, caption=self._caption or None, box=None)
        for heading, is_text in zip(headings, self._is_text, strict=True):
            table.add_column(heading, justify="left" if is_text else "right", no_wrap=not is_text, overflow="fold")
        for row in self._rows:
            table.add_row(*row)
        return table

    def _paragraph(self, row: Sequence[Text]) -> Text:
        cells = list(zip(self._headings, self._is_text, row, strict=True))
        figures = [Text(f"{heading} ".lstrip()) + cell for heading, is_text, cell in cells if not is_text]
        return Text("\n").join([Text(", ").join(figures), *(cell for _, is_text, cell in cells if is_text), Text()])


def _width(heading: str, cells: Sequence[Text]) -> int:
    return max(text.cell_len for whole in (Text(heading), *cells) for text in whole.split("\n", allow_blank=True))
