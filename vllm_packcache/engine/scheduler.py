"""Schedulers of canvases: a picture is computed whole or not at all.

vLLM's schedulers for discrete diffusion schedule a frame as speculative tokens, and clip it to the token budget and to
the longest sequence like any others. Every token of a frame sees the whole of it, so a part of one is of no use.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm.v1.core.sched.diffusion_scheduler import DiffusionAsyncScheduler, DiffusionScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from vllm_packcache.core.layout import CONDITION
from vllm_packcache.engine import forks
from vllm_packcache.engine.manager import RetentionManager, retention_managers
from vllm_packcache.families.lumos import CanvasRequest
from vllm_packcache.families.schedule import computed_passes


class _WholePictures(Scheduler):
    def _reserve_prefill_lookahead(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        """The tokens of ``request`` that a step computes: of its text as many as there is room for, or one picture.

        vLLM asks this last of all, for prefill chunks and for canvases; 0 leaves the request for another step.
        """
        managers = retention_managers(self.kv_cache_manager)
        for manager in managers:
            # Before the first blocks are allocated, which is by the request's name alone.
            manager.video(request)
        num_new_tokens = self._whole(managers, request, num_computed_tokens, num_new_tokens)
        for manager in managers:
            if manager.shared is not None and manager.shared.knows(request.request_id):
                manager.shared.enter(request.request_id, self._entered(manager, request, num_computed_tokens))
        return num_new_tokens

    def _whole(
        self, managers: Sequence[RetentionManager], request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        num_new_tokens = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        if num_new_tokens == 0:
            return 0
        made = managers[0].request(request)
        assert isinstance(made, CanvasRequest), "every request of such a model is one"
        if num_computed_tokens < made.text_tokens:
            return min(num_new_tokens, made.text_tokens - num_computed_tokens)
        picture = made.conditional.layout.tokens_per_frame
        if (num_computed_tokens - made.text_tokens) % picture:
            # Of a fork whose prompt another one has computed.
            return num_new_tokens
        if num_computed_tokens > request.num_tokens and self._awaits_ids(managers, request):
            return 0
        return picture if num_new_tokens >= picture else 0

    def _entered(self, manager: RetentionManager, request: Request, num_computed_tokens: int) -> int | None:
        """The frame that begins with the tokens behind ``num_computed_tokens``; None: none does."""
        video, made = manager.video(request), manager.request(request)
        assert isinstance(made, CanvasRequest), "every request of such a model is one"
        assert video is not None, "only of a video that goes on there are forks"
        layout = made.conditional.layout
        frame = layout.frame_of(num_computed_tokens)
        if frame == CONDITION or num_computed_tokens != layout.frame_start(frame):
            return None
        return None if num_computed_tokens >= request.num_tokens and video.passes else frame

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        """Whether ``request`` may be scheduled: a fork waits while another one computes what they have in common."""
        return super()._handle_blocked_waiting_request(request) and not forks.waits(
            retention_managers(self.kv_cache_manager), request
        )

    def _awaits_ids(self, managers: Sequence[RetentionManager], request: Request) -> bool:
        """Whether the pass in flight ends a frame, and the next one keeps what the ids of that frame say."""
        videos = [video for manager in managers if (video := manager.video(request)) is not None]
        return any(video.retention.policy.reads_tokens and video.passes == 0 for video in videos)

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        """Count the passes of frames, as the workers do."""
        super()._update_after_schedule(scheduler_output)
        managers = retention_managers(self.kv_cache_manager)
        for name in scheduler_output.scheduled_spec_decode_tokens:
            request = self.requests[name]
            made = managers[0].request(request)
            assert isinstance(made, CanvasRequest), "every request of such a model is one"
            steps = computed_passes(made.options, made.grid)
            for manager in managers:
                if (video := manager.video(request)) is not None:
                    video.passes = (video.passes + 1) % steps


class CanvasScheduler(_WholePictures, DiffusionScheduler):
    """A step at a time."""


class CanvasAsyncScheduler(_WholePictures, DiffusionAsyncScheduler):
    """A step ahead of the one in flight."""
