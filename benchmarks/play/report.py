"""What `benchmarks.play` measured."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from benchmarks.play.plan import PACKCACHE, RESET
from benchmarks.report.markdown import Files, listed, ratio, significant
from benchmarks.report.parts import Goal, Result, Row, goals_of_ratios, provenance, rows_of_goals
from benchmarks.report.table import Paragraph, Table

CPU, WALL = "cpu_seconds", "seconds"
CLOCKS = {CPU: "the engines' processor time", WALL: "the clock"}

THROUGHPUT = "frames a second, sessions / stock vLLM"
LATE = "first token, late / early frame"
PAUSE = "slowest / median frame, packcache"
HELD = "sessions at once"


def goals(result: Result) -> list[Goal]:
    """The four of the benchmark."""
    late, plan = result["late_frames"], result["plan"]
    names = {
        THROUGHPUT: f"frames a second of {plan['sessions']} sessions / stock vLLM with a request a frame",
        LATE: f"time to the first token of frame {late['frame']} / of frame {late['early_frame']}",
        PAUSE: f"slowest frame of {plan['pauses']} / median frame of a session",
        HELD: f"sessions at once where one video of {plan['held_frames']} frames fits whole",
    }
    return goals_of_ratios(result, names)


def rows(result: Result) -> Iterator[Row]:
    """Of each comparison."""
    yield from rows_of_goals(result["targets"])
    for clock, words in CLOCKS.items():
        own = result["throughput"]["ratios"][clock]
        samples = own["samples"]
        yield Row(THROUGHPUT, f"by {words}", "", own["median"], min(samples), max(samples), "range of rounds")
    for name in (PACKCACHE, RESET):
        pauses = result["pauses"][name]
        yield Row(name, "slowest / median frame", "", pauses["worst / median"])
        yield Row(name, "median frame", "", median(pauses["seconds"]), unit="s")
    yield Row(HELD, "let in", "", result["held"]["sessions"])


def _measured(result: Result) -> str:
    plan = result["plan"]
    frame = plan["grid"][0] * plan["grid"][1]
    return (
        f"frames of {frame} tokens and an action, over HTTP. {plan['sessions']} sessions at once with a KV pool of "
        f"{plan['pool_blocks']} blocks, beside stock vLLM with the same pool and prefix caching, whose clients send "
        f"their prompt again for every frame and begin anew with {plan['context'] // 2} of {plan['context']} frames."
    )


def _table(result: Result) -> Table:
    throughput, pauses, held = result["throughput"]["ratios"], result["pauses"], result["held"]
    lines = [
        (f"frames a second, sessions / stock, by {words}", ratio(throughput[clock]["median"]))
        for clock, words in CLOCKS.items()
    ]
    late = result["late_frames"]
    lines += [
        (f"first token of frame {late['frame']} / of frame {late['early_frame']}", ratio(late["ratio"])),
        ("slowest / median frame, packcache", ratio(pauses[PACKCACHE]["worst / median"])),
        ("slowest / median frame, reset", ratio(pauses[RESET]["worst / median"])),
        (f"sessions at once in {held['pool_blocks']} blocks", str(held["sessions"])),
    ]
    return Table(("", "measured"), lines)


def long(result: Result, files: Files) -> Iterator[Paragraph]:
    """The section of the report."""
    yield f"Sessions that are played: {_measured(result)}"
    yield provenance(result)
    yield _table(result)
    samples = result["throughput"]["ratios"][CPU]["samples"]
    yield f"Frames a second by {CLOCKS[CPU]}, round by round: {listed([ratio(sample) for sample in samples])}."
    seconds = {name: significant(median(result["pauses"][name]["seconds"])) for name in (PACKCACHE, RESET)}
    yield f"Median frame: {seconds[PACKCACHE]} s with packcache, {seconds[RESET]} s with reset."


def short(result: Result, files: Files) -> Iterator[Paragraph]:
    """The section of a README."""
    yield f"**Played**: {_measured(result)} All samples: {files.link('play.json')}."
    yield _table(result)
