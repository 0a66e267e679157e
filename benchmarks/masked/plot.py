"""The picture: ratios with their goals and floors, and memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.decode.samples import CPU
from benchmarks.masked.report import GB
from vllm_packcache.tools.figures import new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MEASURED, _RECKONED, _GOAL, _OTHER = "#2f6fde", "#a9c4f5", "#c0392b", "#9aa0a6"

NAMES = {
    "full / packcache": "full / packcache",
    "packcache / short": "packcache / as if short",
    "together / apart": "in one batch / one by one",
}


Bar = tuple[str, float, tuple[float, float] | None, float | None]
"""Name, value, spread and goal."""


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw a result of `run`, as PNG or SVG by the suffix of ``path``."""
    figure = new_figure(10, 4)
    ratios, memory = figure.subplots(1, 2, width_ratios=(3, 2))
    _ratios(ratios, result)
    _memory(memory, result["memory"])
    figure.suptitle(f"{result['is']}", x=0.01, ha="left", fontsize=9, wrap=True)
    save(figure, path, quick=result["quick"])


def _ratios(axes: Axes, result: Mapping[str, Any]) -> None:
    """A bar and a goal each; the floor beside the first."""
    bars: list[Bar] = []
    for target in result["targets"]:
        part = "batch" if target["ratio"] == "together / apart" else "last_frame"
        found = result[part]["whole_frame"]["ratios"][target["ratio"]][CPU]
        goal = target.get("at_least", target.get("at_most"))
        bars.append((NAMES[target["ratio"]], found["median"], (found["min"], found["max"]), goal))
    floor = result["last_frame"]["floors"]["whole_frame"]["full / packcache"]
    bars.insert(1, ("the same by arithmetic: the floor", floor, None, None))
    for row, (_, value, spread, goal) in enumerate(bars):
        axes.barh(row, value, height=0.6, color=_RECKONED if spread is None else _MEASURED)
        if spread is not None:
            axes.plot(spread, (row, row), color="black", linewidth=1.2)
        if goal is not None:
            axes.plot((goal, goal), (row - 0.42, row + 0.42), color=_GOAL, linewidth=2)
        axes.annotate(f"{value:.2f}", (_end(bars[row]), row), (6, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(bars)), [name for name, *_ in bars])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max(map(_end, bars)))
    axes.set_xlabel("ratio of processor time; red: the goal")
    axes.spines[["top", "right"]].set_visible(False)


def _end(bar: Bar) -> float:
    """Where a bar, its spread and its goal end."""
    _, value, spread, goal = bar
    return max(value, goal or 0, *(spread or ()))


def _memory(axes: Axes, memory: Mapping[str, Any]) -> None:
    """KV cache of both streams, and the mask that the published code needs."""
    bars = {
        "packcache: KV cache": (memory["kv_bytes"]["packcache"], _MEASURED),
        "full: KV cache": (memory["kv_bytes"]["full"], _OTHER),
        "published code: mask alone": (memory["published_mask_bytes"], _OTHER),
    }
    for row, (held, colour) in enumerate(bars.values()):
        axes.barh(row, held / GB, height=0.6, color=colour)
        axes.annotate(f"{held / GB:.3g}", (held / GB, row), (4, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(bars)), list(bars))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.2 * max(held for held, _ in bars.values()) / GB)
    axes.set_xlabel("GB held at most")
    axes.spines[["top", "right"]].set_visible(False)
