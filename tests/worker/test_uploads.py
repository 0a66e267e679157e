"""What goes to a device in a step goes there from pinned memory: a copy from any other would wait for the device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.worker.test_attention import BLOCK, make_common, make_step
from tests.worker.test_runner_v1 import REBASING, VIDEO, batch, build, state
from vllm_packcache.core.layout import FrameLayout, VideoLayout
from vllm_packcache.core.policies import PackCache
from vllm_packcache.core.positions import Positions
from vllm_packcache.core.retention import Retention
from vllm_packcache.worker import attention, runner_v1
from vllm_packcache.worker.blocks.compaction import compact
from vllm_packcache.worker.keys import rotation

DEVICE = torch.device("meta")
"""In place of a GPU: it has shapes, and nothing to wait for."""


class PageableCopies(TorchDispatchMode):
    """Counts copies from the host to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [each for each in args if isinstance(each, torch.Tensor)]
        if isinstance(result, torch.Tensor) and result.device == DEVICE:
            self.count += any(each.device.type == "cpu" and each.dim() for each in tensors)
        return result


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Sizes of what vLLM's copy from pinned memory was asked for; there must be no other copies."""
    asked: list[int] = []

    def async_tensor_h2d(data: Any, device: torch.device) -> torch.Tensor:
        tensor = torch.as_tensor(data)
        asked.append(tensor.numel())
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

    for module in (attention, rotation, runner_v1):
        monkeypatch.setattr(module, "async_tensor_h2d", async_tensor_h2d)
    with PageableCopies() as copies:
        yield asked
    assert copies.count == 0


def test_a_copy_from_pageable_memory_is_seen() -> None:
    with PageableCopies() as copies:
        torch.ones(3).to(DEVICE, non_blocking=True)
        torch.empty(3, device=DEVICE)[torch.ones(3, dtype=torch.int64).to(DEVICE)] += 1
    assert copies.count == 2


def test_block_tables(pinned: list[int]) -> None:
    common = make_common(block_table_tensor=torch.empty(2, 9, dtype=torch.int32, device=DEVICE))
    compacted = attention.compact_metadata(common, compact(make_step(), BLOCK))
    assert compacted.block_table_tensor.device == compacted.seq_lens.device == DEVICE
    assert compacted.query_start_loc.device == DEVICE
    assert compacted.query_start_loc_cpu.device.type == "cpu"
    assert len(pinned) == 3


def test_positions(pinned: list[int]) -> None:
    one = batch([35], state("a", VIDEO), config=REBASING)
    runner_v1.publish_step(build)(one, num_scheduled_tokens={"a": 2})
    positions = torch.empty(5, dtype=torch.int64, device=DEVICE)
    runner_v1.position_tokens(lambda runner: (None, None, positions))(one)
    assert pinned == [2]


def test_slides(pinned: list[int]) -> None:
    layout = VideoLayout(FrameLayout(8), 10)
    retention = Retention(layout, PackCache(window=2, history_frames=1.5, selection="spatial"), BLOCK)
    keys = rotation.KeyRotation(
        rotation.Rotary(np.ones(2), np.zeros(2, dtype=np.int64), np.arange(2), np.arange(2, 4)), ()
    )
    turned: list[torch.Tensor] = []

    class Kernel:
        """It copies for itself; see `vllm_packcache.worker.keys.kernel`."""

        def rotate(self, blocks: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            turned.append(blocks)

    keys.__dict__["_kernel"] = Kernel()
    table = torch.empty(40, dtype=torch.int32, device=DEVICE)
    keys.slide(retention, Positions(layout, 2), layout.frame_start(3), table)
    (blocks,) = turned
    assert blocks.device == DEVICE
    assert pinned == [len(blocks)]
