"""What `benchmarks.quality` measured."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.quality.measures import MEASURES
from benchmarks.quality.plot import FRONTIER, PICTURES, base_of, cell
from benchmarks.quality.variants import PACKCACHE, SELECTIONS, under
from benchmarks.report.markdown import Files, listed
from benchmarks.report.parts import Goal, Result, Row, notes, provenance, row_of_mean, rows_of_count, verdict
from benchmarks.report.table import Paragraph, Table
from vllm_packcache.tools.files import stem

FIRST = next(iter(MEASURES))
"""The measure that sentences are about: tokens that are right."""

SPATIAL = "spatial"
"""How packcache itself selects blocks."""

SELECTED = {SPATIAL: PACKCACHE} | {selection: f"{PACKCACHE}, {selection}" for selection in SELECTIONS}
"""Selections inside a frame, and the variants that have them."""


def goals(result: Result) -> list[Goal]:
    """One for each comparison and span: it is met if every measure meets it."""
    found = []
    for goal, span in dict.fromkeys((target["goal"], target["span"]) for target in _targets(result)):
        own = {t["measure"]: t for t in result["targets"] if (t["goal"], t["span"]) == (goal, span)}
        missed = [MEASURES[name].heading.partition(",")[0] for name, target in own.items() if not target["met"]]
        label = FIRST if FIRST in own else next(iter(own))
        first, measure = own[label], MEASURES[label]
        aim = "not worse beyond the CI" if "not worse" in goal else "better beyond the CI"
        found.append(
            Goal(
                f"{goal}, {span}",
                f"{measure.heading}: {cell(first, measure)}; {len(own) - len(missed)} of {len(own)} measures",
                f"every measure {aim}",
                verdict(result, not missed, by=f" by {listed(missed)}" if missed else ""),
            )
        )
    return found


def rows(result: Result) -> Iterator[Row]:
    """Means with their confidence intervals, by span and by frame; differences; the frontier; the goals."""
    for target in _targets(result):
        name, unit = target["goal"], _unit(target["measure"])
        yield row_of_mean(name, f"goal: {target['measure']}", target["span"], target, unit)
        yield Row(name, f"goal met: {target['measure']}", target["span"], target["met"])
    for name, variant in result["variants"].items():
        yield Row(name, "live tokens", f"frame {result['trained_frames']}", variant["live_tokens"])
    for name, scores in result["scores"].items():
        for label, count in scores.items():
            yield from rows_of_count(name, label, count, _unit(label))
    for name, measures in result["differences"].items():
        for label, by_span in measures.items():
            for span, found in by_span.items():
                yield row_of_mean(name, label, span, found, _unit(label))
    for point in result["frontier"]:
        name = f"frontier: {_point(point)}"
        yield Row(name, "live tokens", result["spans"][0], point["live_tokens"])
        for label, found in point["scores"].items():
            yield row_of_mean(name, label, result["spans"][0], found, _unit(label))


def _targets(result: Result) -> Sequence[Mapping[str, Any]]:
    """Of guided videos nothing is judged."""
    return result.get("targets", ())


def _unit(label: str) -> str:
    """Of a measure as it is written."""
    return {"psnr_db": "dB", "ssim": "", "flicker": "levels of 255"}.get(label, "share")


def _point(point: Mapping[str, Any]) -> str:
    return point["name"] if point["budget"] is None else f"{point['family']}, {point['budget']:g} frames"


# ---------------------------------------------------------------------------------------------------------------------
# Text


def _measured(result: Result) -> str:
    first, last = result["seeds"]
    compared = "under every policy at equal live tokens"
    if _is_cached(result):
        compared = "with keys and values as each format has them, at equal live tokens and at equal bytes"
    return (
        f"{result['videos']} held-out videos (worlds {first} to {last}), each made by {_made(result)}, in float32, "
        f"{compared}; the model was trained on videos of {result['trained_frames']} "
        "frames. Means and 95 % confidence intervals over videos, against the true continuation."
    )


def _is_cached(result: Result) -> bool:
    """Whether it compares formats of the cache."""
    return any("cache" in own for own in result["variants"].values())


def _made(result: Result) -> str:
    """By what, and how."""
    options = result.get("model", {}).get("options")
    if options is None:
        guided = ", without guidance and with" if _scales(result) else ""
        return f"the bundled model from its condition alone, greedily{guided}"
    return (
        f"the bundled masked model from its text and its picture, {options['steps']} + 1 passes a frame with guidance "
        f"{options['guidance']:g} and the world's own seed"
    )


def selection_sentence(result: Result, span: str) -> str:
    """Which selection inside a frame gets most tokens right, and by how much beside `SPATIAL`."""
    measure = MEASURES[FIRST]
    means = {
        selection: result["scores"][name][FIRST]["spans"][span]["mean"]
        for selection, name in SELECTED.items()
        if span in result["scores"][name][FIRST]["spans"]
    }
    best, *others = sorted(means, key=lambda selection: -means[selection])
    shown = cell(result["scores"][SELECTED[best]][FIRST]["spans"][span], measure)
    sentence = f"Of the selections inside a frame `{best}` gets most tokens right at {span}, {shown} %: "
    # Of the two that are compared one is spatial, which differences are taken from.
    other = others[0] if best == SPATIAL else best
    found = result["differences"][f"{PACKCACHE} - {SELECTED[other]}"][FIRST][span]
    beyond = "more than" if abs(found["mean"]) > found["ci95"] else "within"
    which = f"`{other}`, the next" if best == SPATIAL else f"`{SPATIAL}`, the default"
    size = cell(found | {"mean": abs(found["mean"])}, measure)
    return f"{sentence}{size} points more than {which}, which is {beyond} the confidence interval of the difference."


def _scales(result: Result) -> list[float]:
    """Of guidance, but 1."""
    return list(dict.fromkeys(own["guidance"] for own in result["variants"].values() if "guidance" in own))


def guidance_sentence(result: Result, span: str) -> str:
    """What guidance does to the objects of each policy's videos, world by world."""
    label = "identity"
    measure, sentences = MEASURES[label], []
    for name, variant in result["variants"].items():
        if "guidance" in variant:
            continue
        own: dict[str, list[str]] = {}
        for scale in _scales(result):
            found = result["differences"][f"{under(name, scale)} - {name}"][label][span]
            if found is None or abs(found["mean"]) <= found["ci95"]:
                own.setdefault("no more and no fewer beyond the confidence interval", []).append(f"{scale:g}")
            else:
                shown = cell(found | {"mean": abs(found["mean"])}, measure)
                own.setdefault("more" if found["mean"] > 0 else "fewer", []).append(f"{scale:g} ({shown})")
        effects = "; ".join(f"{effect} with {listed(scales)}" for effect, scales in own.items())
        mean = cell(result["scores"][name][label]["spans"][span], measure)
        sentences.append(f"`{name}` gets {mean} % of objects right without guidance, {effects}.")
    return " ".join(sentences)


