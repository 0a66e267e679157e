"""Generate held-out videos under every variant, measure them, and write what came out.

Every variant gets the same worlds and makes their videos from the condition alone; how, is the generator's business. A
part of the work is a few videos of one variant. Each is written to the folder as it is done, and one that is there is
not done again: an interrupted run goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import signal
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from rich.console import Console

from benchmarks.engine_process import child_environment
from benchmarks.quality.generators import Causal, Generator
from benchmarks.quality.measures import MEASURES, measure
from benchmarks.quality.variants import BLOCK_SIZE, Variant
from benchmarks.statistics import Count, mean_of_videos
from vllm_packcache.demo.scores import FIRST_HELD_OUT_SEED, true_frames
from vllm_packcache.demo.tokenizer import VideoTokenizer
from vllm_packcache.demo.world import make_world
from vllm_packcache.tools.progress import counting

Int64 = npt.NDArray[np.int64]

TRUTH, COPY = REFERENCES = ("the true video", "a copy of the first picture")
"""What is had without a model."""

STRIP_FRAMES = 10
"""Frames of a video in the picture of one."""


@dataclass(frozen=True, kw_only=True)
class QualityPlan:
    """Sizes of everything that is run.

    Args:
        generator: what makes the videos.
        videos: V, worlds that every variant gets; 0: as many as is usual.
        frontier_videos: of the points of the frontier, which have ``trained_frames``; no more than ``videos``.
        trained_frames: of the longest videos that the model was trained on; 0: the generator's.
        lengths: as many of those the longest videos have at most; see `Variant.lengths`. 0: as many as is usual.
    """

    generator: Generator = field(default_factory=Causal)
    videos: int = 0
    frontier_videos: int = 50
    trained_frames: int = 0
    lengths: int = 0

    @property
    def frames(self) -> int:
        """Of the longest videos."""
        return self.lengths * self.trained_frames

    def __post_init__(self) -> None:
        for name in ("videos", "trained_frames", "lengths"):
            object.__setattr__(self, name, getattr(self, name) or getattr(self.generator, name))
        object.__setattr__(self, "frontier_videos", min(self.videos, self.frontier_videos))

    @property
    def spans(self) -> dict[str, slice]:
        """Frames that a mean is taken over; people count frames from 1."""
        ends = [self.trained_frames]
        while ends[-1] < self.frames:
            ends.append(min(self.frames, 2 * ends[-1]))
        return {f"frames {a + 1}-{b}": slice(a, b) for a, b in zip([0, *ends], ends, strict=False)}

    @cached_property
    def works(self) -> dict[str, _Work]:
        """What is generated, by variant's key: the frontier shares what is compared."""
        works: dict[str, _Work] = {}
        for variant in self.generator.variants.named:
            works[_key(variant)] = self._work(variant, min(variant.lengths, self.lengths), self.videos)
        for variant in self.generator.variants.frontier:
            works.setdefault(_key(variant), self._work(variant, 1, self.frontier_videos))
        return works

    def _work(self, variant: Variant, lengths: int, videos: int) -> _Work:
        frames = lengths * self.trained_frames
        return _Work(variant, frames, videos, self.generator.at_once(variant, frames))


class _Work(NamedTuple):
    variant: Variant
    frames: int
    videos: int
    at_once: int

    @property
    def parts(self) -> Iterator[range]:
        """Seeds of the worlds of each part."""
        for first in range(0, self.videos, self.at_once):
            last = min(self.videos, first + self.at_once)
            yield range(FIRST_HELD_OUT_SEED + first, FIRST_HELD_OUT_SEED + last)


class _Part(NamedTuple):
    generator: Generator
    variant: Variant
    frames: int
    seeds: range
    path: Path


class Videos(NamedTuple):
    """What came of a variant.

    Args:
        frames: what was generated, token ids of the demo's tokenizer, [V, T, 16, 16].
        scores: by measure, each [V, T].
    """

    frames: Int64
    scores: dict[str, Count]


