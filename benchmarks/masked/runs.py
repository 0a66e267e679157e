"""The runs: frames that are made one after another by one engine, and what they took."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.decode.samples import CLOCKS, CPU, ratios_of
from benchmarks.engine_process import EngineFailed, EngineProcess
from benchmarks.masked.plan import APART, BATCH, BATCH_RATIOS, BLOCK_SIZE, RATIOS, TOGETHER, MaskedPlan, MeasuredVideo
from benchmarks.masked.process import CHOOSING, ENCODING, ENTERING, LAYERS, PARTS, Made, MaskedEngine, MaskedSettings
from benchmarks.model import write_config
from vllm_packcache.families.schedule import computed_passes

Frame = Mapping[str, Mapping[str, list[float]]]
"""Seconds by clock and by what they are of, ``passes`` or `PARTS`: of each pass of a frame, the commit the last."""


def frame_of(made: Made, steps: int) -> Frame:
    """What a frame took.

    Raises:
        EngineFailed: it was not made in ``steps`` and a commit.
    """
    passes = [number for number, parts in enumerate(made.parts) if LAYERS in parts]
    if len(passes) != steps + 1:
        raise EngineFailed(f"a frame of {steps} steps and a commit was made in {len(passes)} passes")
    return {
        clock: {
            "passes": [getattr(made.burst, clock)[number] for number in passes],
            **{part: [made.parts[number].get(part, {clock: 0.0})[clock] for number in passes] for part in PARTS},
        }
        for clock in CLOCKS
    }


def summed(frames: Sequence[Frame]) -> Frame:
    """Frames made one after another, as one."""
    return {
        clock: {what: [sum(own) for own in zip(*(frame[clock][what] for frame in frames), strict=True)] for what in own}
        for clock, own in frames[0].items()
    }


def reckoned(own: Mapping[str, list[float]], plan: MaskedPlan, video: MeasuredVideo) -> float:
    """Seconds of a frame of the model that is reported, ``enter + steps x step + commit``.

    All layers are alike: what they take, and what entering a frame and encoding one take, is multiplied. The output
    layer is there once; what it takes goes with the number of tokens that are unknown before each step. Where all
    layers and all steps are timed, this is the sum of the passes.

    Args:
        own: a `Frame` by one clock.
        plan: sizes.
        video: whose frame.
    """
    more = plan.layers / plan.model.layers
    rest = [whole - sum(parts) for whole, *parts in zip(own["passes"], *(own[part] for part in PARTS), strict=True)]
    *layers, of_commit = own[LAYERS]
    step = more * fmean(layers) + fmean(rest[:-1])
    of_a_token = sum(own[CHOOSING]) / sum(plan.unknown(video, plan.steps))
    choosing = of_a_token * sum(plan.unknown(video, plan.steps_reported))
    once = sum(own[ENTERING]) + of_commit + sum(own[ENCODING])
    return more * once + plan.steps_reported * step + choosing + rest[-1]


class Bench:
    """The runs of one engine.

    Args:
        plan: sizes.
        engine: that makes the frames.
        advance: is called after each frame.
    """

    def __init__(self, plan: MaskedPlan, engine: EngineProcess, advance: Callable[[], None]) -> None:
        self._plan = plan
        self._engine = engine
        self._advance = advance
        self._made(self._plan.batch)

    @classmethod
    @contextmanager
    def in_temporary_folder(cls, plan: MaskedPlan, advance: Callable[[], None]) -> Iterator[Bench]:
        """One that leaves nothing behind."""
        with tempfile.TemporaryDirectory(prefix="packcache-bench-") as name:
            folder = Path(name)
            write_config(folder / "model", plan.model, plan.max_model_len, masked=True)
            settings = MaskedSettings(
                model=str(folder / "model"),
                dtype=plan.model.dtype,
                block_size=BLOCK_SIZE,
                kv_cache_memory_bytes=plan.kv_blocks * BLOCK_SIZE * plan.model.kv_bytes_per_token,
                max_model_len=plan.max_model_len,
                max_num_batched_tokens=plan.max_num_batched_tokens,
                max_num_seqs=plan.videos,
                threads=plan.threads,
                additional_config=plan.additional_config,
                load_format="dummy",
                device=plan.device,
            )
            engine = EngineProcess("masked", settings, folder / "log", MaskedEngine)
            try:
                engine.answer()
                yield cls(plan, engine, advance)
            finally:
                engine.close()

    def about(self) -> dict[str, Any]:
        """What vLLM has chosen, and how much memory its process has held at most."""
        return {**self._engine.call("about"), "peak_bytes": self._engine.call("peak_memory")}

    def last_frame(self) -> dict[str, Any]:
        """Time the last frame of every video of `MaskedPlan.cases`."""
        plan, cases = self._plan, self._plan.cases
        frames: dict[str, list[Frame]] = {name: [] for name in cases}
        peaks: dict[str, int] = dict.fromkeys(cases, 0)
        as_decided = True
        for name in in_turn(list(cases), plan.rounds):
            video = cases[name]
            made = self._made(video)
            frames[name].append(frame_of(made, plan.steps))
            peaks[name] = max(peaks[name], *made.burst.used_blocks)
            decided = sum(-(-length // BLOCK_SIZE) for length in plan.live(video))
            own = (used for used, parts in zip(made.burst.used_blocks, made.parts, strict=True) if LAYERS in parts)
            # With its commit the request has ended.
            as_decided &= list(own)[:-1] == [decided] * plan.steps
        return {
            "videos": {
                name: {
                    "total_tokens": video.total_tokens,
                    "text_ids": video.text,
                    "given_frames": video.given,
                    "live_tokens": plan.live(video),
                    "peak_blocks": peaks[name],
                }
                for name, video in cases.items()
            },
            **self._times(frames, cases, RATIOS),
            "floors": {
                what: {
                    ratio: plan.floor(cases[above], cases[below], **sizes) for ratio, (above, below) in RATIOS.items()
                }
                for what, sizes in self._sizes.items()
            },
            "blocks_as_decided": as_decided,
        }

    def frame(self, video: MeasuredVideo) -> Frame:
        """Make a frame, however many passes of it are computed."""
        options = self._plan.planned(video).options
        return frame_of(self._made(video), computed_passes(options, video.grid) - 1)

    def batch(self) -> dict[str, Any]:
        """Time the frames of some videos in one batch, and of the same videos one after another."""
        plan, video = self._plan, self._plan.batch
        frames: dict[str, list[Frame]] = {name: [] for name in BATCH}
        for name in in_turn(BATCH, plan.batch_rounds):
            if name == TOGETHER:
                frames[name].append(frame_of(self._made(video, plan.videos), plan.steps))
            else:
                alone = [frame_of(self._made(video), plan.steps) for _ in range(plan.videos)]
                frames[APART].append(summed(alone))
        return {
            "videos": plan.videos,
            "grid": list(video.grid),
            "tokens_per_frame": video.tokens_per_frame,
            "given_frames": video.given,
            **self._times(frames, dict.fromkeys(BATCH, video), BATCH_RATIOS),
        }

    @property
    def _sizes(self) -> dict[str, dict[str, int]]:
        plan = self._plan
        return {
            "as_timed": {"layers": plan.model.layers, "steps": plan.steps},
            "whole_frame": {"layers": plan.layers, "steps": plan.steps_reported},
        }

    def _times(
        self,
        frames: Mapping[str, Sequence[Frame]],
        videos: Mapping[str, MeasuredVideo],
        ratios: Mapping[str, tuple[str, str]],
    ) -> dict[str, Any]:
        """Seconds of every pass; of all passes together; of the frame that is reported; and ratios of these."""
        passes = by_clock(frames, lambda _, own: own)
        timed = by_clock(frames, lambda _, own: sum(own["passes"]))
        whole = by_clock(frames, lambda name, own: reckoned(own, self._plan, videos[name]))
        return {
            "passes": {clock: {name: by_pass(own) for name, own in passes[clock].items()} for clock in CLOCKS},
            "as_timed": timed | {"ratios": ratios_of(timed, ratios)},
            "whole_frame": whole | {"ratios": ratios_of(whole, ratios)},
        }

    def _made(self, video: MeasuredVideo, videos: int = 1) -> Made:
        made = self._engine.call("make", [video.ids] * videos, video.extra_args)
        self._engine.end()
        self._advance()
        return made


def by_clock(
    frames: Mapping[str, Sequence[Frame]], of: Callable[[str, Mapping[str, list[float]]], Any]
) -> dict[str, dict[str, list[Any]]]:
    """What ``of`` makes of the name and the seconds of every frame, by clock and name."""
    return {
        clock: {name: [of(name, frame[clock]) for frame in own] for name, own in frames.items()} for clock in CLOCKS
    }


def by_pass(rounds: Sequence[Mapping[str, list[float]]]) -> dict[str, list[list[float]]]:
    """Samples of all rounds, by what they are of and by pass."""
    return {what: [list(own) for own in zip(*(frame[what] for frame in rounds), strict=True)] for what in rounds[0]}


def in_turn(names: Sequence[str], rounds: int) -> Iterator[str]:
    """All names in every round, each round in another order."""
    for number in range(rounds):
        turn = number % len(names)
        yield from (*names[turn:], *names[:turn])


def readings(last_frame: Mapping[str, Any], plan: MaskedPlan) -> dict[str, Any]:
    """What full / packcache is of the other videos of 13 pictures, reckoned from the times of the one that was made.

    The time of a pass is linear in the number of tokens that its frame reads.
    """
    seconds = {name: median(own) for name, own in last_frame["whole_frame"][CPU].items()}
    live = {name: sum(own["live_tokens"]) for name, own in last_frame["videos"].items()}
    of_a_token = (seconds["full"] - seconds["packcache"]) / (live["full"] - live["packcache"])
    found = {}
    for name in plan.readings:
        videos = {"full": plan.reading(name, policy="full"), "packcache": plan.reading(name)}
        own = {case: plan.live(video) for case, video in videos.items()}
        full, packcache = (
            seconds["packcache"] + of_a_token * (sum(lengths) - live["packcache"]) for lengths in own.values()
        )
        found[name] = {
            "live_tokens": own,
            "full / packcache": full / packcache,
            "floor": plan.floor(*videos.values(), layers=plan.layers, steps=plan.steps_reported),
        }
    return found


def rates(last_frame: Mapping[str, Any], plan: MaskedPlan) -> dict[str, float]:
    """Floating-point operations a second of processor time: attention, the layers' matrices, the output layer.

    The layers' share of a pass is linear in the tokens that are read: the slope is that of attention.
    """
    passes = last_frame["passes"][CPU]
    work = {name: plan.work(plan.cases[name], layers=plan.model.layers, steps=plan.steps) for name in passes}
    layers, choosing = (
        {name: sum(median(samples) for samples in own[part]) for name, own in passes.items()}
        for part in (LAYERS, CHOOSING)
    )
    attention = (work["full"].attention - work["packcache"].attention) / (layers["full"] - layers["packcache"])
    return {
        "attention": attention,
        "linear": work["full"].linear / (layers["full"] - work["full"].attention / attention),
        "head": work["full"].head / median(choosing.values()),
    }
