"""What is made of the measurements: goals, the table."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.decode.samples import CPU, WALL
from benchmarks.overhead.plan import CASES, STOCK

GOALS = {"room / stock": 1.10, "packcache / stock": 1.25}
"""At most so many times stock vLLM's processor time."""


def targets(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every ratio with the bound it must keep, and whether it does: None for the times of a quick run."""
    found = []
    for ratio, bound in GOALS.items():
        value = result["ratios"][ratio][CPU]["median"]
        met = None if result["quick"] else value <= bound
        found.append({"ratio": ratio, "value": value, "at_most": bound, "met": met})
    return found


def print_table(result: Mapping[str, Any], console: Console) -> None:
    """Print what `run` returns."""
    table = Table(title=f"A step of {result['requests']} requests: host cost", box=SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for column in ("ms a step", "times stock", "quartiles", "by the clock", "must be"):
        table.add_column(column, justify="right")
    judged = {target["ratio"]: target for target in result["targets"]}
    for case, name in CASES.items():
        row = [f"{1e3 * fmean(result[CPU][case]):.2f}"]
        if case != STOCK:
            ratio = f"{case} / {STOCK}"
            own = result["ratios"][ratio]
            low, high = own[CPU]["quartiles"]
            row += [f"{own[CPU]['median']:.3f}", f"{low:.2f} - {high:.2f}", f"{own[WALL]['median']:.3f}"]
            if target := judged.get(ratio):
                met = {True: " [green]yes[/]", False: " [red]MISSED[/]", None: ""}[target["met"]]
                row.append(f"<= {target['at_most']:.2f}{met}")
        table.add_row(name, *row)
    console.print(table)
    for runner, cases in result["host"].items():
        for case, own in cases.items():
            step = own["microseconds_per_step"]
            console.print(
                f"{runner}, {CASES[case]}: {step['median']:.0f} µs of a step are in our functions "
                f"({own['microseconds_per_step_and_request']:.2f} a request), {step['max']:.0f} where a frame begins",
                soft_wrap=True,
            )