def _of_formats(result: Result, span: str) -> Table:
    """By how much formats change each measure; bold: beyond the confidence interval."""
    return Table(
        (f"less {base_of(result)}", "KiB of a video", *(measure.title for measure in MEASURES.values())),
        [
            (
                name,
                f"{result['variants'][name]['bytes'] / 1024:,.0f}",
                *(_bold(own[label][span], cell(own[label][span], measure)) for label, measure in MEASURES.items()),
            )
            for pair, own in result["differences"].items()
            for name in (pair.partition(" - ")[0],)
        ],
    )


def _effects(result: Result, span: str) -> Table:
    """By how much guidance changes each measure; bold: beyond the confidence interval."""
    found = [
        (name, scale, result["differences"][f"{under(name, scale)} - {name}"])
        for name, variant in result["variants"].items()
        if "guidance" not in variant
        for scale in _scales(result)
    ]
    return Table(
        ("guided less unguided", "guidance", *(measure.title for measure in MEASURES.values())),
        [
            (
                name,
                f"{scale:g}",
                *(_bold(own[label][span], cell(own[label][span], measure)) for label, measure in MEASURES.items()),
            )
            for name, scale, own in found
        ],
    )


def _by_span(result: Result, own: Mapping[str, Any], label: str) -> list[str]:
    """Cells of a measure for every span; a variant with shorter videos leaves some out."""
    return [cell(own[span], MEASURES[label]) if span in own else "" for span in result["spans"]]


