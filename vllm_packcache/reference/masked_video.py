"""The published loop of Lumos-1, literally: two streams, steps that unmask, a commit that masks again.

And the same with less of it computed (see `vllm_packcache.families.schedule`), no less literally: what is left out
stays in a stream's cache, and among its last states, as it was.

One request at a time. Each stream keeps its whole history; the method is a mask and positions, which change with the
frame and not with the pass. A pass of a frame writes over what the pass before it wrote, which is the published cutting
of the cache back to the frame's start.

Source: Lumos-1, arXiv 2507.08801, and its public inference code; PackCache, arXiv 2601.04359.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_packcache.core.blocks import BlockMap
from vllm_packcache.core.layout import CONDITION
from vllm_packcache.core.plan import Plan
from vllm_packcache.core.positions import Positions
from vllm_packcache.families import lumos
from vllm_packcache.families.lumos import MaskedOptions, StepNoise
from vllm_packcache.families.schedule import schedule
from vllm_packcache.reference.lumos import LumosReference
from vllm_packcache.reference.visibility import frame_visibility, positions


class Step(NamedTuple):
    """What one step did, and how near it came to doing something else.

    Args:
        ids: [N], the frame's visual tokens after it, some of them mask tokens.
        drawing_margin: by how much the random number of a token that was drawn could change, at least, before another
            one were drawn: a share of all probability. 1 where none was drawn.
        masking_margin: by how much the confidence of what stays masked is below that of the rest, at least: in units of
            a logarithm. Infinite where nothing stays masked.
    """

    ids: Tensor
    drawing_margin: float
    masking_margin: float


Fading = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From keys before RoPE and values of a layer, float32 [n, G, D], to what is left of them in an older frame."""


@dataclass(frozen=True)
class MaskedGeneration:
    """The frames that one request made.

    Args:
        frames: int64, [frames, F]: their ids, as they are shown, not as they are committed.
        margins: float64, [frames, steps, 2]: margins of drawing and of masking of every step (see `Step`). Where one is
            near 0, rounding may turn a token.
    """

    frames: Tensor
    margins: Tensor

    @property
    def token_ids(self) -> list[int]:
        """All ids, frame after frame."""
        return self.frames.flatten().tolist()


class MaskedVideo:
    """A video being made: its streams and what they have cached.

    The prompt is computed at once. Given frames, conditioning images among them, are committed as they are; each in the
    same way as a frame that was made, in a pass of its own.

    Args:
        model: the checkpoint.
        prompt_ids: of `vllm_packcache.families.lumos.text_prompt`, and any frames that are given.
        frames: how many frames of the layout there will be, given ones included.
        plan: layout, policy and positions of the conditional stream; those of the unconditional one follow.
        options: of the request.
        block_size: tokens of a KV-cache block.
        fading: what becomes of a frame's blocks when it is no longer the newest; None: nothing.

    Raises:
        ValueError: the prompt is not of this layout, or nothing can be masked in its frames.
    """

    def __init__(
        self,
        model: LumosReference,
        prompt_ids: Sequence[int],
        frames: int,
        plan: Plan,
        options: MaskedOptions,
        block_size: int = 32,
        fading: Fading | None = None,
    ) -> None:
        layout = plan.layout
        if layout.frame.grid is None:
            raise ValueError("grid is needed: a frame is made of rows and columns")
        if layout.frame != lumos.frame_layout(layout.frame.grid):
            raise ValueError(f"the frame's special tokens are not those of this model: {layout.frame}")
        rows, columns = layout.frame.grid
        self._grid = rows, columns
        self._offsets = torch.from_numpy(lumos.visual_offsets(self._grid).copy())
        if len(self._offsets) < 2:
            raise ValueError("grid must have two visual tokens at least: one stays masked until the last step")
        self.first_frame = lumos.given_frames(prompt_ids, layout)
        self.options = options
        self.plan = plan
        self._model = model
        prompt = torch.tensor(prompt_ids)
        self._conditional = _Stream(model, prompt, frames, plan, block_size, fading)
        self._unconditional: _Stream | None = None
        if options.guided:
            without_text = unconditional_plan(plan)
            start = layout.condition_tokens - without_text.layout.condition_tokens
            self._unconditional = _Stream(model, prompt[start:], frames, without_text, block_size, fading)

    @torch.inference_mode()
    def make(self, frame: int) -> tuple[Tensor, Tensor]:
        """Make a frame: all its steps, without the commit. Frames before it have been committed.

        Returns:
            int64, [F], its ids, and float64, [steps, 2], its margins.
        """
        options = self.options
        ids = torch.from_numpy(lumos.masked_frame(self._grid))
        making = [_Making(stream, frame) for stream in self._streams]
        margins = []
        for step, own in enumerate(schedule(options, self._grid)):
            for stream, rows in zip(making, own.rows, strict=False):
                if rows:
                    stream.compute(ids, whole=rows == len(ids))
            noise = lumos.step_noise(options.seed, frame, step, len(self._offsets))
            tau = lumos.temperature(options, frame - self.first_frame, step)
            logits = self._logits([stream.states for stream in making[: 2 if own.guided else 1]])
            done = unmask(logits, ids[self._offsets], noise, step, options.steps, tau, forgets=options.fresh)
            ids[self._offsets] = done.ids
            margins.append(done[1:])
        return ids, torch.tensor(margins, dtype=torch.float64)

    def states(self, frame: int, ids: Tensor) -> list[Tensor]:
        """One pass of a frame [F], which the next writes over: states of all streams [F, hidden], conditional first."""
        return [stream.picture(frame, ids) for stream in self._streams]

    @torch.inference_mode()
    def commit(self, frame: int, ids: Tensor) -> None:
        """Compute a finished frame once more, some of it masked, for later frames to see.

        Args:
            frame: its number.
            ids: [F].
        """
        # What a policy reads are the ids that the request gets, whatever is committed of them.
        for stream in self._streams:
            stream.token_ids += ids.tolist()
        self._conditional.picture(frame, self._committed(ids))
        if self._unconditional is not None:
            if not self.options.share_history:
                ids = ids.clone()
                ids[self._offsets] = lumos.MASK
            self._unconditional.picture(frame, self._committed(ids))

    def _committed(self, ids: Tensor) -> Tensor:
        return torch.from_numpy(lumos.committed(ids.numpy(), self.options.remask))

    @property
    def _streams(self) -> list[_Stream]:
        """The conditional one first."""
        return [stream for stream in (self._conditional, self._unconditional) if stream is not None]

    def _logits(self, states: Sequence[Tensor]) -> Tensor:
        """Logits of the visual ids at the visual tokens, [N, V]: ``u + s (c - u)``. Source: arXiv 2207.12598.

        Args:
            states: [F, hidden], of the conditional stream, and of the unconditional one where there is guidance.
        """
        conditional, *unconditional = (self._model.visual_logits(own[self._offsets]) for own in states)
        if not unconditional:
            return conditional
        return self.options.guidance * (conditional - unconditional[0]) + unconditional[0]


