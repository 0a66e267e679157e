"""What `benchmarks.decode` measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.decode.samples import CLOCK_NAMES, CPU, WALL, summary
from benchmarks.report.markdown import Files, listed, number, percent, ratio, significant, with_quartiles
from benchmarks.report.parts import (
    NOT_MEASURED,
    Goal,
    Result,
    Row,
    goals_of_ratios,
    provenance,
    row_of_ratio,
    rows_of_goals,
)
from benchmarks.report.table import Paragraph, Table

LAST_OF_CHANGED = "full / changed, least, the middle of the last frame"
CHOOSING = "choosing what changed / a frame"

NAMES = {
    "full / packcache": "full / packcache, last frame",
    "packcache / short": "packcache / stock vLLM at the live length",
    "opt_out / full": "a request that keeps its whole cache / stock vLLM",
    "rebase / absolute": "positions re-based / absolute, a whole frame with its slide",
    CHOOSING: "choosing what changed, once a frame, on the host / the frame",
    "peak blocks, prompted": "peak KV blocks late / early, frames given",
    "peak blocks, generated": "peak KV blocks late / early, all frames generated",
}
"""Goals, for people."""

END_TO_END = "end to end: "
"""What names of ratios over all frames begin with."""

NO_FRAMES = "All frames one by one, end to end, and other policies: not measured."
"""Of a result of before they were."""


def goals(result: Result) -> list[Goal]:
    """All that have a bound; what was not measured is named."""
    growth, frames, grown = result["early_and_late_frame"], result.get("frames"), late(result)
    summaries = {name: own[CPU] for name, own in result["last_frame"]["ratios"].items()}
    summaries[grown] = growth["ratios"]["late / early"][CPU]
    names = NAMES | {grown: f"packcache at {grown}, the same live length"}
    if frames is None:
        return [*goals_of_ratios(result, names, summaries), Goal("full / packcache, end to end", NOT_MEASURED, "", "")]
    # Results of before there was a selection by changes lack it.
    if "changed" in frames["policies"]:
        summaries[LAST_OF_CHANGED] = frames["last"]["ratios"]["full / changed, least"][CPU]
    for name, own in frames["end_to_end"]["ratios"].items():
        summaries[f"{END_TO_END}{name}"] = own[CPU]
        names[f"{END_TO_END}{name}"] = f"{name}, end to end over {frames['frames'][-1]['frame'] + 1} frames"
    return goals_of_ratios(result, names, summaries)


def late(result: Result) -> str:
    """Name of the ratio of a late frame to an early one."""
    return "frame {late} / frame {early}".format(**result["early_and_late_frame"]["frames"])


# ---------------------------------------------------------------------------------------------------------------------
# CSV


def rows(result: Result) -> Iterator[Row]:
    """Ratios and seconds a step with their quartiles over rounds, what was counted, the goals."""
    last, growth, slide = result["last_frame"], result["early_and_late_frame"], result["sliding_frame"]
    yield from rows_of_goals(result["targets"])
    yield from _ratios(last["ratios"], "last frame")
    for place, own in last["places"].items():
        yield from _timed(own, f"last frame, {place}")
        yield from _counted(own["blocks_at_the_end"], "KV blocks", f"last frame, {place}")
    for name, own in result["control"].items():
        yield from _timed(own, f"control, {name}")
    for clock, words in CLOCK_NAMES.items():
        for name, seconds in slide[clock]["frame"].items():
            yield Row(name, f"seconds of a frame by {words}", "a frame that slides", seconds, unit="s")
        yield Row("rebase / absolute", f"ratio by {words}", "a frame that slides", slide[clock]["rebase / absolute"])
        yield Row("slide", f"seconds by {words}", "a frame that slides", slide[clock]["slide"], unit="s")
        yield Row("slide", f"share of a frame by {words}", "a frame that slides", slide[clock]["share_of_slide"])
    yield from _ratios(growth["ratios"], late(result))
    for number_, half in enumerate(growth["halves"], 1):
        yield from _timed(half, f"{late(result)}, half {number_}")
    for key, words in (("peak_blocks", "peak KV blocks"), ("peak_blocks_of_prefill", "peak KV blocks of prefill")):
        yield from _counted(growth[key], words, "frames given")
    yield from _counted(result["generated"]["peak_blocks"], "peak KV blocks", "all frames generated")
    for name, share in result["share_of_reading"].items():
        yield Row(name, "share of a step that reads", "last frame, middle", share)
    for name, passed in result["checks"].items():
        yield Row(name, "check passed", "", passed)
    if frames := result.get("frames"):
        for frame in frames["frames"]:
            yield from _timed(frame, f"frame {frame['frame']}")
        yield from _ratios(frames["end_to_end"]["ratios"], "end to end")
        for clock, words in CLOCK_NAMES.items():
            for name, samples in frames["end_to_end"][clock].items():
                yield row_of_ratio(name, f"seconds by {words}", "end to end", summary(samples))._replace(unit="s")


def _ratios(ratios: Mapping[str, Mapping[str, Any]], place: str) -> Iterator[Row]:
    for name, by_clock in ratios.items():
        for clock, words in CLOCK_NAMES.items():
            yield row_of_ratio(name, f"ratio by {words}", place, by_clock[clock])


def _timed(own: Mapping[str, Any], place: str) -> Iterator[Row]:
    """Of what `step_times` gives, and of the lengths beside it."""
    yield from _ratios(own["ratios"], place)
    for clock, words in CLOCK_NAMES.items():
        for name, samples in own[clock].items():
            yield row_of_ratio(name, f"seconds of a step by {words}", place, summary(samples))._replace(unit="s")
    if "prompt_tokens" in own:
        yield Row("", "prompt tokens", place, own["prompt_tokens"])
    if live := own.get("live_tokens"):
        yield from _counted(live if isinstance(live, dict) else {"packcache": live}, "live tokens", place)


def _counted(counts: Mapping[str, float], measure: str, place: str) -> Iterator[Row]:
    for name, count in counts.items():
        yield Row(name, measure, place, count)


# ---------------------------------------------------------------------------------------------------------------------
# Text


def _measured(result: Result) -> str:
    last, model, machine = result["last_frame"], result["model"], result["machine"]
    return (
        f"a video of {last['condition_tokens']:,} condition tokens and {last['frames']} frames of "
        f"{last['tokens_per_frame']:,} tokens; stock vLLM against packcache and other policies, with a small random "
        f"model ({model['dtype']}, {model['layers']} layers of {model['heads']} heads) that spends "
        f"{percent(result['share_of_reading']['full'], 0)} of a step of the last frame on the full cache, on a "
        f"CPU ({machine['cpu']}, {machine['cores']} cores, {machine['threads_per_engine']} "
        "thread an engine). Ratios are of interleaved bursts of decode steps, by processor time: median (quartiles)."
    )


def _control(result: Result) -> str:
    """How far apart two engines are that do the same, what a slide takes, how the last frame goes."""
    places = result["last_frame"]["places"]
    along = [ratio(own["ratios"]["full / packcache"][CPU]["median"]) for own in places.values()]
    apart = {name: abs(own["ratios"]["full / short"][CPU]["median"] - 1) for name, own in result["control"].items()}
    tiny = result["control"]["tiny"]["prompt_tokens"]
    return (
        f"Two identical stock engines differed by {percent(apart['live'])} in the same run, on steps over {tiny} "
        f"tokens by {percent(apart['tiny'])}. The slide, which turns the keys of the whole history, takes "
        f"{percent(result['sliding_frame'][CPU]['share_of_slide'], 2)} of a frame. In the last frame, full / packcache "
        f"is {listed(along)} at its {listed(list(places))}: the frame itself grows too."
    )


def long(result: Result, files: Files) -> Iterator[Paragraph]:
    """The section of the report."""
    last, growth = result["last_frame"], result["early_and_late_frame"]
    yield f"One request at a time: {_measured(result)}"
    yield provenance(result)
    yield _control(result)
    yield "**Last frame.** The whole frame is the mean of its start, its middle and its end."
    places = {"the whole frame": last["ratios"]} | {
        f"its {place}": own["ratios"] for place, own in last["places"].items()
    }
    yield Table(
        ("ratio", "by processor time (quartiles)", "by the clock"),
        [
            (f"{name}, {place}", with_quartiles(ratios[name][CPU]), ratio(ratios[name][WALL]["median"]))
            for name in last["ratios"]
            for place, ratios in places.items()
        ],
    )
    yield _step_table(last["places"], "place")
    yield "**End to end**, sum over all frames, and **the middle of the last frame**, of every policy."
    if (frames := result.get("frames")) is None:
        yield NO_FRAMES
    else:
        yield from _frames(frames, files)
    first, last_one = growth["frames"].values()
    yield f"**Early and late**: frames {first} and {last_one}, at the same live length."
    by_clock = growth["ratios"]["late / early"]
    yield Table(
        ("", "value"),
        [
            ("late / early, by processor time", with_quartiles(by_clock[CPU])),
            ("late / early, by the clock", with_quartiles(by_clock[WALL])),
            *(
                (f"peak KV blocks, {how}, {role}", f"{count:,}")
                for how, own in (("frames given", growth), ("all frames generated", result["generated"]))
                for role, count in own["peak_blocks"].items()
            ),
        ],
    )
    yield "**Checks.** " + "; ".join(
        f"{check}: {'yes' if passed else '**NO**'}" for check, passed in result["checks"].items()
    )
    shares = ", ".join(f"{name} {percent(share, 0)}" for name, share in result["share_of_reading"].items())
    yield f"Share of a step in the middle of the last frame that a sequence of one block does not need: {shares}."


def _frames(frames: Mapping[str, Any], files: Files) -> Iterator[Paragraph]:
    yield _policies(frames)
    yield f"End to end: {frames['end_to_end']['is']}."
    yield "**Frame by frame**, in the middle of those that were timed:"
    yield _step_table({f"{frame['frame']}": frame for frame in frames["frames"]}, "frame")
    ratios = list(frames["end_to_end"]["ratios"])
    yield Table(
        ("frame", *ratios),
        [
            (f"{frame['frame']}", *(with_quartiles(frame["ratios"][name][CPU]) for name in ratios))
            for frame in frames["frames"]
        ],
    )
    yield from files.picture("decode", "Processor time of a step by frame and policy")


def _step_table(places: Mapping[str, Mapping[str, Any]], heading: str) -> Table:
    """Milliseconds a step by engine, and how much is read."""
    engines = next(iter(places.values()))[CPU]
    return Table(
        (heading, "tokens before it", *(f"{name}, ms a step" for name in engines)),
        [
            (place, f"{own['prompt_tokens']:,}", *(significant(1e3 * median(own[CPU][name])) for name in engines))
            for place, own in places.items()
        ],
    )


def _policies(frames: Mapping[str, Any]) -> Table:
    whole, last, frame = frames["end_to_end"], frames["last"]["ratios"], frames["frames"][-1]
    return Table(
        (
            "policy",
            "tokens read, last frame",
            "end to end, s",
            "full / policy, end to end",
            "full / policy, last frame",
        ),
        [
            (
                name,
                f"{frame['live_tokens'][name]:,}",
                significant(median(whole[CPU][name])),
                *_faster(name, whole["ratios"], last),
            )
            for name in frames["policies"]
        ],
    )


def _faster(name: str, *ratios: Mapping[str, Any]) -> Sequence[str]:
    return [with_quartiles(own[f"full / {name}"][CPU]) if f"full / {name}" in own else number(1, 0) for own in ratios]


def short(result: Result, files: Files) -> Iterator[Paragraph]:
    """The section of a README."""
    yield (
        f"**Decoding**, one request at a time: {_measured(result)} {_control(result)} All samples: "
        f"{files.link('decode.json')}."
    )
    if (frames := result.get("frames")) is None:
        yield NO_FRAMES
        return
    yield _policies(frames)
    yield from files.picture("decode", "Processor time of a step by frame and policy")
