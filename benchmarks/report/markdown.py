"""Numbers, links and pictures as Markdown."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def number(value: float, digits: int) -> str:
    """With digits after the point and thousands separated."""
    # Adding 0 makes of -0.0, which a small negative number is rounded to, 0.0.
    return f"{round(value, digits) + 0.0:,.{digits}f}"


def significant(value: float, digits: int = 3) -> str:
    """With so many digits that say something, and no fewer than are before the point."""
    return number(value, 0 if value == 0 else max(0, _decimals(value, digits)))


def _decimals(value: float, digits: int) -> int:
    """Digits after the point that show so many digits of a number that is not 0; negative: fewer than it has before."""
    return digits - 1 - math.floor(math.log10(abs(value)))


def percent(share: float, digits: int = 1) -> str:
    """A share of 1."""
    return f"{number(100 * share, digits)} %"


def ratio(value: float) -> str:
    """Small ratios are looked at more closely."""
    return number(value, _digits(value))


def with_quartiles(summary: Mapping[str, Any]) -> str:
    """Median and quartiles of a ratio."""
    digits = _digits(summary["median"])
    low, high = (number(quartile, digits) for quartile in summary["quartiles"])
    return f"{number(summary['median'], digits)} ({low} to {high})"


def _digits(value: float) -> int:
    if 0 < abs(value) < 0.001:
        # One that says something, not a row of zeros.
        return _decimals(value, 1)
    return 3 if value < 2 else 2


def listed(words: Sequence[str]) -> str:
    """As in a sentence."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


@dataclass(frozen=True)
class Files:
    """The files of a folder of results, as a text names them.

    Args:
        folder: of the results.
        base: folder of the text.
    """

    folder: Path
    base: Path

    def link(self, name: str) -> str:
        """A file's name, linked."""
        path = self._path(name)
        return f"[`{path}`]({path})"

    def picture(self, stem: str, caption: str) -> list[str]:
        """A picture as a paragraph; none, if there is none."""
        name = f"{stem}.png"
        path = self.folder / name
        return [f"![{caption}]({self._path(name)})"] if path.is_file() and path.stat().st_size else []

    def _path(self, name: str) -> str:
        return Path(os.path.relpath(self.folder / name, self.base)).as_posix()
