"""Videos of the masked demo model under any policy that keeps the text: many at once, computed where somebody asks.

The loop is that of `vllm_packcache.reference.masked_video`, its choice of tokens too, and what a pass leaves as it was
(`vllm_packcache.families.schedule`). What lives while a frame is made is asked of the same core as in the engine.
`tests/benchmarks/test_sparse.py` compares with the reference, which computes everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.training.live import live_tokens, retention_of
from benchmarks.training.masked_model import Lumos
from benchmarks.training.masked_sparse import COLUMNS, ROWS, Asked, Videos, hidden
from vllm_packcache.core.plan import Plan
from vllm_packcache.core.retention import Retention, some_tokens
from vllm_packcache.demo.masked.tokenizer import FRAME, GRID_SHAPE
from vllm_packcache.families import lumos
from vllm_packcache.families.lumos import MaskedOptions
from vllm_packcache.families.schedule import schedule
from vllm_packcache.reference.masked_video import unconditional_plan, unmask

Int64 = npt.NDArray[np.int64]

_OFFSETS = lumos.visual_offsets(GRID_SHAPE)
_WITH_ENDS = lumos.FRAME_START_TOKENS + np.arange(ROWS * (COLUMNS + lumos.ROW_END_TOKENS))
"""Where in a frame its visual tokens and the ends of its rows are."""


def is_computable(plan: Plan, block_size: int, frames: int) -> bool:
    """Whether the whole text lives, and nothing outlives the window: then heads see their own, or nothing.

    Args:
        plan: of a video's conditional stream.
        block_size: tokens of a KV-cache block.
        frames: of the video.
    """
    if plan.policy.outlives_window:
        return False
    text = _text_tokens(plan)
    retention = Retention(plan.layout, plan.policy, block_size, some_tokens)
    return all(live_tokens(retention, frame)[:text].all() for frame in range(frames))


class _Stream:
    """One stream of V videos, and what of it lives: a `masked_sparse.Past` of one frame at a time.

    Args:
        model: the model.
        plans: of each video.
        prompts: of each, text and conditioning image.
        block_size: tokens of a KV-cache block.
        history: rows of the embedding that pictures show, [V, 1 + T, 16, 16], to be written as they are committed.

    Attributes:
        said: of the visual tokens of the frame that is made, what was last computed of each: logits [V, N, codes].
    """

    def __init__(
        self,
        model: Lumos,
        plans: Sequence[Plan],
        prompts: Sequence[Sequence[int]],
        block_size: int,
        history: Tensor,
    ) -> None:
        self._model, self._plans = model, plans
        frames = history.shape[1] - 1
        # What the keys and values of a frame are of, which need not be what it shows.
        canvas = torch.zeros(len(plans), frames, ROWS, COLUMNS, dtype=torch.int64)
        self._masked = torch.zeros(len(plans), ROWS * COLUMNS, dtype=torch.bool)
        self.said = torch.zeros(*self._masked.shape, model.codes)
        self._ids = [np.zeros(own.layout.frame_start(frames), dtype=np.int64) for own in plans]
        for own, prompt in zip(self._ids, prompts, strict=True):
            own[: len(prompt)] = prompt
        lengths = [_text_tokens(own) for own in plans]
        text = np.zeros((len(plans), max(lengths)), dtype=np.int64)
        for row, length, prompt in zip(text, lengths, prompts, strict=True):
            row[:length] = np.searchsorted(model.ids, prompt[:length])
        image = torch.tensor([own.layout.condition_image_tokens > 0 for own in plans])
        self.videos = Videos(torch.from_numpy(text), torch.tensor(lengths), image, history, canvas, self)
        self._retentions = [retention_of(plan, block_size, ids) for plan, ids in zip(plans, self._ids, strict=True)]
        self._kept = torch.zeros(len(plans), dtype=torch.int64)
        self._live = torch.zeros(len(plans), 0, ROWS, COLUMNS + 1, dtype=torch.bool)

    def begin(self, frame: int) -> None:
        """Go on to a frame; those before it have been shown."""
        self._kept = torch.tensor([frame - own.positions.window_start(frame) for own in self._plans])
        self._live = torch.from_numpy(np.stack([self._pictures(own, frame) for own in self._retentions]))

    def show(self, frame: int, made: Sequence[Int64]) -> None:
        """What each request got of a frame, [F]: policies read that, whatever is committed of it."""
        for own, plan, ids in zip(self._ids, self._plans, made, strict=True):
            own[plan.layout.frame_start(frame) : plan.layout.frame_start(frame + 1)] = ids

    def compute(self, frame: int, known: Tensor, *, whole: bool) -> None:
        """A pass of a frame's visual ids [V, N]: of all of them, or of those that were masked when it was done last."""
        rows, now = (own.view(-1, ROWS, COLUMNS) for own in (self._model.rows(known.numpy()), self._masked))
        canvas = self.videos.canvas[:, frame]
        canvas[:] = rows if whole else torch.where(now, rows, canvas)
        self._masked = known == lumos.MASK
        video, place = self._masked.nonzero().unbind(1)
        asked = Asked(video, torch.full_like(video, frame), place // COLUMNS, place % COLUMNS)
        self.said[video, place] = self._model.logits(hidden(self._model, self.videos, asked))

    def kept(self, asked: Asked) -> Tensor:
        """As `masked_sparse.Past`."""
        return self._kept[asked.video]

    def there(self, asked: Asked, picture: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """As `masked_sparse.Past`."""
        return self._live[asked.video, picture, row, column]

    @staticmethod
    def _pictures(retention: Retention, frame: int) -> npt.NDArray[np.bool_]:
        """Which tokens of the image, or of nothing, and of the frames before live, bool [1 + frame, 16, 17]."""
        layout, length = retention.layout, retention.layout.tokens_per_frame
        live = live_tokens(retention, frame)[: layout.frame_start(frame)]
        pictures = np.zeros((1 + frame, length), dtype=bool)
        shown = live[layout.condition_tokens - layout.condition_image_tokens :].reshape(-1, length)
        pictures[1 + frame - len(shown) :] = shown
        return pictures[:, _WITH_ENDS].reshape(1 + frame, ROWS, COLUMNS + 1)


@dataclass(frozen=True)
class Request:
    """What a video is made of.

    Args:
        prompt: ids of the text, and of a conditioning image or none.
        plan: of the conditional stream.
        options: how it is made. But for the seed all videos that are made at once have the same.
    """

    prompt: Sequence[int]
    plan: Plan
    options: MaskedOptions


class Making:
    """V videos that are being made, and what their passes compute.

    Args:
        model: the model.
        requests: the videos.
        options: how their frames are made, whatever those of the requests say; the seed is theirs.
        block_size: tokens of a KV-cache block.
        history: rows of the embedding that pictures show, [V, 1 + T, 16, 16], to be written as they are committed.
    """

    def __init__(
        self, model: Lumos, requests: Sequence[Request], options: MaskedOptions, block_size: int, history: Tensor
    ) -> None:
        self._model, self._options = model, options
        self._passes = schedule(options, GRID_SHAPE)
        plans = [own.plan for own in requests]
        self._streams = [_Stream(model, plans, [own.prompt for own in requests], block_size, history)]
        if options.guided:
            prompts = [own.prompt[_text_tokens(own.plan) - lumos.VIDEO_START_TOKENS :] for own in requests]
            # Where it is not shared, what is committed is masked, all but the image.
            own_history = history if options.share_history else history.clone()
            self._streams.append(_Stream(model, list(map(unconditional_plan, plans)), prompts, block_size, own_history))

    def begin(self, frame: int) -> None:
        """Go on to a frame; those before it have been shown."""
        for stream in self._streams:
            stream.begin(frame)

    def logits(self, frame: int, step: int, known: Tensor) -> Tensor:
        """What a frame's tokens are drawn by in a step, logits [V, N, codes].

        Args:
            frame: its number.
            step: 0 to S - 1, one after the other.
            known: its visual ids before the step, [V, N]; where they are not masked, logits mean nothing.
        """
        own, s = self._passes[step], self._options.guidance
        for stream, rows in zip(self._streams, own.rows, strict=False):
            if rows:
                stream.compute(frame, known, whole=rows == FRAME.tokens_per_frame)
        conditional, *unconditional = (stream.said for stream in self._streams)
        return s * (conditional - unconditional[0]) + unconditional[0] if own.guided else conditional

    def show(self, frame: int, made: Sequence[Int64]) -> None:
        """What each request got of a frame, [F]: policies read that, whatever is committed of it."""
        for stream in self._streams:
            stream.show(frame, made)


def begun(model: Lumos, requests: Sequence[Request], frames: int) -> Tensor:
    """Rows of the embedding of the conditioning images of V requests and of masked frames, [V, 1 + T, 16, 16]."""
    history = torch.full((len(requests), 1 + frames, ROWS, COLUMNS), model.row(lumos.MASK))
    for own, request in zip(history, requests, strict=True):
        if image := request.plan.layout.condition_image_tokens:
            own[0] = model.rows(np.array(request.prompt[-image:])[_OFFSETS].reshape(GRID_SHAPE))
    return history


class Beside(Protocol):
    """Other ways to make frames, which are asked what they would draw by where a video is."""

    ways: Sequence[MaskedOptions]

    def take(self, step: int, masked: Tensor, said: Tensor, others: Sequence[Tensor]) -> None:
        """Look at a step.

        Args:
            step: its number.
            masked: bool, [V, N], which of a frame's visual tokens are masked before it.
            said: logits [V, N, codes] that tokens are drawn by; where they are not masked they mean nothing.
            others: the same of every way.
        """


@torch.inference_mode()
def generate(
    model: Lumos, requests: Sequence[Request], block_size: int, frames: int, beside: Beside | None = None
) -> Int64:
    """Make the frames of V requests; see `is_computable`.

    Args:
        model: the model.
        requests: the videos.
        block_size: tokens of a KV-cache block.
        frames: T.
        beside: what looks on.

    Returns:
        Codes, [V, T, 16, 16].
    """
    options, first = requests[0].options, len(model.ids) - model.codes
    history = begun(model, requests, frames)
    ways = (options, *(() if beside is None else beside.ways))
    videos, *others = (Making(model, requests, way, block_size, history) for way in ways)
    shown = np.zeros((len(requests), frames, ROWS, COLUMNS), dtype=np.int64)
    for frame in range(frames):
        for making in (videos, *others):
            making.begin(frame)
        known = torch.full((len(requests), ROWS * COLUMNS), lumos.MASK)
        for step in range(options.steps):
            said = videos.logits(frame, step, known)
            if beside is not None:
                beside.take(step, known == lumos.MASK, said, [own.logits(frame, step, known) for own in others])
            for own, logits, request in zip(known, said, requests, strict=True):
                noise = lumos.step_noise(request.options.seed, frame, step, ROWS * COLUMNS)
                tau = lumos.temperature(request.options, frame, step)
                own[:] = unmask(logits, own, noise, step, options.steps, tau, forgets=options.fresh).ids
        made = [lumos.masked_frame(GRID_SHAPE) for _ in requests]
        for number, (ids, own) in enumerate(zip(made, known.numpy(), strict=True)):
            ids[_OFFSETS] = own
            committed = lumos.committed(ids, options.remask)[_OFFSETS].reshape(GRID_SHAPE)
            history[number, 1 + frame] = model.rows(committed)
            shown[number, frame] = model.rows(own).view(ROWS, COLUMNS)
        for making in (videos, *others):
            making.show(frame, made)
    return shown - first


def _text_tokens(plan: Plan) -> int:
    return plan.layout.condition_tokens - plan.layout.condition_image_tokens
