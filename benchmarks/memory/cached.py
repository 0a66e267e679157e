"""What is remembered where keys and values are kept in fewer bits: what follows from it, and how it is told."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.bundled import CAUSAL, identity
from benchmarks.memory.plan import CachedPlan
from benchmarks.memory.report import measured, points, table_of_means
from benchmarks.memory.runs import MEASURES, Counts, values_by_video
from benchmarks.quality.cached import EQUAL_BYTES, in_bytes
from benchmarks.quality.variants import BLOCK_SIZE
from benchmarks.report.markdown import Files
from benchmarks.report.parts import Goal, Result, Row, notes, provenance, row_of_mean, rows_of_goals, verdict
from benchmarks.report.table import Paragraph, Table
from benchmarks.statistics import mean_of_videos
from vllm_packcache.demo.scores import FIRST_HELD_OUT_SEED


def summary(plan: CachedPlan, counts: Counts) -> dict[str, Any]:
    """What was right, over worlds, and world by world beside bfloat16: the result."""
    values = values_by_video(counts, slice(plan.first_frame - 1, plan.frames))
    pairs = [pair for own in plan.policies for pair in own.pairs]
    return {
        "model": identity(CAUSAL),
        "seeds": [FIRST_HELD_OUT_SEED, FIRST_HELD_OUT_SEED + plan.worlds - 1],
        "worlds": plan.worlds,
        "frames_counted": [plan.first_frame, plan.frames],
        "block_size": BLOCK_SIZE,
        "notes": [
            "every token is asked for after the true ones before it: mistakes do not add up",
            "the model computes in float32; keys and values are rounded when they are written, keys once more whenever "
            "the window slides, and read as they are then; fp8_e4m3 is rounded to nearest, as on GPUs",
            f"{EQUAL_BYTES}: the longest history whose blocks, condition and newest frame included, take no more bytes "
            "than those of the same policy in bfloat16",
            "differences are of the same worlds: the interval is that of the mean of the differences",
        ],
        "variants": {
            variant.name: {
                "config": variant.server.as_mapping(),
                "live_tokens": variant.live_tokens(plan.frames - 1),
                **in_bytes(variant, plan.frames),
                "scores": {key: mean_of_videos(found) for key, found in values[variant.name].items()},
            }
            for variant in plan.variants
        },
        "differences": {
            f"{who} - {base}": {key: mean_of_videos(found - values[base][key]) for key, found in values[who].items()}
            for who, base in pairs
        },
    }


def targets(result: Result) -> list[dict[str, Any]]:
    """Whether what the freed bytes buy remembers more than the same bytes in bfloat16, beyond the interval."""
    return [
        {
            "ratio": f"{key}: {pair}",
            "measure": key,
            "pair": pair,
            "value": found["mean"],
            **found,
            "at_least": 0.0,
            "met": found["mean"] - found["ci95"] > 0,
        }
        for pair, own in result["differences"].items()
        if EQUAL_BYTES in pair
        for key, found in own.items()
        if found is not None
    ]


def goals(result: Result) -> list[Goal]:
    """More is remembered in as many bytes."""
    return [
        Goal(
            f"{MEASURES[target['measure']]}: {target['pair'].replace(' - ', ' less ')}",
            points(target),
            "> 0 beyond the CI",
            verdict(result, target["met"]),
        )
        for target in result["targets"]
    ]


def rows(result: Result) -> Iterator[Row]:
    """Means with their intervals, and the paired differences."""
    yield from rows_of_goals(result["targets"])
    for name, own in result["variants"].items():
        yield Row(name, "live tokens", "", own["live_tokens"])
        yield Row(name, "bytes of a video", "", own["bytes"], unit="B")
        for measure, found in own["scores"].items():
            yield row_of_mean(name, measure, "", found, "share")
    for name, own in result["differences"].items():
        for measure, found in own.items():
            yield row_of_mean(name, measure, "", found, "share")


def _table(result: Result) -> Table:
    return Table(
        ("policy", "history, frames", "live tokens", "KiB of a video", *MEASURES.values()),
        [
            (
                name,
                f"{own['config']['history_frames']:g}" if "history_frames" in own["config"] else "all",
                f"{own['live_tokens']:,}",
                f"{own['bytes'] / 1024:,.0f}",
                *(points(own["scores"][measure]) for measure in MEASURES),
            )
            for name, own in result["variants"].items()
        ],
    )


def _paragraphs(result: Result) -> Iterator[Paragraph]:
    yield _table(result)
    yield "**Differences** from the same policy in bfloat16, world by world, in points."
    yield table_of_means("", result["differences"], MEASURES)


def long(result: Result, files: Files) -> Iterator[Paragraph]:
    """The section of the report."""
    yield f"Memory in fewer bits: {measured(result)}"
    yield provenance(result)
    yield from notes(result)
    yield from _paragraphs(result)


def short(result: Result, files: Files) -> Iterator[Paragraph]:
    """The section of a README."""
    yield (
        f"**Memory in fewer bits**: {measured(result)} Keys and values are rounded as the format has it. More in "
        f"{files.link('memory_cached.json')}."
    )
    yield from _paragraphs(result)