def long(result: Result, files: Files) -> Iterator[Paragraph]:
    """The section of the report."""
    spans = result["spans"]
    yield f"Quality: {_measured(result)}"
    yield provenance(result)
    yield from notes(result)
    yield f"**Variants.** Live tokens: what is read of the past when frame {result['trained_frames']} begins."
    yield Table(
        ("variant", "policy", "options", "live tokens"),
        [
            (name, variant["policy"], _options(variant["config"]), f"{variant['live_tokens']:,}")
            for name, variant in result["variants"].items()
        ],
        texts=3,
    )
    if targets := _targets(result):
        yield "**Goals**: by how much the first has more than the other, video by video."
        yield Table(
            ("goal", "frames", "measure", "difference", "verdict"),
            [
                (
                    target["goal"],
                    target["span"],
                    MEASURES[target["measure"]].title,
                    cell(target, MEASURES[target["measure"]]),
                    verdict(result, target["met"]),
                )
                for target in targets
            ],
            texts=3,
        )
    if _scales(result):
        yield f"**Guidance**, {spans[0]}. {guidance_sentence(result, spans[0])}"
        yield _effects(result, spans[0])
    if _is_cached(result):
        yield f"**Formats**, {spans[0]}, video by video; bold: beyond the confidence interval."
        yield _of_formats(result, spans[0])
    for label, measure in MEASURES.items():
        yield f"**{measure.title}**"
        yield Table(
            ("", *spans),
            [(name, *_by_span(result, own[label]["spans"], label)) for name, own in result["scores"].items()],
        )
    yield "**Differences**, video by video; bold: beyond the confidence interval."
    for label, measure in MEASURES.items():
        yield Table(
            (measure.title, *spans),
            [
                (name, *(_bold(own[label].get(span), shown) for span, shown in zip(spans, cells, strict=True)))
                for name, own in result["differences"].items()
                for cells in (_by_span(result, own[label], label),)
            ],
        )
    if _has_selections(result):
        yield f"**Selection inside a frame**, {spans[0]}. {selection_sentence(result, spans[0])}"
        yield Table(
            ("selection", *(measure.title for measure in MEASURES.values())),
            [
                (
                    selection,
                    *(cell(result["scores"][name][label]["spans"][spans[0]], MEASURES[label]) for label in MEASURES),
                )
                for selection, name in SELECTED.items()
            ],
        )
    if result["frontier"]:
        yield f"**Frontier**: quality against live tokens, {spans[0]}."
        yield Table(
            ("point", "live tokens", *(measure.title for measure in MEASURES.values())),
            [
                (
                    _point(point),
                    f"{point['live_tokens']:,}",
                    *(cell(point["scores"][label], measure) for label, measure in MEASURES.items()),
                )
                for point in result["frontier"]
            ],
        )
        yield from files.picture(FRONTIER, "Quality against live tokens")
    pictures = PICTURES[result["benchmark"]]
    yield from files.picture(pictures.chart, _caption(result))
    yield from files.picture(pictures.videos, "One world under every policy")


def _has_selections(result: Result) -> bool:
    return all(name in result["scores"] for name in SELECTED.values())


def _options(config: Mapping[str, Any]) -> str:
    return f"`{json.dumps({key: value for key, value in config.items() if key != 'layout'})}`"


def _bold(found: Mapping[str, float] | None, shown: str) -> str:
    return f"**{shown}**" if found is not None and abs(found["mean"]) > found["ci95"] else shown


def short(result: Result, files: Files) -> Iterator[Paragraph]:
    """The section of a README."""
    spans: Sequence[str] = result["spans"]
    others = [label for label in MEASURES if label != FIRST]
    # Means say enough of what is beside the tokens and the objects.
    exact = {FIRST, "identity", "identity_after_occlusion"}
    own_file = f"{stem(result['benchmark'])}.json"
    yield f"**Quality**: {_measured(result)} More in {files.link('report.md')} and {files.link(own_file)}."
    yield Table(
        (
            "",
            "live tokens",
            *(f"{MEASURES[FIRST].heading}, {span}" for span in spans),
            *(f"{MEASURES[label].title}, {spans[0]}" for label in others),
        ),
        [
            (
                name,
                f"{result['variants'][name]['live_tokens']:,}" if name in result["variants"] else "",
                *_by_span(result, own[FIRST]["spans"], FIRST),
                *(
                    shown if label in exact else shown.partition(" ")[0]
                    for label in others
                    for shown in (cell(own[label]["spans"][spans[0]], MEASURES[label]),)
                ),
            )
            for name, own in result["scores"].items()
        ],
    )
    if _has_selections(result):
        yield selection_sentence(result, spans[0])
    if _scales(result):
        yield guidance_sentence(result, spans[0])
    if _is_cached(result):
        yield f"By how much that is more than {base_of(result)}, video by video; bold: beyond the confidence interval."
        yield _of_formats(result, spans[0])
    if result["frontier"]:
        yield from files.picture(FRONTIER, "Quality against live tokens")
    else:
        yield from files.picture(PICTURES[result["benchmark"]].chart, _caption(result))


def _caption(result: Result) -> str:
    if _is_cached(result):
        return "Quality by format of the cache"
    return "Quality by guidance" if _scales(result) else "Quality by frame"
