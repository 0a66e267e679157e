"""How right a video of the toy world is: its tokens, its pictures and its objects, against the truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from vllm_packcache.demo.tokenizer import VideoTokenizer
from vllm_packcache.demo.world import Video, World, palette

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


class Sightings(NamedTuple):
    """What becomes of each object in frames 1, 2, ... of a world, bool [T, objects] each.

    Args:
        visible: the truth shows some part of it.
        hidden: it is wholly behind the pillar.
        returned: it is wholly visible for the first time since it was hidden.
        right: it is visible, and all of its visible tokens are shown at their true place.
    """

    visible: np.ndarray
    hidden: np.ndarray
    returned: np.ndarray
    right: np.ndarray


def sightings(video: World, shown: np.ndarray) -> Sightings:
    """Look for the objects of a world in frames 1, 2, ... shown as codebook indices int [T, 16, 16]."""
    found = Sightings(*np.zeros((4, len(shown), len(video.objects)), bool))
    for i in range(len(video.objects)):
        whole = len(video.object_cells(i, 0))
        awaited = False
        for k, frame in enumerate(shown):
            cells = video.object_cells(i, k + 1)
            found.visible[k, i] = len(cells) > 0
            found.hidden[k, i] = video.hidden(i, k + 1)
            found.right[k, i] = len(cells) > 0 and (frame[cells[:, 0], cells[:, 1]] == cells[:, 2]).all()
            found.returned[k, i] = awaited and len(cells) == whole
            awaited = (awaited or found.hidden[k, i]) and not found.returned[k, i]
    return found


def wrong_frames(video: World, shown: np.ndarray) -> np.ndarray:
    """In which of frames 1, 2, ... an object is missing, broken or where none should be, bool [T].

    A frame may be wrong without a sighting that is: it may show an object that is hidden, or one too many.
    """
    truth = np.stack([video.frame_ids(k + 1) for k in range(len(shown))])
    objects = np.isin(truth, palette().parts) | np.isin(shown, palette().parts)
    return ((truth != shown) & objects).any((1, 2))


def score_objects(video: World, shown: np.ndarray) -> ObjectScore:
    """Compare the objects of a world with frames 1, 2, ... shown as codebook indices int [T, 16, 16]."""
    found = sightings(video, shown)
    after = found.visible & np.logical_or.accumulate(found.hidden)
    return ObjectScore(
        seen=int(found.visible.sum()),
        right=int(found.right.sum()),
        after_seen=int(after.sum()),
        after_right=int((after & found.right).sum()),
        returns=int(found.returned.sum()),
        returns_right=int((found.returned & found.right).sum()),
    )


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
