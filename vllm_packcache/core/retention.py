"""Which KV-cache blocks of a request live: the one truth, shared by scheduler and worker.

Retention is a pure function of (layout, policy, number of computed tokens), and of the ids of finished frames, where
the policy reads them. Scheduler and worker evaluate it each for itself and exchange no messages; a preempted request
that is recomputed replays the same decisions.

What a query may read is constant inside a frame: the blocks its policy kept of everything before the frame
(`Retention.past`), and everything from the first block of the frame on (`BlockMap.tail_start`).

This module is pure: it knows neither vLLM nor torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from numbers import Integral
from typing import NamedTuple

import numpy as np

from vllm_packcache.core.blocks import BlockIndices, BlockMap
from vllm_packcache.core.layout import CONDITION, VideoLayout
from vllm_packcache.core.policies.base import Int64, Policy, Tokens


class PolicyError(ValueError):
    """A policy does not do what it must. The message names the policy, the frame and the block."""


class Decision(NamedTuple):
    """What lives of a stream's past while a frame is made, on its way from the scheduler to the workers.

    Workers do not know the ids of tokens in time: what has been sampled last is on its way from the device.

    Args:
        stream: number of the request's stream.
        frame: the frame.
        past: see `Retention.past`.
    """

    stream: int
    frame: int
    past: BlockIndices


DECISIONS = "_packcache_decisions"
"""Attribute of a step's schedule: decisions by request."""


class Written(NamedTuple):
    """A change of the block table of a request's second stream, where vLLM knows the first one's alone.

    Args:
        start: logical index of the first block.
        blocks: ids, from there on.
        found: tokens whose keys and values were in the prefix cache; 0: there was nothing, or it has been told.
    """

    start: int
    blocks: list[int]
    found: int = 0


SECOND_BLOCKS = "_packcache_second_blocks"
"""Attribute of a step's schedule: what is `Written`, by request."""


class Unit(NamedTuple):
    """A frame that is held in fewer bits: see `vllm_packcache.core.encoded`.

    Args:
        frame: its number.
        blocks: the logical blocks with its tag, whose tokens are read.
        held: those that it lives in, the first of them.
    """

    frame: int
    blocks: range
    held: range


class LiveSegment(NamedTuple):
    """The queries ``[start, stop)`` of one frame and the blocks they read.

    They read the blocks ``past`` in full (ascending logical indices), then the blocks from ``tail_start`` on
    up to token ``stop``, causally.
    """

    frame: int
    start: int
    stop: int
    past: BlockIndices
    tail_start: int

    def live_tokens(self, block_size: int) -> int:
        """Tokens that the last query of the segment reads."""
        return len(self.past) * block_size + self.stop - self.tail_start * block_size


