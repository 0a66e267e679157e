"""What quality costs where frames are made in passes: the picture, and what is said of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.quality import report
from benchmarks.quality.measures import MEASURES
from benchmarks.quality.plot import PICTURES, cell
from benchmarks.report.markdown import Files, listed, number
from benchmarks.report.parts import Result, Row, notes, provenance, row_of_mean, verdict
from benchmarks.report.table import Paragraph, Table
from vllm_packcache.tools.figures import new_figure, save
from vllm_packcache.tools.files import stem

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABELS = ("tokens_right", "identity", "identity_after_occlusion")
"""Measures that sentences and the picture are about."""

OFF = {"logits": "logits off by, %", "draws": "draws of another token, %"}
"""What is measured of deviations, for people."""

_PLAIN, _LESS = "#6b7177", ("#2f6fde", "#d6336c", "#2a9d8f", "#e9a23b")


def plain(result: Result) -> dict[int, str]:
    """Variants of which nothing is left out, by their passes."""
    return {own["made"]["steps"]: name for name, own in result["variants"].items() if set(own["made"]) == {"steps"}}


def less(result: Result) -> dict[str, tuple[str, str | None]]:
    """Of every other one: the same passes with nothing left out, and the most whole passes that have no more rows."""
    variants, whole = result["variants"], plain(result)
    found: dict[str, tuple[str, str | None]] = {}
    for name, own in variants.items():
        if name in whole.values():
            continue
        fewer = [steps for steps, other in whole.items() if variants[other]["rows"] <= own["rows"]]
        found[name] = whole[own["made"]["steps"]], whole[max(fewer)] if fewer else None
    return found


def targets(result: Result) -> list[dict[str, Any]]:
    """Where most is left out: it is to cost no quality, and to be worth more than whole passes of no more rows."""
    (span,) = result["spans"]
    found = []
    for name, (same, fewer) in less(result).items():
        if len(result["variants"][name]["made"]) < _ALL:
            continue
        for other, goal in ((same, "not worse"), (fewer, "better")):
            if other is None:
                continue
            for label, by_span in result["differences"][f"{name} - {other}"].items():
                if (difference := by_span[span]) is None:
                    continue
                sign = 1 if MEASURES[label].higher_is_better else -1
                mean, error = sign * difference["mean"], difference["ci95"]
                met = mean + error >= 0 if goal == "not worse" else mean - error > 0
                sentence = f"{name} {goal} than {other}"
                found.append({"goal": sentence, "span": span, "measure": label, **difference, "met": met})
    return found


_ALL = 4
"""So many options has a variant that leaves out all there is: its passes, and what is left out of them."""


def rows(result: Result) -> Iterator[Row]:
    """Those of the quality, what each costs, and deviations."""
    yield from report.rows(result)
    for name, own in result["variants"].items():
        yield Row(name, "rows of a frame", "both streams", own["rows"])
        yield Row(name, "forward passes of a frame", "", own["forwards"])
    for own in result["deviations"]:
        place = f"guidance {own['guidance']:g}, {own['steps']} passes"
        for label, words in OFF.items():
            yield row_of_mean(own["name"], words.removesuffix(", %"), place, own[label], "share")


# ---------------------------------------------------------------------------------------------------------------------
# Picture


def draw(result: Result, path: Path) -> None:
    """Draw quality against rows, and deviations, as PNG or SVG by the suffix of ``path``."""
    figure = new_figure(13, 8)
    axes = figure.subplots(2, 3)
    for own, label in zip(axes[0], LABELS, strict=True):
        _quality(own, result, label)
    axes[0][0].legend(fontsize=7, frameon=False, loc="lower right")
    for own, label in zip(axes[1], OFF, strict=False):
        _off(own, result, label)
    _key(axes[1][-1], result)
    save(figure, path, quick=result.get("quick", False))


def _quality(axes: Axes, result: Result, label: str) -> None:
    (span,), measure, variants = result["spans"], MEASURES[label], result["variants"]

    def point(name: str) -> tuple[float, float, float] | None:
        found = result["scores"][name][label]["spans"][span]
        if found is None:
            return None
        return variants[name]["rows"], measure.factor * found["mean"], measure.factor * found["ci95"]

    names = [name for _, name in sorted(plain(result).items())]
    points = [own for own in map(point, names) if own is not None]
    if points:
        costs, means, errors = zip(*points, strict=True)
        axes.errorbar(costs, means, errors, color=_PLAIN, marker="o", markersize=4, capsize=2, label="whole passes")
        for (cost, mean, _), steps in zip(points, sorted(plain(result)), strict=False):
            axes.annotate(f"{steps}", (cost, mean), (3, 4), textcoords="offset points", fontsize=7, color=_PLAIN)
    labelled: set[int] = set()
    for letter, name in zip(_letters(), less(result), strict=False):
        own, steps = point(name), variants[name]["made"]["steps"]
        if own is None:
            continue
        colour = _colour(result, steps)
        cost, mean, error = own
        words = f"{steps} passes, less computed" if steps not in labelled else None
        labelled.add(steps)
        axes.errorbar([cost], [mean], [error], color=colour, marker="s", markersize=4, capsize=2, label=words)
        axes.annotate(letter, (cost, mean), (4, -9), textcoords="offset points", fontsize=8, color=colour)
    axes.set_title(measure.title, loc="left", fontsize=10)
    axes.set_xlabel("rows computed of a frame, both streams and the commit", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _colour(result: Result, steps: int) -> str:
    """Of variants of so many passes of which something is left out."""
    return dict(zip(sorted({result["variants"][name]["made"]["steps"] for name in less(result)}), _LESS, strict=False))[
        steps
    ]


def _letters() -> Iterator[str]:
    return map(chr, range(ord("a"), ord("z") + 1))


def _key(axes: Axes, result: Result) -> None:
    """What the letters are."""
    axes.set_axis_off()
    for line, (letter, name) in enumerate(zip(_letters(), less(result), strict=False)):
        colour = _colour(result, result["variants"][name]["made"]["steps"])
        axes.text(
            0, 1 - 0.065 * line, f"{letter}  {name}", fontsize=8, color=colour, transform=axes.transAxes, va="top"
        )


def _off(axes: Axes, result: Result, label: str) -> None:
    settings = _settings(result)
    names = list(dict.fromkeys(own["name"] for own in result["deviations"]))
    for number_, setting in enumerate(settings):
        own = {dev["name"]: dev[label] for dev in result["deviations"] if (dev["guidance"], dev["steps"]) == setting}
        places = [line + 0.38 * number_ - 0.19 for line in range(len(names))]
        values = [100 * own[name]["mean"] for name in names]
        axes.barh(places, values, 0.36, color=_LESS[number_], label=f"guidance {setting[0]:g}, {setting[1]} passes")
        for place, value in zip(places, values, strict=True):
            axes.annotate(f"{value:.2g}", (value, place), (3, 0), textcoords="offset points", va="center", fontsize=7)
    axes.set_yticks(range(len(names)), [name.replace(", ", ",\n") for name in names], fontsize=8)
    axes.invert_yaxis()
    axes.set_title(OFF[label], loc="left", fontsize=10)
    axes.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2)
    axes.spines[["top", "right"]].set_visible(False)


def _settings(result: Result) -> list[tuple[float, int]]:
    return list(dict.fromkeys((own["guidance"], own["steps"]) for own in result["deviations"]))


# ---------------------------------------------------------------------------------------------------------------------
# Text


def _measured(result: Result) -> str:
    first, last = result["seeds"]
    return (
        f"{result['videos']} held-out videos (worlds {first} to {last}) of {result['trained_frames']} frames of the "
        f"bundled masked model, with guidance {result['model']['options']['guidance']:g}. A row is a token of one "
        "stream that goes through all layers; rows of a frame are those of all its passes and of the commit. Means and "
        "95 % confidence intervals over videos, against the true continuation."
    )


def _beyond(difference: Mapping[str, float] | None) -> str:
    """How a difference is to its interval."""
    if difference is None or abs(difference["mean"]) <= difference["ci95"]:
        return "no other"
    return "better" if difference["mean"] > 0 else "worse"


def winner_sentence(result: Result) -> str:
    """Which ways to leave something out are worth more, or less, than whole passes of no more rows."""
    (span,) = result["spans"]
    found: dict[str, list[str]] = {"better": [], "worse": [], "no other": []}
    for name, (_, fewer) in less(result).items():
        if fewer is None:
            continue
        marks = {_beyond(result["differences"][f"{name} - {fewer}"][label][span]) for label in LABELS}
        kind = "no other" if marks == {"no other"} or {"better", "worse"} <= marks else (marks - {"no other"}).pop()
        found[kind].append(f"{name} ({fewer})")
    parts = [
        f"{words}: {listed(own)}"
        for words, own in (
            ("more right than whole passes of no more rows", found["better"]),
            ("fewer", found["worse"]),
            ("no difference beyond the confidence interval", found["no other"]),
        )
        if own
    ]
    return f"Tokens and objects right, beside the whole passes in brackets. {'. '.join(parts).capitalize()}."


def settled_sentence() -> str:
    """What this model cannot say."""
    return (
        "Settled rows (refresh) change nothing here whatever is asked of them: keys and values of this model are of a "
        "token alone, and not of what it sees. Of a model that mixes them nothing follows from that."
    )


def deviation_sentence(result: Result) -> str:
    """By how much more the published guidance and passes are off."""
    low, high = _settings(result)
    names = dict.fromkeys(own["name"] for own in result["deviations"])
    by = {(own["name"], own["guidance"], own["steps"]): own["logits"]["mean"] for own in result["deviations"]}
    parts = [f"{name} {number(100 * by[name, *low], 2)} and {number(100 * by[name, *high], 2)} %" for name in names]
    return (
        f"Guided logits are off, with guidance {low[0]:g} in {low[1]} passes and with {high[0]:g} in {high[1]}: "
        f"{'; '.join(parts)}."
    )


def _table(result: Result) -> Table:
    (span,), whole = result["spans"], less(result)
    return Table(
        (
            "",
            "rows a frame",
            "forward passes",
            *(MEASURES[label].heading for label in LABELS),
            "less the same, whole",
            "less whole passes of no more rows",
        ),
        [
            (
                name,
                f"{own['rows']:,}",
                own["forwards"],
                *(cell(result["scores"][name][label]["spans"][span], MEASURES[label]) for label in LABELS),
                *(_differences(result, name, other) for other in whole.get(name, (None, None))),
            )
            for name, own in sorted(result["variants"].items(), key=lambda named: named[1]["rows"])
        ],
    )


def _differences(result: Result, name: str, other: str | None) -> str:
    """Of objects right."""
    if other is None:
        return ""
    (span,), label = result["spans"], "identity"
    return f"{cell(result['differences'][f'{name} - {other}'][label][span], MEASURES[label])} ({other})"


def _deviations(result: Result) -> Table:
    return Table(
        ("left out", "guidance", "passes", *OFF.values()),
        [
            (
                own["name"],
                f"{own['guidance']:g}",
                own["steps"],
                *(f"{100 * own[label]['mean']:.2f} ± {100 * own[label]['ci95']:.2f}" for label in OFF),
            )
            for own in result["deviations"]
        ],
    )


def long(result: Result, files: Files) -> Iterator[Paragraph]:
    """The section of the report."""
    yield f"Quality against what is computed: {_measured(result)}"
    yield provenance(result)
    yield from notes(result)
    yield _table(result)
    yield f"{winner_sentence(result)} {settled_sentence()}"
    yield "**Goals** where most is left out: by how much the first has more than the other, video by video."
    yield Table(
        ("goal", "measure", "difference", "verdict"),
        [
            (
                target["goal"],
                MEASURES[target["measure"]].title,
                cell(target, MEASURES[target["measure"]]),
                verdict(result, target["met"]),
            )
            for target in result["targets"]
        ],
        texts=2,
    )
    yield (
        "**Deviations**, with the same ids given in every step: root of the squares of what the guided logits of "
        "masked tokens are off by, as a share of the logits'; and the share of draws that are of another token."
    )
    yield _deviations(result)
    yield from files.picture(PICTURES[result["benchmark"]].chart, "Quality against rows, and deviations")


def short(result: Result, files: Files) -> Iterator[Paragraph]:
    """The section of a README."""
    yield (
        f"**Less computed in passes**: {_measured(result)} More in {files.link('report.md')} and "
        f"{files.link(stem(result['benchmark']) + '.json')}."
    )
    yield _table(result)
    yield f"{winner_sentence(result)} {settled_sentence()} {deviation_sentence(result)}"
    yield from files.picture(PICTURES[result["benchmark"]].chart, "Quality against rows, and deviations")
