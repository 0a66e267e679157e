"""What of a video lives while its frames are made, as clients see it: blocks, tokens, positions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from vllm_packcache.core.encoded import Encoding, retention_of
from vllm_packcache.core.plan import Stream, VideoRequest
from vllm_packcache.core.policies.base import Int64
from vllm_packcache.core.retention import Retention
from vllm_packcache.core.view import IN_CONDITION, FrameView, view_of

STREAMS = ("conditional", "unconditional")
"""Of a guided video, by their names for people."""


class Living:
    """The cache of a video that is made, frame by frame.

    Everything is asked of the objects that the scheduler obeys, of the ids that the engine has made.

    Args:
        made: what the request makes.
        prompt_ids: of the request.
        block_size: tokens of a KV-cache block.
        encoding: how much room older frames take; None: as much as when they were new.
    """

    def __init__(
        self, made: VideoRequest, prompt_ids: Sequence[int], block_size: int, encoding: Encoding | None = None
    ) -> None:
        self._ids, self._block_size, self._encoding = list(prompt_ids), block_size, encoding
        self._streams = [(stream, self._retention(stream)) for stream in made.streams]
        self._frame = max(0, made.streams[0].plan.layout.frame_of(len(self._ids)))

    def add(self, ids: Sequence[int]) -> dict[str, Any]:
        """What has lived while the next frame was made.

        Args:
            ids: of the frame.

        Returns:
            Data of an event ``frame``: tokens and blocks of all streams, positions and the states of blocks of the
            first, and where there are two ``streams`` with those of each.
        """
        self._ids += ids
        shown = [self._shown(stream, retention) for stream, retention in self._streams]
        self._frame += 1
        sums = {name: sum(own[name] for own in shown) for name in ("resident_blocks", "resident_tokens", "full_tokens")}
        said = {
            **sums,
            "block_size": self._block_size,
            "positions": shown[0]["positions"],
            "blocks": shown[0]["blocks"],
        }
        return said if len(shown) == 1 else {**said, "streams": dict(zip(STREAMS, shown, strict=True))}

    def _shown(self, stream: Stream, retention: Retention) -> dict[str, Any]:
        view = view_of(retention, self._frame)
        positions = stream.plan.positions
        last = positions.of(np.array([view.tokens.full - 1]), positions.window_start(self._frame))
        return {
            "resident_blocks": int((view.states >= IN_CONDITION).sum()),
            "resident_tokens": view.tokens.live - view.saved,
            "full_tokens": view.tokens.full,
            "positions": [0, int(last.max()) + 1],
            "blocks": _runs(view),
        }

    def _retention(self, stream: Stream) -> Retention:
        plan = stream.plan
        tokens = partial(self._between, stream) if plan.policy.reads_tokens else None
        return retention_of(plan.layout, plan.policy, self._block_size, self._encoding, tokens)

    def _between(self, stream: Stream, start: int, stop: int) -> Int64:
        return np.array(stream.ids(self._ids, start, stop), dtype=np.int64)


def _runs(view: FrameView) -> list[list[int]]:
    """States of blocks in the order of the sequence, each with how many of it there are."""
    begins = np.flatnonzero(np.diff(view.states, prepend=view.states[0] - 1))
    counts = np.diff(begins, append=len(view.states))
    return [[int(view.states[begin]), int(count)] for begin, count in zip(begins, counts, strict=True)]
