"""The KV cache manager that frees a video's frame blocks by the policy.

It decides nothing: `vllm_packcache.core.retention` does. It learns a request's layout when the request's first blocks
are allocated, caps prefix caching to the condition, and frees what the policy no longer keeps.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any

import numpy as np
from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.request import Request

from vllm_packcache.config.server import POLICY_FLAG, ServerConfig, is_video_key
from vllm_packcache.core.forks import FORKS
from vllm_packcache.core.layout import CONDITION, VideoLayout
from vllm_packcache.core.plan import Stream, Turn, VideoRequest
from vllm_packcache.core.policies.base import Int64
from vllm_packcache.core.positions import Positions
from vllm_packcache.core.retention import DECISIONS, SECOND_BLOCKS, Decision, PolicyError, Retention, Written
from vllm_packcache.core.session import Forgetting
from vllm_packcache.engine import forks
from vllm_packcache.engine.record import PHASES, VideoRecord
from vllm_packcache.engine.spec import RetentionSpec

logger = logging.getLogger("vllm.packcache")


@dataclass(slots=True)
class Totals:
    """What has happened since it was last taken, all requests together.

    Args:
        freed_blocks: by the policy.
        slides: frames by which windows have slid.
        rotated_blocks: whose keys have been rotated.
        preemptions: of videos.
        frame_seconds: how long each frame took that was made.
        ended: why each video ended that did.
        admitted: engine's ids of videos that hold blocks for the first time.
    """

    freed_blocks: int = 0
    slides: int = 0
    rotated_blocks: int = 0
    preemptions: int = 0
    frame_seconds: list[float] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    admitted: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        """Whether anything has happened."""
        return bool(
            self.freed_blocks
            or self.slides
            or self.rotated_blocks
            or self.preemptions
            or self.admitted
            or self.frame_seconds
            or self.ended
        )


@dataclass(slots=True)
class Held:
    """A stream of a video that holds blocks, or is about to.

    Args:
        stream: which it is.
        retention: what of it lives.
        record: outlives this when the request is preempted.
        most_blocks: that it holds at once; None: as many as its length takes.
        frame: up to which blocks have been freed.
        frame_ends: the request's token with which the next frame begins: before it, nothing is to be freed.
        quiet_until: the request's token up to which no more blocks are held, and no frame ends: nothing is to be told.
        decided: tokens, from the start, of which the policy has said what they read.
        passes: that have been scheduled of the frame being made, where frames are made in passes; those that compute
            nothing are not scheduled.
        blocks: logical blocks.
        dropped_blocks: how many of them the policy has freed.
    """

    stream: Stream
    retention: Retention
    record: VideoRecord
    most_blocks: int | None
    frame: int = CONDITION
    frame_ends: int = 0
    quiet_until: int = 0
    decided: int = 0
    passes: int = 0
    blocks: int = 0
    dropped_blocks: int = 0

    @property
    def positions(self) -> Positions:
        """Where its tokens are."""
        return self.stream.plan.positions

    @property
    def resident_blocks(self) -> int:
        """Blocks that it holds."""
        return self.blocks - self.dropped_blocks

    @property
    def phase(self) -> str:
        """One of `PHASES`."""
        return PHASES[2 if self._window_starts(self.frame) else 1 if self.dropped_blocks else 0]

    def enter(self, frame: int) -> None:
        """Blocks have been freed up to ``frame``."""
        self.frame = frame
        self.frame_ends = self.stream.start + self.retention.layout.frame_start(frame + 1)

    def forget(self, frames: int, gone: range) -> None:
        """Some old frames are not counted any more: see `vllm_packcache.core.session`."""
        self.retention.forget(frames, gone)
        self.decided -= frames * self.retention.layout.tokens_per_frame
        self.enter(self.frame - frames)
        self.blocks -= len(gone)
        # They had been freed.
        self.dropped_blocks -= len(gone)

    def slides(self, frame: int) -> int:
        """By how many frames the window moves on until ``frame`` is made."""
        return self._window_starts(frame) - self._window_starts(self.frame)

    def _window_starts(self, frame: int) -> int:
        window = self.retention.policy.history_window
        return 0 if window is None else max(0, frame - window)


_RECORD = "_packcache_record"
_REQUEST = "_packcache_request"
_MANAGERS = "_packcache_managers"
_UNKNOWN = object()
_FOR_EVER = sys.maxsize


def record_of(request: Request) -> VideoRecord | None:
    """The record of a video; None: the request is none, or has not been looked at."""
    return getattr(request, _RECORD, None)


class RetentionManager(FullAttentionManager):
    """Full attention's manager, with blocks freed by a policy.

    Requests without a layout are stock requests in every respect. Where videos may be guided, what vLLM asks of a
    guided one is handed on to the manager of its second stream; all others cost no more than a look-up.
    """

    def __init__(self, kv_cache_spec: RetentionSpec, *, enable_caching: bool, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, enable_caching=enable_caching, **kwargs)
        self._spec = kv_cache_spec
        self._config: ServerConfig = kv_cache_spec.server_config
        self.stream = kv_cache_spec.stream
        self.encodes = kv_cache_spec.encoding is not None
        self._tokens_ahead = kv_cache_spec.tokens_ahead
        self.frame_by_frame = kv_cache_spec.frame_by_frame
        self._prefix_caching = enable_caching
        # `cache_blocks` is the one call that brings the request, and the coordinator leaves it out for managers
        # without prefix caching. The block pool has its own switch and stores no hash when caching is off.
        self.enable_caching = True
        self._videos: dict[str, Held | None] = {}
        self._records: dict[str, VideoRecord] = {}
        self.settled: dict[str, int] = {}
        """Requests that decode, and the token of each up to which a step may go without asking any stream anything."""
        self.failures: dict[str, str] = {}
        """Requests that cannot go on, and why: the scheduler ends them."""
        self.decisions: dict[str, list[Decision]] = {}
        """Of requests whose policy reads tokens: what the workers have not been told yet."""
        self.totals = Totals()
        self.second: GuidanceManager | None = None
        self._guided: Collection[str] = ()
        if self._config.guidance and not isinstance(self, LaterStreamManager):
            self.second = GuidanceManager(self, kv_cache_spec, **kwargs)
            self._guided = self.second.requests
        self.shared = forks.SharedBlocks(self) if self._config.family.role == "canvas" else None
        self._announce(kv_cache_spec)

    def _announce(self, kv_cache_spec: RetentionSpec) -> None:
        blocks, streams = self.block_pool.num_gpu_blocks - 1, self._config.streams
        tokens = blocks * self.block_size
        logger.info(
            "%d KV-cache blocks of %d tokens: the longest video holds at most %d of them%s (text of its prompt not "
            "counted)%s",
            blocks,
            self.block_size,
            kv_cache_spec.most_blocks(tokens),
            f" in each of its {streams} streams" if streams > 1 else "",
            f", a request that keeps its whole cache ends at {tokens} tokens" if streams == 1 else "",
        )

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        """Blocks that the request needs for ``num_tokens`` tokens; at admission no more than it ever holds at once.

        The other parameters are vLLM's, and its answer is the one for fewer tokens.
        """
        beside = 0
        if request_id in self._guided:
            assert self.second is not None
            beside = self.second.get_num_blocks_to_allocate(
                request_id, num_tokens, self.second.found(request_id), 0, 0, num_tokens_main_model, apply_admission_cap
            )
        video = self._videos.get(request_id) if apply_admission_cap else None
        if video is not None and video.most_blocks is not None:
            # Blocks that the policy has freed still have their place in the request's list.
            num_tokens = min(num_tokens, (video.most_blocks + video.dropped_blocks) * self.block_size)
        if self.shared is not None and self.shared.knows(request_id):
            beside += self.shared.to_copy(request_id)
            num_tokens -= len(self.shared.found(request_id)) * self.block_size
        return beside + super().get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            new_computed_blocks,
            total_computed_tokens,
            num_local_computed_tokens,
            num_tokens_main_model,
            apply_admission_cap,
            prefill_end,
        )

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        """Allocate blocks for a request's first ``num_tokens`` tokens, in all its streams; those of this one."""
        if request_id in self._guided:
            assert self.second is not None
            self.second.allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
        if self.shared is not None and self.shared.knows(request_id):
            self.shared.take(request_id, num_tokens_main_model)
        return super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)

    def take_pending_cow_copies(self) -> list[tuple[KVCacheBlock, KVCacheBlock]]:
        """What vLLM has the workers copy before they run the step; both blocks are kept until then."""
        if self.shared is not None:
            self.shared.copies_are_taken()
        return super().take_pending_cow_copies()

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        """Learn the request's layout, and cache its prefix up to the end of the condition.

        What a frame's keys and values are depends on what its tokens could see, and a later frame's eviction
        would leave a hole: frames are no prefix to share. Nor are tokens that another layout would position otherwise.
        """
        name = request.request_id
        video: Any = self._videos.get(name, _UNKNOWN)
        if video is _UNKNOWN:
            video = self.video(request)
        if name in self._guided:
            assert self.second is not None
            self.second.cache_blocks(request, num_tokens, retention_interval, replay_boundaries=replay_boundaries)
        if video is not None or name in self._records:
            # A canvas holds blocks for tokens that are not counted yet.
            if video and num_tokens <= video.quiet_until and len(self.req_to_blocks[name]) == video.blocks:
                if self.stream == 0:
                    video.record.computed = num_tokens
                return
            num_tokens = self.own_tokens(name, num_tokens)
            self._record(request, video, num_tokens)
            if video is not None:
                num_tokens = min(num_tokens, video.positions.shared_tokens)
        # Blocks are known by hashes of the request's tokens, which are those of its first stream.
        if self._prefix_caching and self.stream == 0:
            super().cache_blocks(request, num_tokens, retention_interval, replay_boundaries=replay_boundaries)

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Free what no step that is still to come reads.

        Args:
            request_id: the request.
            processed_computed_tokens: computed tokens without those of steps in flight; those still read what
                their own frame could see.
            num_prompt_tokens: unused; part of vLLM's interface.
        """
        del num_prompt_tokens
        if request_id in self._guided:
            assert self.second is not None
            self.second.remove_skipped_blocks(request_id, processed_computed_tokens)
        video = self._videos.get(request_id)
        if video is None or processed_computed_tokens < video.frame_ends:
            return
        blocks = self.req_to_blocks.get(request_id)
        if not blocks or request_id in self.failures:
            return
        frame = video.retention.layout.frame_of(video.stream.own_tokens(processed_computed_tokens))
        try:
            indices = video.retention.dropped_blocks(video.frame, frame).tolist()
        except PolicyError as error:
            self.fail(request_id, str(error))
            return
        dropped: list[KVCacheBlock] = []
        for index in indices:
            dropped.append(blocks[index])
            blocks[index] = self._null_block
        self._count(video, frame, len(dropped))
        video.enter(frame)
        if self.stream == 0:
            video.record.phase = video.phase
        self.block_pool.free_blocks(reversed(dropped))

    def settled_until(self, request_id: str) -> int:
        """The request's token up to which it has been decided what this stream of a request that decodes reads."""
        video = self._videos.get(request_id)
        return _FOR_EVER if video is None else video.stream.start + video.decided

    def decide(self, request: Request, stop: int) -> None:
        """Ask the policy what the tokens before ``stop`` read, before a worker does: there it would not fail alone.

        Raises:
            PolicyError: it breaks its contract.
        """
        video = self.video(request)
        stop = self.own_tokens(request.request_id, stop)
        if video is None:
            return
        layout, retention = video.retention.layout, video.retention
        if self._config.family.role == "canvas" and retention.policy.reads_tokens:
            # With a pass in flight vLLM counts its frame as computed, whose ids come with the last of its passes.
            making = layout.frame_of(self.own_tokens(request.request_id, request.num_tokens))
            stop = min(stop, layout.frame_start(making + 1))
        if stop <= video.decided:
            return
        for frame in range(layout.frame_of(video.decided), layout.frame_of(stop - 1) + 1):
            past = retention.past(frame)
            video.decided = layout.frame_start(frame + 1)
            if retention.policy.reads_tokens and frame != CONDITION:
                self.decisions.setdefault(request.request_id, []).append(Decision(self.stream, frame, past))

    def resume(self, request: Request) -> None:
        """Another turn of a session begins, of which the workers know nothing yet but its blocks."""
        name = request.request_id
        if record := self._records.get(name):
            record.resume(request.num_prompt_tokens)
        video = self._videos.get(name)
        if video is not None:
            video.quiet_until = 0
            # What is read by the frame that the last turn was in has to be told again.
            frame = video.retention.layout.frame_of(video.stream.own_tokens(request.num_computed_tokens))
            video.decided = min(video.decided, video.retention.layout.frame_start(frame))

    def forgettable(self, request: Request, turn: Turn) -> range:
        """Logical blocks of the frames that a session forgets with ``turn``.

        Raises:
            PolicyError: they cannot be forgotten.
        """
        frames, first, video = turn.forget_frames, turn.forget_from, self._videos.get(request.request_id)
        forgetting = None if video is None else Forgetting(video.stream.plan, self.block_size)
        if video is None or forgetting is None or forgetting.step is None:
            raise PolicyError("a session that keeps everything forgets no frames")
        most = forgetting.most(
            video.retention.layout.frame_of(video.stream.own_tokens(request.num_computed_tokens)), first
        )
        if frames > most or frames % forgetting.step:
            raise PolicyError(
                f"{frames} frames cannot be forgotten by now: it must be {most} at most, and a multiple of "
                f"{forgetting.step}"
            )
        gone = forgetting.blocks(frames, first)
        if not all(
            block is self._null_block for block in self.req_to_blocks[request.request_id][gone.start : gone.stop]
        ):
            raise PolicyError(f"{frames} frames from {first} on cannot be forgotten: blocks of theirs live")
        return gone

    def forget(self, request: Request, frames: int, gone: range) -> None:
        """Leave ``frames`` old frames of a session out of the block table: see `forgettable`."""
        video = self._videos[request.request_id]
        assert video is not None, "only what a video keeps is forgotten"
        del self.req_to_blocks[request.request_id][gone.start : gone.stop]
        if self.stream == 0:
            video.record.forgotten_frames += frames
        video.forget(frames, gone)

    def take_decisions(self, request: Request) -> list[Decision]:
        """What the workers must be told of a request by now: what its tokens read that have been scheduled.

        A request that found no room may come back with a shorter chunk than has been decided about. What workers hear
        too early they could forget before it is read.
        """
        name = request.request_id
        video, decisions = self.video(request), self.decisions.pop(name)
        assert video is not None, "only of a video anything is decided"
        last = video.retention.layout.frame_of(self.own_tokens(name, request.num_computed_tokens) - 1)
        later = [decision for decision in decisions if decision.frame > last]
        if later:
            self.decisions[name] = later
        return decisions[: len(decisions) - len(later)]

    def own_tokens(self, request_id: str, tokens: int) -> int:
        """How many of a request's first ``tokens`` tokens are in this KV cache group."""
        del request_id
        return tokens

    def needed_blocks(self, request: Request) -> int:
        """Blocks that the request holds when all tokens that it has so far are computed."""
        video = self.video(request)
        blocks = -(-self.own_tokens(request.request_id, request.num_tokens) // self.block_size)
        return blocks if video is None or video.most_blocks is None else min(blocks, video.most_blocks)

    def fail(self, request_id: str, why: str) -> None:
        """The request cannot go on."""
        if request_id in self.failures:
            return
        _log_end(request_id, why)
        self.settled.pop(request_id, None)
        self.failures[request_id] = why

    def chunk_ends(self, request: Request, computed: int) -> int | None:
        """The token of ``request`` up to which it may be computed in one step from ``computed`` on; None: to its end.

        See `bound_chunks`.
        """
        video = self.video(request)
        if video is None:
            return None
        own = video.stream.own_tokens(computed)
        processed = video.stream.own_tokens(max(0, computed - request.num_in_flight_tokens))
        ends = [video.positions.next_slide(own), self._room_ends(video, processed)]
        if self.frame_by_frame:
            layout = video.retention.layout
            ends.append(layout.frame_start(layout.frame_of(own) + 1))
        return min((end + video.stream.start for end in ends if end is not None), default=None)

    def _room_ends(self, video: Held, processed: int) -> int | None:
        """The token up to which ``video`` may be computed while ``processed`` tokens have been; None: to its end."""
        if video.most_blocks is None:
            return None
        frame = video.retention.layout.frame_of(processed)
        start = 0 if frame == CONDITION else video.retention.blocks.tail_start(frame) - len(video.retention.past(frame))
        # Tokens that are decoded while this chunk is in flight have their room too.
        return (start + video.most_blocks) * self.block_size - self._tokens_ahead

    def _count(self, video: Held, frame: int, freed: int) -> None:
        slides = video.slides(frame)
        video.dropped_blocks += freed
        video.record.free(self.kv_cache_group_id, freed)
        self.totals.freed_blocks += freed
        self.totals.slides += slides
        if slides and video.positions.window is not None:
            self.totals.rotated_blocks += slides * len(video.retention.sliding_blocks(frame))

    def _record(self, request: Request, video: Held | None, num_tokens: int) -> None:
        """Keep account of a video that has blocks for ``num_tokens`` tokens."""
        record = self._records.get(request.request_id)
        if record is None:
            return
        blocks = len(self.req_to_blocks[request.request_id])
        layout = record.layout
        if video is not None:
            video.blocks, blocks, layout = blocks, blocks - video.dropped_blocks, video.retention.layout
        frame = self._frame_in_the_making(layout, num_tokens)
        if self.stream == 0 and record.peak_blocks == 0:
            self.totals.admitted.append(request.request_id)
        record.hold(self.kv_cache_group_id, blocks, frame)
        if self.stream == 0:
            self.totals.frame_seconds += record.compute(num_tokens, frame, time.monotonic())
        if video is not None and num_tokens >= record.prompt_tokens:
            # A prompt is cached as a prefix as it is computed, and frames are made from its end on.
            ends = min(layout.frame_start(frame + 1) - 1, video.blocks * self.block_size)
            video.quiet_until = video.stream.start + ends

    def _frame_in_the_making(self, layout: VideoLayout, num_tokens: int) -> int:
        """The frame of the last of ``num_tokens`` tokens, or `CONDITION`; of a canvas the one behind them.

        A canvas counts when it is finished: before, its tokens are speculative ones.
        """
        return layout.frame_of(num_tokens if self._config.family.role == "canvas" else num_tokens - 1)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """The request's blocks; it finished, was aborted or preempted, and starts anew if it comes back."""
        self._videos.pop(request_id, None)
        self.settled.pop(request_id, None)
        self.decisions.pop(request_id, None)
        self.failures.pop(request_id, None)
        if self.shared is not None:
            self.shared.forget(request_id)
        record = self._records.pop(request_id, None)
        if record is not None:
            record.let_go(self.kv_cache_group_id)
        blocks = super().pop_blocks_for_free(request_id)
        if request_id in self._guided:
            assert self.second is not None
            blocks += self.second.pop_blocks_for_free(request_id)
        return blocks

    def take_totals(self) -> Totals:
        """What has happened since this was last called."""
        taken, self.totals = self.totals, Totals()
        return taken

    def videos(self) -> list[Held]:
        """Videos that hold blocks or are about to."""
        return [video for video in self._videos.values() if video is not None]

    def running(self) -> list[VideoRecord]:
        """Of videos that hold blocks, those that keep their whole cache included."""
        return [record for record in self._records.values() if record.held]

    def video(self, request: Request) -> Held | None:
        """What is known of ``request``; None: it keeps its whole cache, or cannot go on (see `failures`)."""
        name = request.request_id
        if name not in self._videos:
            self._videos[name] = None
            try:
                self._videos[name] = self._new_video(request)
            # A policy may raise anything, and no request may take others with it.
            except Exception as error:
                self.fail(name, " ".join(str(error).split()) or repr(error))
        return self._videos[name]

    def _new_video(self, request: Request) -> Held | None:
        made = self.request(request)
        if made is None or self.stream >= len(made.streams):
            return None
        stream = made.streams[self.stream]
        plan = stream.plan
        record = record_of(request) or VideoRecord(plan.layout, self.block_size, request.num_prompt_tokens)
        setattr(request, _RECORD, record)
        self._records[request.request_id] = record
        if made.as_stock:
            return None
        tokens = partial(_tokens_of, request, stream) if plan.policy.reads_tokens else None
        retention = self._spec.retention_of(plan.layout, plan.policy, tokens)
        most = retention.most_blocks(self._tokens_ahead)
        if most is None and self._spec.encoding is not None:
            # Such a request says how long it will be, and no turn makes it longer.
            total = stream.own_tokens(request.num_prompt_tokens + request.max_tokens)
            most = retention.most_of(total, self._tokens_ahead)
        held = Held(stream, retention, record, most)
        held.enter(CONDITION)
        record.phase = held.phase
        if self.second is not None and len(made.streams) > 1:
            self.second.begin(request)
        if self.shared is not None and forks.family_of(request) is not None:
            self.shared.begin(request)
        return held

    def request(self, request: Request) -> VideoRequest | None:
        """What ``request`` makes; None: it is no video. Worked out once, for the managers of all streams.

        Raises:
            ConfigError: where no front end has checked it.
        """
        if not hasattr(request, _REQUEST):
            token_ids = request.prompt_token_ids
            made = self._config.request_of(request.sampling_params, token_ids, request.num_prompt_tokens)
            setattr(request, _REQUEST, made)
        return getattr(request, _REQUEST)


class LaterStreamManager(RetentionManager):
    """Of a stream that begins later than the request, in whose tokens vLLM counts. Many requests have none."""

    def _announce(self, kv_cache_spec: RetentionSpec) -> None:
        """The manager of the first stream says it."""

    def own_tokens(self, request_id: str, tokens: int) -> int:
        """See `RetentionManager.own_tokens`; none, where the request has no such stream."""
        video = self._videos.get(request_id)
        return 0 if video is None else video.stream.own_tokens(tokens)

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> int:
        """See `RetentionManager.get_num_blocks_to_allocate`."""
        return super().get_num_blocks_to_allocate(request_id, self.own_tokens(request_id, num_tokens), *args, **kwargs)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        """Allocate the blocks of this stream for a request's first ``num_tokens`` tokens."""
        return super().allocate_new_blocks(
            request_id, self.own_tokens(request_id, num_tokens), self.own_tokens(request_id, num_tokens_main_model)
        )


class GuidanceManager(LaterStreamManager):
    """Of second streams of guided requests to a causal model: the same layers, in blocks of their own.

    vLLM does not know of it. Blocks are of one pool, and a block is a place in every layer's cache: rows of second
    streams go through the layers with the blocks that this manager holds. What vLLM asks, the first stream's manager
    hands on; requests that are not guided are unknown here. The workers are told its blocks as they are told decisions.

    Blocks of a request's own condition are known by vLLM's hashes of its ids, as those of a prompt, and are found by
    second streams alone: first ones are run before them in a step, and would read what is not there yet.

    Args:
        first: the first stream's manager.
        kv_cache_spec: that one's.
        kwargs: the other arguments of that one.
    """

    def __init__(self, first: RetentionManager, kv_cache_spec: RetentionSpec, **kwargs: Any) -> None:
        # What is cached otherwise has hashes of the request's tokens, which are those of its first stream.
        super().__init__(kv_cache_spec, enable_caching=False, **kwargs)
        self.stream = 1
        # Accounts of a request's blocks are by group, and so are hashes.
        self.kv_cache_group_id = first.kv_cache_group_id + 1
        self._told: dict[str, int] = {}
        # Who listens to what is cached knows of no such group.
        self._shares = first._prefix_caching and not self.block_pool.enable_kv_cache_events
        self._conditions: dict[str, Request] = {}
        self._found: dict[str, Sequence[KVCacheBlock]] = {}
        self._found_tokens: dict[str, int] = {}

    @property
    def requests(self) -> Collection[str]:
        """Names of those that are guided, and hold blocks or are about to."""
        return self._videos

    def begin(self, request: Request) -> None:
        """A guided request comes."""
        name = request.request_id
        held = self._videos[name] = self._new_video(request)
        if held is not None and self._shares:
            self._conditions[name] = Request(
                name,
                list(held.stream.condition),
                request.sampling_params,
                None,
                cache_salt=request.cache_salt,
                block_hasher=request._block_hasher,
            )

    def look_up(self, request: Request) -> None:
        """See what the prefix cache has of a request's own condition: blocks that are allocated next are beside it.

        A token of it is left to be computed with the last one of the first stream's condition: what a step computes of
        a stream is of one frame.
        """
        name = request.request_id
        condition, video = self._conditions.get(name), self._videos.get(name)
        if condition is None or video is None:
            return
        (self._found[name],), _ = self.find_longest_cache_hit(
            condition.block_hashes,
            min(video.positions.shared_tokens, condition.num_tokens - 1),
            [self.kv_cache_group_id],
            self.block_pool,
            self.kv_cache_spec,
            drop_eagle_block=False,
            alignment_tokens=self.block_size,
            dcp_world_size=self.dcp_world_size,
            pcp_world_size=self.pcp_world_size,
        )

    def found(self, request_id: str) -> Sequence[KVCacheBlock]:
        """Blocks that a request has found, until it has them."""
        return self._found.get(request_id, ())

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        """See `LaterStreamManager.allocate_new_blocks`; what has been found is the request's from now on."""
        if found := self._found.pop(request_id, ()):
            # Before any block is taken, which might be one of these.
            self.add_local_computed_blocks(request_id, found, 0, 0)
            self._found_tokens[request_id] = len(found) * self.block_size
        blocks = super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
        self._share(request_id, self.own_tokens(request_id, num_tokens_main_model))
        return blocks

    def _share(self, request_id: str, tokens: int) -> None:
        """Have others find whole blocks of a condition, of which ``tokens`` are computed when this step has run."""
        condition, video = self._conditions.get(request_id), self._videos.get(request_id)
        if condition is None or video is None:
            return
        whole = min(tokens, video.positions.shared_tokens) // self.block_size
        known = self.num_cached_block.get(request_id, 0)
        if known < whole:
            self.block_pool.cache_full_blocks(
                request=condition,
                blocks=self.req_to_blocks[request_id],
                num_cached_blocks=known,
                num_full_blocks=whole,
                block_size=self.block_size,
                kv_cache_group_id=self.kv_cache_group_id,
            )
            self.num_cached_block[request_id] = whole

    def video(self, request: Request) -> Held | None:
        """What is known of ``request``; None: it is not guided."""
        return self._videos.get(request.request_id)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """See `RetentionManager.pop_blocks_for_free`."""
        for known in (self._told, self._conditions, self._found, self._found_tokens):
            known.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    def take_written(self, output: SchedulerOutput) -> dict[str, Written]:
        """What a step changes in block tables of second streams; of requests that workers begin anew, all of them."""
        written: dict[str, Written] = {}
        anew = {new.req_id for new in output.scheduled_new_reqs}
        for name in self._videos:
            if name not in output.num_scheduled_tokens:
                continue
            blocks = self.req_to_blocks[name]
            start = 0 if name in anew else self._told.get(name, 0)
            if start < len(blocks):
                found = self._found_tokens.pop(name, 0)
                written[name] = Written(start, [block.block_id for block in blocks[start:]], found)
            self._told[name] = len(blocks)
        return written


def cap_prefix_hits(get_computed_blocks: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``KVCacheManager.get_computed_blocks``: a video's prefix hit ends with its condition.

    Another request, without a layout or with its whole cache kept, may have cached the same tokens beyond it;
    their keys and values saw more than this request's policy lets them see.

    What a guided video finds of the condition of its second stream does not depend on that.
    """

    @wraps(get_computed_blocks)
    def wrapper(manager: KVCacheManager, request: Request, *args: Any, **kwargs: Any) -> tuple[KVCacheBlocks, int, int]:
        blocks, num_tokens, shared_prefix_boundary = get_computed_blocks(manager, request, *args, **kwargs)
        retaining = retention_manager(manager)
        second = None if retaining is None else retaining.second
        video = None
        if retaining is not None and (num_tokens > 0 or second is not None):
            video = retaining.video(request)
        if second is not None and manager.prefix_cache_lookup_enabled(request):
            second.look_up(request)
        most = 0 if video is None else _most_shared(manager, request, video)
        if video is not None and num_tokens > most:
            block_size = video.retention.block_size
            num_tokens = most // block_size * block_size
            blocks = manager.truncate_computed_blocks(blocks, num_tokens)
        if retaining is not None and retaining.shared is not None:
            # It gets the blocks themselves when slots are allocated.
            num_tokens = forks.find(retention_managers(manager), request)
        return blocks, num_tokens, shared_prefix_boundary

    return wrapper


def _most_shared(manager: KVCacheManager, request: Request, video: Held) -> int:
    """Tokens of a video that a prefix hit may have at most.

    What a second causal stream has not found of its condition is computed with the first chunk. These tokens must be of
    one frame as those of the first stream are, so a token of the condition is left to it.
    """
    shared = video.positions.shared_tokens
    guided = any(other.video(request) is not None for other in retention_managers(manager)[1:])
    return min(shared, video.retention.layout.condition_tokens - 1) if guided else shared


def bound_chunks(reserve_prefill_lookahead: Callable[..., int]) -> Callable[..., int]:
    """Wrap ``Scheduler._reserve_prefill_lookahead``, which has the last word on where a prefill chunk ends.

    A chunk of a video ends where its blocks would be more than the policy lets it hold: a video that is recomputed
    after a preemption takes no more room than it did before. It also ends where the window slides, because then cached
    keys move, and a cache is in one state while a step runs. Where the spec says so it ends with its frame: the rows of
    a step are those of its requests, as captured graphs and the buffers of GPU backends have them.
    """

    @wraps(reserve_prefill_lookahead)
    def wrapper(scheduler: Scheduler, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        num_new_tokens = reserve_prefill_lookahead(scheduler, request, num_computed_tokens, num_new_tokens)
        managers = retention_managers(scheduler.kv_cache_manager)
        if not managers:
            return 0 if _end_if_misdirected(scheduler, request) else num_new_tokens
        name, stop = request.request_id, num_computed_tokens + num_new_tokens
        if stop <= managers[0].settled.get(name, 0):
            return num_new_tokens
        # While it decodes there is no more than one token, and nothing to end.
        decodes = request.num_tokens - num_computed_tokens <= 1
        try:
            if not decodes:
                _check_room(managers, request)
                for end in [manager.chunk_ends(request, num_computed_tokens) for manager in managers]:
                    if end is not None:
                        num_new_tokens = max(0, min(num_new_tokens, end - num_computed_tokens))
            for manager in managers:
                manager.decide(request, num_computed_tokens + num_new_tokens)
        except PolicyError as error:
            managers[0].fail(name, str(error))
        if any(name in manager.failures for manager in managers):
            # Nothing of it is scheduled, and when the step has run vLLM ends these with an error.
            scheduler.grammar_compile_error_reqs.add(name)
            return 0
        if decodes:
            managers[0].settled[name] = min(manager.settled_until(name) for manager in managers)
        return num_new_tokens

    return wrapper


def resume_sessions(update_request_as_session: Callable[..., None]) -> Callable[..., None]:
    """Wrap ``Scheduler._update_request_as_session``, which appends another turn to a session that waits for it."""

    @wraps(update_request_as_session)
    def wrapper(scheduler: Scheduler, session: Request, update: Any) -> None:
        update_request_as_session(scheduler, session, update)
        managers = retention_managers(scheduler.kv_cache_manager)
        try:
            _resume(managers, session)
        # A request may say anything, and none may take others with it.
        except Exception as error:
            managers[0].fail(session.request_id, " ".join(str(error).split()) or repr(error))

    return wrapper


def _resume(managers: Sequence[RetentionManager], request: Request) -> None:
    """Another turn of a session begins, in all its streams.

    Raises:
        PolicyError: the turn contradicts those before it.
    """
    name, before = request.request_id, getattr(request, _REQUEST, None)
    for manager in managers:
        manager.settled.pop(name, None)
    if before is None or any(name in manager.failures for manager in managers):
        return
    delattr(request, _REQUEST)
    made = managers[0].request(request)
    if made is None or made.turn is None or made.streams != before.streams:
        raise PolicyError("a turn of a session must say of its video what the first one said")
    if made.turn.forget_frames:
        _forget(managers[: len(made.streams)], request, made.turn, made.streams[0].plan.layout)
    for manager in managers:
        manager.resume(request)


def _forget(managers: Sequence[RetentionManager], request: Request, turn: Turn, layout: VideoLayout) -> None:
    """Leave old frames of a session out of its sequence, and out of the block tables of its streams.

    Raises:
        PolicyError: they cannot be forgotten, and nothing has been.
    """
    gone = [manager.forgettable(request, turn) for manager in managers]
    start, tokens = layout.frame_start(turn.forget_from), turn.forget_frames * layout.tokens_per_frame
    assert request.prompt_token_ids is not None
    for ids in (request.prompt_token_ids, request._all_token_ids):
        del ids[start : start + tokens]
    request.num_prompt_tokens -= tokens
    request.num_computed_tokens -= tokens
    # Those of the condition stay. Hashes of frames are never looked up, but there must be one of every block.
    del request.block_hashes[layout.condition_tokens // managers[0].block_pool.hash_block_size :]
    request.update_block_hashes()
    for manager, blocks in zip(managers, gone, strict=True):
        manager.forget(request, turn.forget_frames, blocks)


def end_turns(handle_stopped_request: Callable[..., bool]) -> Callable[..., bool]:
    """Wrap ``Scheduler._handle_stopped_request``: where a turn ends, the time that its frame took does too."""

    @wraps(handle_stopped_request)
    def wrapper(scheduler: Scheduler, request: Request) -> bool:
        record = record_of(request) if request.resumable else None
        manager = retention_manager(scheduler.kv_cache_manager)
        if record is not None and manager is not None:
            manager.totals.frame_seconds += record.pause(time.monotonic())
        return handle_stopped_request(scheduler, request)

    return wrapper


def tell_workers(schedule: Callable[..., SchedulerOutput]) -> Callable[..., SchedulerOutput]:
    """Wrap ``Scheduler.schedule``: the step says what lives of videos whose policy reads tokens, where it changes.

    Sessions come before all others: somebody waits for their next frame, and the last to run is the first to be
    preempted. A session comes to the end with every turn, and what it has forgotten cannot be computed again.
    """

    @wraps(schedule)
    def wrapper(scheduler: Scheduler, *args: Any, **kwargs: Any) -> SchedulerOutput:
        if any(request.resumable for request in scheduler.running):
            scheduler.running.sort(key=_comes_later)
        output = schedule(scheduler, *args, **kwargs)
        told: dict[str, list[Decision]] = {}
        managers = retention_managers(scheduler.kv_cache_manager)
        for manager in managers:
            for name in [name for name in manager.decisions if name in output.num_scheduled_tokens]:
                told.setdefault(name, []).extend(manager.take_decisions(scheduler.requests[name]))
        if told:
            setattr(output, DECISIONS, told)
        second = managers[0].second if managers else None
        if second is not None and second.requests and (written := second.take_written(output)):
            setattr(output, SECOND_BLOCKS, written)
        if forked := forks.take_forked(managers, output):
            setattr(output, FORKS, forked)
        return output

    return wrapper


def _comes_later(request: Request) -> bool:
    return not request.resumable


def _tokens_of(request: Request, stream: Stream, start: int, stop: int) -> Int64:
    """Ids of the tokens ``[start, stop)`` of a stream."""
    ids = stream.ids(request.all_token_ids, start, stop)
    if len(ids) < stop - start:
        raise PolicyError(f"token {stream.start + start + len(ids)} is not known yet, and the policy reads it")
    return np.array(ids, dtype=np.int64)


def _log_end(request_id: str, why: str) -> None:
    logger.error("Request %s is ended with an error: %s", request_id, why)


def _end_if_misdirected(scheduler: Scheduler, request: Request) -> bool:
    """End a video that has come to an engine without a policy with an error; whether this is one.

    The front end refuses it, unless it has a policy itself: then the engine's node was started without.
    """
    options = request.sampling_params.extra_args if request.sampling_params is not None else None
    if not options or request.num_output_tokens or not any(map(is_video_key, options)):
        return False
    if request.request_id not in scheduler.grammar_compile_error_reqs:
        _log_end(
            request.request_id,
            f"it is a video, and this engine was started without {POLICY_FLAG}: start every node with the same flags",
        )
        scheduler.grammar_compile_error_reqs.add(request.request_id)
    return True


def _check_room(managers: Sequence[RetentionManager], request: Request) -> None:
    """Where no front end has checked it, a request without room would wait for ever, and those behind it with it."""
    pool = managers[0].block_pool.num_gpu_blocks - 1
    needed = sum(manager.needed_blocks(request) for manager in managers)
    if needed > pool:
        managers[0].fail(request.request_id, f"it holds {needed} blocks, and the KV cache has {pool}")


def retention_managers(manager: KVCacheManager) -> tuple[RetentionManager, ...]:
    """The managers that obey a policy, by the number of their stream; none: the policy is not switched on."""
    found: tuple[RetentionManager, ...] | None = getattr(manager, _MANAGERS, None)
    if found is None:
        own = [each for each in manager.coordinator.single_type_managers if isinstance(each, RetentionManager)]
        own += [each.second for each in own if each.second is not None]
        found = tuple(sorted(own, key=lambda each: each.stream))
        for later in found[1:]:
            # Of requests, not of their streams: where one fails, what has been settled is not.
            later.settled = found[0].settled
        # They are made with it, and it is asked for with every request in every step.
        setattr(manager, _MANAGERS, found)
    return found


def retention_manager(manager: KVCacheManager) -> RetentionManager | None:
    """The first of `retention_managers`."""
    return next(iter(retention_managers(manager)), None)
