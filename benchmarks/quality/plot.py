"""The results as a table for programs and as pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from benchmarks.quality.measures import MEASURES, Measure
from benchmarks.quality.variants import FULL_CACHE, PACKCACHE, under
from benchmarks.report.parts import Result
from benchmarks.report.table import Table
from vllm_packcache.tools.figures import FORMATS, new_figure, save

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {
    FULL_CACHE: "#6b7177",
    "packcache": "#2f6fde",
    "changed": "#d6336c",
    "last frame, evenly": "#e8a0b8",
    "packcache, absolute": "#d1495b",
    "packcache, not anchored": "#8c564b",
    "last 2 frames": "#2a9d8f",
    "last frame": "#7b5ea7",
    "last frame, absolute": "#c08adf",
    "last frames": "#2a9d8f",
    "attention sink": "#e9a23b",
    "random blocks": "#9aa0a6",
    "strided blocks": "#17a2c9",
}
"""Of variants and of the families of the frontier."""


class Pictures(NamedTuple):
    """Names of a benchmark's pictures, without what follows the point.

    Args:
        chart: quality over the frames, or over scales of guidance.
        videos: one world under every variant; empty: there is none.
    """

    chart: str
    videos: str


PICTURES = {
    "quality": Pictures("by_frame", "videos"),
    "quality-cached": Pictures("quality_cached", "videos_cached"),
    "quality-history": Pictures("quality_history", "videos_history"),
    "quality-guided": Pictures("quality_guided", "videos_guided"),
    "quality-masked": Pictures("quality_masked", "videos_masked"),
    "quality-passes": Pictures("quality_passes", ""),
}
"""By benchmark, so that all can lie in one folder."""

FRONTIER = "frontier"
"""Name of the picture of the frontier, which one benchmark has."""


def cell(found: Mapping[str, float] | None, measure: Measure) -> str:
    """A mean and its confidence interval."""
    if found is None:
        return "n/a"
    digits, factor = measure.digits, measure.factor
    return f"{factor * found['mean']:.{digits}f} ± {factor * found['ci95']:.{digits}f}"


def write_csv(result: Result, path: Path) -> None:
    """Every mean as a row."""
    headings = ("table", "name", "budget", "live_tokens", "measure", "span", "mean", "ci95")
    path.write_text(Table(headings, list(_rows(result))).csv(), encoding="utf-8", newline="\r\n")


def _rows(result: Result) -> Iterator[list[Any]]:
    for name, scores in result["scores"].items():
        live = result["variants"].get(name, {}).get("live_tokens")
        for label, score in scores.items():
            for span, found in score["spans"].items():
                yield ["scores", name, None, live, label, span, *_numbers(found)]
    for name, measures in result["differences"].items():
        for label, by_span in measures.items():
            for span, found in by_span.items():
                yield ["differences", name, None, None, label, span, *_numbers(found)]
    for point in result["frontier"]:
        for label, found in point["scores"].items():
            row = ["frontier", point["name"], point["budget"], point["live_tokens"]]
            yield [*row, label, result["spans"][0], *_numbers(found)]


def _numbers(found: Mapping[str, float] | None) -> list[float | None]:
    return [None, None] if found is None else [found["mean"], found["ci95"]]


def draw_frontier(result: Result, path: Path) -> None:
    """Draw quality against live tokens, as PNG or SVG by the suffix of ``path``."""
    figure = new_figure(11, 7)
    (full,) = (point for point in result["frontier"] if point["family"] == FULL_CACHE)
    families = dict.fromkeys(point["family"] for point in result["frontier"] if point is not full)
    for axes, (label, measure) in zip(figure.subplots(2, 3).flat, MEASURES.items(), strict=True):
        for family in families:
            points = [point for point in result["frontier"] if point["family"] == family]
            points = [point for point in points if point["scores"][label] is not None]
            means = [measure.factor * point["scores"][label]["mean"] for point in points]
            errors = [measure.factor * point["scores"][label]["ci95"] for point in points]
            axes.errorbar(
                [point["live_tokens"] for point in points],
                means,
                errors,
                color=COLOURS[family],
                label=family,
                marker="o",
                markersize=4,
                linewidth=2 if family == "packcache" else 1.2,
                elinewidth=0.8,
                capsize=2,
                zorder=3 if family == "packcache" else 2,
            )
        if full["scores"][label] is not None:
            best = measure.factor * full["scores"][label]["mean"]
            error = measure.factor * full["scores"][label]["ci95"]
            axes.axhline(best, color=COLOURS[FULL_CACHE], linewidth=1, linestyle="--", label=FULL_CACHE)
            axes.axhspan(best - error, best + error, color=COLOURS[FULL_CACHE], alpha=0.12, linewidth=0)
        axes.set_title(measure.title, loc="left", fontsize=10)
        _live_token_axis(axes, sorted({point["live_tokens"] for point in result["frontier"]}))
    figure.supxlabel(f"tokens of the past that are read, {result['spans'][0]}", fontsize=10)
    _legend(figure)
    save(figure, path, quick=result.get("quick", False))


def _live_token_axis(axes: Axes, live: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xlim(live[0] / 1.1, live[-1] * 1.1)
    # Points of equal budgets differ by a block.
    ticks = [tokens for before, tokens in zip([0, *live], live, strict=False) if tokens > 1.1 * before]
    axes.set_xticks(ticks, [f"{tokens:,}" for tokens in ticks], fontsize=7)
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)


def draw_by_frame(result: Result, path: Path) -> None:
    """Draw quality over the frames, as PNG or SVG by the suffix of ``path``."""
    colours = {name: colour for name, colour in COLOURS.items() if name in result["scores"]}
    # What somebody named is called as its policy is, and has no colour of its own.
    others = [name for name, own in result["variants"].items() if name == own["policy"] and name not in COLOURS]
    colours |= {name: f"C{number % 10}" for number, name in enumerate(others)}
    figure = new_figure(11, 7)
    for axes, (label, measure) in zip(figure.subplots(2, 3, sharex=True).flat, MEASURES.items(), strict=True):
        for name, colour in colours.items():
            values = np.array(result["scores"][name][label]["by_frame"], dtype=np.float64)
            axes.plot(
                np.arange(1, len(values) + 1),
                measure.factor * values,
                color=colour,
                label=name,
                linewidth=2 if name == "packcache" else 1.2,
                zorder=3 if name == "packcache" else 2,
            )
        axes.axvline(result["trained_frames"] + 0.5, color="#555555", linewidth=0.8, linestyle="--")
        axes.set_title(measure.title, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(f"frame (dashed: {result['trained_frames']}, as many as the model was trained on)", fontsize=10)
    _legend(figure)
    save(figure, path, quick=result.get("quick", False))


def draw_by_scale(result: Result, path: Path) -> None:
    """Draw quality within the trained length against the scale of guidance, as PNG or SVG by the suffix of ``path``."""
    figure, span = new_figure(11, 7), result["spans"][0]
    variants = result["variants"]
    policies = [name for name, own in variants.items() if "guidance" not in own]
    scales = [1, *dict.fromkeys(own["guidance"] for own in variants.values() if "guidance" in own)]
    colours = {name: COLOURS.get(name, f"C{number % 10}") for number, name in enumerate(policies)}
    for axes, (label, measure) in zip(figure.subplots(2, 3, sharex=True).flat, MEASURES.items(), strict=True):
        for name in policies:
            found = {scale: result["scores"][under(name, scale)][label]["spans"][span] for scale in scales}
            points = {scale: own for scale, own in found.items() if own is not None}
            axes.errorbar(
                list(points),
                [measure.factor * own["mean"] for own in points.values()],
                [measure.factor * own["ci95"] for own in points.values()],
                color=colours[name],
                label=name,
                marker="o",
                markersize=4,
                elinewidth=0.8,
                capsize=2,
            )
        axes.set_xticks(scales, [f"{scale:g}" for scale in scales])
        axes.set_title(measure.title, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(f"scale of guidance (1: none), {span}", fontsize=10)
    _legend(figure)
    save(figure, path, quick=result.get("quick", False))


def base_of(result: Result) -> str:
    """What each format is compared with."""
    bases = {name.partition(" - ")[2] for name in result["differences"]}
    return bases.pop() if len(bases) == 1 else "the same policy in bfloat16"


def draw_differences(result: Result, path: Path) -> None:
    """Draw every difference with its interval, as PNG or SVG by the suffix of ``path``."""
    span, names = result["spans"][0], list(result["differences"])
    figure = new_figure(13, 1.6 + 0.5 * len(names))
    for axes, (label, measure) in zip(figure.subplots(2, 3, sharey=True).flat, MEASURES.items(), strict=True):
        for row, name in enumerate(names):
            found = result["differences"][name][label][span]
            if found is not None:
                mean, error = measure.factor * found["mean"], measure.factor * found["ci95"]
                axes.errorbar(mean, row, xerr=error, color=COLOURS[PACKCACHE], marker="o", markersize=4, capsize=2)
        axes.axvline(0, color="#555555", linewidth=0.8, linestyle="--")
        axes.set_yticks(range(len(names)), [name.partition(" - ")[0] for name in names], fontsize=7)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.locator_params(axis="x", nbins=5)
        axes.set_title(measure.title, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(f"more than {base_of(result)}, world by world, {span}", fontsize=10)
    save(figure, path, quick=result.get("quick", False))


def draw_videos(strips: Mapping[str, Any], path: Path) -> None:
    """Write one picture as PNG and SVG: one world under every variant, some of its frames.

    Args:
        strips: ``prompt``, ``frames`` (their numbers, n) and ``rows``: uint8 [up to n, 64, 64, 3] by name.
        path: where to, without what follows the point.
    """
    rows, frames = strips["rows"], strips["frames"]
    figure = new_figure(1.05 * len(frames) + 2.4, 1.12 * len(rows) + 0.5)
    grid = figure.subplots(len(rows), len(frames), squeeze=False)
    for line, (name, pictures) in zip(grid, rows.items(), strict=True):
        for number, axes in enumerate(line):
            axes.set_axis_off()
            if number < len(pictures):
                axes.imshow(pictures[number], interpolation="nearest")
        line[0].text(-0.08, 0.5, name.replace(", ", ",\n"), transform=line[0].transAxes, ha="right", va="center")
    for axes, frame in zip(grid[0], frames, strict=True):
        axes.set_title(f"frame {frame}", fontsize=9)
    figure.suptitle(strips["prompt"], fontsize=10)
    for suffix in FORMATS:
        save(figure, path.with_suffix(suffix))


def _legend(figure: Figure) -> None:
    """One for all panels: no panel need have all the curves."""
    handles: dict[str, Artist] = {}
    for axes in figure.axes:
        own, names = axes.get_legend_handles_labels()
        handles |= dict(zip(names, own, strict=True))
    labels = list(handles)
    figure.legend(list(handles.values()), labels, loc="outside upper center", ncols=5, frameon=False, fontsize=9)
