"""Where a video was cut, and what stays of a scene that has ended: the option ``episodes``.

A frame of which most tokens differ from the frame before shows another scene. Of the last frame of the scene that ends
a few blocks stay as its anchor, so that a return to the scene is not a new one.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from vllm_packcache.core.layout import VideoLayout
from vllm_packcache.core.policies.base import Int64, Tokens


def scene_ends(layout: VideoLayout, first: int, frame: int, tokens: Tokens) -> list[int]:
    """The last frames of scenes that have ended, newest first.

    Args:
        layout: the video.
        first: the oldest frame that is asked about, 0 or more.
        frame: the frame being made; those before it are finished.
        tokens: ids of the sequence.

    Returns:
        Those of the frames ``first`` .. ``frame`` - 2 that the next frame differs from.
    """
    length = layout.tokens_per_frame
    ids = tokens(layout.frame_start(first), layout.frame_start(frame)).reshape(-1, length)
    changed = (ids[1:] != ids[:-1]).sum(axis=1)
    return [first + int(number) for number in np.flatnonzero(2 * changed > length)[::-1]]


def distinct_scenes(layout: VideoLayout, frame: int, ends: Iterable[int], count: int, tokens: Tokens) -> list[int]:
    """Up to ``count`` of ``ends``, the newest of every scene that is not the one being shown.

    Args:
        layout: the video.
        frame: the frame being made; the one before it shows the scene.
        ends: last frames of scenes, newest first.
        count: 0 or more.
        tokens: ids of the sequence.
    """

    def picture(of: int) -> Int64:
        return tokens(layout.frame_start(of), layout.frame_start(of + 1))

    shown = [picture(frame - 1)]
    found: list[int] = []
    for end in ends:
        if len(found) == count:
            break
        own = picture(end)
        if all(2 * int((own != other).sum()) > len(own) for other in shown):
            found.append(end)
            shown.append(own)
    return found
