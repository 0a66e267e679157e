"""A table is the same wherever it is drawn, and a terminal of 80 columns has room for it."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from benchmarks.overhead.plan import CASES
from benchmarks.report.table import Table

TABLE = Table(
    ("", "ms a step", "times stock", "times stock, by the clock"),
    [(name, "12.34", "1.032 (1.002 to 1.054)", "**1.030**") for name in CASES.values()],
)


def printed(table: Table, width: int) -> str:
    file = io.StringIO()
    table.print(Console(file=file, width=width))
    return file.getvalue()


def test_markdown_and_csv():
    table = Table(("name", "of", "number"), [("a, b", "c", 1.5), ("d", "e", None)], texts=2)
    assert str(table) == "| name | of | number |\n| --- | --- | ---: |\n| a, b | c | 1.5 |\n| d | e | None |"
    assert table.csv() == 'name,of,number\n"a, b",c,1.5\nd,e,\n'


def test_a_narrow_terminal_has_room():
    text = printed(TABLE, 80)
    assert all(len(line) <= 80 for line in text.splitlines())
    for name in CASES.values():
        assert f"  {name} " in text, "the first column is whole"
    for word in ("ms", "step", "times", "stock,", "clock", "12.34", "(1.002", "1.054)", "1.030"):
        assert word in text.split()


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_nothing_is_cut_short(width: int):
    text = printed(TABLE, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for cell in ("1.032", "plugin,", "clock"):
        assert cell in text
