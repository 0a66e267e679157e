"""Measure the demo model on worlds it was not trained on.

``python -m vllm_packcache.demo.evaluate --model DIR --videos 50 --frames 16 64 --json FILE``

Everything runs in float32 with the full cache.  Two questions are asked:

* teacher-forced: given the true past, is the next frame predicted right?
* generated: given the condition only, is greedy generation the true video, and are the objects right?
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track

from vllm_packcache.demo.llama import KeyValueCache, Llama, load_pretrained
from vllm_packcache.demo.tokenizer import (
    CONDITION_TOKENS,
    FRAME_TOKENS,
    GRID,
    MODEL_DIR,
    VideoTokenizer,
    world_prompt,
)
from vllm_packcache.demo.world import World, make_world

FIRST_HELD_OUT_SEED = 10_000
"""Evaluation uses worlds from this seed on; training starts at a million."""
MAX_PSNR = 60.0
"""Decibels given to a frame without any error, so that means stay finite."""


def psnr(truth: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of each frame, uint8 [T, H, W, 3] twice to float [T]."""
    error = ((truth.astype(float) - shown) ** 2).mean(axis=(1, 2, 3))
    return np.minimum(MAX_PSNR, 10 * np.log10(255**2 / np.maximum(error, 1e-9)))


def true_frames(tokenizer: VideoTokenizer, video: World, frames: int) -> np.ndarray:
    """Token ids of frames 0 to ``frames`` of a world, int64 [frames + 1, 16, 16]."""
    return np.stack([video.frame_ids(k) for k in range(frames + 1)]) + tokenizer.visual_offset


def sequence(tokenizer: VideoTokenizer, frames: np.ndarray) -> np.ndarray:
    """Frames int [T, 16, 16] as generated ids, int64 [T * 257]."""
    start = np.full((len(frames), 1), tokenizer.frame_id)
    return np.concatenate([start, frames.reshape(len(frames), -1)], 1).reshape(-1)


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


@dataclass
class ObjectScore:
    """Object sightings of one video: every (object, frame) where the truth shows any part of the object.

    ``right`` counts sightings where all visible tokens of the object are at their true place;
    ``after`` counts only sightings later than a time wholly behind the pillar; ``returns`` counts the frames
    in which an object is first wholly visible again.
    """

    seen: int = 0
    right: int = 0
    after_seen: int = 0
    after_right: int = 0
    returns: int = 0
    returns_right: int = 0


def score_objects(video: World, shown: np.ndarray) -> ObjectScore:
    """Compare the objects of a world with frames 1, 2, ... shown as codebook indices int [T, 16, 16]."""
    score = ObjectScore()
    for i in range(len(video.objects)):
        whole = len(video.object_cells(i, 0))
        was_hidden = awaiting = False
        for k in range(1, len(shown) + 1):
            if video.hidden(i, k):
                was_hidden = awaiting = True
                continue
            cells = video.object_cells(i, k)
            if not len(cells):
                continue
            right = bool((shown[k - 1][cells[:, 0], cells[:, 1]] == cells[:, 2]).all())
            score.seen += 1
            score.right += right
            if was_hidden:
                score.after_seen += 1
                score.after_right += right
            if awaiting and len(cells) == whole:
                awaiting = False
                score.returns += 1
                score.returns_right += right
    return score


def _share(part: float, whole: float) -> float | None:
    return round(part / whole, 6) if whole else None


def summary(
    videos: Sequence[World], truths: Sequence[np.ndarray], shown: Sequence[np.ndarray], tokenizer: VideoTokenizer
) -> dict[str, Any]:
    """Scores of shown frames (int [T, 16, 16] each) against truth (int [T + 1, 16, 16] each)."""
    hits = np.stack([s == t[1:] for s, t in zip(shown, truths, strict=True)])
    changed = np.stack([t[1:] != t[:-1] for t in truths])
    ratios = np.stack(
        [psnr(tokenizer.decode_frames(t[1:]), tokenizer.decode_frames(s)) for s, t in zip(shown, truths, strict=True)]
    )
    scores = [score_objects(v, s - tokenizer.visual_offset) for v, s in zip(videos, shown, strict=True)]
    total = {name: sum(getattr(s, name) for s in scores) for name in ObjectScore.__dataclass_fields__}
    return {
        "token_accuracy": round(float(hits.mean()), 6),
        "changed_token_accuracy": round(float(hits[changed].mean()), 6),
        "exact_frames": round(float(hits.all((2, 3)).mean()), 6),
        "exact_videos": round(float(hits.all((1, 2, 3)).mean()), 6),
        "psnr_db": round(float(ratios.mean()), 3),
        "psnr_db_by_frame": [round(float(x), 2) for x in ratios.mean(0)],
        "token_accuracy_by_frame": [round(float(x), 5) for x in hits.mean((0, 2, 3))],
        "objects_right": _share(total["right"], total["seen"]),
        "objects_right_after_occlusion": _share(total["after_right"], total["after_seen"]),
        "returns_from_occlusion_right": _share(total["returns_right"], total["returns"]),
        "videos_with_all_objects_right": _share(sum(s.right == s.seen for s in scores), len(scores)),
        "sightings": total["seen"],
        "returns_from_occlusion": total["returns"],
    }


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
