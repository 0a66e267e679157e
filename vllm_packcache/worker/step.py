"""What the attention wrapper must know of the step being run, published by the runner's adapter.

vLLM's metadata builders see block tables and lengths, not requests. The adapter of the model runner knows the
requests; it publishes one row for each while it builds the attention metadata.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_packcache.retention import Retention


class Row(NamedTuple):
    """One request of the batch: tokens ``[computed, computed + scheduled)`` are run in this step."""

    retention: Retention | None
    computed: int
    scheduled: int


@dataclass(frozen=True, slots=True)
class Step:
    """The batch of one step.

    Args:
        rows: the requests in batch order.
        block_table: host copy of the block table, [at least len(rows), blocks], int32: the manager's blocks.
        block_size: tokens of a block of that table, the same as every retention's.
    """

    rows: list[Row]
    block_table: npt.NDArray[np.int32]
    block_size: int


_current: ContextVar[Step | None] = ContextVar("packcache_step", default=None)


def current_step() -> Step | None:
    """The step whose attention metadata is being built, if any of its requests has a retention."""
    return _current.get()


@contextmanager
def publish(step: Step) -> Iterator[None]:
    """Make ``step`` the current one."""
    token = _current.set(step)
    try:
        yield
    finally:
        _current.reset(token)
