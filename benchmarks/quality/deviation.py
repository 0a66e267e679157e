"""How far what tokens are drawn by is from what it would be with nothing left out of the passes.

A video of the bundled masked model is made with everything computed. Beside it every way to leave something out gets
the same ids in every step, so that what is measured is what a step's logits are off by, and not where a video goes that
went another way once. Guidance multiplies what is off in one stream and not in the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks.quality.generators import Passes
from benchmarks.quality.variants import BLOCK_SIZE, less_of
from benchmarks.statistics import mean_of_videos
from benchmarks.training import masked_sparse_video
from benchmarks.training.masked_bundle import load_bundle
from vllm_packcache.demo.scores import FIRST_HELD_OUT_SEED
from vllm_packcache.families.lumos import MaskedOptions

SETTINGS = ((1.5, 8), (15.0, 50))
"""Guidance and passes: those of small videos, and the published ones."""

WAYS: tuple[Mapping[str, Any], ...] = (
    {"refresh": 8},
    {"reuse": 0.02},
    {"reuse": 0.1},
    {"guidance_interval": 2},
    {"refresh": 8, "reuse": 0.02, "guidance_interval": 2},
)


class Deviations:
    """A `masked_sparse_video.Beside` that adds up.

    Args:
        ways: how frames are made besides.
        videos: V.
    """

    def __init__(self, ways: Sequence[MaskedOptions], videos: int) -> None:
        self.ways = ways
        self._off, self._moved = np.zeros((2, len(ways), videos))
        self._size, self._rows = np.zeros((2, videos))

    def take(self, step: int, masked: Tensor, said: Tensor, others: Sequence[Tensor]) -> None:
        """See `masked_sparse_video.Beside`."""
        del step
        for video, (rows, own) in enumerate(zip(masked, said, strict=True)):
            own = _centred(own[rows])
            self._size[video] += own.square().sum().item()
            self._rows[video] += len(own)
            for number, other in enumerate(others):
                beside = _centred(other[video][rows])
                self._off[number, video] += (beside - own).square().sum().item()
                self._moved[number, video] += (beside.softmax(-1) - own.softmax(-1)).abs().sum().item() / 2

    @property
    def found(self) -> list[dict[str, Any]]:
        """Of every way, means over videos.

        ``logits``: root of the squares of what logits are off by, as a share of the same of the logits, each row about
        its own mean. ``draws``: share of all probability that lies elsewhere: so many draws are of another token.
        """
        return [
            {
                "logits": mean_of_videos(np.sqrt(off / self._size)),
                "draws": mean_of_videos(moved / self._rows),
            }
            for off, moved in zip(self._off, self._moved, strict=True)
        ]


def _centred(logits: Tensor) -> Tensor:
    """Without what is the same for all tokens, which nothing depends on."""
    return (logits - logits.mean(-1, keepdim=True)).double()


def deviations(generator: Passes) -> list[dict[str, Any]]:
    """Those of every one of `WAYS` under every one of `SETTINGS`, by guidance, passes and what is left out."""
    model, (videos, frames) = load_bundle(), generator.looked_at
    found: list[dict[str, Any]] = []
    for guidance, steps in SETTINGS:
        whole = replace(generator.options, guidance=guidance, steps=steps)
        requests = [
            replace(own, options=replace(whole, seed=own.options.seed))
            for seed in range(FIRST_HELD_OUT_SEED, FIRST_HELD_OUT_SEED + videos)
            for own in (generator.request(generator.variants.full, frames, seed),)
        ]
        beside = Deviations([replace(whole, **less) for less in WAYS], videos)
        masked_sparse_video.generate(model, requests, BLOCK_SIZE, frames, beside)
        found += [
            {"guidance": guidance, "steps": steps, "name": less_of(less), **own}
            for less, own in zip(WAYS, beside.found, strict=True)
        ]
    return found
