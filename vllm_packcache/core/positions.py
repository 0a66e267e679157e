"""Which positions a model sees: time re-based to the window, space as it was.

A model is trained on positions up to some length, and the position of a token grows with the video. Re-basing
counts the frames from the oldest one that the window still holds: when the window slides by a frame, every frame
in it moves one slot towards the condition. The condition stays where it is, and so does the row and column of
every token.

Two kinds of models are described by one class:

- *one axis*: a token's position is its index in the sequence, so a frame is a stride of F positions, and the offset
  in the frame carries row and column (Llama, Emu3, ...);
- *three axes* (t, h, w): a visual token of frame f, row r, column c is at
  ``(P + scale_t f, P + scale_h r, P + scale_w c)``, where P is the index of the first visual token of the video, and
  every rotary channel turns with one of the axes. Tokens at the end of a row count as further columns. All other
  tokens (text, and the tokens around a frame's grid) have their index in the sequence on all three axes; in a
  frame, re-basing counts it as if the dropped frames had never been there.

This module is pure: it knows neither vLLM nor torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_packcache.core.layout import VideoLayout

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]

AxisScale = tuple[int, int, int]
"""By how much a position grows with a frame, a row and a column."""

TIME, HEIGHT, WIDTH = range(3)
"""The axes, in the order in which models list them."""


@dataclass(frozen=True, slots=True)
class Positions:
    """Model positions of the tokens of one video.

    Args:
        layout: the video.
        window: W, the history frames whose time is re-based; None: positions are absolute, as without a policy.
        scale: of the three axes; None: the model has one.

    Raises:
        ValueError: three axes, and the layout has no grid or a conditioning image that is no whole number of frames.
    """

    layout: VideoLayout
    window: int | None = None
    scale: AxisScale | None = None

    def __post_init__(self) -> None:
        if self.scale is None:
            return
        if self.layout.frame.grid is None:
            raise ValueError("grid is needed: this model's positions follow rows and columns, which axis_scale scales")
        if self.layout.condition_image_tokens % self.layout.tokens_per_frame:
            raise ValueError(
                f"condition_image_tokens is {self.layout.condition_image_tokens}, which is no whole number of frames "
                f"of {self.layout.tokens_per_frame} tokens: with axis_scale a conditioning image has a frame's shape"
            )

    @property
    def as_stock(self) -> bool:
        """Whether every token's position is its index in the sequence, whatever is dropped."""
        return self.window is None and self.scale is None

    @property
    def axes(self) -> int:
        """Axes of a position: 1 or 3."""
        return 1 if self.scale is None else 3

    @property
    def shared_tokens(self) -> int:
        """Tokens at the start whose positions no layout changes: any request with the same tokens has these too."""
        if self.scale is None:
            return self.layout.condition_tokens
        return self._first_picture

    def window_start(self, frame: int) -> int:
        """s, the frame that time is counted from while ``frame`` is made."""
        return 0 if self.window is None else max(0, frame - self.window)

    def slides(self, token: int) -> bool:
        """Whether the window slides before ``token`` is computed: it is the first of a frame that moves s."""
        frame = self.layout.frame_of(token)
        return self.window_start(frame) > self.window_start(frame - 1) and token == self.layout.frame_start(frame)

    def next_slide(self, token: int) -> int | None:
        """The first token after ``token`` for which the window slides; None: it never does."""
        if self.window is None:
            return None
        return self.layout.frame_start(max(self.layout.frame_of(token), self.window) + 1)

    def of(self, tokens: Int64, window_start: int) -> Int64:
        """Positions of ``tokens`` while the window starts at frame ``window_start``.

        A token of a frame that the window has left behind may come out below the condition's end, or below 0: it
        shares a block with the frame after it and keeps its distance to that.

        Args:
            tokens: [n], indices into the sequence.
            window_start: s.

        Returns:
            [axes, n].
        """
        gone = window_start * self.layout.tokens_per_frame
        indices = np.where(tokens < self.layout.condition_tokens, tokens, tokens - gone)
        if self.scale is None:
            return indices[None]
        assert self.layout.frame.grid is not None
        # Re-based indices make re-based frames; the conditioning image, being condition, has not moved.
        picture, offset = np.divmod(indices - self._first_picture, self.layout.tokens_per_frame)
        row, column = np.divmod(offset - self.layout.frame.frame_start_tokens, self._row_tokens)
        origin = self._first_picture + self.layout.frame.frame_start_tokens
        content = [
            origin + scale * coordinate for scale, coordinate in zip(self.scale, (picture, row, column), strict=True)
        ]
        return np.where(self._is_content(tokens), np.stack(content), indices)

    @property
    def slide_shifts(self) -> Int64:
        """By how much a slide moves a token of a frame, [kinds, axes]: see `slide_kinds`."""
        stride = self.layout.tokens_per_frame
        if self.scale is None:
            return np.array([[-stride]])
        return np.array([[-self.scale[TIME], 0, 0], [-stride] * 3])

    def slide_kinds(self, tokens: Int64) -> Int64:
        """Which row of `slide_shifts` moves each of ``tokens`` of frames: with three axes, visual tokens are 0."""
        if self.scale is None:
            return np.zeros(tokens.shape, dtype=np.int64)
        return np.where(self._is_content(tokens), 0, 1)

    def window_tokens(self, tokens: int) -> int:
        """Of a sequence of ``tokens`` tokens, those of the condition and of W + 1 frames; all without a window."""
        return tokens if self.window is None else min(tokens, self.layout.frame_start(self.window + 1))

    def limit(self, tokens: int) -> int:
        """How many positions a sequence of ``tokens`` tokens needs: all that its tokens ever have are below this."""
        if tokens == 0:
            return 0
        tokens = self.window_tokens(tokens)
        if self.scale is None:
            return tokens
        # The tokens around the last frame's grid have the highest index, its grid the highest row and column.
        last = np.arange(max(0, tokens - self.layout.tokens_per_frame), tokens)
        return int(self.of(last, 0).max()) + 1

    @property
    def _first_picture(self) -> int:
        """Index of the first token that has a frame's shape: of the conditioning image or of frame 0."""
        return self.layout.condition_tokens - self.layout.condition_image_tokens

    @property
    def _row_tokens(self) -> int:
        assert self.layout.frame.grid is not None
        return self.layout.frame.grid[1] + self.layout.frame.row_end_tokens

    def _is_content(self, tokens: Int64) -> npt.NDArray[np.bool_]:
        frame = self.layout.frame
        offset = (tokens - self._first_picture) % self.layout.tokens_per_frame
        inside = (offset >= frame.frame_start_tokens) & (offset < frame.tokens_per_frame - frame.frame_end_tokens)
        return inside & (tokens >= self._first_picture)


