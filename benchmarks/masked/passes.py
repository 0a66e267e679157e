"""A frame of a masked model with less computed in its passes: how long it takes, in layers, rows and passes.

Passes differ in the rows that they compute, and 50 of them take hours on a CPU. What the layers take is linear in the
rows of both streams: matrices and attention both are. So a few passes of different rows are timed, and what all passes
of a frame take is read from the line through them (`reckoned`); how far the passes lie from it is part of the result.
The full cache's passes are all alike.

The output layer takes as long whatever passes compute: a token is drawn in every pass. It is timed by an engine of its
own, so that the passes of different rows, which are timed by another one with few visual ids, need not pay for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.decode.plan import described
from benchmarks.decode.samples import CLOCKS, CPU, ratios_of
from benchmarks.goals import judged
from benchmarks.masked.plan import BLOCK_SIZE, ON_CPU, ON_GPU, POLICY, QUICK, SEED, MaskedPlan, MeasuredVideo
from benchmarks.masked.process import CHOOSING, ENTERING, LAYERS, PARTS
from benchmarks.masked.report import rows_of_passes, rows_of_ratios
from benchmarks.masked.runs import Bench, Frame, by_pass, in_turn
from benchmarks.protocol import Session
from benchmarks.report.markdown import Files, number, ratio, significant, with_quartiles
from benchmarks.report.parts import (
    Goal,
    Result,
    Row,
    goals_of_ratios,
    provenance,
    rows_of_goals,
)
from benchmarks.report.table import Paragraph, Table
from vllm_packcache.families import lumos
from vllm_packcache.families.lumos import MaskedOptions
from vllm_packcache.families.schedule import computed_passes, most_unknown, schedule
from vllm_packcache.tools.figures import new_figure, save
from vllm_packcache.tools.progress import counting

WAYS: Mapping[str, Mapping[str, Any]] = {
    "full": {},
    "packcache": {},
    "settled rows": {"refresh": 8},
    "reused passes": {"reuse": 0.02},
    "every second unconditional pass": {"guidance_interval": 2},
    "all of it": {"refresh": 8, "reuse": 0.02, "guidance_interval": 2},
}
"""Frames that are reported: what their passes leave out. All but the first are under packcache."""

RATIOS = {
    "packcache / settled rows": ("packcache", "settled rows"),
    "packcache / reused passes": ("packcache", "reused passes"),
    "packcache / every second unconditional pass": ("packcache", "every second unconditional pass"),
    "packcache / all of it": ("packcache", "all of it"),
    "full / packcache": ("full", "packcache"),
    "full / all of it": ("full", "all of it"),
}
GOALS = {"packcache / settled rows": 1.35, "packcache / all of it": 2.0, "full / all of it": 5.0}

DRAWING = "drawing"
"""Frames of the engine whose output layer is timed."""

FEW_CODES = 64
"""Visual ids of the model whose layers are timed."""

TIMED_STEPS = 6
"""Of the frame whose passes have different rows."""


@dataclass(frozen=True)
class PassesPlan:
    """What is timed.

    Args:
        frame: sizes; ``steps`` of it are those of frames whose passes are alike.
        rounds: frames of each kind that are timed.
    """

    frame: MaskedPlan
    rounds: int

    @property
    def layers(self) -> MaskedPlan:
        """Sizes of the engine whose layers are timed."""
        model = dataclasses.replace(self.frame.model, vocab=lumos.VISUAL_BEGIN + FEW_CODES)
        return dataclasses.replace(self.frame, model=model)

    @property
    def cases(self) -> dict[str, MeasuredVideo]:
        """Frames whose layers are timed: of each of these, passes."""
        plan = self.layers
        return {
            "full": plan.last_frame(policy="full"),
            "packcache": plan.last_frame(),
            "fewer rows": plan.last_frame(steps=TIMED_STEPS, refresh=TIMED_STEPS, guidance_interval=2),
        }

    def options(self, video: MeasuredVideo) -> MaskedOptions:
        """How a frame is made."""
        return self.layers.planned(video).options

    def rows(self, video: MeasuredVideo) -> list[int]:
        """Rows that each pass of a frame computes in both streams, the commit the last."""
        return rows_of(self.options(video), video.grid)

    def reported(self, name: str) -> MaskedOptions:
        """How the frame of one of `WAYS` is made."""
        return dataclasses.replace(MaskedOptions(steps=self.frame.steps_reported), **WAYS[name])


def sizes(quick: bool) -> PassesPlan:
    """What is run on this machine."""
    on_gpu = torch.cuda.is_available()
    base = QUICK if quick else ON_GPU if on_gpu else ON_CPU
    frame = dataclasses.replace(base, steps=1, batch_rounds=0, device="cuda" if on_gpu else "cpu")
    return PassesPlan(frame, rounds=2 if quick or not on_gpu else 5)


def rows_of(options: MaskedOptions, grid: lumos.Grid) -> list[int]:
    """Rows that each forward pass of a frame computes in both streams, the commit the last."""
    commit = lumos.frame_layout(grid).tokens_per_frame * (2 if options.guided else 1)
    return [*(sum(own.rows) for own in schedule(options, grid) if own.computed), commit]


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def measure(plan: PassesPlan, session: Session) -> dict[str, Any]:
    """Time passes of different rows, and the output layer."""
    gpu = {"gpu": torch.cuda.get_device_name()} if plan.frame.device == "cuda" else {}
    with counting(session.console, "frames") as progress:
        task = progress.add_task("making frames", total=2 + plan.rounds * (len(plan.cases) + 1))
        advance = lambda: progress.advance(task)  # noqa: E731
        with Bench.in_temporary_folder(plan.layers, advance) as bench:
            frames: dict[str, list[Frame]] = {name: [] for name in plan.cases}
            for name in in_turn(list(plan.cases), plan.rounds):
                frames[name].append(bench.frame(plan.cases[name]))
            engine = bench.about()
        with Bench.in_temporary_folder(plan.frame, advance) as bench:
            drawn = [bench.frame(plan.frame.last_frame()) for _ in range(plan.rounds)]
    return {
        "machine": gpu | {"threads_per_engine": plan.frame.threads},
        "seed": SEED,
        "policy": described(POLICY),
        **found(plan, frames, drawn),
        "engine": {"device": plan.frame.device, "block_size": BLOCK_SIZE, **engine},
    }


def found(plan: PassesPlan, frames: Mapping[str, Sequence[Frame]], drawn: Sequence[Frame]) -> dict[str, Any]:
    """What follows from the frames that were timed.

    Args:
        plan: sizes.
        frames: of `PassesPlan.cases`, one a round.
        drawn: of the engine whose output layer is timed, one a round.
    """
    seconds = {
        clock: [
            _seconds(plan, {name: own[turn][clock] for name, own in frames.items()}, drawn[turn][clock])
            for turn in range(plan.rounds)
        ]
        for clock in CLOCKS
    }
    whole = {clock: {name: [own["frames"][name] for own in seconds[clock]] for name in WAYS} for clock in CLOCKS}
    return {
        "is": described_of(plan),
        "model": dataclasses.asdict(plan.frame.model) | {"kv_bytes_per_token": plan.frame.model.kv_bytes_per_token},
        "grid": list(plan.frame.grid),
        "tokens_per_frame": plan.frame.last_frame().tokens_per_frame,
        "frames": plan.frame.frames,
        "layers_timed": plan.frame.model.layers,
        "layers_reported": plan.frame.layers,
        "steps_reported": plan.frame.steps_reported,
        "ways": {
            name: {
                "left_out": dict(WAYS[name]),
                "rows": sum(rows_of(plan.reported(name), plan.frame.grid)),
                "forwards": computed_passes(plan.reported(name), plan.frame.grid),
            }
            for name in WAYS
        },
        "rows": {name: plan.rows(video) for name, video in plan.cases.items()},
        "passes": {
            clock: {name: by_pass([frame[clock] for frame in own]) for name, own in {**frames, DRAWING: drawn}.items()}
            for clock in CLOCKS
        },
        "lines": {clock: [own["line"] for own in seconds[clock]] for clock in CLOCKS},
        "whole_frame": whole | {"ratios": ratios_of(whole, RATIOS)},
    }


def described_of(plan: PassesPlan) -> str:
    """What is made."""
    frame = plan.frame
    rows, columns = frame.grid
    return (
        f"frame {frame.frames} after a conditioning image, {rows} x {columns} visual tokens "
        f"({frame.last_frame().tokens_per_frame:,} in all), both streams of guidance, {frame.layers} layers "
        f"{frame.of}, {frame.steps_reported} passes and the commit"
    )


def _seconds(
    plan: PassesPlan, own: Mapping[str, Mapping[str, list[float]]], drawn: Mapping[str, list[float]]
) -> dict[str, Any]:
    """What one round says of every one of `WAYS`, and the line of packcache's passes."""
    rows = {name: plan.rows(video) for name, video in plan.cases.items()}
    timed = [(count, took) for name in ("packcache", "fewer rows") for count, took in _pairs(rows, own, name)]
    line = fitted(timed)
    full = fitted([(0, 0.0), *((count, took) for count, took in _pairs(rows, own, "full"))])
    of_a_token = sum(drawn[CHOOSING]) / plan.frame.last_frame().grid[0] / plan.frame.last_frame().grid[1]
    frames = {
        name: reckoned(
            full if name == "full" else line,
            rows_of(plan.reported(name), plan.frame.grid),
            of_a_token * sum(most_unknown(plan.frame.steps_reported, plan.frame.grid[0] * plan.frame.grid[1])),
            _rest(own["full" if name == "full" else "packcache"]),
            sum(own["full" if name == "full" else "packcache"][ENTERING]),
            plan.frame.layers / plan.frame.model.layers,
        )
        for name in WAYS
    }
    return {"frames": frames, "line": dataclasses.asdict(line)}