def generate_all(plan: QualityPlan, folder: Path, processes: int, console: Console) -> dict[str, Videos]:
    """The videos of every variant by key, as far as they are not in ``folder`` already from new processes."""
    missing = [
        _Part(plan.generator, work.variant, work.frames, seeds, path)
        for work in plan.works.values()
        for seeds in work.parts
        if not (path := _path(folder, plan.generator, work, seeds)).is_file()
    ]
    total = sum(work.frames * work.videos for work in plan.works.values())
    done = total - sum(part.frames * len(part.seeds) for part in missing)
    # What is short first, and the same worlds of all variants: then an interrupted run has something to compare.
    missing.sort(key=lambda part: (part.frames, part.seeds.start))
    context = multiprocessing.get_context("spawn")
    with (
        counting(console, "frames") as progress,
        child_environment({"OMP_NUM_THREADS": "1"}),
        ProcessPoolExecutor(processes, context, _begin_process) as pool,
    ):
        bar = progress.add_task("generating", total=total, completed=done)
        futures = {pool.submit(_make_part, *part): part for part in missing}
        try:
            for future in as_completed(futures):
                future.result()
                part = futures[future]
                progress.update(bar, advance=part.frames * len(part.seeds), description=part.variant.name)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                console.print("interrupted: the videos in hand are finished; the same command goes on from there")
            pool.shutdown(cancel_futures=True)
            raise
    return {
        key: _joined([_load(_path(folder, plan.generator, work, seeds)) for seeds in work.parts])
        for key, work in plan.works.items()
    }


