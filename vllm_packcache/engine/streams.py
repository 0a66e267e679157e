"""The KV cache managers of a masked model's two streams.

Each frees blocks as the manager of any video does. vLLM counts a request's tokens once, in the sequence of the
conditional stream; the unconditional one begins later in it and counts from there.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request

from vllm_packcache.core.layout import VideoLayout
from vllm_packcache.core.plan import VideoPlan
from vllm_packcache.engine.manager import RetentionManager
from vllm_packcache.engine.stream_spec import StreamSpec
from vllm_packcache.families.lumos import MaskedPlan

logger = logging.getLogger("vllm.packcache")


class StreamManager(RetentionManager):
    """What the managers of both streams have in common. Every request is a video."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._plans: dict[str, MaskedPlan] = {}

    def plan(self, request: Request) -> MaskedPlan:
        """What ``request`` makes."""
        if request.request_id not in self._plans:
            extra_args = request.sampling_params.extra_args if request.sampling_params else None
            assert request.prompt_token_ids is not None
            self._plans[request.request_id] = self._config.masked_plan(extra_args, request.prompt_token_ids)
        return self._plans[request.request_id]

    def _frame_in_the_making(self, layout: VideoLayout, num_tokens: int) -> int:
        """The frame behind ``num_tokens`` tokens: its own count when it is finished."""
        return layout.frame_of(num_tokens)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """See `RetentionManager.pop_blocks_for_free`."""
        self._plans.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)


class ConditionalManager(StreamManager):
    """Of the stream of the whole prompt: its tokens are the request's."""

    def _announce(self, kv_cache_spec: StreamSpec) -> None:
        blocks = self.block_pool.num_gpu_blocks - 1
        logger.info(
            "%d KV-cache blocks of %d tokens: the longest video in the server's layout holds at most %d of them in "
            "each of its two streams (text of its prompt not counted)",
            blocks,
            self.block_size,
            kv_cache_spec.most_blocks(blocks * self.block_size),
        )

    def _plan_of(self, request: Request) -> VideoPlan:
        return self.plan(request).conditional


class UnconditionalManager(StreamManager):
    """Of the stream that begins with the video. A request that is not guided has none, and no blocks here."""

    def _announce(self, kv_cache_spec: StreamSpec) -> None:
        """The other stream's manager has said it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._starts: dict[str, int | None] = {}

    def _plan_of(self, request: Request) -> VideoPlan | None:
        plan = self.plan(request)
        own = plan.unconditional
        self._starts[request.request_id] = (
            None if own is None else plan.conditional.layout.condition_tokens - own.layout.condition_tokens
        )
        return own

    def own_tokens(self, request_id: str, tokens: int) -> int:
        """How many of a request's first ``tokens`` tokens are in this stream."""
        start = self._starts.get(request_id)
        return 0 if start is None else max(0, tokens - start)

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> int:
        """See `RetentionManager.get_num_blocks_to_allocate`."""
        return super().get_num_blocks_to_allocate(request_id, self.own_tokens(request_id, num_tokens), *args, **kwargs)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        """Allocate the blocks of this stream for a request's first ``num_tokens`` tokens."""
        return super().allocate_new_blocks(
            request_id, self.own_tokens(request_id, num_tokens), self.own_tokens(request_id, num_tokens_main_model)
        )

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        """See `RetentionManager.cache_blocks`."""
        self.video(request)
        own = self.own_tokens(request.request_id, num_tokens)
        super().cache_blocks(request, own, retention_interval, replay_boundaries=replay_boundaries)

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """See `RetentionManager.remove_skipped_blocks`."""
        super().remove_skipped_blocks(
            request_id, self.own_tokens(request_id, processed_computed_tokens), num_prompt_tokens
        )

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """See `RetentionManager.pop_blocks_for_free`."""
        self._starts.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)


def stream_managers(manager: KVCacheManager) -> tuple[StreamManager, ...]:
    """The managers of both streams."""
    return tuple(own for own in manager.coordinator.single_type_managers if isinstance(own, StreamManager))
