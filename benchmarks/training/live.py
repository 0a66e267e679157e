"""Which tokens of a video live while a frame is made."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vllm_packcache.core.plan import Plan
from vllm_packcache.core.retention import Retention

Int64 = npt.NDArray[np.int64]

SPARSELY = (
    "computed is what heads look at (docs/train.md); tests compare that with the whole model under these policies"
)
"""What a result says that was made so."""


def retention_of(plan: Plan, block_size: int, ids: Int64) -> Retention:
    """What a video keeps.

    Args:
        plan: of it.
        block_size: tokens of a KV-cache block.
        ids: of the video, [T]; they may be written while it is made.
    """
    return Retention(plan.layout, plan.policy, block_size, lambda start, stop: ids[start:stop])


def live_tokens(retention: Retention, frame: int) -> npt.NDArray[np.bool_]:
    """Which of a video's tokens live while ``frame`` is made, the frame itself included, bool [T], T where it ends."""
    size = retention.block_size
    live = np.zeros(retention.layout.frame_start(frame + 1), dtype=bool)
    live[(retention.past(frame)[:, None] * size + np.arange(size)).reshape(-1)] = True
    live[retention.blocks.tail_start(frame) * size :] = True
    return live
