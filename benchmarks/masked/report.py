"""What is made of the measurements: checks, targets, the table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.decode.samples import CPU, WALL

GB = 1e9


def targets(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every ratio with the bound it must keep, and whether it does.

    None: of a quick run; and of videos in one batch, for which the bound is that of a GPU.
    """
    last, batch = (result[part]["whole_frame"]["ratios"] for part in ("last_frame", "batch"))
    found = [
        _target("full / packcache", last["full / packcache"], at_least=2.3),
        _target("packcache / short", last["packcache / short"], at_most=1.03),
        _target("together / apart", batch["together / apart"], at_most=0.5),
    ]
    if result["engine"]["device"] == "cpu":
        found[-1]["met"] = None
    return [target | {"met": None} for target in found] if result["quick"] else found


def _target(
    ratio: str, by_clock: Mapping[str, Any], *, at_least: float = 0, at_most: float = math.inf
) -> dict[str, Any]:
    bound, value = {"at_least": at_least} if at_least else {"at_most": at_most}, by_clock[CPU]["median"]
    return {"ratio": ratio, "value": value, **bound, "met": at_least <= value <= at_most}


def checks(result: Mapping[str, Any]) -> dict[str, bool]:
    """What does not depend on time."""
    live = {name: sum(own["live_tokens"]) for name, own in result["last_frame"]["videos"].items()}
    return {
        "short reads as many tokens as packcache": live["short"] == live["packcache"],
        "blocks in use are those that retention decides": result["last_frame"]["blocks_as_decided"],
    }


def print_table(result: Mapping[str, Any], console: Console) -> None:
    """Print what `run` returns: ratios, floors and bounds, then memory and what is counted."""
    last, batch, memory = (result[part] for part in ("last_frame", "batch", "memory"))
    table = Table(title="A frame with all its passes: ratios of interleaved runs", box=SIMPLE_HEAD)
    table.add_column("ratio", no_wrap=True)
    for column in ("median", "range", "by the clock", "floor", "must be"):
        table.add_column(column, justify="right")
    table.add_column("met")
    judged = {target["ratio"]: target for target in result["targets"]}
    for part, floors in ((last, last["floors"]), (batch, None)):
        for name, by_clock in part["whole_frame"]["ratios"].items():
            bound, met = "", ""
            if target := judged.get(name):
                bound = f">= {target['at_least']:.2f}" if "at_least" in target else f"<= {target['at_most']:.2f}"
                met = {True: "[green]yes[/]", False: "[red]MISSED[/]", None: "n/a"}[target["met"]]
            floor = "" if floors is None else f"{floors['whole_frame'][name]:.3f}"
            table.add_row(name, *_cells(by_clock), floor, bound, met)
            floor = "" if floors is None else f"{floors['as_timed'][name]:.3f}"
            table.add_row("  as timed", *_cells(part["as_timed"]["ratios"][name]), floor, style="dim")
    console.print(table)
    console.print(result["is"], soft_wrap=True)
    for check, passed in result["checks"].items():
        console.print(f"{check}: {'[green]yes[/]' if passed else '[red]NO[/]'}")
    held = ", ".join(f"{name} {held / GB:.2f} GB" for name, held in memory["kv_bytes"].items())
    console.print(
        f"KV cache held at most: {held}; the published code's mask alone: {memory['published_mask_bytes'] / GB:.1f} GB",
        soft_wrap=True,
    )


def _cells(by_clock: Mapping[str, Any]) -> tuple[str, str, str]:
    """Median and range by processor time, and the median by the clock."""
    own = by_clock[CPU]
    return f"{own['median']:.3f}", f"{own['min']:.2f} - {own['max']:.2f}", f"{by_clock[WALL]['median']:.3f}"
