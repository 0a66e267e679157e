"""One model of a table, drawn as Markdown, as CSV and to the console."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text


@dataclass(frozen=True)
class Table:
    """Rows under headings.

    Args:
        headings: of the columns.
        rows: cells, as many in each as there are headings.
        texts: columns at the left that are no numbers.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[Any]]
    texts: int = 1

    def __str__(self) -> str:
        return self.markdown()

    def markdown(self) -> str:
        """As a page shows it."""
        rule = ["---"] * self.texts + ["---:"] * (len(self.headings) - self.texts)
        return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in (self.headings, rule, *self.rows))

    def csv(self) -> str:
        """As a program reads it; None is an empty cell."""
        file = io.StringIO()
        csv.writer(file, lineterminator="\n").writerows([self.headings, *self.rows])
        return file.getvalue()

    def print(self, console: Console) -> None:
        """As a terminal shows it: what finds no room is wrapped at words, headings before cells."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table as Drawn

        rows = [[styled(str(cell)) for cell in row] for row in (self.headings, *self.rows)]
        columns = [[cell.plain for cell in column] for column in zip(*rows, strict=True)]
        drawn = Drawn(box=SIMPLE_HEAD)
        # Three characters lie between two columns, two on either side of all.
        widths = _widths(columns, console.width - 3 * len(columns) - 1)
        for number, (heading, width) in enumerate(zip(rows[0], widths, strict=True)):
            is_text = number < self.texts
            drawn.add_column(heading, width=width, justify="left" if is_text else "right", overflow="fold")
        for row in rows[1:]:
            drawn.add_row(*row)
        console.print(drawn)


SHORT = 10
"""Characters of a cell that is not wrapped as long as others can be."""

Paragraph = str | Table
"""Of a section: prose, a list, a heading or a picture as Markdown; or a table."""


def _widths(columns: Sequence[Sequence[str]], room: int) -> list[int]:
    """Of columns that have ``room`` together, so that no word is broken: what is wrapped first disturbs least."""
    words = [max((len(word) for cell in column for word in cell.split()), default=0) for column in columns]
    cells = [max(map(len, column[1:]), default=0) for column in columns]
    widths = [max(map(len, column)) for column in columns]
    first, others = (0,), range(1, len(columns))
    for narrowed, wanted in (
        (others, cells),
        (others, [max(SHORT, -(-width // 2)) for width in cells]),
        (first, [room // 2]),
        (others, words),
        (first, words),
    ):
        while sum(widths) > room and (wide := [n for n in narrowed if widths[n] > max(wanted[n], words[n])]):
            widths[max(wide, key=widths.__getitem__)] -= 1
    return widths


def styled(text: str) -> Text:
    """Markdown's bold and code as a terminal shows them, and verdicts in their colours."""
    from rich.text import Text

    shown = Text()
    for part in re.split(r"(\*\*.+?\*\*|`[^`]+`)", text):
        if part.startswith("**"):
            shown.append(part[2:-2], "bold")
        else:
            shown.append(part.strip("`"))
    shown.highlight_words(["MISSED"], "red")
    shown.highlight_regex(r"^met\b", "green")
    return shown
