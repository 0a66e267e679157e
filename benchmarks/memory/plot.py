"""The picture: both measures against live tokens, a curve a policy."""

from __future__ import annotations

from pathlib import Path

from benchmarks.memory.plan import FAMILIES
from benchmarks.memory.runs import MEASURES
from benchmarks.quality.variants import FULL_CACHE
from benchmarks.report.parts import Result
from vllm_packcache.tools.figures import new_figure, save

COLOURS = dict(
    zip(
        FAMILIES,
        (
            *("#6b7177", "#2f6fde", "#d1495b", "#e8590c", "#7b5ea7", "#e39aa4", "#9fbdf2", "#b08968", "#17a2c9"),
            *("#2a9d8f", "#e9a23b"),
        ),
        strict=True,
    )
)


def draw(result: Result, path: Path) -> None:
    """Draw what is remembered, as PNG or SVG by the suffix of ``path``."""
    figure = new_figure(11, 5)
    for axes, (measure, title) in zip(figure.subplots(1, 2), MEASURES.items(), strict=True):
        for family, colour in COLOURS.items():
            own = [each for each in result["variants"].values() if each["family"] == family]
            points = [(each["live_tokens"], each["scores"][measure]) for each in own if each["scores"][measure]]
            if not points:
                continue
            means = [100 * found["mean"] for _, found in points]
            errors = [100 * found["ci95"] for _, found in points]
            if family == FULL_CACHE:
                axes.axhline(means[0], color=colour, linestyle="--", linewidth=1, label=family)
                axes.axhspan(means[0] - errors[0], means[0] + errors[0], color=colour, alpha=0.12, linewidth=0)
            else:
                live = [tokens for tokens, _ in points]
                axes.errorbar(live, means, errors, color=colour, marker="o", markersize=4, capsize=2, label=family)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("live tokens when a frame begins")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(fontsize=8, frameon=False)
    save(figure, path, quick=result.get("quick", False))
