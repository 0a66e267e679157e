"""What is made of the measurements: checks, targets, the table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.decode.plan import BLOCK_SIZE, POLICY
from benchmarks.decode.samples import CPU, WALL

_WHOLE = "end to end: full / packcache"
"""The target for all frames together."""


def targets(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every ratio with the bound it must keep, and whether it does: None for the times of a quick run."""
    last = {name: by_clock[CPU]["median"] for name, by_clock in result["last_frame"]["ratios"].items()}
    growth, generated = result["early_and_late_frame"], result["generated"]
    whole = result["frames"]["end_to_end"]["ratios"]
    timed = [
        _target("full / packcache", last["full / packcache"], at_least=3.7),
        _target("packcache / short", last["packcache / short"], at_most=1.05),
        _target("opt_out / full", last["opt_out / full"], at_most=1.02),
        _target("rebase / absolute", result["sliding_frame"][CPU]["rebase / absolute"], at_most=1.02),
        _target(_growth_name(result), growth["ratios"]["late / early"][CPU]["median"], at_most=1.03),
        _target(_WHOLE, whole["full / packcache"][CPU]["median"], at_least=2.2),
    ]
    if result["quick"]:
        timed = [target | {"met": None} for target in timed]
    return [
        *timed,
        _peak_target("peak blocks, prompted", growth["peak_blocks"]),
        _peak_target("peak blocks, generated", generated["peak_blocks"]),
    ]


def _peak_target(name: str, peaks: Mapping[str, int]) -> dict[str, Any]:
    """Late over early: equal, but for one block at each boundary of the condition and of the window's frames."""
    boundaries = 1 + POLICY.window + 1
    return _target(name, peaks["late"] / peaks["early"], at_most=1 + boundaries / peaks["early"])


def _target(ratio: str, value: float, *, at_least: float = 0, at_most: float = math.inf) -> dict[str, Any]:
    bound = {"at_least": at_least} if at_least else {"at_most": at_most}
    return {"ratio": ratio, "value": value, **bound, "met": at_least <= value <= at_most}


def checks(result: Mapping[str, Any]) -> dict[str, bool]:
    """What does not depend on time."""
    runs = ("last_frame", "sliding_frame", "early_and_late_frame", "generated", "frames")
    return {
        "tokens of opt_out equal those of full": result["last_frame"]["tokens_equal"],
        "blocks in use are those that retention decides": all(result[run]["blocks_as_decided"] for run in runs),
    }


def print_table(result: Mapping[str, Any], console: Console) -> None:
    """Print what `run` returns: ratios and their bounds, then what is counted."""
    last, growth = result["last_frame"], result["early_and_late_frame"]
    table = Table(title="Decode steps: ratios of interleaved runs", box=SIMPLE_HEAD)
    table.add_column("ratio", no_wrap=True)
    for column in ("median", "quartiles", "by the clock", "must be"):
        table.add_column(column, justify="right", no_wrap=column != "by the clock")
    table.add_column("met")
    whole = result["frames"]["end_to_end"]["ratios"]
    measured = last["ratios"] | {
        _growth_name(result): growth["ratios"]["late / early"],
        _WHOLE: whole["full / packcache"],
    }
    for target in result["targets"]:
        name = target["ratio"]
        if name in measured:
            cells = _cells(measured[name])
        elif name == "rebase / absolute":
            cells = (f"{target['value']:.3f}", "whole frame", f"{result['sliding_frame'][WALL][name]:.3f}")
        else:
            cells = (f"{target['value']:.3f}", "counted", "")
        bound = f">= {target['at_least']:.2f}" if "at_least" in target else f"<= {target['at_most']:.2f}"
        met = {True: "[green]yes[/]", False: "[red]MISSED[/]", None: "n/a"}[target["met"]]
        table.add_row(name, *cells, bound, met)
        for place, at_place in last["places"].items():
            if name in at_place["ratios"]:
                table.add_row(f"  at its {place}", *_cells(at_place["ratios"][name]), style="dim")
    for title, ratios in (("end to end", whole), ("middle of the last frame", result["frames"]["last"]["ratios"])):
        table.add_row(f"{title}:", style="dim")
        for name, ratio in ratios.items():
            table.add_row(f"  {name}", *_cells(ratio), style="dim")
    for control in result["control"].values():
        row = f"control, {control['prompt_tokens']:,} tokens"
        table.add_row(row, *_cells(control["ratios"]["full / short"]), style="dim")
    console.print(table)
    for check, passed in result["checks"].items():
        console.print(f"{check}: {'[green]yes[/]' if passed else '[red]NO[/]'}")
    slide = result["sliding_frame"][CPU]["share_of_slide"]
    console.print(f"share of a frame that the slide before it takes: {slide:.2%}")
    shares = ", ".join(f"{name} {share:.0%}" for name, share in result["share_of_reading"].items())
    console.print(f"share of a step that a sequence of {BLOCK_SIZE} tokens does not need: {shares}")


def _cells(by_clock: Mapping[str, Any]) -> tuple[str, str, str]:
    """Median and quartiles by processor time, and the median by the clock."""
    low, high = by_clock[CPU]["quartiles"]
    return f"{by_clock[CPU]['median']:.3f}", f"{low:.2f} - {high:.2f}", f"{by_clock[WALL]['median']:.3f}"


def _growth_name(result: Mapping[str, Any]) -> str:
    return "frame {late} / frame {early}".format(**result["early_and_late_frame"]["frames"])


def share_of_reading(result: Mapping[str, Any]) -> dict[str, float]:
    """Part of a step in the middle of the last frame that a sequence of one block does not need."""
    tiny = median(sample for own in result["control"]["tiny"][CPU].values() for sample in own)
    steps = result["last_frame"]["places"]["middle"][CPU]
    return {name: 1 - tiny / median(own) for name, own in steps.items()}
