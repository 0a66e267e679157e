"""Every world under every policy: which tokens the model would have made, given the true past."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from rich.console import Console

from benchmarks.engine_process import child_environment
from benchmarks.memory.plan import MemoryPlan
from benchmarks.quality.decoder import VideoCache, forced
from benchmarks.quality.variants import BLOCK_SIZE, Variant
from benchmarks.statistics import Count
from benchmarks.training.llama import Llama, load_pretrained
from vllm_packcache.demo.scores import FIRST_HELD_OUT_SEED, sequence, true_frames
from vllm_packcache.demo.tokenizer import MODEL_DIR, VideoTokenizer, world_prompt
from vllm_packcache.demo.world import make_world
from vllm_packcache.tools.progress import counting

Int64 = npt.NDArray[np.int64]

CHANGED, RETURNED = "changed_tokens_right", "returned_cells_right"
MEASURES = {CHANGED: "changed tokens right, %", RETURNED: "cells that come out from behind the pillar right, %"}


class Scores(NamedTuple):
    """Of one world under one policy, by frame: how many are right, and of how many; [T] each."""

    changed: tuple[Int64, Int64]
    returned: tuple[Int64, Int64]


def run(plan: MemoryPlan, processes: int, console: Console) -> dict[str, dict[str, Count]]:
    """Counts by variant and measure, each of shape [V, T]."""
    variants = plan.variants
    seeds = range(FIRST_HELD_OUT_SEED, FIRST_HELD_OUT_SEED + plan.worlds)
    context = multiprocessing.get_context("spawn")
    found: list[list[Scores]] = []
    with (
        counting(console, "worlds") as progress,
        child_environment({"OMP_NUM_THREADS": "1"}),
        ProcessPoolExecutor(processes, context) as pool,
    ):
        task = progress.add_task("asking", total=plan.worlds)
        for scores in pool.map(partial(_world, variants, plan.frames), seeds):
            found.append(scores)
            progress.advance(task)
    return {
        variant.name: {
            CHANGED: _count([scores[number].changed for scores in found]),
            RETURNED: _count([scores[number].returned for scores in found]),
        }
        for number, variant in enumerate(variants)
    }


def processes() -> int:
    """As many as there are cores."""
    return os.cpu_count() or 1


def _count(parts: list[tuple[Int64, Int64]]) -> Count:
    right, of = (np.array(own, dtype=np.float64) for own in zip(*parts, strict=True))
    return Count(right, of)


@cache
def _model() -> tuple[Llama, VideoTokenizer]:
    return load_pretrained(MODEL_DIR), VideoTokenizer()


def _world(variants: tuple[Variant, ...], frames: int, seed: int) -> list[Scores]:
    """Body of a process: one world under every policy."""
    model, tokenizer = _model()
    world = make_world(seed)
    truth = true_frames(tokenizer, world, frames)
    prompt = np.array(world_prompt(tokenizer, world))
    ids = np.concatenate([prompt, sequence(tokenizer, truth[1:])])
    changed = truth[1:] != truth[:-1]
    returned = np.stack([world.emerging(frame) for frame in range(1, frames + 1)])
    scores = []
    for variant in variants:
        video = VideoCache(model.size, variant.plan(), BLOCK_SIZE, frames, _reader(ids))
        right = forced(model, video, ids, len(prompt)).reshape(truth[1:].shape) == truth[1:]
        scores.append(Scores(*(((right & asked).sum((1, 2)), asked.sum((1, 2))) for asked in (changed, returned))))
    return scores


def _reader(ids: Int64) -> Callable[[int, int], Int64]:
    return lambda start, stop: ids[start:stop]
