"""How good a generated video is, frame by frame."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from benchmarks.statistics import Count
from vllm_packcache.demo.scores import MAX_PSNR
from vllm_packcache.demo.tokenizer import VISUAL_TOKENS, VideoTokenizer
from vllm_packcache.demo.world import GRID, World, palette

Int64 = npt.NDArray[np.int64]
Pictures = npt.NDArray[np.uint8]

RECOGNISABLE = 0.5
"""Share of an object's cells that must be in front of the pillar for it to be looked for."""


class Measure(NamedTuple):
    """What is measured of a frame.

    Args:
        heading: for tables and plots.
        factor: that its values are shown with.
        digits: after the point.
        higher_is_better: else lower is.
    """

    heading: str
    factor: float = 100
    digits: int = 1
    higher_is_better: bool = True

    @property
    def title(self) -> str:
        """The heading, with an arrow where less is better."""
        return self.heading if self.higher_is_better else f"{self.heading} ↓"


MEASURES: Mapping[str, Measure] = {
    "tokens_right": Measure("tokens right, %"),
    "psnr_db": Measure("PSNR, dB", 1),
    "ssim": Measure("SSIM", 1, 3),
    "flicker": Measure("flicker", 1, 2, higher_is_better=False),
    "identity": Measure("right objects, %"),
    "identity_after_occlusion": Measure("after occlusion, %"),
}
"""How many visual tokens are those of the true continuation; PSNR, at most 60 dB, and SSIM of the picture against the
true one; flicker: by how much pixels (0-255) change from one frame to the next where those of the true video do not;
right objects: of those that can be seen in the true frame, how many show up whole in their row, at any place, in the
colour and shape that the prompt gave them; after occlusion: the same, once the object has been hidden."""

OBJECTS = ("identity", "identity_after_occlusion")
"""Those of what has to be remembered."""


def measure(video: World, shown: Int64, truth: Int64, tokenizer: VideoTokenizer) -> dict[str, Count]:
    """Every one of `MEASURES` for one video.

    Args:
        video: the world.
        shown: generated frames, token ids [T, 16, 16].
        truth: true frames, with the condition's picture, [T + 1, 16, 16].
        tokenizer: the demo's.

    Returns:
        Counts of shape [1, T].
    """
    pictures = tokenizer.decode_frames(np.concatenate([truth[:1], shown]))
    true_pictures = tokenizer.decode_frames(truth)
    right = (shown == truth[1:]).sum((1, 2))
    similar = [_similarity(a, b) for a, b in zip(true_pictures[1:], pictures[1:], strict=True)]
    counts = {
        "tokens_right": (right, np.full(len(shown), VISUAL_TOKENS)),
        "psnr_db": ([ratio for ratio, _ in similar], np.ones(len(shown))),
        "ssim": ([ssim for _, ssim in similar], np.ones(len(shown))),
        "flicker": _flicker(pictures, true_pictures),
        **_identity(video, shown - tokenizer.visual_offset),
    }
    return {name: Count(np.array([total], float), np.array([of], float)) for name, (total, of) in counts.items()}


def _similarity(truth: Pictures, shown: Pictures) -> tuple[float, float]:
    """PSNR in dB and SSIM of a picture, [64, 64, 3] twice."""
    if (truth == shown).all():
        return MAX_PSNR, 1.0
    ssim = structural_similarity(truth, shown, channel_axis=2)
    return min(MAX_PSNR, peak_signal_noise_ratio(truth, shown)), ssim


def _flicker(shown: Pictures, truth: Pictures) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Sum of the absolute changes where the truth stands still, and how many values that are, [T] each."""
    still = (truth[1:] == truth[:-1]).all(-1, keepdims=True)
    change = np.abs(shown[1:].astype(np.int64) - shown[:-1])
    return (change * still).sum((1, 2, 3)), 3 * still.sum((1, 2, 3))


def _identity(video: World, shown: Int64) -> dict[str, tuple[Int64, Int64]]:
    """Objects that are recognised and objects that could be, in frames of codebook indices [T, 16, 16]."""
    recognised, seen, after, after_seen = np.zeros((4, len(shown)), dtype=np.int64)
    for number in range(len(video.objects)):
        was_hidden = False
        for k, frame in enumerate(shown, start=1):
            was_hidden |= video.hidden(number, k)
            if not recognises(video, number, video.frame_ids(k)):
                continue
            found = recognises(video, number, frame)
            seen[k - 1] += 1
            recognised[k - 1] += found
            after_seen[k - 1] += was_hidden
            after[k - 1] += found and was_hidden
    return {"identity": (recognised, seen), "identity_after_occlusion": (after, after_seen)}


def recognises(video: World, number: int, frame: Int64) -> bool:
    """Whether object ``number`` shows in its row of ``frame`` [16, 16]: whole, but for what the pillar hides."""
    thing = video.objects[number]
    look = palette().objects[thing.shape, thing.colour, video.scene]
    behind = np.zeros(GRID, dtype=np.bool_)
    if video.pillar is not None:
        behind[video.pillar.left : video.pillar.left + video.pillar.width] = True
    rows, columns = np.nonzero(look >= 0)
    for left in range(GRID - look.shape[1] + 1):
        front = ~behind[left + columns]
        cells = frame[thing.row + rows[front], left + columns[front]]
        if front.mean() >= RECOGNISABLE and (cells == look[rows[front], columns[front]]).all():
            return True
    return False
