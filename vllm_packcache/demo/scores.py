"""How right a video of the toy world is: its tokens, its pictures and its objects, against the truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_packcache.demo.tokenizer import VideoTokenizer
from vllm_packcache.demo.world import Video, World

FIRST_HELD_OUT_SEED = 10_000
"""Evaluation uses worlds from this seed on; training starts at a million."""
MAX_PSNR = 60.0
"""Decibels given to a frame without any error, so that means stay finite."""


def psnr(truth: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of each frame, uint8 [T, H, W, 3] twice to float [T]."""
    error = ((truth.astype(float) - shown) ** 2).mean(axis=(1, 2, 3))
    return np.minimum(MAX_PSNR, 10 * np.log10(255**2 / np.maximum(error, 1e-9)))


def true_frames(tokenizer: VideoTokenizer, video: Video, frames: int) -> np.ndarray:
    """Token ids of frames 0 to ``frames`` of a video, int64 [frames + 1, 16, 16]."""
    return np.stack([video.frame_ids(k) for k in range(frames + 1)]) + tokenizer.visual_offset


def sequence(tokenizer: VideoTokenizer, frames: np.ndarray) -> np.ndarray:
    """Frames int [T, 16, 16] as generated ids, int64 [T * 257]."""
    start = np.full((len(frames), 1), tokenizer.frame_id)
    return np.concatenate([start, frames.reshape(len(frames), -1)], 1).reshape(-1)


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
