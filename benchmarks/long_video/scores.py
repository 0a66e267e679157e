"""What the answers of `benchmarks.long_video` are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.long_video.plan import COPY, FORCED, GENERATED, TRUTH, LongVideoPlan
from benchmarks.long_video.runs import Answers, Bools, Int64
from benchmarks.statistics import Count
from vllm_packcache.demo.scores import psnr, sequence, true_frames
from vllm_packcache.demo.tokenizer import FRAME_TOKENS, VISUAL_TOKENS, VideoTokenizer
from vllm_packcache.demo.world import World, make_world, palette


def score(plan: LongVideoPlan, answers: Mapping[str, Answers]) -> dict[str, Any]:
    """The scores of both measurements, by measurement, variant and measure. References show what is easy."""
    tokenizer = VideoTokenizer()
    worlds = [make_world(seed) for seed in plan.seeds]
    truth = np.stack([true_frames(tokenizer, world, plan.frames) for world in worlds])
    first = np.broadcast_to(truth[:, :1], truth[:, 1:].shape)
    forced = {name: _forced_counts(own.likeliest, truth) for name, own in answers.items()}
    generated = {
        name: _generated_counts(own.generated, worlds, truth, tokenizer)
        for name, own in answers.items()
        if own.generated is not None
    } | {
        name: _generated_counts(_ids(frames, tokenizer), worlds, truth, tokenizer)
        for name, frames in ((TRUTH, truth[:, 1:]), (COPY, first))
    }
    return {
        measurement: {
            name: {measure: count.summary(plan.spans) for measure, count in counts.items()}
            for name, counts in by_name.items()
        }
        for measurement, by_name in ((FORCED, forced), (GENERATED, generated))
    }


def _ids(frames: Int64, tokenizer: VideoTokenizer) -> Int64:
    """Frames [V, T, 16, 16] as if generated, [V, T * 257]."""
    return np.stack([sequence(tokenizer, video) for video in frames])


def _forced_counts(likeliest: Bools, truth: Int64) -> dict[str, Count]:
    """Shares of right tokens.

    Args:
        likeliest: [V, T, 257].
        truth: [V, T + 1, 16, 16].
    """
    right = likeliest[:, :, 1:]
    changed = (truth[:, 1:] != truth[:, :-1]).reshape(right.shape)
    return {
        "changed_tokens_right": Count((right & changed).sum(2), changed.sum(2)),
        "tokens_right": Count(right.sum(2), np.full(right.shape[:2], VISUAL_TOKENS)),
        "frame_token_right": Count(likeliest[:, :, 0].astype(np.float64), np.ones(right.shape[:2])),
    }


def _generated_counts(ids: Int64, worlds: Sequence[World], truth: Int64, tokenizer: VideoTokenizer) -> dict[str, Count]:
    """How much generated videos are like the true ones, and like any video of these worlds.

    Args:
        ids: [V, T * 257].
        worlds: V worlds.
        truth: [V, T + 1, 16, 16].
        tokenizer: the demo's.
    """
    videos, frames = len(worlds), truth.shape[1] - 1
    shown = np.stack([tokenizer.frames_from_ids(video) for video in ids.tolist()])
    right = (shown == truth[:, 1:]).sum((2, 3))
    ratios = [
        psnr(tokenizer.decode_frames(true[1:]), tokenizer.decode_frames(own))
        for true, own in zip(truth, shown, strict=True)
    ]
    raw = ids.reshape(videos, frames, FRAME_TOKENS)
    # Visual ids are the end of the vocabulary.
    whole = (raw[:, :, 0] == tokenizer.frame_id) & (raw[:, :, 1:] >= tokenizer.visual_offset).all(2)
    background = np.stack([world.background for world in worlds])[:, None] + tokenizer.visual_offset
    of_objects = np.stack(
        [np.isin(own - tokenizer.visual_offset, _codewords(world)) for own, world in zip(shown, worlds, strict=True)]
    )
    other = shown != background
    before = np.concatenate([truth[:, :1], shown[:, :-1]], axis=1)
    one = np.ones((videos, frames))
    return {
        "tokens_right": Count(right, one * VISUAL_TOKENS),
        "psnr_db": Count(np.stack(ratios), one),
        "whole_frames": Count(whole * one, one),
        "object_cells": Count((other & of_objects).sum((2, 3)), one),
        "debris_cells": Count((other & ~of_objects).sum((2, 3)), one),
        "moving_cells": Count((shown != before).sum((2, 3)), one),
    }


def _codewords(world: World) -> Int64:
    """All codewords that the objects of a world can show."""
    looks = np.stack([palette().objects[thing.shape, thing.colour, world.scene] for thing in world.objects])
    # Elsewhere the background shows through.
    return np.unique(looks[looks >= 0])
