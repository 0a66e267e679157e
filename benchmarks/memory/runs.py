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
from benchmarks.memory.forced import likeliest
from benchmarks.memory.plan import FILMS, MemoryPlan
from benchmarks.quality.variants import BLOCK_SIZE, Variant
from benchmarks.statistics import Count
from benchmarks.training.llama import Llama, load_pretrained
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

Scores = dict[str, tuple[Int64, Int64]]
"""Of one video under one policy, by measure and frame: how many are right, and of how many; [T] each."""

Counts = dict[str, dict[str, Count]]
"""By variant and measure, each of shape [V, T]."""


def run_worlds(plan: MemoryPlan, processes: int, console: Console) -> Counts:
    """Ask about what changes in every world."""
    body = partial(_world, plan.variants, plan.frames)
    return _run(body, plan.variants, plan.worlds, "worlds", processes, console)


def run_films(plan: MemoryPlan, processes: int, console: Console) -> Counts:
    """Ask about the first frame after a return, and about the same frame where it is none, by kind of `FILMS`."""
    body = partial(_films, plan.film_variants)
    return _run(body, plan.film_variants, plan.films, "films", processes, console)


def processes() -> int:
    """As many as there are cores."""
    return os.cpu_count() or 1


def _run(
    body: Callable[[int], list[Scores]],
    variants: Sequence[Variant],
    count: int,
    what: str,
    processes: int,
    console: Console,
) -> Counts:
    context = multiprocessing.get_context("spawn")
    found: list[list[Scores]] = []
    with (
        counting(console, what) as progress,
        child_environment({"OMP_NUM_THREADS": "1"}),
        ProcessPoolExecutor(processes, context) as pool,
    ):
        task = progress.add_task("asking", total=count)
        for scores in pool.map(body, range(FIRST_HELD_OUT_SEED, FIRST_HELD_OUT_SEED + count)):
            found.append(scores)
            progress.advance(task)
    return {
        variant.name: {key: _count([scores[number][key] for scores in found]) for key in found[0][number]}
        for number, variant in enumerate(variants)
    }


def _count(parts: list[tuple[Int64, Int64]]) -> Count:
    right, of = (np.array(own, dtype=np.float64) for own in zip(*parts, strict=True))
    return Count(right, of)


@cache
def _model() -> tuple[Llama, VideoTokenizer]:
    return load_pretrained(MODEL_DIR), VideoTokenizer()


def _world(variants: Sequence[Variant], frames: int, seed: int) -> list[Scores]:
    """Body of a process: one world under every policy."""
    world = make_world(seed)
    _, tokenizer = _model()
    truth = true_frames(tokenizer, world, frames)
    returned = np.stack([world.emerging(frame) for frame in range(1, frames + 1)])
    return _ask(variants, world.prompt, truth, {CHANGED: truth[1:] != truth[:-1], RETURNED: returned})


def _films(variants: Sequence[Variant], seed: int) -> list[Scores]:
    """Body of a process: one film of every kind under every policy."""
    _, tokenizer = _model()
    found: list[Scores] = [{} for _ in variants]
    for kind, cuts in FILMS.items():
        film, last = make_film(seed, cuts), cuts[-1]
        other = replace(film, scenes=(film.scenes[0], make_film(seed + 1, cuts).scenes[1]))
        truth = true_frames(tokenizer, film, last)
        unseen = np.concatenate([true_frames(tokenizer, other, last)[:-1], truth[-1:]])
        asked = np.zeros((last, GRID, GRID), dtype=bool)
        # What looks as it did before the cut, as the walls do, can be copied.
        asked[-1] = film.known(last) & (truth[-1] != truth[-2])
        for key, frames in ((kind, truth), (kind + UNSEEN, unseen)):
            for scores, own in zip(found, _ask(variants, film.prompt, frames, {key: asked}), strict=True):
                scores.update(own)
    return found


def _ask(variants: Sequence[Variant], prompt: str, frames: Int64, asked: Mapping[str, Bool]) -> list[Scores]:
    """What every policy gets right of the tokens that each measure asks for.

    Args:
        variants: the policies.
        prompt: the sentence.
        frames: ids of the condition's picture and of T frames, [T + 1, rows, columns].
        asked: by measure, [T, rows, columns].
    """
    model, tokenizer = _model()
    truth = frames[1:]
    ids = np.concatenate([tokenizer.build_prompt_from_ids(prompt, frames[0]), sequence(tokenizer, truth)])
    wanted = np.any(list(asked.values()), axis=0).reshape(len(truth), -1)
    found = likeliest(model, [variant.plan() for variant in variants], BLOCK_SIZE, ids, wanted)
    right = [best.reshape(truth.shape) == truth for best in found]
    return [{key: ((own & mask).sum((1, 2)), mask.sum((1, 2))) for key, mask in asked.items()} for own in right]
