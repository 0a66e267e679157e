"""The picture: what a step costs, frame by frame, with every policy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.decode.plan import POLICY
from benchmarks.decode.samples import CPU
from vllm_packcache.tools.figures import new_figure, save

_STYLES = {
    "full": ("#9aa0a6", "o"),
    "packcache": ("#2f6fde", "o"),
    "changed": ("#d1495b", "v"),
    "changed, least": ("#d1495b", "P"),
    "last 2 frames": ("#2a9d8f", "s"),
    "attention sink": ("#e9a23b", "^"),
    "last frame": ("#7b5ea7", "D"),
}
"""Colour and marker of each curve."""


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw `Bench.frames` of a result of `run`, as PNG or SVG by the suffix of ``path``."""
    from matplotlib.ticker import MaxNLocator

    measured = result["frames"]
    frames = measured["frames"]
    numbers = [frame["frame"] for frame in frames]
    # Seconds would be those of one machine.
    unit = median(frames[0][CPU]["full"])
    figure = new_figure(9, 5.5)
    axes = figure.subplots()
    for name in measured["policies"]:
        colour, marker = _STYLES[name]
        steps = [median(frame[CPU][name]) / unit for frame in frames]
        # Policies that keep the same number of tokens lie on one another: a dot shows through a ring.
        dot = {"markersize": 4, "zorder": 3} if name == POLICY.name else {"markersize": 8, "markerfacecolor": "none"}
        axes.plot(numbers, steps, color=colour, marker=marker, linewidth=1.2, label=_label(name, measured), **dot)
    axes.set_title(
        f"A video of {numbers[-1] + 1} frames of {measured['tokens_per_frame']:,} tokens: "
        "what it costs to generate a token in the middle of each",
        loc="left",
        fontsize=11,
    )
    axes.set_xlabel("frame")
    axes.set_ylabel("processor time of a step, frame 0 with the full cache = 1")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", frameon=False)
    save(figure, path, quick=result["quick"])


def _label(name: str, measured: Mapping[str, Any]) -> str:
    ratio = f"full / {name}"
    whole, last = measured["end_to_end"]["ratios"], measured["last"]["ratios"]
    if ratio not in whole:
        return f"{name} cache (stock vLLM)"
    medians = f"{whole[ratio][CPU]['median']:.2f} x as fast end to end, {last[ratio][CPU]['median']:.2f} x in the last"
    return f"{name}: {medians}"
