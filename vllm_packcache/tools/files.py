"""Where a measurement is written."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def stem(benchmark: str) -> str:
    """Name of the files of a benchmark's result, without what follows the point."""
    return benchmark.replace("-", "_")


def claim(*paths: Path | None) -> None:
    """Make sure that files can be written, minutes before there is something to write; None is none.

    Raises:
        OSError: one cannot be.
    """
    for path in paths:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Write a measurement as JSON that people can read too: an array of numbers is a line, not a line each."""
    text = re.sub(r"\[[^][{}\"]*\]", lambda match: " ".join(match[0].split()), json.dumps(result, indent=1))
    path.write_text(text + "\n", encoding="utf-8")
