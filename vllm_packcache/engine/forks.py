"""Forks: several videos of one request hold what they have in common once, and copy what one of them writes.

The videos of a request (``n``) have one prompt and one plan, and differ in their seed. What is computed of the prompt
is the same for all: the first one that runs computes it, the others wait for it, and then have its blocks in their own
block tables. References are counted by the block pool, so whoever drops a block leaves it to the others.

A frame that is entered writes to blocks of the past in two ways: where its window slides, cached keys are turned in
place; and where it begins within a block, its own keys come behind the last ones of the past. A block that others hold
too is copied before that, with vLLM's own copies of blocks: they run in a step before anything else does. So how many
are copied is known before slots are allocated, and counts as what is needed: where there is no room others are
preempted, as ever, and whoever is left alone shares nothing and copies nothing.

What was computed may be shared at two places: behind the whole prompt, while the window has not slid since; and behind
the condition, which is never turned. A video that comes later, or comes back, finds whichever there is. Where older
frames are encoded in place, nothing is shared: blocks are written to, and freed, before those who write them have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from vllm_packcache.core.forks import FORK_OPTION, Forked, Replaced
from vllm_packcache.core.layout import CONDITION
from vllm_packcache.core.retention import PolicyError
from vllm_packcache.families.lumos import CanvasRequest

if TYPE_CHECKING:
    from vllm_packcache.engine.manager import Held, RetentionManager


class Found(NamedTuple):
    """What a stream of a fork has in common with that of another one.

    Attributes:
        frame: the first that it computes itself.
        blocks: of the tokens before; null blocks in place of those that this frame does not read.
    """

    frame: int
    blocks: list[KVCacheBlock]


def family_of(request: Request) -> str | None:
    """The request whose videos ``request`` is one of; None: it is the only one."""
    params = request.sampling_params
    options = None if params is None else params.extra_args
    return (options or {}).get(FORK_OPTION) or None


class SharedBlocks:
    """The blocks of one stream that several videos hold.

    Args:
        manager: of the stream.
    """

    def __init__(self, manager: RetentionManager) -> None:
        self._manager = manager
        self._forks: dict[str, Request] = {}
        # By name of the request: what it enters with the step being scheduled, has entered, and has computed.
        self._entering: dict[str, int] = {}
        self._entered: dict[str, int] = {}
        self._reached: dict[str, int] = {}
        self._found: dict[str, Found] = {}
        self._tokens: dict[str, int] = {}
        self._replaced: dict[str, list[int]] = {}
        # Of the step being scheduled: references that wait for their copy, and what each copy is of.
        self._awaiting: Counter[int] = Counter()
        self._sources: dict[int, KVCacheBlock] = {}

    def begin(self, request: Request) -> None:
        """A fork comes, or comes back."""
        self._forks[request.request_id] = request

    def forget(self, name: str) -> None:
        """It ended, or was preempted."""
        known: tuple[dict[str, Any], ...] = (
            self._forks,
            self._entering,
            self._entered,
            self._reached,
            self._found,
            self._tokens,
            self._replaced,
        )
        for own in known:
            own.pop(name, None)

    def knows(self, name: str) -> bool:
        """Whether the request is a fork."""
        return name in self._forks

    def others(self, request: Request) -> list[Request]:
        """Videos of the same request that hold blocks."""
        family = family_of(request)
        blocks = self._manager.req_to_blocks
        return [
            other
            for name, other in self._forks.items()
            if name != request.request_id and blocks.get(name) and family_of(other) == family
        ]

    def reached(self, name: str) -> int:
        """Tokens of a request that have been computed, or are in a step that is scheduled."""
        return self._reached.get(name, 0)

    def enter(self, name: str, frame: int | None) -> None:
        """The step being scheduled is the first of ``frame``; None: it is another one."""
        self._entering.pop(name, None)
        if frame is not None:
            self._entering[name] = frame

    def blocks_before(self, video: Held, donor: str, frame: int) -> list[KVCacheBlock] | None:
        """Blocks of another video's, of all tokens before ``frame``, as ``frame`` reads them; None: they are gone.

        Raises:
            PolicyError: the policy breaks its contract.
        """
        retention, positions = video.retention, video.positions
        start = retention.layout.frame_start(frame)
        blocks = self._manager.req_to_blocks[donor][: -(-start // retention.block_size)]
        if self.reached(donor) < start:
            return None
        entered = self._entered.get(donor, CONDITION)
        if frame > 0 and positions.window_start(entered) != positions.window_start(frame - 1):
            # Keys of its history have been turned on.
            return None
        read = retention.past(frame)
        if start % retention.block_size:
            read = np.append(read, retention.blocks.tail_start(frame))
        kept = [self._manager._null_block] * len(blocks)
        for index in read.tolist():
            if blocks[index].is_null:
                return None
            kept[index] = blocks[index]
        return kept

    def find(self, name: str, found: Found | None, tokens: int = 0) -> None:
        """What the request has in common with another one: it is given to it when slots are allocated."""
        self._found.pop(name, None)
        self._tokens.pop(name, None)
        if found is not None:
            self._found[name], self._tokens[name] = found, tokens

    def found(self, name: str) -> Sequence[KVCacheBlock]:
        """What it has in common with another one, and has not been given yet."""
        found = self._found.get(name)
        return () if found is None else found.blocks

    def to_copy(self, name: str) -> int:
        """Blocks that the request needs because it is about to write to what others hold too."""
        return len(self._written(name))

    def _written(self, name: str) -> list[int]:
        """Logical blocks that others hold too, and the frame being entered writes to."""
        video, frame = self._manager._videos.get(name), self._entering.get(name)
        if video is None or frame is None:
            return []
        retention, start = video.retention, video.retention.layout.frame_start(frame)
        written = set(retention.sliding_blocks(frame).tolist()) if video.positions.slides(start) else set()
        if start % retention.block_size:
            written.add(retention.blocks.tail_start(frame))
        found = self._found.get(name)
        blocks = self._manager.req_to_blocks.get(name, []) if found is None else found.blocks
        return sorted(
            index
            for index in written
            if index < len(blocks)
            and not blocks[index].is_null
            and (found is not None or self._held(blocks[index]) > 1)
        )

    def _held(self, block: KVCacheBlock) -> int:
        return block.ref_cnt - self._awaiting[block.block_id]

    def take(self, name: str, tokens: int) -> None:
        """Slots are allocated: the request gets what it has in common with another one, and copies what it writes to.

        Args:
            name: of the request.
            tokens: that are computed of the stream when the step being scheduled has run.
        """
        self._reached[name] = tokens
        self._share(name)
        self._copy(name)
        frame = self._entering.pop(name, None)
        if frame is not None:
            self._entered[name] = frame

    def _share(self, name: str) -> None:
        found, video = self._found.get(name), self._manager._videos.get(name)
        if found is None or video is None:
            return
        self._manager.block_pool.touch([block for block in found.blocks if not block.is_null])
        blocks = self._manager.req_to_blocks[name]
        assert not blocks, "a fork has blocks of others before it has its own"
        blocks += found.blocks
        video.enter(found.frame)
        video.dropped_blocks = sum(block.is_null for block in blocks)
        if found.frame > 0:
            # It is as if it had entered the frame before.
            self._entered[name] = found.frame - 1

    def _copy(self, name: str) -> None:
        written, pool = self._written(name), self._manager.block_pool
        # Once it has its blocks, others may have copied theirs.
        self._found.pop(name, None)
        blocks = self._manager.req_to_blocks[name]
        for index in written:
            block = blocks[index]
            if self._held(block) <= 1:
                continue
            source = self._sources.get(block.block_id)
            if source is not None:
                # It is a copy itself, which is made in this step.
                pool.touch([source])
                pool.free_blocks([block])
                blocks[index] = source
                block = source
            (copy,) = pool.get_new_blocks(1)
            self._manager._apply_cow(name, index, block, copy)
            self._awaiting[block.block_id] += 1
            self._sources[copy.block_id] = block
            self._replaced.setdefault(name, []).append(index)

    def copies_are_taken(self) -> None:
        """The step has been scheduled, and the workers are told what to copy."""
        self._awaiting.clear()
        self._sources.clear()

    def told(self, name: str) -> int:
        """Tokens of the request that others have computed, as the workers have not been told yet; 0: none."""
        return self._tokens.pop(name, 0)

    def replaced(self, name: str) -> Replaced | None:
        """What has changed of its block table."""
        indices = self._replaced.pop(name, None)
        if not indices:
            return None
        first, last = min(indices), max(indices)
        blocks = self._manager.req_to_blocks[name][first : last + 1]
        return Replaced(self._manager.stream, first, [block.block_id for block in blocks])

    @property
    def saved_blocks(self) -> int:
        """By how many the blocks that there are fall short of those that all forks together hold."""
        held: Counter[int] = Counter()
        for name, request in self._forks.items():
            video = self._manager._videos.get(name)
            if video is not None:
                prompt = -(-video.stream.own_tokens(request.num_prompt_tokens) // self._manager.block_size)
                shared = self._manager.req_to_blocks.get(name, [])[:prompt]
                held.update(block.block_id for block in shared if not block.is_null)
        return held.total() - len(held)


def waits(managers: Sequence[RetentionManager], request: Request) -> bool:
    """Whether a fork that holds no blocks waits for what another one of its request computes in this step, or later."""
    shared = managers[0].shared if managers else None
    if shared is None or family_of(request) is None:
        return False
    prompt = request.num_prompt_tokens
    for other in shared.others(request):
        if shared.reached(other.request_id) < prompt:
            return True
        # What a step copies is what it found, so who writes at once comes a step later than who writes in the next one.
        if other.num_computed_tokens < prompt < request.num_tokens:
            return True
    return False


def find(managers: Sequence[RetentionManager], request: Request) -> int:
    """Look for what a fork has in common with others that run; how many tokens of it need not be computed.

    A step computes a token at least. A fork that has nothing to compute but its frames has a step for its prompt's last
    token, in which the workers do nothing for it.
    """
    if family_of(request) is None:
        return 0
    name, made = request.request_id, managers[0].request(request)
    streams = [
        (each.shared, video)
        for each in managers
        if each.shared is not None and (video := each.video(request)) is not None
    ]
    for shared, _ in streams:
        shared.find(name, None)
    if not streams or not isinstance(made, CanvasRequest) or any(name in manager.failures for manager in managers):
        return 0
    layout = made.conditional.layout
    given = (request.num_prompt_tokens - layout.condition_tokens) // layout.tokens_per_frame
    # A frame that is encoded is written over while others read it as it was: then they have the condition in common.
    places = (0,) if managers[0].encodes else (given, 0)
    for frame in dict.fromkeys(places):
        for other in streams[0][0].others(request):
            try:
                blocks = [shared.blocks_before(video, other.request_id, frame) for shared, video in streams]
            except PolicyError:
                # The policy is asked once more before anything is scheduled, and then the request fails.
                return 0
            all_of_them = [own for own in blocks if own is not None]
            if len(all_of_them) < len(streams):
                continue
            tokens = layout.frame_start(frame)
            for (shared, _), own in zip(streams, all_of_them, strict=True):
                shared.find(name, Found(frame, own), tokens)
            return tokens if tokens < request.num_tokens else tokens - 1
    return 0


def take_forked(managers: Sequence[RetentionManager], output: SchedulerOutput) -> dict[str, Forked]:
    """What the workers must be told of forks that a step has."""
    told: dict[str, Forked] = {}
    if not managers or managers[0].shared is None:
        return told
    anew = {new.req_id for new in output.scheduled_new_reqs}
    for name in output.num_scheduled_tokens:
        if not managers[0].shared.knows(name):
            continue
        tokens = managers[0].shared.told(name)
        replaced = [part for manager in managers if manager.shared and (part := manager.shared.replaced(name))]
        if name in anew:
            # Its block tables come with it.
            replaced = []
        if tokens or replaced:
            told[name] = Forked(tokens, tuple(replaced))
    return told