def _pairs(rows: Mapping[str, list[int]], own: Mapping[str, Any], name: str) -> Iterator[tuple[int, float]]:
    return zip(rows[name], own[name][LAYERS], strict=True)


def _rest(own: Mapping[str, list[float]]) -> float:
    """What a pass takes besides its parts."""
    rests = [whole - sum(parts) for whole, *parts in zip(own["passes"], *(own[part] for part in PARTS), strict=True)]
    return median(rests)


@dataclass(frozen=True)
class Line:
    """Seconds of a pass's layers by its rows.

    Args:
        start: of none.
        slope: of a row.
        off: by how much the passes lie from it at most, as a share of the slowest.
    """

    start: float
    slope: float
    off: float

    def at(self, rows: int) -> float:
        """Seconds of a pass."""
        return self.start + self.slope * rows


def fitted(passes: Sequence[tuple[int, float]]) -> Line:
    """The line of least squares through passes, rows and seconds of each."""
    rows, seconds = np.array(passes, dtype=np.float64).T
    slope, start = np.polyfit(rows, seconds, 1)
    off = np.abs(start + slope * rows - seconds).max() / seconds.max()
    return Line(float(start), float(slope), float(off))


def reckoned(line: Line, rows: Sequence[int], choosing: float, rest: float, entering: float, more: float) -> float:
    """Seconds of a frame, ``enter + its passes + commit``.

    Args:
        line: of the layers that were timed.
        rows: of each pass and of the commit.
        choosing: seconds of the output layer and of the choice of tokens, all passes together.
        rest: of a pass, besides layers and that.
        entering: of the layers that were timed.
        more: as many times as those there are.
    """
    return more * (entering + sum(map(line.at, rows))) + len(rows) * rest + choosing


