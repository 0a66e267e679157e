"""A frame of a masked model whose older frames are held in fewer bits: what decoding them costs, and what they take.

Engines that differ in nothing but ``precision.history`` make the same frame in turn. The policy keeps whole frames, as
it must where they are encoded, so all of them read the same tokens. Timed are the layers of a pass, of which decoding
is a part, and what is encoded behind a commit; what is reported is a frame of all layers and passes.

What a history takes is counted: a video of so many frames, of which all are kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from benchmarks.decode.plan import described
from benchmarks.decode.samples import CLOCKS, CPU, ratios_of
from benchmarks.goals import judged
from benchmarks.masked.plan import BLOCK_SIZE, ON_CPU, ON_GPU, QUICK, SEED, MaskedPlan, MeasuredVideo
from benchmarks.masked.process import ENCODING, ENTERING, LAYERS
from benchmarks.masked.report import rows_of_passes, rows_of_ratios
from benchmarks.masked.runs import Bench, Frame, by_pass, in_turn
from benchmarks.protocol import Session
from benchmarks.report.markdown import Files, ratio, significant, with_quartiles
from benchmarks.report.parts import Goal, Result, Row, goals_of_ratios, provenance, rows_of_goals
from benchmarks.report.table import Paragraph, Table
from vllm_packcache.core.encoded import retention_of
from vllm_packcache.core.packing import HISTORY_FORMATS
from vllm_packcache.core.policies import PackCache
from vllm_packcache.core.retention import Retention
from vllm_packcache.families import lumos
from vllm_packcache.tools.figures import new_figure, save
from vllm_packcache.tools.progress import counting

AS_WRITTEN = "auto"
FORMATS = (AS_WRITTEN, *HISTORY_FORMATS)

RATIOS = {f"{name} / {AS_WRITTEN}": (name, AS_WRITTEN) for name in HISTORY_FORMATS}

MOST_SECONDS = 1.05
"""Of a frame, in any format, to one whose history is as it was written."""

MOST_BYTES = {"int2": 0.25}
"""Of a history, the newest frame included, to one that is as it was written."""

BYTES = "bytes of the history, {} / " + AS_WRITTEN

KEPT = 4
"""Frames that the timed frame reads, the newest included."""

GIVEN = KEPT + 1
"""Frames before it: those that it reads have been encoded, and turned by as much as their window has slid."""

FEW_CODES = 64
"""Visual ids of the model: the output layer is the same for all."""


@dataclass(frozen=True)
class HistoryPlan:
    """What is timed and counted.

    Args:
        frame: sizes; ``steps`` of it are those that are timed.
        rounds: frames of each format that are timed.
    """

    frame: MaskedPlan
    rounds: int

    @property
    def video(self) -> MeasuredVideo:
        """Whose last frame is made."""
        return self.frame.last_frame(GIVEN)

    def of(self, history: str) -> MaskedPlan:
        """Sizes of the engine of a format."""
        return dataclasses.replace(self.frame, policy=whole(KEPT), precision={"history": history})

    def held(self, history: str) -> int:
        """Blocks of the history of the last frame in both streams, all frames before it kept."""
        plan = dataclasses.replace(self.frame, policy=whole(self.frame.frames), precision={"history": history})
        return sum(
            len(retention.past(plan.frames - 1)) - len(retention.blocks.condition_blocks)
            for retention in _retentions(plan)
        )


def whole(frames: int) -> PackCache:
    """The policy that keeps so many frames, each of them whole."""
    return PackCache(window=frames, history_frames=frames, selection="spatial")


def _retentions(plan: MaskedPlan) -> list[Retention]:
    model, video = plan.model, plan.last_frame()
    page = BLOCK_SIZE * 2 * model.kv_heads * model.head_size * model.bytes_per_element
    encoding = plan.config.encoding(model.kv_heads, model.head_size, page)
    streams = [own.plan for own in plan.planned(video).streams]
    return [retention_of(own.layout, own.policy, BLOCK_SIZE, encoding) for own in streams]


def sizes(quick: bool) -> HistoryPlan:
    """What is run on this machine."""
    on_gpu = torch.cuda.is_available()
    base = QUICK if quick else ON_GPU if on_gpu else ON_CPU
    model = dataclasses.replace(base.model, vocab=lumos.VISUAL_BEGIN + FEW_CODES)
    frame = dataclasses.replace(base, model=model, steps=1, batch_rounds=0, device="cuda" if on_gpu else "cpu")
    return HistoryPlan(frame, rounds=2 if quick or not on_gpu else 5)


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def measure(plan: HistoryPlan, session: Session) -> dict[str, Any]:
    """Make the frame with a history in each format, in turn."""
    gpu = {"gpu": torch.cuda.get_device_name()} if plan.frame.device == "cuda" else {}
    frames: dict[str, list[Frame]] = {name: [] for name in FORMATS}
    with counting(session.console, "frames") as progress, ExitStack() as stack:
        task = progress.add_task("making frames", total=(1 + plan.rounds) * len(FORMATS))
        advance = lambda: progress.advance(task)  # noqa: E731
        benches = {name: stack.enter_context(Bench.in_temporary_folder(plan.of(name), advance)) for name in FORMATS}
        for name in in_turn(FORMATS, plan.rounds):
            frames[name].append(benches[name].frame(plan.video))
        engine = benches[AS_WRITTEN].about()
    return {
        "machine": gpu | {"threads_per_engine": plan.frame.threads},
        "seed": SEED,
        "policy": described(whole(KEPT)),
        **found(plan, frames),
        "engine": {"device": plan.frame.device, "block_size": BLOCK_SIZE, **engine},
    }


def found(plan: HistoryPlan, frames: Mapping[str, Sequence[Frame]]) -> dict[str, Any]:
    """What follows from the frames that were timed, one a round, by format."""
    seconds = {
        clock: {name: [_reckoned(frame[clock], plan.frame) for frame in own] for name, own in frames.items()}
        for clock in CLOCKS
    }
    held = {name: plan.held(name) for name in FORMATS}
    rows, columns = plan.frame.grid
    return {
        "is": (
            f"a frame that reads a conditioning image and {KEPT} frames, all but the newest encoded, {rows} x "
            f"{columns} visual tokens ({plan.video.tokens_per_frame:,} in all), both streams of guidance, "
            f"{plan.frame.layers} layers {plan.frame.of}, {plan.frame.steps_reported} passes and the commit, without "
            "the output layer"
        ),
        "model": dataclasses.asdict(plan.frame.model) | {"kv_bytes_per_token": plan.frame.model.kv_bytes_per_token},
        "frames": plan.frame.frames,
        "layers_timed": plan.frame.model.layers,
        "live_tokens": plan.of(AS_WRITTEN).live(plan.video),
        "held_blocks": held,
        "bytes": {name: blocks / held[AS_WRITTEN] for name, blocks in held.items() if name != AS_WRITTEN},
        "passes": {
            clock: {name: by_pass([frame[clock] for frame in own]) for name, own in frames.items()} for clock in CLOCKS
        },
        "whole_frame": seconds | {"ratios": ratios_of(seconds, RATIOS)},
    }


def _reckoned(own: Mapping[str, list[float]], plan: MaskedPlan) -> float:
    """Seconds of a frame of the model that is reported, of what its layers take."""
    *layers, commit = own[LAYERS]
    of_layers = sum(own[ENTERING]) + plan.steps_reported * fmean(layers) + commit + sum(own[ENCODING])
    return plan.layers / plan.model.layers * of_layers


# ---------------------------------------------------------------------------------------------------------------------
# What came out


def targets(result: Result) -> list[dict[str, Any]]:
    """Ratios with a goal; of a quick run those of bytes alone."""
    ratios = result["whole_frame"]["ratios"]
    seconds = [
        judged(name, ratios[name][CPU]["median"], at_most=MOST_SECONDS, judge=not result["quick"]) for name in RATIOS
    ]
    sizes_of = [
        judged(BYTES.format(name), result["bytes"][name], at_most=bound, judge=not result["quick"])
        for name, bound in MOST_BYTES.items()
    ]
    return [*seconds, *sizes_of]


def goals(result: Result) -> list[Goal]:
    """The same, for people."""
    names = {name: f"seconds a frame at equal tokens, history in {name}" for name in RATIOS}
    counted = {name: f"{name}, {result['frames']} frames" for name in map(BYTES.format, MOST_BYTES)}
    summaries = {name: result["whole_frame"]["ratios"][name][CPU] for name in RATIOS}
    return goals_of_ratios(result, names | counted, summaries)


def rows(result: Result) -> Iterator[Row]:
    """Ratios, seconds, bytes, and the goals."""
    yield from rows_of_goals(result["targets"])
    yield from rows_of_ratios(result["whole_frame"], "whole frame")
    yield from rows_of_passes(result["passes"], "as timed")
    for name, share in result["bytes"].items():
        yield Row(name, "bytes of the history", f"of those {AS_WRITTEN}", share)


def _measured(result: Result) -> str:
    model = result["model"]
    return (
        f"{result['is']}. The model ({model['dtype']}, hidden {model['hidden']:,}, {model['kv_heads']} KV heads of "
        f"{model['head_size']}) has made-up weights. {result['layers_timed']} layer(s) were timed, and multiplied. "
        f"Bytes are those of blocks of {result['engine']['block_size']} tokens that the history of frame "
        f"{result['frames']} holds, of which all frames are kept, the newest as it was written. Ratios are by "
        "processor time: median (quartiles)."
    )


def _table(result: Result) -> Table:
    whole_frame, passes = result["whole_frame"], result["passes"][CPU]
    return Table(
        ("history", "its blocks", "its bytes", "layers timed, s", "encoding, s", "frame, s", f"this / {AS_WRITTEN}"),
        [
            (
                name,
                f"{result['held_blocks'][name]:,}",
                ratio(result["bytes"][name]) if name in result["bytes"] else "1",
                significant(sum(map(median, passes[name][LAYERS]))),
                significant(sum(map(median, passes[name][ENCODING]))),
                significant(median(whole_frame[CPU][name])),
                with_quartiles(whole_frame["ratios"][f"{name} / {AS_WRITTEN}"][CPU]) if name != AS_WRITTEN else "",
            )
            for name in FORMATS
        ],
        texts=1,
    )


def long(result: Result, files: Files) -> Iterator[Paragraph]:
    """The section of the report."""
    yield f"Older frames in fewer bits: {_measured(result)}"
    yield provenance(result)
    yield _table(result)
    yield from files.picture("masked_history", "A frame whose older frames are held in fewer bits")


def short(result: Result, files: Files) -> Iterator[Paragraph]:
    """The section of a README."""
    yield f"**Older frames in fewer bits**: {_measured(result)} All samples: {files.link('masked_history.json')}."
    yield _table(result)
    yield from files.picture("masked_history", "A frame whose older frames are held in fewer bits")


def draw(result: Result, path: Path) -> None:
    """Draw seconds and bytes with their goals, as PNG or SVG by the suffix of ``path``."""
    figure = new_figure(10, 3)
    seconds, sizes_of = figure.subplots(1, 2, sharey=True)
    for line, name in enumerate(HISTORY_FORMATS):
        own = result["whole_frame"]["ratios"][f"{name} / {AS_WRITTEN}"][CPU]
        seconds.barh(line, own["median"], height=0.6, color="#2f6fde")
        seconds.plot((own["min"], own["max"]), (line, line), color="black", linewidth=1.2)
        share = result["bytes"][name]
        sizes_of.barh(line, share, height=0.6, color="#2f6fde")
        # Numbers stand behind the mark of the goal.
        for axes, value, end in (
            (seconds, own["median"], max(own["max"], MOST_SECONDS)),
            (sizes_of, share, max(share, MOST_BYTES.get(name, 0))),
        ):
            axes.annotate(f"{value:.2f}", (end, line), (6, 0), textcoords="offset points", va="center")
        for axes, bound in ((seconds, MOST_SECONDS), (sizes_of, MOST_BYTES.get(name))):
            if bound is not None:
                axes.plot((bound, bound), (line - 0.42, line + 0.42), color="#c0392b", linewidth=2)
    seconds.set_yticks(range(len(HISTORY_FORMATS)), HISTORY_FORMATS)
    seconds.invert_yaxis()
    seconds.set_xlabel("seconds a frame, of those as written; red: the goal")
    sizes_of.set_xlabel("bytes of the history, of those as written")
    for axes in (seconds, sizes_of):
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, path, quick=result["quick"])
