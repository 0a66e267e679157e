"""Measure the demo model on worlds it was not trained on.

``python -m benchmarks.training.evaluate --model DIR --videos 50 --frames 16 64 --json FILE``

Everything runs in float32 with the full cache, sparsely (`benchmarks.training.sparse`). Two questions are asked:

* teacher-forced: given the true past, is the next frame predicted right?
* generated: given the condition only, is greedy generation the true video, and are the objects right?
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track

from benchmarks.quality.variants import BLOCK_SIZE, FULL_CACHE, Shape, Variant
from benchmarks.training.llama import Llama, load_pretrained
from benchmarks.training.sparse_video import generate, likeliest
from vllm_packcache.demo.scores import FIRST_HELD_OUT_SEED, sequence, summary, true_frames
from vllm_packcache.demo.tokenizer import (
    CONDITION_TOKENS,
    GRID,
    MODEL_DIR,
    VideoTokenizer,
    world_prompt,
)
from vllm_packcache.demo.world import make_world

AT_ONCE = 25
"""Videos that are computed together."""

EVERYTHING = Variant(Shape("demo", CONDITION_TOKENS), FULL_CACHE, "full", {}).plan()


def evaluate(model: Llama, tokenizer: VideoTokenizer, count: int, frames: int) -> dict[str, Any]:
    """Both measurements on ``count`` held-out worlds of ``frames`` frames, each beside copying.

    Copying means the last true frame when teacher-forced, and the conditioning picture when generated.
    """
    videos = [make_world(FIRST_HELD_OUT_SEED + i) for i in range(count)]
    truths = [true_frames(tokenizer, video, frames) for video in videos]
    forced, generated = [], []
    for first in track(range(0, count, AT_ONCE), f"{frames} frames"):
        some = slice(first, first + AT_ONCE)
        prompts = np.array([world_prompt(tokenizer, video) for video in videos[some]])
        true = np.stack([sequence(tokenizer, truth[1:]) for truth in truths[some]])
        every = np.ones((len(true), frames, GRID * GRID), dtype=bool)
        given = np.concatenate([prompts, true], 1)
        forced.append(likeliest(model, tokenizer, EVERYTHING, BLOCK_SIZE, given, every))
        generated.append(generate(model, tokenizer, EVERYTHING, BLOCK_SIZE, prompts, frames))
    made = np.concatenate(generated)
    shown = [tokenizer.frames_from_ids(own.reshape(-1).tolist()) for own in made]
    best = list(np.concatenate(forced).reshape(count, frames, GRID, GRID))
    return {
        "videos": count,
        "frames": frames,
        "teacher_forced": {
            "model": summary(videos, truths, best, tokenizer),
            "copy_last_frame": summary(videos, truths, [t[:-1] for t in truths], tokenizer),
        },
        "generated": {
            "model": summary(videos, truths, shown, tokenizer),
            "copy_condition": summary(videos, truths, [t[:1].repeat(frames, 0) for t in truths], tokenizer),
            "frame_token_accuracy": round(float((made[:, :, 0] == tokenizer.frame_id).mean()), 6),
        },
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Evaluate the demo video model on held-out worlds.")
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--videos", type=int, default=50)
    parser.add_argument("--frames", type=int, nargs="+", default=[16], help="video lengths to measure")
    parser.add_argument("--json", type=Path, required=True, help="file for the results")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = load_pretrained(args.model), VideoTokenizer(args.model)
    lengths = {str(frames): evaluate(model, tokenizer, args.videos, frames) for frames in args.frames}
    results = {
        "first_seed": FIRST_HELD_OUT_SEED,
        "parameters": sum(p.numel() for p in model.parameters()),
        "lengths": lengths,
    }
    args.json.write_text(json.dumps(results, indent=1) + "\n")
    for frames, result in lengths.items():
        for kind in ("teacher_forced", "generated"):
            for who, values in result[kind].items():
                if isinstance(values, dict):
                    short = {k: v for k, v in values.items() if not isinstance(v, list)}
                    print(f"{frames} frames, {kind}, {who}: {short}")


if __name__ == "__main__":
    main()
