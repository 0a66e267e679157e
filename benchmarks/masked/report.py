"""What `benchmarks.masked` measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import median
from typing import Any

from benchmarks.decode.samples import CLOCK_NAMES, CPU, WALL, summary
from benchmarks.masked.process import CHOOSING, ENTERING, LAYERS
from benchmarks.report.markdown import Files, number, ratio, significant, with_quartiles
from benchmarks.report.parts import Goal, Result, Row, goals_of_ratios, provenance, row_of_ratio, rows_of_goals
from benchmarks.report.table import Paragraph, Table

GB = 1e9

PARTS = {"last_frame": "last frame", "batch": "several videos"}
WHAT = {"whole_frame": "whole frame", "as_timed": "as timed"}

VIDEOS = {
    "full": "full cache",
    "packcache": "packcache",
    "short": "full cache, as many tokens as packcache reads",
    "last frame": "sliding window over the last frame",
}
"""What is timed, for people."""


def goals(result: Result) -> list[Goal]:
    """All that have a bound, and memory beside what the published code needs."""
    last, batch = result["last_frame"]["whole_frame"]["ratios"], result["batch"]["whole_frame"]["ratios"]
    names = {
        "full / packcache": f"full / packcache, frame {result['frames']} with all its passes",
        "packcache / short": "packcache / the full cache at the live length",
        "together / apart": f"{result['batch']['videos']} videos in one batch / one after another, for a GPU",
    }
    summaries = {name: own[CPU] for name, own in (last | batch).items()}
    return goals_of_ratios(result, names, summaries)


# ---------------------------------------------------------------------------------------------------------------------
# CSV


def rows(result: Result) -> Iterator[Row]:
    """Ratios and seconds of frames with their quartiles over rounds, floors, what was counted, the goals."""
    yield from rows_of_goals(result["targets"])
    for part, place in PARTS.items():
        for key, what in WHAT.items():
            yield from rows_of_ratios(result[part][key], f"{place}, {what}")
        yield from rows_of_passes(result[part]["passes"], place)
    for key, what in WHAT.items():
        for name, floor in result["last_frame"]["floors"][key].items():
            yield Row(name, "floor", f"last frame, {what}", floor)
    for name, own in result["last_frame"]["videos"].items():
        for stream, length in zip(("conditional", "unconditional"), own["live_tokens"], strict=True):
            yield Row(name, "live tokens", stream, length)
        yield Row(name, "tokens", "", own["total_tokens"])
        yield Row(name, "peak KV blocks", "both streams", own["peak_blocks"])
        yield Row(name, "peak KV cache", "both streams", result["memory"]["kv_bytes"][name], unit="bytes")
    for name, own in result["readings"].items():
        yield Row("full / packcache", "ratio, interpolated", name, own["full / packcache"])
        yield Row("full / packcache", "floor", name, own["floor"])
    for name, rate in (result["rates"] or {}).items():
        yield Row(name, "operations a second", "", rate)
    yield Row("published code", "peak of its mask", "", result["memory"]["published_mask_bytes"], unit="bytes")
    yield Row("engine", "peak memory of its process", "", result["engine"]["peak_bytes"], unit="bytes")
    for name, passed in result["checks"].items():
        yield Row(name, "check passed", "", passed)


def rows_of_passes(passes: Mapping[str, Any], place: str) -> Iterator[Row]:
    """Seconds of every pass and of its parts, by clock and by what was made."""
    for clock, words in CLOCK_NAMES.items():
        for name, own in passes[clock].items():
            for of, by_pass in own.items():
                for number_, samples in enumerate(by_pass, 1):
                    yield _seconds(name, f"seconds of {of} by {words}", f"{place}, pass {number_}", samples)


def rows_of_ratios(own: Mapping[str, Any], place: str) -> Iterator[Row]:
    """Ratios, and seconds by clock and by what was made."""
    for clock, words in CLOCK_NAMES.items():
        for name, by_clock in own["ratios"].items():
            yield row_of_ratio(name, f"ratio by {words}", place, by_clock[clock])
        for name, samples in own[clock].items():
            yield _seconds(name, f"seconds by {words}", place, samples)


def _seconds(name: str, measure: str, place: str, samples: list[float]) -> Row:
    return row_of_ratio(name, measure, place, summary(samples))._replace(unit="s")


# ---------------------------------------------------------------------------------------------------------------------
# Text


def _measured(result: Result) -> str:
    model, machine = result["model"], result["machine"]
    where = machine.get("gpu") or (
        f"a CPU ({machine['cpu']}, {machine['cores']} cores, {machine['threads_per_engine']} "
        f"thread{'s' if machine['threads_per_engine'] > 1 else ''})"
    )
    return (
        f"{result['is']}. The model ({model['dtype']}, hidden {model['hidden']:,}, {model['heads']} heads, "
        f"{model['kv_heads']} of keys and values, MLP {model['intermediate']:,}, vocabulary {model['vocab']:,}) has "
        f"made-up weights and is run on {where}; all layers are alike. Given frames are not computed: what is "
        "cached does not matter to time. Ratios are of frames made in turn by one engine, by processor time: median "
        "(quartiles)."
    )


def _floor(result: Result) -> str:
    """Why ratios are not those of operations."""
    rates = result["rates"]
    text = (
        "The floor is the ratio of floating-point operations of the layers' matrices, of the output layer and of "
        "attention over what is read."
    )
    if rates is None:
        return text
    attention, linear, head = (number(rates[part] / 1e9, 0) for part in ("attention", "linear", "head"))
    return (
        f"{text} Attention ran at {attention}, the layers' matrices at {linear} and the output layer, in float32, at "
        f"{head} GFLOP/s: where attention is slower than matrices, the ratio lies above its floor; where both are "
        "equally fast, it is the floor."
    )


def _readings(result: Result) -> str:
    own = "; ".join(
        f"{name}: {ratio(found['full / packcache'])}, floor {ratio(found['floor'])}"
        for name, found in result["readings"].items()
    )
    return (
        f"The video has {result['frames']} frames after its conditioning image. Of {result['frames']} pictures in all, "
        f"interpolated, as a pass is linear in the tokens that are read: {own}."
    )


def _memory(result: Result) -> str:
    memory = result["memory"]
    tokens = memory["published_frames"] * result["tokens_per_frame"]
    return (
        f"KV cache: the most blocks that a request held in its two streams, in the engine that was timed, for "
        f"{result['layers_reported']} layers in bfloat16. The published code needs an attention mask besides its two "
        f"caches: at its peak an int64 copy of it and its float32 result, 12 bytes for each of {tokens:,} x {tokens:,} "
        f"elements ({memory['published_frames']} frames without text), "
        f"{number(memory['published_mask_bytes'] / GB, 1)} GB. There is no mask here: a picture is one attention row, "
        "whose queries all see the same keys."
    )


def _table(result: Result) -> Table:
    last, kv = result["last_frame"], result["memory"]["kv_bytes"]
    whole, floors = last["whole_frame"], last["floors"]["whole_frame"]
    return Table(
        ("", "tokens read, both streams", "frame, s", "full / this", "floor", "KV cache, GB"),
        [
            (
                VIDEOS[name],
                f"{sum(own['live_tokens']):,}",
                significant(median(whole[CPU][name])),
                *_against_full(f"full / {name}", whole["ratios"], floors),
                significant(kv[name] / GB),
            )
            for name, own in last["videos"].items()
        ],
    )


def _against_full(name: str, ratios: Mapping[str, Any], floors: Mapping[str, float]) -> tuple[str, str]:
    return (with_quartiles(ratios[name][CPU]), ratio(floors[name])) if name in ratios else ("", "")


def _batch(result: Result) -> str:
    batch = result["batch"]
    found = batch["whole_frame"]["ratios"]["together / apart"]
    rows_, columns = batch["grid"]
    return (
        f"{batch['videos']} videos of {rows_} x {columns} visual tokens in one batch take "
        f"{with_quartiles(found[CPU])} of the time that they take one after another"
        + ("." if result["engine"]["device"] == "cuda" else " (the goal is for a GPU, which one video does not fill).")
    )


def long(result: Result, files: Files) -> Iterator[Paragraph]:
    """The section of the report."""
    yield f"A frame with all its passes: {_measured(result)}"
    yield provenance(result)
    yield _table(result)
    yield f"{_floor(result)} {_readings(result)}"
    yield _batch(result)
    last = result["last_frame"]
    yield "**What was timed**, medians of rounds, s by processor time:"
    yield Table(
        ("", "pass", "whole", "layers", "output layer and choice", "entering", "the rest"),
        [
            (VIDEOS[name], _pass(number_, result), *map(significant, own))
            for name, passes in last["passes"][CPU].items()
            for number_, own in enumerate(_medians(passes))
        ],
    )
    yield Table(
        ("ratio", "reported", "floor", "as timed", "floor", "as timed, by the clock"),
        [
            (
                name,
                with_quartiles(last["whole_frame"]["ratios"][name][CPU]),
                ratio(last["floors"]["whole_frame"][name]),
                with_quartiles(last["as_timed"]["ratios"][name][CPU]),
                ratio(last["floors"]["as_timed"][name]),
                ratio(last["as_timed"]["ratios"][name][WALL]["median"]),
            )
            for name in last["whole_frame"]["ratios"]
        ],
    )
    yield (
        f"**Memory.** {_memory(result)} The engine's process held {number(result['engine']['peak_bytes'] / GB, 1)} GB "
        "at most, with the weights of the layers that were timed, of the embedding and of the output layer."
    )
    yield "**Checks.** " + "; ".join(
        f"{check}: {'yes' if passed else '**NO**'}" for check, passed in result["checks"].items()
    )
    yield from files.picture("masked", "Ratios with their goals, and memory")


def _medians(passes: Mapping[str, list[list[float]]]) -> Iterator[tuple[float, ...]]:
    """Of each pass: the whole, the parts that have a column, and the rest."""
    for of_all in zip(passes["passes"], *(passes[part] for part in (LAYERS, CHOOSING, ENTERING)), strict=True):
        whole, *parts = map(median, of_all)
        yield whole, *parts, max(0.0, whole - sum(parts))


def _pass(number_: int, result: Result) -> str:
    return "commit" if number_ == result["steps_timed"] else f"step {number_ + 1}"


def short(result: Result, files: Files) -> Iterator[Paragraph]:
    """The section of a README."""
    yield (
        f"**A masked model** (Lumos-1): {_measured(result)} {_floor(result)} {_batch(result)} "
        f"{_memory(result)} All samples: {files.link('masked.json')}."
    )
    yield _table(result)
    yield from files.picture("masked", "Ratios with their goals, and memory")
