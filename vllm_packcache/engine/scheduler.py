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
        num_new_tokens = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        if num_new_tokens == 0:
            return 0
        made = managers[0].request(request)
        assert isinstance(made, CanvasRequest), "every request of such a model is one"
        if num_computed_tokens < made.text_tokens:
            return min(num_new_tokens, made.text_tokens - num_computed_tokens)
        picture = made.conditional.layout.tokens_per_frame
        if num_computed_tokens > request.num_tokens and self._awaits_ids(managers, request):
            return 0
        return picture if num_new_tokens >= picture else 0

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
