"""What a request makes and keeps, settled once: scheduler and worker each derive it for themselves.

This module is pure: it knows neither vLLM nor torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from vllm_packcache.core.layout import VideoLayout
from vllm_packcache.core.policies import Full, Policy
from vllm_packcache.core.positions import Positions


@dataclass(frozen=True)
class VideoPlan:
    """What one request keeps, and where its model sees it. Scheduler and worker each derive it for themselves."""

    layout: VideoLayout
    policy: Policy
    positions: Positions

    @property
    def as_stock(self) -> bool:
        """Whether the whole cache is kept and positions are as without a policy."""
        return type(self.policy) is Full and self.positions.as_stock


class Asked(NamedTuple):
    """What a request says of its video.

    Attributes:
        policy: what to keep, and of it what the request changes.
        layout: the video.
        frames: how many frames to make, the one that the prompt ends in included; None: it does not say.
        has_frames: whether anybody has said how large a frame is; without that, ``policy`` is `Full`.
    """

    policy: Policy
    layout: VideoLayout
    frames: int | None
    has_frames: bool
