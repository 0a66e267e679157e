"""The picture: quality over the frames."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.long_video.plan import COPY, FORCED, GENERATED, VARIANTS
from vllm_packcache.tools.figures import new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {variant.name: variant.colour for variant in VARIANTS} | {COPY: "#c9c9c9"}
"""Of the curves in the plot."""


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw the curves of a result of `run` as a PNG or SVG, as the name says."""
    figure = new_figure(11, 8)
    forced, generated = figure.subplots(2, 1, sharex=True)
    _draw_curves(forced, result, FORCED, "changed_tokens_right")
    forced.set_title("given the true past: tokens that differ from the last frame", loc="left", fontsize=11)
    _draw_curves(generated, result, GENERATED, "tokens_right")
    generated.set_title("generated from the condition alone: all tokens", loc="left", fontsize=11)
    generated.set_xlabel("frame")
    # No picture has all the curves.
    lines = {line.get_label(): line for axes in (forced, generated) for line in axes.get_lines()}
    names = [name for name in _COLOURS if name in lines]
    figure.legend([lines[name] for name in names], names, loc="outside upper center", ncols=4, frameon=False)
    save(figure, path)


def _draw_curves(axes: Axes, result: Mapping[str, Any], measurement: str, measure: str) -> None:
    frames = np.arange(1, result["frames"] + 1)
    for name, scores in result[measurement].items():
        if name in _COLOURS:
            share = np.array(scores[measure]["by_frame"], dtype=np.float64)
            axes.plot(frames, 100 * share, color=_COLOURS[name], label=name, linewidth=1.4)
    trained = result["trained_frames"]
    axes.axvline(trained + 0.5, color="#555555", linewidth=1, linestyle="--")
    axes.annotate(
        f"trained on {trained} frames",
        (trained + 0.5, 0.02),
        xycoords=("data", "axes fraction"),
        xytext=(4, 0),
        textcoords="offset points",
        fontsize=9,
        color="#555555",
    )
    axes.set_ylabel("right, %")
    axes.set_xlim(1, result["frames"])
    axes.spines[["top", "right"]].set_visible(False)
