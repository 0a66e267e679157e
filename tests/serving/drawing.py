"""Tokens that are drawn on the V2 runner, whose kernel for random numbers cannot be interpreted.

In its place are a few lines of PyTorch. What they are given is vLLM's: the logits of each request when all of its
sampling has been applied, its temperature, its seed, and where the token before stands.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor


def noise(seed: int, position: int, vocabulary: int) -> Tensor:
    """What is added to logits before the best one is taken, so that it is drawn by its probability, [vocabulary]."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + position) % 2**63)
    return -torch.empty(vocabulary).exponential_(generator=generator).log()


def draw(patch: pytest.MonkeyPatch) -> None:
    """Have engines of this process draw with `noise`."""

    def gumbel_sample(
        logits: Tensor, rows: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor, **others: Any
    ) -> Tensor:
        del others
        drawn = []
        for row, slot, position in zip(logits, rows.tolist(), positions.tolist(), strict=True):
            warm = float(temperature[slot]) > 0
            drawn.append((row + noise(int(seeds[slot]), position, len(row)) if warm else row).argmax())
        return torch.stack(drawn)

    patch.setattr("vllm.v1.worker.gpu.sample.sampler.gumbel_sample", gumbel_sample)
