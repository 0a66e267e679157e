"""What `benchmarks.serve` measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.report.markdown import Files, listed, percent, ratio, significant
from benchmarks.report.parts import Goal, Result, Row, goals_of_ratios, provenance, rows_of_goals
from benchmarks.report.table import Paragraph, Table
from benchmarks.serve.plan import PACKCACHE, SERVERS, STOCK
from benchmarks.serve.runs import CPU, PERCENTILES, WALL

CLOCKS = {CPU: "the engines' processor time", WALL: "the clock"}
RATIO = "throughput packcache / stock"
PREEMPTIONS, USAGE = "preemptions", "most of the KV pool in use"
RANKS = (*(f"p{rank}" for rank in PERCENTILES), "max")

SHOWN = ("selection", "history_frames", "window")
"""Options of the policy that are told; results of before there were selections lack one."""

NAMES = {
    "capacity packcache / stock": "videos at once without a preemption, packcache / stock",
    RATIO: f"throughput by {CLOCKS[CPU]}, packcache / stock",
}


def goals(result: Result) -> list[Goal]:
    """The two of the benchmark; throughput with what the rounds gave."""
    samples = result["load"][RATIO][CPU]["samples"]
    capacity, throughput = goals_of_ratios(result, NAMES)
    return [capacity, throughput._replace(value=f"{throughput.value} {_rounds(samples)}")]


def _rounds(samples: Sequence[float]) -> str:
    return f"(rounds: {listed([ratio(sample) for sample in samples])})"


def rows(result: Result) -> Iterator[Row]:
    """Of each server; of loads the median of the rounds, and the least and the most."""
    load = result["load"]
    yield from rows_of_goals(result["targets"])
    for server in SERVERS:
        for which in ("peak", "mean"):
            yield Row(server, f"{which} KV blocks of a video", "", result[f"{which}_blocks_of_a_video"][server])
        yield Row(server, "videos at once without a preemption", "", result["capacity"][server]["videos"])
        for tried in result["capacity"][server]["loads"]:
            place = f"{tried['videos']} videos at once, room looked for"
            yield Row(server, PREEMPTIONS, place, tried["preemptions"])
            yield Row(server, USAGE, place, tried["peak_usage"])
        own = [by_server[server] for by_server in load["rounds"]]
        place = f"{load['videos']} videos at once"
        for measure, samples, unit in _measures(own):
            yield _over_rounds(server, measure, place, samples, unit)
    for clock, words in CLOCKS.items():
        samples = load[RATIO][clock]["samples"]
        yield _over_rounds("packcache / stock", f"throughput by {words}", f"{load['videos']} videos at once", samples)


def _over_rounds(name: str, measure: str, place: str, samples: Sequence[float], unit: str = "") -> Row:
    return Row(name, measure, place, median(samples), min(samples), max(samples), "range of rounds", unit)


def _measures(loads: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[float], str]]:
    """What is measured of a load: name, a sample a round, unit."""

    def of(key: str) -> list[float]:
        return [load[key] for load in loads]

    yield "throughput", of("tokens_per_second"), "tokens/s"
    yield "time of all videos", of(WALL), "s"
    yield "processor time of the engine", of(CPU), "s"
    yield "processor time of the other server", of("other_cpu_seconds"), "s"
    yield PREEMPTIONS, of("preemptions"), ""
    yield USAGE, of("peak_usage"), ""
    yield "first token, median of videos", [median(load["first_token_seconds"]) for load in loads], "s"
    for key, words in (("video_seconds_percentiles", "whole video"), ("inter_token_seconds", "between two tokens")):
        for rank in RANKS:
            yield f"{words}, {rank}", [load[key][rank] for load in loads], "s"


# ---------------------------------------------------------------------------------------------------------------------
# Text


def _measured(result: Result) -> str:
    video, policy = result["video"], result["policy"]
    return (
        f"videos of {video['frames']} frames of {video['tokens_per_frame']:,} tokens, each generated from a condition "
        f"of {video['condition_tokens']:,}, sent over HTTP to two servers, stock vLLM and packcache "
        f"({listed([f'{name} = {policy[name]}' for name in SHOWN if name in policy])}), "
        f"with the same KV pool of {result['pool_blocks']:,} blocks, large enough for "
        f"{result['pool_blocks'] // result['peak_blocks_of_a_video'][STOCK]} such videos with their full cache."
    )


def _why(result: Result) -> str:
    peak, mean = result["peak_blocks_of_a_video"], result["mean_blocks_of_a_video"]
    return (
        f"A video holds {peak[STOCK]:,} blocks at most with stock vLLM and {peak[PACKCACHE]:,} with packcache, on "
        f"average while it grows {significant(mean[STOCK])} and {significant(mean[PACKCACHE])}."
    )


def _throughput(result: Result) -> list[tuple[str, str, str, str]]:
    load = result["load"]
    return [
        (
            f"throughput of {load['videos']} videos by {words}",
            "",
            "",
            f"{ratio(own['median'])} {_rounds(own['samples'])}",
        )
        for clock, words in CLOCKS.items()
        for own in (load[RATIO][clock],)
    ]


def _loads(result: Result) -> dict[str, tuple[float, float]]:
    """Medians over the rounds by measure, of stock vLLM and of packcache."""
    by_server = [list(_measures([by_server[server] for by_server in result["load"]["rounds"]])) for server in SERVERS]
    return {
        f"{stock[0]}{', ' if stock[2] else ''}{stock[2]}": (median(stock[1]), median(packcache[1]))
        for stock, packcache in zip(*by_server, strict=True)
    }


def _table(result: Result, measures: Sequence[str]) -> Table:
    capacity = [result["capacity"][server]["videos"] for server in SERVERS]
    loads = _loads(result)
    return Table(
        ("", "stock vLLM", "packcache", "packcache / stock"),
        [
            ("videos at once without a preemption", *map(str, capacity), ratio(capacity[1] / capacity[0])),
            *_throughput(result),
            *((measure, *(_cell(measure, value) for value in loads[measure]), "") for measure in measures),
        ],
    )


def _cell(measure: str, value: float) -> str:
    if measure == PREEMPTIONS:
        return f"{value:,g}"
    return percent(value, 0) if measure == USAGE else significant(value)


def long(result: Result, files: Files) -> Iterator[Paragraph]:
    """The section of the report."""
    yield f"Many requests at once: {_measured(result)} {_why(result)}"
    yield provenance(result)
    yield (
        f"Load: {result['load']['videos']} videos at once, on both servers; medians of "
        f"{len(result['load']['rounds'])} rounds."
    )
    yield _table(result, list(_loads(result)))
    yield "Loads that were tried to find how many videos run together to their end without a preemption:"
    yield Table(
        ("server", "videos at once", PREEMPTIONS, "all at the same time", USAGE),
        [
            (
                server,
                f"{tried['videos']}",
                f"{tried['preemptions']}{', stopped there' if tried['stopped'] else ''}",
                "yes" if tried["together"] else "no",
                percent(tried["peak_usage"], 0),
            )
            for server in SERVERS
            for tried in result["capacity"][server]["loads"]
        ],
    )
    yield "Arguments of the servers:"
    yield "\n".join(f"- {server}: `{arguments}`" for server, arguments in result["engine"].items())


def short(result: Result, files: Files) -> Iterator[Paragraph]:
    """The section of a README."""
    yield f"**Many videos at once**: {_measured(result)} {_why(result)} All samples: {files.link('serve.json')}."
    measures = ["throughput, tokens/s", PREEMPTIONS, "whole video, p50, s", "whole video, p99, s"]
    yield _table(result, [*measures, "between two tokens, p99, s", "between two tokens, max, s"])
