"""What a calibration says, as tables, sentences, a plot and a configuration file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vllm_packcache.calibrate.decay import PAPER_DECAY
from vllm_packcache.calibrate.mass import IMAGE, NEAREST, OLDER, OWN, TEXT
from vllm_packcache.tools.figures import new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GOOD_FIT = 0.9
"""R^2 from which on the exponential is called a description."""

FAR_OFF = 1.25
"""Measured and fitted mass that differ by more than this factor are marked in the table."""


def print_tables(result: Mapping[str, Any], console: Console) -> None:
    """Print the masses, the fit, and what configurations keep."""
    console.print(_mass_table(result))
    if "views" in result:
        console.print(_view_table(result))
    for sentence in sentences(result):
        console.print(sentence)
    console.print(_kept_table(result))


def sentences(result: Mapping[str, Any]) -> Iterator[str]:
    """What the numbers say of the decay."""
    fit, distances = result["fit"], result["largest_distance"]
    rho, r_squared, interval = fit["rho"], fit["r_squared"], fit["interval"]
    spread = "one video gives no interval" if interval is None else _between(interval, "95 % CI {:.3f} to {:.3f}")
    layers = fit["rho_by_layer"]
    yield (
        f"Fitted over distances 1 to {distances}: rho = {rho:.3f} ({spread}), R^2 = {r_squared:.3f}; "
        f"in single layers rho is {min(layers):.3f} to {max(layers):.3f}."
    )
    if rho >= 1:
        yield f"Attention does not decay with temporal distance: decay is set to {fit['decay']:g}, the most it can be."
    elif fit["decay"] != round(rho, 4):
        yield f"Attention is all on the previous frame: decay is set to {fit['decay']:g}, the least it can be."
    if r_squared < GOOD_FIT:
        yield (
            f"The exponential describes these masses badly (R^2 below {GOOD_FIT:g}): trust the mass that is "
            "kept, not rho."
        )
    if fit["half_in_interval"] is None:
        yield f"Whether the paper's rho = {PAPER_DECAY:g} fits cannot be said of one video."
    else:
        lies = "inside" if fit["half_in_interval"] else "outside"
        yield f"The paper's rho = {PAPER_DECAY:g} lies {lies} the interval."
    trained = result["trained_frames"]
    if trained is not None and result["frames"] > trained:
        yield f"The model was trained on videos of {trained} frames: what it does after them says little."
    suggestion = result["suggestion"]
    if pair := _pair(result):
        own, paper = pair
        more = "more" if own["kept_measured"] > paper["kept_measured"] else "no more"
        shares = f"{_percent(own['kept_measured'])} and {_percent(paper['kept_measured'])}"
        yield (
            f"At the same history_frames = {own['history_frames']:g} and window = {own['window']}, the fitted rho "
            f"keeps {more} than the paper's: {shares} of all attention, measured on the blocks that live."
        )
    if suggestion is not None and suggestion["kept_measured"] < result["target"]:
        yield (
            f"On the blocks that live the suggestion keeps less than the target of {_percent(result['target'])}: "
            "within a frame, attention is not even."
        )
    if "changed" in result:
        yield from _about_changes(result)


def _about_changes(result: Mapping[str, Any]) -> Iterator[str]:
    """What changes, and what it takes to keep it."""
    changed = result["changed"]
    own, spatial = changed["suggestion"], changed["spatial"]
    yield _what_changes(result)
    if not changed["told_apart"]:
        yield "Most blocks differ in all of their tokens: selection = changed has nothing to choose by."
    evenly = "" if spatial is None else f", and spread evenly at the same size {_percent(spatial['kept_measured'])}"
    yield (
        f"With selection = changed, history_frames = {own['history_frames']:g}, window = {own['window']} and "
        f"changed_tokens = {own['changed_tokens']} there is room for {_percent(own['held'])} of the blocks that change "
        f"within the window; they keep {_percent(own['kept_measured'])} of all attention{evenly}."
    )
    # Of every budget the longest window: a shorter one costs as much.
    longest = {history: window for window, history in changed["windows"]}
    yield (
        f"Room for {100 * result['target']:g} % of what changes takes "
        f"{', '.join(f'{history:g} frames for a window of {window}' for history, window in longest.items())}."
    )


def _what_changes(result: Mapping[str, Any]) -> str:
    changed = result["changed"]
    return (
        f"From one frame to the next {_percent(changed['tokens'])} of the tokens differ; "
        f"{changed['suggestion']['changed_tokens']} or more differ in {_percent(changed['blocks'])} of the blocks of "
        f"{result['block_size']}."
    )


def _pair(result: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
    """The same budget and window with the fitted decay and with the paper's; None: one of the two is impossible."""
    rows = [*([result["suggestion"]] if result["suggestion"] else []), *result["compared"]]
    for paper in rows:
        own = rows[0]
        same = all(own[option] == paper[option] for option in ("history_frames", "window"))
        if own["decay"] == result["fit"]["decay"] and paper is not own and same:
            return own, paper
    return None


