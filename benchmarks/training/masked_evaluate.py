"""Measure the masked demo model on worlds it was not trained on.

``python -m benchmarks.training.masked_evaluate --videos 50 --json FILE``

Videos are made with steps, noise, guidance and commits as a server makes them, sparsely
(`benchmarks.training.masked_sparse`), in float32.
Asked is whether they are the true continuation, with the full cache and with packcache, as long as in training and
longer; what steps, guidance, noise and re-masking do to that; and whether a video made of text alone shows what the
text says.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track

from benchmarks.training.masked_bundle import load_bundle
from benchmarks.training.masked_model import Lumos
from benchmarks.training.masked_sparse_video import Request
from benchmarks.training.masked_sparse_video import generate as generate_together
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.demo.masked.bundle import (
    MODEL_DIR,
    OPTIONS,
    PRESET,
    TRAINED_FRAMES,
    request_options,
)
from vllm_packcache.demo.masked.tokenizer import build_text_tokenizer, prompt, world_frame
from vllm_packcache.demo.scores import FIRST_HELD_OUT_SEED, summary
from vllm_packcache.demo.tokenizer import VideoTokenizer
from vllm_packcache.demo.world import OBJECT_CELLS, World, make_world, palette
from vllm_packcache.families import LUMOS
from vllm_packcache.families.lumos import MaskedOptions

BLOCK_SIZE = 32
AT_ONCE = 25
"""Videos that are computed together."""
POLICIES = ("full", "packcache")

CHANGES: tuple[Mapping[str, Any], ...] = (
    {"guidance": 1.0},
    {"guidance": 3.0},
    {"steps": 8},
    {"temperature": 0.0},
    {"remask": 0.7},
)
"""What is tried instead of `OPTIONS`, one at a time."""


def generate(
    model: Lumos,
    videos: Sequence[World],
    frames: int,
    policy: str,
    options: Sequence[MaskedOptions],
    *,
    with_image: bool = True,
    texts: Sequence[str] | None = None,
) -> np.ndarray:
    """Make the frames of worlds.

    Args:
        model: the bundle.
        videos: V worlds; their frame 0 is the conditioning image.
        frames: how many to make.
        policy: one of `POLICIES`.
        options: of each request; but for the seed they are the same.
        with_image: image to video; else text to video.
        texts: of the prompts; None: what the worlds do.

    Returns:
        Codes, int64 [V, frames, 16, 16]: of image to video frames 1, 2, ... of each world.
    """
    server = ServerConfig.parse("packcache", PRESET, family=LUMOS)
    requests = []
    for video, text, own in zip(videos, texts or [video.prompt for video in videos], options, strict=True):
        ids = prompt(text, frames, build_text_tokenizer())
        if with_image:
            ids += world_frame(video, 0).tolist()
        plan = LUMOS.request(server, request_options(frames, own, policy=policy), ids)
        requests.append(Request(ids, plan.conditional, plan.options))
    return generate_together(model, requests, BLOCK_SIZE, frames)


class Evaluation:
    """Measurements on the same held-out worlds.

    Args:
        model: the bundle.
        count: of worlds.
    """

    def __init__(self, model: Lumos, count: int) -> None:
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
        made = [
            codes
            for some, own in self._together(f"{frames} frames, {policy}, {options}", worlds, options)
            for codes in generate(self._model, some, frames, policy, own, texts=None if with_text else [""] * len(some))
        ]
        return self._summary(worlds, made)

    @staticmethod
    def _together(
        what: str, worlds: Sequence[World], options: MaskedOptions
    ) -> Iterator[tuple[Sequence[World], list[MaskedOptions]]]:
        """Worlds that are computed at a time, with options that have a seed each."""
        for first in track(range(0, len(worlds), AT_ONCE), what):
            some = worlds[first : first + AT_ONCE]
            yield some, [dataclasses.replace(options, seed=first + number) for number in range(len(some))]

    def copies(self, frames: int) -> dict[str, Any]:
        """The same for a video that is its conditioning image all along."""
        return self._summary(self.worlds, [world.frame_ids(0)[None].repeat(frames, 0) for world in self.worlds])

    def shown(self, options: MaskedOptions) -> float:
        """Text to video: the share of objects that the first frame shows whole, in their shape and colour."""
        found = []
        for some, own in self._together(f"text to video, {options}", self.worlds, options):
            for world, codes in zip(some, generate(self._model, some, 1, "full", own, with_image=False), strict=True):
                found += [shows(codes[0], world, number) for number in range(len(world.objects))]
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


def evaluate(model: Lumos, count: int, swept: int) -> dict[str, Any]:
    """Everything that ``evaluation.json`` says of the quality.

    Args:
        model: the bundle.
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
            for guidance in (1.0, OPTIONS.guidance, 3.0)
        },
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Evaluate the masked demo model on held-out worlds.")
    parser.add_argument("--bundle", type=Path, default=MODEL_DIR)
    parser.add_argument("--videos", type=int, default=50, help="for the options of the demo")
    parser.add_argument("--swept", type=int, default=25, help="videos for each change of an option")
    parser.add_argument("--json", type=Path, required=True, help="file for the results")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = evaluate(load_bundle(args.bundle), args.videos, args.swept)
    args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