def _begin_process() -> None:
    """An interruption is the parent's business: a part is finished."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _make_part(generator: Generator, variant: Variant, frames: int, seeds: range, path: Path) -> None:
    """Body of a process: generate and measure the videos of some worlds."""
    tokenizer = VideoTokenizer()
    made = []
    for seed, shown in zip(seeds, generator.maker(variant, frames)(seeds), strict=True):
        world = make_world(seed)
        truth = true_frames(tokenizer, world, frames)
        made.append(Videos(shown[None], measure(world, shown, truth, tokenizer)))
    videos = _joined(made)
    arrays = {
        f"{name}_{field}": array for name, count in videos.scores.items() for field, array in count._asdict().items()
    }
    # A file with this name is a finished part.
    unfinished = path.with_suffix(".unfinished.npz")
    np.savez_compressed(unfinished, frames=videos.frames.astype(np.uint16), **arrays)
    unfinished.rename(path)


def _joined(videos: Sequence[Videos]) -> Videos:
    scores = {
        name: Count(*(np.concatenate(arrays) for arrays in zip(*(own.scores[name] for own in videos), strict=True)))
        for name in MEASURES
    }
    return Videos(np.concatenate([own.frames for own in videos]), scores)


def _load(path: Path) -> Videos:
    with np.load(path) as part:
        scores = {name: Count(part[f"{name}_total"], part[f"{name}_of"]) for name in MEASURES}
        return Videos(part["frames"].astype(np.int64), scores)


def _key(variant: Variant) -> str:
    """What decides what comes out."""
    server = variant.server
    guidance = [] if variant.scale == 1 else [variant.scale]
    made = [dict(variant.made)] if variant.made else []
    return json.dumps([server.as_mapping(), server.fingerprint(), *guidance, *made], sort_keys=True)


def _path(folder: Path, generator: Generator, work: _Work, seeds: range) -> Path:
    """Where a part is kept. Another model, configuration or length has another name."""
    decides = json.dumps(
        [_key(work.variant), generator.described, BLOCK_SIZE, work.frames, seeds.start, seeds.stop], sort_keys=True
    )
    name = work.variant.name.replace(" ", "-").replace(",", "")
    return folder / f"{name}-{seeds.start}-{hashlib.sha256(decides.encode()).hexdigest()[:12]}.npz"


# ---------------------------------------------------------------------------------------------------------------------
# What came out


def summary(plan: QualityPlan, videos: Mapping[str, Videos]) -> dict[str, Any]:
    """Scores of every variant, paired differences, and the frontier."""
    spans = plan.spans
    variants = plan.generator.variants
    points = (variants.full, *variants.frontier) if variants.frontier else ()
    own = {variant.name: videos[_key(variant)].scores for variant in variants.named}
    scores = own | _references(plan)
    differences = {f"{who} - {name}": _differences(own[who], own[name], spans) for who, name in plan.generator.pairs}
    return {
        "spans": list(spans),
        "variants": described(plan),
        "scores": {name: _summaries(counts, spans) for name, counts in scores.items()},
        "differences": differences,
        "frontier": [_point(variant, plan, videos[_key(variant)].scores) for variant in points],
    }


def described(plan: QualityPlan) -> dict[str, Any]:
    """What is compared."""
    return {
        variant.name: {
            "policy": variant.policy,
            "config": variant.server.as_mapping(),
            "live_tokens": variant.live_tokens(plan.trained_frames - 1),
            **({} if variant.scale == 1 else {"guidance": variant.scale}),
            **plan.generator.about(variant),
        }
        for variant in plan.generator.variants.named
    }


def _summaries(counts: Mapping[str, Count], spans: Mapping[str, slice]) -> dict[str, Any]:
    frames = next(iter(counts.values())).total.shape[1]
    reached = {name: span for name, span in spans.items() if span.stop <= frames}
    return {name: count.summary(reached) for name, count in counts.items()}


def _differences(a: Mapping[str, Count], b: Mapping[str, Count], spans: Mapping[str, slice]) -> dict[str, Any]:
    """By measure and span, the mean over worlds of a's value less b's."""
    frames = min(next(iter(counts.values())).total.shape[1] for counts in (a, b))
    return {
        name: {
            label: mean_of_videos(a[name].of_videos(span) - b[name].of_videos(span))
            for label, span in spans.items()
            if span.stop <= frames
        }
        for name in a
    }


def _references(plan: QualityPlan) -> dict[str, dict[str, Count]]:
    """The scores of videos that no model has made."""
    tokenizer = VideoTokenizer()
    made: dict[str, list[Videos]] = {name: [] for name in REFERENCES}
    for seed in range(FIRST_HELD_OUT_SEED, FIRST_HELD_OUT_SEED + plan.videos):
        world = make_world(seed)
        truth = true_frames(tokenizer, world, plan.frames)
        for name, frames in ((TRUTH, truth[1:]), (COPY, np.broadcast_to(truth[:1], truth[1:].shape))):
            made[name].append(Videos(frames[None], measure(world, frames, truth, tokenizer)))
    return {name: _joined(videos).scores for name, videos in made.items()}


def _point(variant: Variant, plan: QualityPlan, counts: Mapping[str, Count]) -> dict[str, Any]:
    """A point of the frontier: quality within the trained length, against the tokens read there."""
    span = slice(0, plan.trained_frames)
    own = {name: Count(*(array[: plan.frontier_videos] for array in count)) for name, count in counts.items()}
    return {
        "family": variant.family,
        "name": variant.name,
        "budget": variant.budget,
        "live_tokens": variant.live_tokens(plan.trained_frames - 1),
        "scores": {name: mean_of_videos(count.of_videos(span)) for name, count in own.items()},
    }


def strips(plan: QualityPlan, videos: Mapping[str, Videos]) -> dict[str, Any]:
    """One world under every variant, as pictures: see `plot.draw_videos`."""
    tokenizer = VideoTokenizer()
    worlds = [make_world(FIRST_HELD_OUT_SEED + number) for number in range(plan.videos)]

    def frames_hidden(number: int) -> int:
        return sum(worlds[number].hidden(0, k) for k in range(1, plan.frames + 1))

    # A usual one of those in which something has to be remembered.
    hiding = sorted((n for n in range(plan.videos) if frames_hidden(n)), key=frames_hidden) or [0]
    number = hiding[len(hiding) // 2]
    world = worlds[number]
    # Most is told early on.
    shown = np.unique(np.geomspace(1, plan.frames, STRIP_FRAMES).round().astype(int)).tolist()
    rows = {TRUTH: np.stack([world.frame(k) for k in shown])}
    for variant in (plan.generator.variants.full, *plan.generator.variants.compared):
        made = videos[_key(variant)].frames[number]
        # One that ends earlier leaves the rest empty.
        rows[variant.name] = tokenizer.decode_frames(made[[k - 1 for k in shown if k <= len(made)]])
    return {"prompt": world.prompt, "frames": shown, "rows": rows}