def as_yaml(result: Mapping[str, Any]) -> str:
    """The suggested configuration, with what was measured above it."""
    fit, suggestion = result["fit"], result["suggestion"]
    interval = fit["interval"]
    spread = "" if interval is None else _between(interval, ", 95 % CI {:.3f} to {:.3f}")
    lines = [
        f"Written by vllm-packcache calibrate on {result['date']}.",
        f"model      {result['model']}",
        f"videos     {result['videos']} of {result['frames']} frames, full cache",
        f"attention  {_percent(result['mass'][TEXT])} on the text, {_percent(result['mass'][IMAGE])} on the "
        f"conditioning image, {_percent(result['mass'][OWN])} on the own frame,",
        f"           {_percent(sum(result['mass'][NEAREST:]))} on the {result['largest_distance']} frames before it, "
        f"{_percent(result['mass'][OLDER])} on older ones",
        f"decay      rho = {fit['rho']:.3f}{spread}, R^2 = {fit['r_squared']:.3f}",
        f"kept       {_percent(suggestion['kept'])} of all attention if even within a frame, "
        f"{_percent(suggestion['kept_measured'])} measured on blocks of {result['block_size']} tokens; "
        f"target {_percent(result['target'])}",
    ]
    header = "".join(f"# {line}\n" for line in lines)
    layout_first = {"layout": result["config"]["layout"], **result["config"]}
    return header + yaml.safe_dump(layout_first, sort_keys=False, default_flow_style=None) + _instead(result)


def _instead(result: Mapping[str, Any]) -> str:
    """The options that keep what changed, for who puts them in the place of the others."""
    own = result["changed"]["suggestion"]
    options = {option: own[option] for option in ("history_frames", "window", "selection", "changed_tokens")}
    lines = [
        _what_changes(result),
        f"To keep what changed, {_percent(own['held'])} of it within the window, put these in the place of the options",
        f"above; they keep {_percent(own['kept_measured'])} of all attention.",
        *yaml.safe_dump(options, sort_keys=False).splitlines(),
    ]
    return "\n" + "".join(f"# {line}\n" for line in lines)


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _between(interval: tuple[float, float], form: str) -> str:
    return form.format(*interval)


def _mass_table(result: Mapping[str, Any]) -> Table:
    fit, distances = result["fit"], result["largest_distance"]
    first, last = result["query_frames"]
    table = Table(
        title=f"Attention of the queries of frames {first} to {last}, {result['videos']} videos, %", box=SIMPLE_HEAD
    )
    table.add_column("on", no_wrap=True)
    for heading in ("mass", "95 % CI", "C rho^d", "C 2^-d", "mass / fit"):
        table.add_column(heading, justify="right", no_wrap=True)
    intervals = result["mass_ci95"] or [None] * len(result["mass"])
    rows = list(zip(result["segments"], result["mass"], intervals, strict=True))
    for name, mass, interval in _told_apart_first(rows):
        cells = [f"{100 * mass:.2f}", "" if interval is None else f"{100 * interval[0]:.2f} to {100 * interval[1]:.2f}"]
        if name.startswith("distance"):
            distance = result["segments"].index(name) - NEAREST + 1
            model = fit["scale"] * fit["rho"] ** distance
            half = fit["scale_at_half"] * PAPER_DECAY**distance
            ratio = mass / model
            off = not 1 / FAR_OFF <= ratio <= FAR_OFF
            cells += [f"{100 * model:.2f}", f"{100 * half:.2f}", f"{ratio:.2f}{' !' if off else ''}"]
        table.add_row(name, *cells)
    table.caption = f"older: at a distance above {distances};  !: off the fit by more than a factor of {FAR_OFF:g}"
    return table


def _told_apart_first(rows: list[Any]) -> list[Any]:
    """Rows of all segments in another order: older frames come after those that are told apart."""
    return [*rows[:OLDER], *rows[NEAREST:], rows[OLDER]]


def _view_table(result: Mapping[str, Any]) -> Table:
    table = Table(title="Attention by pass, %", box=SIMPLE_HEAD)
    table.add_column("on", no_wrap=True)
    views = result["views"]
    for name in views:
        table.add_column(name, justify="right")
    rows = list(zip(result["segments"], *(own["mass"] for own in views.values()), strict=True))
    for segment, *shares in _told_apart_first(rows):
        table.add_row(segment, *(f"{100 * share:.2f}" for share in shares))
    table.add_row("rho", *(f"{own['rho']:.3f}" for own in views.values()))
    return table