def contiguous_axes(sections: Sequence[int]) -> Int64:
    """The axis of every frequency where each axis has a run of them: ``mrope_section`` of Qwen2-VL.

    Args:
        sections: frequencies of the axes t, h and w.

    Returns:
        [sum of ``sections``].
    """
    return np.repeat(np.arange(len(sections)), sections)


def interleaved_axes(sections: Sequence[int]) -> Int64:
    """The axis of every frequency where they take turns: ``mrope_interleaved`` of Qwen3-VL.

    t, h, w, t, h, w, ... as long as h and w have any left; t has the rest.

    Args:
        sections: frequencies of the axes t, h and w.

    Returns:
        [sum of ``sections``].
    """
    frequency = np.arange(sum(sections))
    turn = frequency % 3
    used_up = frequency >= 3 * np.asarray(sections)[turn]
    return np.where(used_up, TIME, turn)


def mm_rope_axes(frequencies: int) -> Int64:
    """The axis of every frequency in MM-RoPE of Lumos-1: a pattern of 16, a quarter of it time.

    Source: arXiv 2507.08801.

    Returns:
        [frequencies].
    """
    pattern = [TIME] * 4 + [HEIGHT, HEIGHT, WIDTH, WIDTH] * 3
    return np.resize(np.array(pattern), frequencies)


def slide_angles(positions: Positions, frequencies: Float64, axis_of: Int64) -> Float64:
    """The angles by which a slide turns a cached key.

    Rotary embedding turns the pair of channels i of a key at position p by ``p theta_i``; turning it on by
    ``shift theta_i`` gives the key at position p + shift. Source: RoFormer, arXiv 2104.09864.

    Args:
        positions: of the video.
        frequencies: theta, [n]: one for each pair of channels.
        axis_of: [n], the axis that each pair turns with.

    Returns:
        [kinds, n], a row for each of `Positions.slide_shifts`.
    """
    shifts = positions.slide_shifts
    # Models with several axes may be fed one index on all of them.
    return (shifts[:, axis_of] if shifts.shape[1] > 1 else shifts) * frequencies
