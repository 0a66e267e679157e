"""The bundled model under a policy, one video at a time, without an engine: fast enough for thousands of videos.

The cache holds live tokens only, and its keys are turned in place when the window slides, as in the engine's workers;
what lives and where is asked of the same pure core. `tests/benchmarks/test_quality.py` compares it with the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.formats import FLOAT32, CacheFormat
from benchmarks.training.live import retention_of
from benchmarks.training.llama import KeyValueCache, Llama, LlamaSize, rotary_table, rotate
from vllm_packcache.core.layout import VideoLayout
from vllm_packcache.core.plan import Plan
from vllm_packcache.reference.guided import combined

Int64 = npt.NDArray[np.int64]

SMALLEST_WINDOW = 24
"""Fewest tokens that are guessed at once: fewer take as long."""


class VideoCache(KeyValueCache):
    """Keys and values of the tokens of one video that live.

    Args:
        size: of the model.
        plan: what the video keeps, and where the model sees it; one axis.
        block_size: tokens of a KV-cache block.
        frames: T, frames of the video.
        stored: how keys and values are kept: rounded when they are written, and keys at every turn.
    """

    def __init__(
        self, size: LlamaSize, plan: Plan, block_size: int, frames: int, stored: CacheFormat = FLOAT32
    ) -> None:
        self._plan, self._stored = plan, stored
        tokens = plan.layout.frame_start(frames)
        self._ids = np.zeros(tokens, dtype=np.int64)
        self._retention = retention_of(plan, block_size, self._ids)
        most = self._retention.most_blocks()
        # What a frame drops is dropped when the frame begins.
        bounded = tokens if most is None else most * block_size + plan.layout.tokens_per_frame
        super().__init__(size, min(tokens, bounded))
        self._turn = rotary_table(size, int(plan.positions.slide_shifts[0, 0]), 1)
        # Logical indices of the tokens that are held of before the frame being made, and that frame's first.
        self._past = np.zeros(0, dtype=np.int64)
        self._first = 0
        self._window_start = 0

    @property
    def layout(self) -> VideoLayout:
        """Of the video."""
        return self._plan.layout

    @property
    def next_position(self) -> int:
        """Position of the token that comes next."""
        return int(self._plan.positions.of(np.array([self._computed]), self._window_start)[0, 0])

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """See `KeyValueCache.write`."""
        return super().write(layer, self._stored.rounded(keys), self._stored.rounded(values))

    def tell(self, ids: Sequence[int]) -> None:
        """Which tokens come next: what lives later may hang on what they are."""
        self._ids[self._computed : self._computed + len(ids)] = ids

    def begin(self, frame: int) -> None:
        """Drop what does not live while ``frame`` is made, and turn what is left if the window slides."""
        held = np.append(self._past, np.arange(self._first, self._computed))
        blocks, tagged = held // self._retention.block_size, self._retention.blocks
        live = np.isin(blocks, self._retention.past(frame)) | (blocks >= tagged.tail_start(frame))
        if not live.all():
            kept = torch.from_numpy(np.flatnonzero(live))
            for cached in (self.keys, self.values):
                cached[..., : len(kept), :] = cached.index_select(-2, kept)
        self._first = self._computed
        self._past = held[live]
        self.length = len(self._past)
        # Ascending, so the condition's are the first.
        condition = int((blocks[live] < tagged.condition_blocks.stop).sum())
        for _ in range(self._window_start, self._plan.positions.window_start(frame)):
            history = self.keys[..., condition : self.length, :]
            history.copy_(self._stored.rounded(rotate(history, *self._turn)))
        self._window_start = self._plan.positions.window_start(frame)

    def keep(self, tokens: int) -> None:
        """Forget all but ``tokens`` tokens of the frame being made."""
        self.length = len(self._past) + tokens

    @property
    def _computed(self) -> int:
        """Tokens of the sequence that have been computed."""
        return self._first + self.length - len(self._past)


class Second(NamedTuple):
    """The second stream of a guided video.

    Args:
        cache: an empty cache.
        prompt: its condition.
        scale: s.
    """

    cache: VideoCache
    prompt: list[int]
    scale: float


@torch.inference_mode()
def generate(
    model: Llama,
    cache: VideoCache,
    prompt: list[int],
    frames: int,
    draft: Callable[[Int64], Int64],
    second: Second | None = None,
) -> Int64:
    """Greedy generation of a video.

    A frame is not made token by token: some tokens are guessed and computed together, those up to the first that is not
    the most likely one stay, and what was likeliest behind it is the new guess (Jacobi iteration). Every pass makes at
    least one more token right, and the result is that of greedy decoding, whatever the guess was.

    Args:
        model: the model.
        cache: an empty cache.
        prompt: the condition.
        frames: T.
        draft: guess of the next frame, [F], from the frames before it, [n, F]; its first token is not looked at.
        second: what the video is led away from; None: it is not guided.

    Returns:
        Token ids, [T, F].
    """
    made: list[Int64] = []
    caches, prompts = ([cache], [prompt]) if second is None else ([cache, second.cache], [prompt, second.prompt])
    scale = 1.0 if second is None else second.scale
    # Conditions may differ in length; their last tokens are followed by the same.
    first = int(_likeliest([_logits(model, *own)[-1:] for own in zip(caches, prompts, strict=True)], scale)[0])
    window = SMALLEST_WINDOW
    for number in range(frames):
        for own in caches:
            own.begin(number)
        frame = np.array(draft(np.array(made)), dtype=np.int64)
        frame[0] = first
        right = 0
        while right < len(frame):
            for own in caches:
                own.keep(right)
            ids = frame[right : right + window].tolist()
            best = _likeliest([_logits(model, own, ids) for own in caches], scale)
            follow = frame[right + 1 : right + 1 + len(best)]
            wrong = np.flatnonzero(best[: len(follow)] != follow)
            follow[:] = best[: len(follow)]
            first = int(best[-1])
            right += int(wrong[0]) + 1 if len(wrong) else len(best)
            # What is computed behind a wrong token is lost.
            window = max(SMALLEST_WINDOW, window // 2) if len(wrong) else 2 * window
        made.append(frame)
    return np.array(made)


@torch.inference_mode()
def likeliest(model: Llama, cache: VideoCache, ids: Int64, frames: int) -> Int64:
    """The most likely tokens of a video, each after the true ones before it.

    Args:
        model: the model.
        cache: an empty cache.
        ids: of the condition and T whole frames, [C + T F].
        frames: T.

    Returns:
        Token ids, [T, F - 1]: of each frame all but the first.
    """
    starts = [cache.layout.frame_start(frame) for frame in range(frames + 1)]
    _logits(model, cache, ids[: starts[0]].tolist())
    found = []
    for frame, (start, stop) in enumerate(pairwise(starts)):
        cache.begin(frame)
        found.append(_logits(model, cache, ids[start:stop].tolist())[:-1].argmax(-1).numpy())
    return np.array(found)


def _logits(model: Llama, cache: VideoCache, ids: list[int]) -> Tensor:
    """Of the token after each of ``ids``, which are computed and cached, [n, vocabulary]."""
    cache.tell(ids)
    hidden: Tensor = model.hidden(torch.tensor([ids]), cache)
    return model.logits(hidden)[0]


def _likeliest(streams: Sequence[Tensor], scale: float) -> Int64:
    """The most likely tokens, [n], of the logits of one stream, or of two that guide, [n, vocabulary] each."""
    own, *others = streams
    for other in others:
        own = combined(own, other, scale)
    return own.argmax(-1).numpy()