def generate_masked(
    model: LumosReference,
    prompt_ids: Sequence[int],
    frames: int,
    plan: Plan,
    options: MaskedOptions,
    block_size: int = 32,
    fading: Fading | None = None,
) -> MaskedGeneration:
    """Make the frames that follow a prompt.

    Args:
        model: the checkpoint.
        prompt_ids: of `vllm_packcache.families.lumos.text_prompt`, and any frames that are given.
        frames: how many to make.
        plan: layout, policy and positions of the request.
        options: how they are made.
        block_size: tokens of a KV-cache block.
        fading: of older frames, see `MaskedVideo`.

    Raises:
        ValueError: the prompt is not of this layout, or there are no frames to make.
    """
    if frames < 1:
        raise ValueError(f"frames must be 1 or more, not {frames}")
    given = lumos.given_frames(prompt_ids, plan.layout)
    video = MaskedVideo(model, prompt_ids, given + frames, plan, options, block_size, fading)
    made, margins = [], []
    for frame in range(given, given + frames):
        ids, margin = video.make(frame)
        video.commit(frame, ids)
        made.append(ids)
        margins.append(margin)
    return MaskedGeneration(torch.stack(made), torch.stack(margins))


def unmask(
    logits: Tensor,
    current: Tensor,
    noise: StepNoise,
    step: int,
    steps: int,
    tau: float,
    *,
    forgets: bool = True,
) -> Step:
    """One step: draw every unknown token, mask the least confident ones again.

    What is as confident as the token that cuts is not masked, so ties leave fewer unknown than the schedule says. Known
    tokens are more confident than any other; should ties have left none unknown before the last step, the least
    confident known one is masked, as published.

    Args:
        logits: float32, [N, V], of the visual ids.
        current: int64, [N], the frame's visual tokens before the step.
        noise: of the step.
        step: 0 to ``steps`` - 1; the last one masks nothing.
        steps: S.
        tau: temperature of the confidence's noise.
        forgets: whether a known token may be masked again. False: none is, as nothing was computed to draw it by.
    """
    probabilities = logits.softmax(-1)
    sums = probabilities.double().cumsum(-1)
    targets = torch.from_numpy(noise.uniform)[:, None] * sums[:, -1:]
    codes = torch.searchsorted(sums, targets, right=True).clamp(max=logits.shape[1] - 1)
    unknown = current == lumos.MASK
    proposed = torch.where(unknown, lumos.VISUAL_BEGIN + codes[:, 0], current)
    below = torch.where(codes > 0, sums.gather(1, (codes - 1).clamp(min=0)), 0.0)
    gaps = torch.minimum(targets - below, sums.gather(1, codes) - targets)[unknown]
    drawing_margin = gaps.min().item() if len(gaps) else 1.0
    if step == steps - 1:
        return Step(proposed, drawing_margin, float("inf"))

    drawn = torch.where(unknown, probabilities.gather(1, codes)[:, 0], torch.finfo(torch.float32).max)
    confidence = drawn.clamp(min=lumos.LEAST_PROBABILITY).log() + tau * torch.from_numpy(noise.gumbel)
    ascending = confidence.sort().values
    cut = ascending[lumos.still_masked(step, steps, len(current), int(unknown.sum()))]
    again = (confidence < cut) & (unknown | forgets)
    masking_margin = (cut - confidence[again].max()).item() if again.any() else float("inf")
    return Step(torch.where(again, lumos.MASK, proposed), drawing_margin, masking_margin)