class Retention:
    """What one request keeps: the policy applied to its layout.

    Time and memory of every method are bounded by the blocks of the condition and of the frames that the
    policy can keep (and by the tokens asked about), never by the length of the video.

    Args:
        layout: the video.
        policy: what to keep.
        block_size: tokens of a KV-cache block.
        tokens: ids of the request's tokens; only a policy that reads them needs any. Then the decision about a frame
            follows from that about the frame before: what is asked about later costs time for the frames between, what
            is asked about again for all of them.
    """

    __slots__ = ("_decided", "_most_past", "_remembered", "_tokens", "_window", "blocks", "layout", "policy")

    def __init__(self, layout: VideoLayout, policy: Policy, block_size: int, tokens: Tokens | None = None) -> None:
        self.layout = layout
        self.policy = policy
        self.blocks = BlockMap(layout, block_size)
        self._tokens = tokens
        # A request works on one frame for many steps, and where it enters the next one both are asked about. Where a
        # decision follows from the one before, one that is forgotten costs all of them: there are more.
        self._decided: dict[int, BlockIndices] = {}
        self._remembered = _FOLLOWING if policy.reads_tokens else 2
        self._window = _promised(policy, "history_window", lambda: policy.history_window, 1)
        self._most_past = _promised(policy, "most_past_blocks", lambda: policy.most_past_blocks(self.blocks), 0)

    @property
    def block_size(self) -> int:
        """Tokens of a KV-cache block."""
        return self.blocks.block_size

    def past(self, frame: int) -> BlockIndices:
        """Live blocks before ``tail_start(frame)`` while ``frame`` is made, ascending logical indices.

        Raises:
            PolicyError: the policy's decision is none that it may take.
        """
        if frame == CONDITION:
            return _NOTHING
        past = self._decided.get(frame)
        if past is not None:
            return past
        if self.policy.reads_tokens:
            if self._tokens is None:
                raise self._error(frame, "what it keeps depends on tokens, and nobody has told which blocks")
            for other in range(max((known + 1 for known in self._decided if known < frame), default=0), frame):
                self._keep_in_mind(other)
        return self._keep_in_mind(frame)

    def plain(self, frame: int) -> BlockIndices:
        """Those blocks of `past` that are read as they were written."""
        return self.past(frame)

    def units(self, frame: int) -> tuple[Unit, ...]:
        """What of the past is read encoded while ``frame`` is made, the oldest first."""
        del frame
        return ()

    def leaving(self, frame: int) -> Unit | None:
        """What is to be encoded when ``frame`` is finished; None: nothing."""
        del frame
        return None

    def forget(self, frames: int, gone: range) -> None:
        """Some old frames are not counted any more: what comes behind them moves into their place.

        Args:
            frames: how many; see `vllm_packcache.core.session.Forgetting`.
            gone: blocks that they are, of which nothing lives.
        """
        decided, self._decided = self._decided, {}
        for frame, past in decided.items():
            kept = np.where(past < gone.stop, past, past - len(gone))
            kept.flags.writeable = False
            self._decided[frame - frames] = kept

    def tell(self, decisions: Sequence[Decision]) -> None:
        """Take decisions as they are, where a policy reads tokens that are not known here: see `Decision`."""
        # All of a step are asked about in that step.
        self._remembered = max(_FOLLOWING, len(decisions) + 2)
        for decision in decisions:
            self._remember(decision.frame, decision.past)

    def _keep_in_mind(self, frame: int) -> BlockIndices:
        past = self._decide(frame)
        self._remember(frame, past)
        return past

    def _remember(self, frame: int, past: BlockIndices) -> None:
        self._decided.pop(frame, None)
        while len(self._decided) >= self._remembered:
            del self._decided[next(iter(self._decided))]
        self._decided[frame] = past

    def _decide(self, frame: int) -> BlockIndices:
        try:
            if self.policy.reads_tokens:
                decision = self._decide_by_tokens(frame)
            else:
                decision = self.policy.past_blocks(self.blocks, frame)
        except Exception as error:
            raise self._error(frame, f"past_blocks {_raised(error)}") from error
        if not isinstance(decision, np.ndarray) or decision.ndim != 1 or decision.dtype.kind not in "iu":
            what = type(decision).__name__
            if isinstance(decision, np.ndarray):
                what += f" of {decision.dtype} and shape {list(decision.shape)}"
            raise self._error(frame, f"past_blocks must return block indices as an array of integers, not {what}")
        past = decision.astype(np.int64)
        past.flags.writeable = False
        self._check_blocks(frame, past)
        # The last decision is there, except for the first frame that is asked about.
        for other, kept in list(self._decided.items())[-1:]:
            self._check_shrinks(*((other, kept, frame, past) if other < frame else (frame, past, other, kept)))
        return past

    def _decide_by_tokens(self, frame: int) -> BlockIndices:
        assert self._tokens is not None
        before = self._decided[frame - 1] if frame > 0 else _NOTHING
        return self.policy.past_blocks_of(self.blocks, frame, before, self._tokens)

    def _check_blocks(self, frame: int, past: BlockIndices) -> None:
        if not len(past):
            return
        back = np.flatnonzero(past[1:] <= past[:-1])
        if len(back):
            before, after = past[back[0]], past[back[0] + 1]
            raise self._error(frame, f"block {after} comes after block {before}: indices must ascend, each once")
        end = self.blocks.tail_start(frame)
        if past[0] < 0 or past[-1] >= end:
            block = past[0] if past[0] < 0 else past[-1]
            raise self._error(frame, f"block {block} is none of the past, which has blocks 0 to {end - 1}")
        if self._most_past is not None and len(past) > self._most_past:
            raise self._error(
                frame,
                f"it keeps {len(past)} blocks, up to block {past[-1]}, and said that it keeps {self._most_past} at "
                "most (most_past_blocks)",
            )
        if self._window is not None and not self.policy.outlives_window:
            history = past[np.searchsorted(past, self.blocks.condition_blocks.stop) :]
            oldest = max(0, frame - self._window)
            if len(history) and history[0] < self.blocks.frame_blocks(oldest).start:
                raise self._error(
                    frame,
                    f"block {history[0]} is of frame {self.blocks.tag(int(history[0]))}, and it said that it keeps "
                    f"nothing older than {self._window} frames (history_window)",
                )

    def _check_shrinks(self, older: int, before: BlockIndices, newer: int, after: BlockIndices) -> None:
        """Of what was past by frame ``older``, ``newer`` may keep nothing that it did not: no block comes back."""
        kept = after[: np.searchsorted(after, self.blocks.tail_start(older))]
        back = kept[~np.isin(kept, before, assume_unique=True)]
        if len(back):
            raise self._error(newer, f"block {back[0]} comes back, which was dropped by frame {older}")

    def _error(self, frame: int, what: str) -> PolicyError:
        return PolicyError(f"policy {type(self.policy).__name__}, frame {frame}: {what}")

    def history_blocks(self, frame: int) -> BlockIndices:
        """Live blocks with tokens of earlier frames while ``frame`` is made, without the condition's, ascending.

        The last of them may be the block that ``frame`` begins in.
        """
        past = self.past(frame)
        history = past[past >= self.blocks.condition_blocks.stop]
        tail_start = self.blocks.tail_start(frame)
        shared = self.layout.frame_start(frame) % self.block_size != 0
        if shared and tail_start not in self.blocks.condition_blocks:
            history = np.append(history, tail_start)
        return history

    def sliding_blocks(self, frame: int) -> BlockIndices:
        """Those of `history_blocks` that a window which slides before ``frame`` is made takes along, ascending.

        What has outlived the window stays where it was when it left: at the place of the window's oldest frame.
        """
        history = self.history_blocks(frame)
        if self._window is None or not self.policy.outlives_window:
            return history
        return history[np.searchsorted(history, self.blocks.frame_blocks(max(0, frame - self._window)).start) :]

    def most_blocks(self, ahead: int = 0) -> int | None:
        """Blocks that the request holds at most, however long it grows; None: as many as its length takes.

        That is the condition, or what is kept of the past besides the frame being made, whichever is more.

        Args:
            ahead: tokens of the next frame that may be computed while blocks of the past are still held: a step is
                scheduled before the one in flight has been processed.
        """
        return None if self._most_past is None else self._with_frame(self._most_past, ahead)

    def most_of(self, tokens: int, ahead: int = 0) -> int:
        """Blocks that the request holds at most, if it is ``tokens`` long in the end.

        Args:
            tokens: of the whole request.
            ahead: see `most_blocks`.
        """
        length = -(-tokens // self.block_size)
        most = self.most_blocks(ahead)
        return length if most is None else min(length, most)

    def _with_frame(self, past: int, ahead: int) -> int:
        """Blocks of the condition, or ``past`` blocks and those of the frame being made, whichever are more."""
        # A frame begins anywhere in a block.
        making = -(-(self.block_size - 1 + self.layout.tokens_per_frame + ahead) // self.block_size)
        return max(-(-(self.layout.condition_tokens + ahead) // self.block_size), past + making)

    def segments(self, start: int, stop: int) -> Iterator[LiveSegment]:
        """What the queries ``[start, stop)`` read, one item a frame."""
        for frame, first, last in self.layout.segments(start, stop):
            if frame == CONDITION:
                yield LiveSegment(frame, first, last, _NOTHING, 0)
            else:
                yield LiveSegment(frame, first, last, self.past(frame), self.blocks.tail_start(frame))

    def live_blocks(self, num_computed_tokens: int) -> BlockIndices:
        """Logical blocks that live when ``num_computed_tokens`` tokens have been computed, ascending.

        The next token decides: at a frame's end its successor's decisions already hold.
        """
        frame = self.layout.frame_of(num_computed_tokens)
        end = -(-num_computed_tokens // self.block_size)
        if frame == CONDITION:
            return np.arange(end)
        return np.concatenate([self.past(frame), np.arange(self.blocks.tail_start(frame), end)])

    def live_tokens(self, num_computed_tokens: int) -> int:
        """Tokens held by `live_blocks`: computed ones only."""
        if num_computed_tokens == 0:
            return 0
        live = self.live_blocks(num_computed_tokens)
        return len(live) * self.block_size - (-num_computed_tokens % self.block_size)

    def dropped_blocks(self, from_frame: int, to_frame: int) -> BlockIndices:
        """Logical blocks that live while ``from_frame`` is made and no longer while ``to_frame`` is, ascending.

        Blocks of the frames between the two count as living before. Costs time for those frames, each of
        which is asked about once in a request's life.
        """
        if to_frame <= from_frame:
            return _NOTHING
        added = np.arange(self.blocks.tail_start(from_frame), self.blocks.tail_start(to_frame))
        before = np.concatenate([self.past(from_frame), added])
        return np.setdiff1d(before, self.past(to_frame), assume_unique=True)


def some_tokens(start: int, stop: int) -> Int64:
    """Made-up ids of tokens, always the same: how many blocks a policy keeps does not depend on them."""
    return np.arange(start, stop, dtype=np.int64) * 7919 % 104_729 % 5


def check_policy(retention: Retention, frames: int) -> None:
    """Ask for the decisions of a video's first ``frames`` frames, one after the other.

    Raises:
        PolicyError: one is none that the policy may take.
    """
    for frame in range(frames):
        retention.past(frame)


def _promised(policy: Policy, name: str, ask: Callable[[], object], low: int) -> int | None:
    """A bound that the policy gives, a whole number that is ``low`` or more; None: it gives none."""
    try:
        value = ask()
    except Exception as error:
        raise PolicyError(f"policy {type(policy).__name__}: {name} {_raised(error)}") from error
    if value is None:
        return None
    if isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= low:
        return int(value)
    raise PolicyError(
        f"policy {type(policy).__name__}: {name} must be a whole number, {low} or more, or None, not {value!r}"
    )


def _raised(error: Exception) -> str:
    return f"raised {type(error).__name__}: {' '.join(str(error).split())}"


_FOLLOWING = 16
"""Decisions that are kept in mind where each follows from the one before."""

_NOTHING: BlockIndices = np.empty(0, dtype=np.int64)
_NOTHING.flags.writeable = False
