"""Measure the demo model on worlds it was not trained on.

``python -m benchmarks.training.evaluate --model DIR --videos 50 --frames 16 64 --json FILE``

Everything runs in float32 with the full cache.  Two questions are asked:

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

from benchmarks.training.llama import KeyValueCache, Llama, load_pretrained
from vllm_packcache.demo.scores import FIRST_HELD_OUT_SEED, sequence, summary, true_frames
from vllm_packcache.demo.tokenizer import (
    CONDITION_TOKENS,
    FRAME_TOKENS,
    GRID,
    MODEL_DIR,
    VideoTokenizer,
    world_prompt,
)
from vllm_packcache.demo.world import World, make_world


@torch.inference_mode()
def predict_next_frames(model: Llama, tokenizer: VideoTokenizer, video: World, frames: int) -> np.ndarray:
    """Teacher-forced most likely ids of the first ``frames`` frames, int64 [frames, 257]."""
    ids = [*world_prompt(tokenizer, video), *sequence(tokenizer, true_frames(tokenizer, video, frames)[1:])]
    hidden = model.hidden(torch.tensor([ids[:-1]]))[0, CONDITION_TOKENS - 1 :]
    return model.logits(hidden).argmax(-1).numpy().reshape(frames, FRAME_TOKENS)


@torch.inference_mode()
def generate(model: Llama, prompt: list[int], draft: np.ndarray) -> list[int]:
    """Greedy generation of as many tokens as ``draft`` has, with the full cache.

    ``draft`` (int [n]) only makes it fast: its tokens are checked a frame at a time and kept as far as they
    are what greedy decoding gives, so the result is that of decoding token by token.
    """
    cache = KeyValueCache(model.size, len(prompt) + len(draft))
    model.hidden(torch.tensor([prompt[:-1]]), cache)
    done: list[int] = []
    last = prompt[-1]
    while len(done) < len(draft):
        guess = draft[len(done) : min(len(draft) - 1, len(done) + FRAME_TOKENS)]
        kept = cache.length
        hidden = model.hidden(torch.tensor([[last, *guess]]), cache)
        best = model.logits(hidden)[0].argmax(-1).numpy()
        wrong = np.flatnonzero(best[: len(guess)] != guess)
        agreed = int(wrong[0]) if len(wrong) else len(guess)
        done.extend(best[: agreed + 1].tolist())
        last = done[-1]
        cache.length = kept + 1 + agreed
    return done


def evaluate(model: Llama, tokenizer: VideoTokenizer, count: int, frames: int) -> dict[str, Any]:
    """Both measurements on ``count`` held-out worlds of ``frames`` frames, each beside copying.

    Copying means the last true frame when teacher-forced, and the conditioning picture when generated.
    """
    videos = [make_world(FIRST_HELD_OUT_SEED + i) for i in range(count)]
    truths = [true_frames(tokenizer, video, frames) for video in videos]
    forced, forced_starts, generated, generated_starts = [], 0.0, [], 0.0
    for video, truth in track(list(zip(videos, truths, strict=True)), f"{frames} frames"):
        best = predict_next_frames(model, tokenizer, video, frames)
        forced.append(best[:, 1:].reshape(-1, GRID, GRID))
        forced_starts += float((best[:, 0] == tokenizer.frame_id).mean())
        ids = generate(model, world_prompt(tokenizer, video), sequence(tokenizer, truth[1:]))
        generated.append(tokenizer.frames_from_ids(ids))
        generated_starts += float((np.array(ids[::FRAME_TOKENS]) == tokenizer.frame_id).mean())
    return {
        "videos": count,
        "frames": frames,
        "teacher_forced": {
            "model": summary(videos, truths, forced, tokenizer),
            "copy_last_frame": summary(videos, truths, [t[:-1] for t in truths], tokenizer),
            "frame_token_accuracy": round(forced_starts / count, 6),
        },
        "generated": {
            "model": summary(videos, truths, generated, tokenizer),
            "copy_condition": summary(videos, truths, [t[:1].repeat(frames, 0) for t in truths], tokenizer),
            "frame_token_accuracy": round(generated_starts / count, 6),
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
