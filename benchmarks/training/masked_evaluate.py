"""Measure the masked demo model on worlds it was not trained on.

``python -m benchmarks.training.masked_evaluate --videos 8 --json FILE``

Videos are made by the reference decoder in float32, with steps, noise, guidance and commits as a server makes them.
Asked is whether they are the true continuation, with the full cache and with packcache, as long as in training and
longer; what steps, guidance, noise and re-masking do to that; and whether a video made of text alone shows what the
text says.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vllm_packcache.config.server import ServerConfig
from vllm_packcache.demo.masked.bundle import (
    MODEL_DIR,
    OPTIONS,
    PRESET,
    TRAINED_FRAMES,
    request_options,
    write_checkpoint,
)
from vllm_packcache.demo.masked.tokenizer import GRID_SHAPE, build_text_tokenizer, prompt, world_frame
from vllm_packcache.demo.scores import FIRST_HELD_OUT_SEED, summary
from vllm_packcache.demo.tokenizer import VideoTokenizer
from vllm_packcache.demo.world import OBJECT_CELLS, World, make_world, palette
from vllm_packcache.families import LUMOS, lumos
from vllm_packcache.families.lumos import MaskedOptions
from vllm_packcache.reference.lumos import LumosReference
from vllm_packcache.reference.masked_video import generate_masked

BLOCK_SIZE = 32
POLICIES = ("full", "packcache")

CHANGES: tuple[Mapping[str, Any], ...] = (
    {"guidance": 1.0},
    {"guidance": 4.0},
    {"steps": 4},
    {"temperature": 0.0},
    {"remask": 0.0},
)
"""What is tried instead of `OPTIONS`, one at a time."""


class FusedLumos(LumosReference):
    """The reference, with attention fused and over the keys that are seen only: several times as fast on a CPU."""

    def attention(self, queries: Tensor, queries_at: Tensor, cached: Tensor, keys_at: Tensor, mask: Tensor) -> Tensor:
        """As of `LumosReference`, but for the order of sums."""
        seen = mask[0]
        if not torch.equal(mask, seen.expand_as(mask)):
            return super().attention(queries, queries_at, cached, keys_at, mask)
        q, k, v = (
            heads.transpose(0, 1)[None]
            for heads in (
                self.rotate(queries, queries_at),
                self.rotate(cached[0][seen], keys_at[:, seen]),
                cached[1][seen],
            )
        )
        return scaled_dot_product_attention(q, k, v, enable_gqa=True)[0].transpose(0, 1)


def generate(
    model: LumosReference,
    video: World,
    frames: int,
    policy: str,
    options: MaskedOptions,
    *,
    with_image: bool = True,
    text: str | None = None,
) -> np.ndarray:
    """Make the frames of a world.

    Args:
        model: the checkpoint.
        video: the world; its frame 0 is the conditioning image.
        frames: how many to make.
        policy: one of `POLICIES`.
        options: of the request.
        with_image: image to video; else text to video.
        text: of the prompt; None: what the world does.

    Returns:
        Codes, int64 [frames, 16, 16]: of image to video frames 1, 2, ... of the world.
    """
    ids = prompt(video.prompt if text is None else text, frames, build_text_tokenizer())
    if with_image:
        ids += world_frame(video, 0).tolist()
    plan = LUMOS.request(
        ServerConfig.parse("packcache", PRESET, family=LUMOS), request_options(frames, options, policy=policy), ids
    )
    made = generate_masked(model, ids, frames, plan.conditional, plan.options, BLOCK_SIZE)
    return np.stack([lumos.codes_of_frame(frame, GRID_SHAPE) for frame in made.frames.numpy()])


class Evaluation:
    """Measurements on the same held-out worlds.

    Args:
        model: the checkpoint.
        count: of worlds.
    """

    def __init__(self, model: LumosReference, count: int) -> None:
        self._model = model
        self._tokenizer = VideoTokenizer()
        self.worlds = [make_world(FIRST_HELD_OUT_SEED + i) for i in range(count)]

    def measure(
        self, frames: int, policy: str, options: MaskedOptions, count: int | None = None, *, with_text: bool = True
    ) -> dict[str, Any]:
        """Image to video: how near the videos come to the true ones.

        Args:
            frames: of each.
            policy: one of `POLICIES`.
            options: of the requests; every video has a seed of its own.
            count: of worlds; None: all.
            with_text: whether the prompt has words.
        """
        worlds = self.worlds[:count]
        text = None if with_text else ""
        made = [
            generate(self._model, world, frames, policy, dataclasses.replace(options, seed=seed), text=text)
            for seed, world in enumerate(track(worlds, f"{frames} frames, {policy}, {options}"))
        ]
        return self._summary(worlds, made)

    def copies(self, frames: int) -> dict[str, Any]:
        """The same for a video that is its conditioning image all along."""
        return self._summary(self.worlds, [world.frame_ids(0)[None].repeat(frames, 0) for world in self.worlds])

    def shown(self, options: MaskedOptions) -> float:
        """Text to video: the share of objects that the first frame shows whole, in their shape and colour."""
        found = []
        for seed, world in enumerate(track(self.worlds, f"text to video, {options}")):
            changed = dataclasses.replace(options, seed=seed)
            (frame,) = generate(self._model, world, 1, "full", changed, with_image=False)
            found += [shows(frame, world, number) for number in range(len(world.objects))]
        return round(sum(found) / len(found), 4)

    def _summary(self, worlds: Sequence[World], made: Sequence[np.ndarray]) -> dict[str, Any]:
        offset = self._tokenizer.visual_offset
        truths = [
            np.stack([world.frame_ids(k) for k in range(len(codes) + 1)]) + offset
            for world, codes in zip(worlds, made, strict=True)
        ]
        return {"videos": len(worlds)} | summary(worlds, truths, [codes + offset for codes in made], self._tokenizer)


def shows(frame: np.ndarray, video: World, number: int) -> bool:
    """Whether a frame [16, 16] shows object ``number`` whole, wherever."""
    thing = video.objects[number]
    look = palette().objects[thing.shape, thing.colour, video.scene]
    places = np.lib.stride_tricks.sliding_window_view(frame, (OBJECT_CELLS, OBJECT_CELLS))
    return bool(((places == look) | (look < 0)).all((2, 3)).any())


def evaluate(model: LumosReference, count: int, swept: int) -> dict[str, Any]:
    """Everything that ``evaluation.json`` says of the quality.

    Args:
        model: the checkpoint.
        count: worlds for the options of the demo.
        swept: worlds for each change of these.
    """
    evaluation = Evaluation(model, count)
    lengths = {
        str(frames): {policy: evaluation.measure(frames, policy, OPTIONS) for policy in POLICIES}
        | {"copy_condition": evaluation.copies(frames)}
        for frames in (TRAINED_FRAMES, 2 * TRAINED_FRAMES)
    }
    changes = [
        {"changed": change} | evaluation.measure(TRAINED_FRAMES, "full", dataclasses.replace(OPTIONS, **change), swept)
        for change in ({}, *CHANGES)
    ]
    without_text = evaluation.measure(
        TRAINED_FRAMES, "full", dataclasses.replace(OPTIONS, guidance=1.0), swept, with_text=False
    )
    return {
        "first_seed": FIRST_HELD_OUT_SEED,
        "trained_frames": TRAINED_FRAMES,
        "options": dataclasses.asdict(OPTIONS),
        "lengths": lengths,
        "changes": changes,
        "without_text": without_text,
        "text_to_video_objects_shown": {
            str(guidance): evaluation.shown(dataclasses.replace(OPTIONS, guidance=guidance))
            for guidance in (1.0, OPTIONS.guidance, 4.0)
        },
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Evaluate the masked demo model on held-out worlds.")
    parser.add_argument("--bundle", type=Path, default=MODEL_DIR)
    parser.add_argument("--videos", type=int, default=8, help="for the options of the demo")
    parser.add_argument("--swept", type=int, default=4, help="videos for each change of an option")
    parser.add_argument("--json", type=Path, required=True, help="file for the results")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with TemporaryDirectory() as folder:
        model = FusedLumos.load(write_checkpoint(folder, args.bundle))
    results = evaluate(model, args.videos, args.swept)
    args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