class _Stream:
    """One sequence with a cache of its own.

    Args:
        model: the checkpoint.
        prompt: int64, [n], text and any given frames.
        frames: of the layout.
        plan: of this stream.
        block_size: tokens of a KV-cache block.
        fading: of older frames.
    """

    def __init__(
        self,
        model: LumosReference,
        prompt: Tensor,
        frames: int,
        plan: Plan,
        block_size: int,
        fading: Fading | None,
    ) -> None:
        self._model, self._plan, self._block_size, self._fading = model, plan, block_size, fading
        self._faded = 0
        layout = plan.layout
        self._cache = model.new_cache(layout.frame_start(frames))
        self.token_ids: list[int] = prompt.tolist()
        text = layout.condition_tokens - layout.condition_image_tokens
        self._run(prompt[:text], 0, CONDITION, torch.ones(text, text, dtype=torch.bool).tril())
        for start in range(text, layout.condition_tokens, layout.tokens_per_frame):
            stop = start + layout.tokens_per_frame
            self._run(prompt[start:stop], start, CONDITION, torch.ones(1, stop, dtype=torch.bool))
        for frame in range((len(prompt) - layout.condition_tokens) // layout.tokens_per_frame):
            self.picture(frame, prompt[layout.frame_start(frame) : layout.frame_start(frame + 1)])

    def picture(self, frame: int, ids: Tensor, some: Tensor | None = None) -> Tensor:
        """One pass of a frame [F]: every token sees the live history and the whole frame.

        Args:
            frame: its number.
            ids: [F].
            some: int64, [m], which of them are computed; None: all.

        Returns:
            float32, [m, hidden].
        """
        self._fade(frame)
        seen = frame_visibility(self._plan, self._block_size, frame, self.token_ids)
        return self._run(ids, self._plan.layout.frame_start(frame), frame, seen[None], some)

    def _fade(self, frame: int) -> None:
        """The blocks of frames fade that are older than the newest while ``frame`` is made, each once."""
        blocks_of = BlockMap(self._plan.layout, self._block_size).frame_blocks
        while self._fading is not None and self._faded < frame - 1:
            blocks = blocks_of(self._faded)
            self._faded += 1
            tokens = slice(blocks.start * self._block_size, blocks.stop * self._block_size)
            for keys, values in self._cache if blocks else ():
                keys[tokens], values[tokens] = self._fading(keys[tokens], values[tokens])

    @torch.inference_mode()
    def _run(self, ids: Tensor, start: int, frame: int, mask: Tensor, some: Tensor | None = None) -> Tensor:
        at = positions(self._plan, self._block_size, start + len(ids), frame)
        return self._model.run(ids, start, self._cache, at, mask.expand(len(ids), -1), some)


class _Making:
    """A frame that is being made, in one stream.

    Args:
        stream: which.
        frame: its number.

    Attributes:
        states: float32, [F, hidden]: of every token what was computed of it last.
    """

    def __init__(self, stream: _Stream, frame: int) -> None:
        self._stream, self._frame = stream, frame
        self._masked: Tensor | None = None
        self.states = torch.empty(0)

    def compute(self, ids: Tensor, *, whole: bool) -> None:
        """A pass of ids [F]: of all of them, or of those that were masked when this was done last."""
        if whole:
            self.states = self._stream.picture(self._frame, ids)
        else:
            assert self._masked is not None, "the first pass of a frame is whole"
            (some,) = self._masked.nonzero(as_tuple=True)
            if len(some):
                self.states[some] = self._stream.picture(self._frame, ids, some)
        self._masked = ids == lumos.MASK


def unconditional_plan(plan: Plan) -> Plan:
    """Of the stream without text: the same policy and the same kind of positions."""
    layout = lumos.unconditional_layout(plan.layout)
    return Plan(layout, plan.policy, Positions(layout, plan.positions.window, plan.positions.scale))