# ---------------------------------------------------------------------------------------------------------------------
# What came out


def targets(result: Result) -> list[dict[str, Any]]:
    """Ratios with a goal; a quick run is not judged."""
    ratios = result["whole_frame"]["ratios"]
    return [
        judged(name, ratios[name][CPU]["median"], at_least=bound, judge=not result["quick"])
        for name, bound in GOALS.items()
    ]


def goals(result: Result) -> list[Goal]:
    """The same, for people."""
    names = {name: f"{name}, frame {result['frames']} with all its passes" for name in GOALS}
    return goals_of_ratios(result, names, {name: result["whole_frame"]["ratios"][name][CPU] for name in GOALS})


def rows(result: Result) -> Iterator[Row]:
    """Ratios, seconds, rows, and the goals."""
    yield from rows_of_goals(result["targets"])
    yield from rows_of_ratios(result["whole_frame"], "whole frame")
    yield from rows_of_passes(result["passes"], "as timed")
    for name, own in result["ways"].items():
        yield Row(name, "rows of a frame", "both streams", own["rows"])
        yield Row(name, "forward passes of a frame", "", own["forwards"])
    for line in result["lines"][CPU]:
        yield Row("passes of different rows", "off their line at most", "share of the slowest", line["off"])


def _measured(result: Result) -> str:
    off = max(line["off"] for line in result["lines"][CPU])
    model = result["model"]
    return (
        f"{result['is']}. The model ({model['dtype']}, hidden {model['hidden']:,}, vocabulary {model['vocab']:,}) has "
        f"made-up weights. {result['layers_timed']} layer(s) were timed in passes of different rows, and what all "
        f"passes take is read from the line through them, from which none lay further than {number(100 * off, 1)} % of "
        "the slowest. Ratios are by processor time: median (quartiles)."
    )


