"""Bars that say how far a measurement is."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def counting(console: Console, unit: str) -> Progress:
    """Bars that count something; they vanish at the end.

    Args:
        console: where they are drawn.
        unit: what is counted; may refer to a task's fields, as in ``{task.fields[unit]}``.
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
