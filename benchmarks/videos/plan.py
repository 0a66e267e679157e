"""What `benchmarks.videos` runs: sizes."""

from __future__ import annotations

from dataclasses import dataclass

THREADS = 1
"""OpenMP threads of the engine: the API server, which decodes, needs a core of a small machine."""


@dataclass(frozen=True, kw_only=True)
class VideosPlan:
    """Sizes of everything that is run.

    Args:
        frames: that are made of each video.
        rounds: of a video and a completion.
        followers: clients that follow the events of a video.
        followed_rounds: of a video for each of them.
    """

    frames: int = 8
    rounds: int = 9
    followers: tuple[int, ...] = (0, 1, 4)
    followed_rounds: int = 5


FULL = VideosPlan()
QUICK = VideosPlan(frames=1, rounds=1, followers=(0, 2), followed_rounds=1)