def _table(result: Result) -> Table:
    whole = result["whole_frame"]
    base = result["ways"]["packcache"]["rows"]
    return Table(
        (
            "",
            "left out",
            "forward passes",
            "packcache's rows / its rows",
            "frame, s",
            "packcache / this",
            "full / this",
        ),
        [
            (
                name,
                ", ".join(f"{option} {value:g}" for option, value in own["left_out"].items()),
                own["forwards"],
                ratio(base / own["rows"]),
                significant(median(whole[CPU][name])),
                *(
                    with_quartiles(whole["ratios"][f"{above} / {name}"][CPU])
                    if f"{above} / {name}" in whole["ratios"]
                    else ""
                    for above in ("packcache", "full")
                ),
            )
            for name, own in result["ways"].items()
        ],
        texts=2,
    )


def long(result: Result, files: Files) -> Iterator[Paragraph]:
    """The section of the report."""
    yield f"A frame with less computed in its passes: {_measured(result)}"
    yield provenance(result)
    yield _table(result)
    yield "**What was timed**, medians of rounds, s of the layers by processor time:"
    yield Table(
        ("", "pass", "rows", "layers, s"),
        [
            (name, number_, f"{count:,}", significant(median(samples)))
            for name, counts in result["rows"].items()
            for number_, (count, samples) in enumerate(
                zip(counts, result["passes"][CPU][name][LAYERS], strict=True), start=1
            )
        ],
    )
    yield from files.picture("masked_passes", "A frame with less computed in its passes")


def short(result: Result, files: Files) -> Iterator[Paragraph]:
    """The section of a README."""
    yield f"**Less computed in passes**: {_measured(result)} All samples: {files.link('masked_passes.json')}."
    yield _table(result)
    yield from files.picture("masked_passes", "A frame with less computed in its passes")


def draw(result: Result, path: Path) -> None:
    """Draw times of layers by rows, and ratios with their goals, as PNG or SVG by the suffix of ``path``."""
    figure = new_figure(10, 4)
    passes, ratios = figure.subplots(1, 2)
    for name, colour in (("full", "#9aa0a6"), ("packcache", "#2f6fde"), ("fewer rows", "#2f6fde")):
        counts = result["rows"][name]
        for samples in zip(*result["passes"][CPU][name][LAYERS], strict=True):
            passes.plot(counts, samples, "o", color=colour, markersize=4)
    for line in result["lines"][CPU]:
        most = max(result["rows"]["packcache"])
        passes.plot((0, most), (line["start"], line["start"] + line["slope"] * most), color="#2f6fde", linewidth=0.8)
    passes.set(
        xlabel="rows of a pass, both streams", ylabel="layers that were timed, s", xlim=(0, None), ylim=(0, None)
    )
    passes.annotate("full cache", (0.97, 0.9), xycoords="axes fraction", ha="right", color="#6b7177")
    passes.annotate("packcache", (0.97, 0.2), xycoords="axes fraction", ha="right", color="#2f6fde")
    for line, (name, by_clock) in enumerate(result["whole_frame"]["ratios"].items()):
        found = by_clock[CPU]
        ratios.barh(line, found["median"], height=0.6, color="#2f6fde")
        ratios.plot((found["min"], found["max"]), (line, line), color="black", linewidth=1.2)
        if name in GOALS:
            ratios.plot((GOALS[name],) * 2, (line - 0.42, line + 0.42), color="#c0392b", linewidth=2)
        ratios.annotate(f"{found['median']:.2f}", (found["max"], line), (6, 0), textcoords="offset points", va="center")
    names = [name.replace(" unconditional", "\nunconditional") for name in result["whole_frame"]["ratios"]]
    ratios.set_yticks(range(len(names)), names, fontsize=8)
    ratios.invert_yaxis()
    ratios.set_xlabel("ratio of processor time; red: the goal")
    for axes in (passes, ratios):
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, path, quick=result["quick"])
