"""How much of a model's attention every part of a video gets, however the model makes videos."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vllm_packcache.core.layout import VideoLayout

Float64 = npt.NDArray[np.float64]

SEGMENTS = ("text", "conditioning image", "own frame", "older frames")
"""What the first columns of a measurement stand for; behind them come the frames at distance 1, 2, ... D."""

TEXT, IMAGE, OWN, OLDER, NEAREST = range(len(SEGMENTS) + 1)
"""Columns of a measurement."""


@dataclass(frozen=True)
class Video:
    """A video as a model sees it.

    Args:
        token_ids: condition and whole frames.
        layout: which of them is what.
    """

    token_ids: list[int]
    layout: VideoLayout

    @property
    def frames(self) -> int:
        """How many whole frames it has."""
        return (len(self.token_ids) - self.layout.condition_tokens) // self.layout.tokens_per_frame


class Mass(NamedTuple):
    """Attention mass of one video: shares of a query's attention, averaged over queries.

    Only queries of frames with D frames before them count, so that every distance has the same queries.

    Args:
        layout: of the video.
        by_segment: [layers, heads, 4 + D], see `SEGMENTS`; over the last axis they sum to 1.
        by_block: [frames - D, layers, blocks], averaged over heads; row i is of the queries of frame D + i.
    """

    layout: VideoLayout
    by_segment: Float64
    by_block: Float64


@dataclass
class Tally:
    """What is known so far of one video.

    Args:
        layout: of the video.
        distances: D.
        block_size: tokens of a block.
    """

    layout: VideoLayout
    distances: int
    block_size: int
    by_segment: dict[int, list[Tensor]] = field(default_factory=dict)
    by_block: dict[int, list[Tensor]] = field(default_factory=dict)

    def add(self, layer: int, frame: int, mass: Tensor) -> None:
        """Count the queries of ``frame``: what every token got of them on average, [heads, tokens] in float64."""
        if frame < self.distances:
            return
        condition = self.layout.condition_tokens
        first = frame - self.distances
        starts = torch.tensor([self.layout.frame_start(k) for k in range(first, frame + 2)])
        before = F.pad(mass.cumsum(-1), (1, 0))
        of_frames = before[:, starts].diff()
        condition_edges = [0, condition - self.layout.condition_image_tokens, condition, int(starts[0])]
        text, image, older = before[:, condition_edges].diff().unbind(-1)
        of_condition = torch.stack([text, image, of_frames[:, -1], older], -1)
        # The nearest frame is the last one before the query's own.
        by_segment = torch.cat([of_condition, of_frames[:, :-1].flip(-1)], -1)
        self.by_segment.setdefault(layer, []).append(by_segment)
        blocks = -(-self.layout.frame_start(frame + 1) // self.block_size)
        padded = F.pad(mass.mean(0), (0, blocks * self.block_size - mass.shape[1]))
        self.by_block.setdefault(layer, []).append(padded.view(blocks, self.block_size).sum(-1))

    def mass(self) -> Mass:
        """The measurement, all layers of which have been counted."""
        layers = sorted(self.by_segment)
        by_segment = [torch.stack(self.by_segment[layer]).mean(0) for layer in layers]
        # Later frames see more blocks: rows are as long as the last.
        by_block = [pad_sequence(self.by_block[layer], batch_first=True) for layer in layers]
        return Mass(self.layout, torch.stack(by_segment).numpy(), torch.stack(by_block, 1).numpy())
