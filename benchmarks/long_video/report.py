"""What `benchmarks.long_video` measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.long_video.plan import COPY, FORCED, GENERATED, TRUTH
from benchmarks.report.markdown import Files, number
from benchmarks.report.parts import NOT_MEASURED, Goal, Result, Row, notes, provenance, rows_of_count
from benchmarks.report.table import Paragraph, Table

SHOWN = (
    (FORCED, "changed_tokens_right", "forced: changed tokens right, %", 100),
    (FORCED, "tokens_right", "forced: tokens right, %", 100),
    (GENERATED, "tokens_right", "generated: tokens right, %", 100),
    (GENERATED, "psnr_db", "generated: PSNR, dB", 1),
    (GENERATED, "whole_frames", "generated: whole frames, %", 100),
    (GENERATED, "object_cells", "generated: object cells", 1),
    (GENERATED, "debris_cells", "generated: debris cells", 1),
    (GENERATED, "moving_cells", "generated: moving cells", 1),
)
"""Tables: measurement, measure, heading, factor."""


HELD, LOST = "packcache, rebase", "packcache, absolute"


def goals(result: Result) -> list[Goal]:
    """None: it shows what positions do, and was given no bound."""
    return []


def rows(result: Result) -> Iterator[Row]:
    """Means with their confidence intervals, by span and by frame."""
    for name, variant in result["variants"].items():
        for measure in ("live_tokens", "positions"):
            yield Row(name, measure.replace("_", " "), f"frame {result['frames']}", variant[measure])
    for measurement in (FORCED, GENERATED):
        for name, counts in result[measurement].items():
            for label, count in counts.items():
                yield from rows_of_count(name, f"{measurement}: {label}", count, "")


def _measured(result: Result) -> str:
    return (
        f"{result['videos']} held-out videos of {result['frames']} frames, of which the bundled model was trained on "
        f"{result['trained_frames']}, in the real engine."
    )


def _cell(found: Mapping[str, float] | None, factor: float) -> str:
    return "n/a" if found is None else f"{number(factor * found['mean'], 1)} ± {number(factor * found['ci95'], 1)}"


def long(result: Result, files: Files) -> Iterator[Paragraph]:
    """The section of the report."""
    yield f"Long videos: {_measured(result)}"
    yield provenance(result)
    yield from notes(result)
    yield Table(
        ("variant", "tokens read, last frame", "positions"),
        [(name, f"{own['live_tokens']:,}", f"{own['positions']:,}") for name, own in result["variants"].items()],
    )
    for measurement, label, heading, factor in SHOWN:
        scores = result[measurement]
        yield Table(
            (heading, *_spans(result)),
            [(name, *(_cell(own, factor) for own in by[label]["spans"].values())) for name, by in scores.items()],
        )
    yield from files.picture("long_video", f"Quality by frame over {result['frames']} frames")


def _spans(result: Result) -> list[str]:
    return list(next(iter(result[FORCED].values()))["tokens_right"]["spans"])


def short(result: Result, files: Files) -> Iterator[Paragraph]:
    """The section of a README."""
    first, *_, last = _spans(result)

    def shown(measurement: str, name: str, label: str) -> str:
        if name not in result[measurement]:
            return "" if name in (COPY, TRUTH) else NOT_MEASURED
        spans: Mapping[str, Any] = result[measurement][name][label]["spans"]
        late, early = (100 * spans[span]["mean"] for span in (last, first))
        return f"{number(late, 1)} ({number(early, 1)})"

    yield (
        f"**Long videos**: {_measured(result)} Percentages of frames {last} ({first} in brackets); all numbers with "
        f"confidence intervals: {files.link('long_video.json')}."
    )
    yield Table(
        ("", "changed tokens right, given the true past", "tokens right, generated", "frames that are frames"),
        [
            (
                name,
                shown(FORCED, name, "changed_tokens_right"),
                shown(GENERATED, name, "tokens_right"),
                shown(GENERATED, name, "whole_frames"),
            )
            for name in [*result["variants"], COPY]
        ],
    )
    held, lost = (result[FORCED][name]["changed_tokens_right"]["spans"][first]["mean"] for name in (HELD, LOST))
    yield f"Within the trained length re-basing costs {number(100 * (lost - held), 1)} points of changed tokens."
    yield from files.picture("long_video", f"Quality by frame over {result['frames']} frames")
