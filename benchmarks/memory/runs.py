"""Every world and film under every policy: which tokens the model would have made, given the true past."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache, partial

import numpy as np
import numpy.typing as npt
from rich.console import Console

from benchmarks.engine_process import child_environment
from benchmarks.formats import FLOAT32, FORMATS
from benchmarks.memory.plan import FILMS, MemoryPlan
from benchmarks.quality.decoder import VideoCache
from benchmarks.quality.decoder import likeliest as likeliest_of_one
from benchmarks.quality.variants import BLOCK_SIZE, Variant
from benchmarks.statistics import Count, Float64
from benchmarks.training.llama import Llama, load_pretrained
from benchmarks.training.sparse_video import NOT_ASKED, likeliest
from vllm_packcache.demo.scores import FIRST_HELD_OUT_SEED, sequence, true_frames
from vllm_packcache.demo.tokenizer import MODEL_DIR, VideoTokenizer
from vllm_packcache.demo.world import GRID, make_film, make_world
from vllm_packcache.tools.progress import counting

Int64 = npt.NDArray[np.int64]

Bool = npt.NDArray[np.bool_]

CHANGED, RETURNED = "changed_tokens_right", "returned_cells_right"
MEASURES = {CHANGED: "changed tokens right, %", RETURNED: "cells that come out from behind the pillar right, %"}
UNSEEN = "_unseen"
"""Added to a kind of `FILMS`: the same frame, of a scene that was not shown before."""

REMEMBERED = "_remembered"
"""Added to a kind: by how much more is right where the scene was shown before."""

FILM_MEASURES = {
    "returned_soon": "away for 5 frames: right, %",
    "returned_soon" + REMEMBERED: "away for 5 frames: remembered, points",
    "returned_late": "away for 13 frames: right, %",
    "returned_late" + REMEMBERED: "away for 13 frames: remembered, points",
}

AT_ONCE = 25
"""Videos that a process asks about at a time."""

Scores = dict[str, tuple[Int64, Int64]]
"""Of V videos under one policy, by measure and frame: how many are right, and of how many; [V, T] each."""

Counts = dict[str, dict[str, Count]]
"""By variant and measure, each of shape [V, T]."""

Values = dict[str, dict[str, Float64]]
"""By variant and measure, of each video."""


def run_worlds(plan: MemoryPlan, processes: int, console: Console) -> Counts:
    """Ask about what changes in every world."""
    body = partial(_worlds, plan.variants, plan.frames)
    return _run(body, plan.variants, plan.worlds, "worlds", processes, console)


def run_films(plan: MemoryPlan, processes: int, console: Console) -> Counts:
    """Ask about the first frame after a return, and about the same frame where it is none, by kind of `FILMS`."""
    body = partial(_films, plan.film_variants)
    return _run(body, plan.film_variants, plan.films, "films", processes, console)


def values_by_video(counts: Counts, span: slice) -> Values:
    """Shares that are right over the frames of ``span``."""
    return {name: {key: count.of_videos(span) for key, count in own.items()} for name, own in counts.items()}


def processes() -> int:
    """As many as there are cores."""
    return os.cpu_count() or 1


def _run(
    body: Callable[[range], list[Scores]],
    variants: Sequence[Variant],
    count: int,
    what: str,
    processes: int,
    console: Console,
) -> Counts:
    context = multiprocessing.get_context("spawn")
    stop = FIRST_HELD_OUT_SEED + count
    parts = [range(first, min(stop, first + AT_ONCE)) for first in range(FIRST_HELD_OUT_SEED, stop, AT_ONCE)]
    found: list[list[Scores]] = []
    with (
        counting(console, what) as progress,
        child_environment({"OMP_NUM_THREADS": "1"}),
        ProcessPoolExecutor(processes, context) as pool,
    ):
        task = progress.add_task("asking", total=count)
        for part, scores in zip(parts, pool.map(body, parts), strict=True):
            found.append(scores)
            progress.advance(task, len(part))
    return {
        variant.name: {key: _count([scores[number][key] for scores in found]) for key in found[0][number]}
        for number, variant in enumerate(variants)
    }


def _count(parts: list[tuple[Int64, Int64]]) -> Count:
    right, of = (np.concatenate(own).astype(np.float64) for own in zip(*parts, strict=True))
    return Count(right, of)


@cache
def _model() -> tuple[Llama, VideoTokenizer]:
    return load_pretrained(MODEL_DIR), VideoTokenizer()


def _worlds(variants: Sequence[Variant], frames: int, seeds: range) -> list[Scores]:
    """Body of a process: some worlds under every policy."""
    worlds = [make_world(seed) for seed in seeds]
    _, tokenizer = _model()
    truth = np.stack([true_frames(tokenizer, world, frames) for world in worlds])
    returned = np.stack([[world.emerging(frame) for frame in range(1, frames + 1)] for world in worlds])
    asked = {CHANGED: truth[:, 1:] != truth[:, :-1], RETURNED: returned}
    return _ask(variants, [world.prompt for world in worlds], truth, asked)


def _films(variants: Sequence[Variant], seeds: range) -> list[Scores]:
    """Body of a process: some films of every kind under every policy."""
    _, tokenizer = _model()
    found: list[Scores] = [{} for _ in variants]
    for kind, cuts in FILMS.items():
        last = cuts[-1]
        films = [make_film(seed, cuts) for seed in seeds]
        others = [
            replace(film, scenes=(film.scenes[0], make_film(seed + 1, cuts).scenes[1]))
            for film, seed in zip(films, seeds, strict=True)
        ]
        truth, unseen = (np.stack([true_frames(tokenizer, film, last) for film in own]) for own in (films, others))
        unseen[:, -1] = truth[:, -1]
        asked = np.zeros((len(films), last, GRID, GRID), dtype=bool)
        # What looks as it did before the cut, as the walls do, can be copied.
        asked[:, -1] = np.stack([film.known(last) for film in films]) & (truth[:, -1] != truth[:, -2])
        prompts = [film.prompt for film in films]
        for key, frames in ((kind, truth), (kind + UNSEEN, unseen)):
            for scores, own in zip(found, _ask(variants, prompts, frames, {key: asked}), strict=True):
                scores.update(own)
    return found


def _ask(variants: Sequence[Variant], prompts: Sequence[str], frames: Int64, asked: Mapping[str, Bool]) -> list[Scores]:
    """What every policy gets right of the tokens that each measure asks for.

    Args:
        variants: the policies.
        prompts: the sentences, V.
        frames: ids of the condition's pictures and of T frames, [V, T + 1, rows, columns].
        asked: by measure, [V, T, rows, columns].
    """
    _, tokenizer = _model()
    truth = frames[:, 1:]
    ids = np.stack(
        [
            np.concatenate([tokenizer.build_prompt_from_ids(prompt, own[0]), sequence(tokenizer, own[1:])])
            for prompt, own in zip(prompts, frames, strict=True)
        ]
    )
    wanted = np.any(list(asked.values()), axis=0).reshape(*truth.shape[:2], -1)
    found = []
    for variant in variants:
        said = _said(variant, ids, wanted)
        right = said.reshape(truth.shape) == truth
        found.append({key: ((right & mask).sum((2, 3)), mask.sum((2, 3))) for key, mask in asked.items()})
    return found


def _said(variant: Variant, ids: Int64, asked: Bool) -> Int64:
    """The most likely tokens that are asked for, [V, T, F - 1], of whole videos; what is rounded is computed whole."""
    model, tokenizer = _model()
    plan, frames = variant.plan(), asked.shape[1]
    if variant.cache == FLOAT32.name:
        return likeliest(model, tokenizer, plan, BLOCK_SIZE, ids, asked)
    caches = (VideoCache(model.size, plan, BLOCK_SIZE, frames, FORMATS[variant.cache]) for _ in ids)
    said = np.stack([likeliest_of_one(model, cache, own, frames) for cache, own in zip(caches, ids, strict=True)])
    return np.where(asked, said, NOT_ASKED)
