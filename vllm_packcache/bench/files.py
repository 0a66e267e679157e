"""Where a measurement is written."""

from __future__ import annotations

from pathlib import Path


def claim(*paths: Path | None) -> None:
    """Make sure that files can be written, minutes before there is something to write; None is none.

    Raises:
        OSError: one cannot be.
    """
    for path in paths:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