def _kept_table(result: Mapping[str, Any]) -> Table:
    table = Table(title=f"Attention kept, %; target {100 * result['target']:g}", box=SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for heading in ("H", "W", "decay", "history tokens", "kept, even", "kept, measured", "least of a layer"):
        table.add_column(heading, justify="right")
    named = [] if result["suggestion"] is None else [("suggested", result["suggestion"])]
    changed = result.get("changed", {})
    by_change = [
        (name, changed.get(key)) for name, key in (("changed", "suggestion"), ("the same, spatial", "spatial"))
    ]
    others = [*(("for comparison", other) for other in result["compared"]), *((n, r) for n, r in by_change if r)]
    for name, row in [*named, *others]:
        table.add_row(
            name,
            f"{row['history_frames']:g}",
            f"{row['window']}",
            f"{row['decay']:g}",
            f"{sum(row['kept_tokens']):,}",
            f"{100 * row['kept']:.2f}" if "kept" in row else "",
            f"{100 * row['kept_measured']:.2f}",
            f"{100 * min(row['kept_measured_by_layer']):.2f}",
        )
    table.caption = f"even: within a frame; measured: on blocks of {result['block_size']} tokens that live"
    return table


# ---------------------------------------------------------------------------------------------------------------------
# Plot

_MEASURED, _FIT, _HALF, _CONDITION, _GREY, _LAYER = (
    "#2f6fde",
    "#d1495b",
    "#e9a23b",
    "#2a9d8f",
    "#9aa0a6",
    "#c9ced4",
)
_WINDOWS = ("#b9cdf3", "#7fa6ea", "#4d82dc", "#2759b0", "#173a78")


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw a result as a PNG or SVG, as the name says."""
    figure = new_figure(16, 4.8)
    segments, distances, budgets = figure.subplots(1, 3, width_ratios=(1, 1.8, 1.8))
    _draw_segments(segments, result)
    _draw_distances(distances, result)
    _draw_budgets(budgets, result)
    for axes in (segments, distances, budgets):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{result['model']}: {result['videos']} videos of {result['frames']} frames, full cache", x=0.01, ha="left"
    )
    save(figure, path, quick=result.get("quick", False))


def _draw_segments(axes: Axes, result: Mapping[str, Any]) -> None:
    mass, distances = result["mass"], result["largest_distance"]
    bars = {
        "text": mass[TEXT],
        "conditioning\nimage": mass[IMAGE],
        "own frame": mass[OWN],
        f"{distances} frames\nbefore": sum(mass[NEAREST:]),
        "older\nframes": mass[OLDER],
    }
    colours = (_CONDITION, _CONDITION, _GREY, _MEASURED, _GREY)
    drawn = axes.barh(list(bars), [100 * share for share in bars.values()], color=colours, height=0.65)
    axes.bar_label(drawn, fmt="%.1f", padding=3, fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.18)
    axes.set_xlabel("share of attention, %")
    axes.set_title("where attention goes", loc="left", fontsize=11)


def _draw_distances(axes: Axes, result: Mapping[str, Any]) -> None:
    from matplotlib.ticker import LogFormatter, MaxNLocator, NullFormatter

    fit = result["fit"]
    mass = 100 * np.array(result["mass"][NEAREST:])
    distance = np.arange(1, len(mass) + 1)
    error = None
    if result["mass_ci95"] is not None:
        interval = 100 * np.array(result["mass_ci95"][NEAREST:])
        # A percentile may pass the mean by a rounding error.
        error = np.maximum(0, np.stack([mass - interval[:, 0], interval[:, 1] - mass]))
    for number, layer in enumerate(result["mass_by_layer"]):
        share = 100 * np.array(layer[NEAREST:])
        axes.plot(distance, share, color=_LAYER, linewidth=0.8, label=None if number else "single layers")
    axes.plot(
        distance,
        100 * fit["scale"] * fit["rho"] ** distance,
        color=_FIT,
        label=f"C rho$^d$, rho = {fit['rho']:.3f}, R$^2$ = {fit['r_squared']:.2f}",
    )
    half = 100 * fit["scale_at_half"] * PAPER_DECAY**distance
    axes.plot(distance, half, color=_HALF, linestyle="--", label="rho = 1/2, the paper's")
    label = "measured" if error is None else "measured, 95 % CI"
    axes.errorbar(distance, mass, error, color=_MEASURED, marker="o", linestyle="none", capsize=3, label=label)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("temporal distance d, frames")
    axes.set_ylabel("share of attention, %")
    axes.set_title("by temporal distance", loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=9)


def _draw_budgets(axes: Axes, result: Mapping[str, Any]) -> None:
    suggestion = result["suggestion"]
    for colour, (window, curve) in zip(_WINDOWS, result["curves"].items(), strict=False):
        history, share = np.array(curve).T
        axes.plot(history, 100 * share, color=colour, marker=".", markersize=4, label=f"W = {window}")
    axes.axhline(100 * result["target"], color="#555555", linewidth=1, linestyle="--", label="target")
    if suggestion is not None:
        history, window = suggestion["history_frames"], suggestion["window"]
        style: dict[str, Any] = {"linestyle": "none", "zorder": 5, "clip_on": False}
        axes.plot(
            history,
            100 * suggestion["kept"],
            color=_FIT,
            marker="*",
            markersize=14,
            label=f"suggested:\nH = {history:g}, W = {window}",
            **style,
        )
        axes.plot(
            history,
            100 * suggestion["kept_measured"],
            color="#222222",
            marker="_",
            markersize=18,
            markeredgewidth=2,
            label="the same, measured\non live blocks",
            **style,
        )
    axes.set_xlabel("budget H for the history, frames")
    axes.set_ylabel("attention kept, %")
    axes.set_title(f"what is kept with decay = {result['fit']['decay']:g}", loc="left", fontsize=11)
    # Curves may be anywhere: beside them.
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
