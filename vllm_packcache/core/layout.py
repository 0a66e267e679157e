"""Where a video lies in a token sequence.

A unified autoregressive video model puts everything into one sequence::

    [ condition: text, conditioning image ][ frame 0 ][ frame 1 ] ... [ frame k ] ...

Every frame has the same number of tokens. Inside a frame the visual tokens are in row-major order, possibly
with special tokens before the first row, after every row and after the last row.

This module is pure: it knows neither vLLM nor torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

CONDITION = -1
"""The segment number of the condition; frames are numbered 0, 1, 2, ..."""

MAX_TOKENS_PER_FRAME = 2**20
"""Most tokens of a frame, a hundred times what models have: some checks of a request look at a frame token by token."""

MAX_FRAMES = 2**20
"""Most frames that a request may ask for or a window may have: their tokens do not overflow an int64."""


class Segment(NamedTuple):
    """The tokens ``[start, stop)`` of one segment: the condition or one frame."""

    frame: int
    start: int
    stop: int


class TokenPlace(NamedTuple):
    """What a token is: its frame (or `CONDITION`) and, for a visual token, its row and column."""

    frame: int
    row: int | None
    column: int | None


@dataclass(frozen=True, slots=True)
class FrameLayout:
    """The shape of one frame, the same for every frame of a video.

    Args:
        tokens_per_frame: F, all tokens of a frame, special tokens included.
        grid: (rows, columns) of visual tokens, where known. Only positions and pictures need it; retention
            works on F alone.
        frame_start_tokens: special tokens before the first row.
        row_end_tokens: special tokens after every row.
        frame_end_tokens: special tokens after the last row.

    Raises:
        ValueError: a number is impossible, or the grid contradicts ``tokens_per_frame``.
    """

    tokens_per_frame: int
    grid: tuple[int, int] | None = None
    frame_start_tokens: int = 0
    row_end_tokens: int = 0
    frame_end_tokens: int = 0

    def __post_init__(self) -> None:
        for field in ("frame_start_tokens", "row_end_tokens", "frame_end_tokens"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} must be 0 or more, not {getattr(self, field)}")
        if self.tokens_per_frame < 1:
            raise ValueError(f"tokens_per_frame must be 1 or more, not {self.tokens_per_frame}")
        if self.tokens_per_frame > MAX_TOKENS_PER_FRAME:
            raise ValueError(f"tokens_per_frame must be at most {MAX_TOKENS_PER_FRAME}, not {self.tokens_per_frame}")
        if self.grid is not None:
            expected = self.grid_tokens(self.grid, self.frame_start_tokens, self.row_end_tokens, self.frame_end_tokens)
            if expected != self.tokens_per_frame:
                rows, columns = self.grid
                raise ValueError(
                    f"tokens_per_frame is {self.tokens_per_frame}, but the grid of {rows} x {columns} with "
                    f"its extra tokens makes {expected}: give one of the two, or make them agree"
                )

    @staticmethod
    def grid_tokens(grid: tuple[int, int], frame_start_tokens: int, row_end_tokens: int, frame_end_tokens: int) -> int:
        """Tokens of a frame of ``grid`` = (rows, columns) with its extra tokens.

        Raises:
            ValueError: the grid has no rows or no columns, or too many.
        """
        rows, columns = grid
        if rows < 1 or columns < 1:
            raise ValueError(f"grid must have at least one row and one column, not {rows} x {columns}")
        tokens = frame_start_tokens + rows * (columns + row_end_tokens) + frame_end_tokens
        if tokens > MAX_TOKENS_PER_FRAME:
            raise ValueError(
                f"grid of {rows} x {columns} makes frames of {tokens} tokens: they may have at most "
                f"{MAX_TOKENS_PER_FRAME}"
            )
        return tokens

    @classmethod
    def from_grid(
        cls,
        grid: tuple[int, int],
        frame_start_tokens: int = 0,
        row_end_tokens: int = 0,
        frame_end_tokens: int = 0,
    ) -> FrameLayout:
        """The layout of a frame whose size follows from its grid."""
        tokens = cls.grid_tokens(grid, frame_start_tokens, row_end_tokens, frame_end_tokens)
        return cls(tokens, grid, frame_start_tokens, row_end_tokens, frame_end_tokens)


@dataclass(frozen=True, slots=True)
class VideoLayout:
    """Which token of a sequence is condition and which belongs to frame k.

    Args:
        frame: the shape of a frame.
        condition_tokens: C, the tokens before frame 0.
        condition_image_tokens: how many of them, at the end, are the conditioning image; the rest is text.

    Raises:
        ValueError: a number is negative, or the image is longer than the condition.
    """

    frame: FrameLayout
    condition_tokens: int
    condition_image_tokens: int = 0

    def __post_init__(self) -> None:
        if self.condition_tokens < 0:
            raise ValueError(f"condition_tokens must be 0 or more, not {self.condition_tokens}")
        if not 0 <= self.condition_image_tokens <= self.condition_tokens:
            raise ValueError(
                f"condition_image_tokens must lie between 0 and condition_tokens ({self.condition_tokens}), "
                f"not {self.condition_image_tokens}"
            )

    @property
    def tokens_per_frame(self) -> int:
        """F, tokens of a frame."""
        return self.frame.tokens_per_frame

    def frame_start(self, frame: int) -> int:
        """Index of the first token of ``frame``; 0 for the condition."""
        if frame == CONDITION:
            return 0
        return self.condition_tokens + frame * self.tokens_per_frame

    def frame_of(self, token: int) -> int:
        """The frame that ``token`` (an index into the sequence) belongs to, or `CONDITION`."""
        if token < self.condition_tokens:
            return CONDITION
        return (token - self.condition_tokens) // self.tokens_per_frame

    def offsets(self, start: int, stop: int) -> set[int]:
        """Places in their frames of the tokens ``[start, stop)``, those of the condition left out."""
        start = max(start, self.condition_tokens) - self.condition_tokens
        tokens = range(start, max(start, stop - self.condition_tokens))
        return {token % self.tokens_per_frame for token in tokens[: self.tokens_per_frame]}

    def tokens_to_end(self, given: int, frames: int) -> int:
        """Tokens that end a video of ``given`` tokens after ``frames`` more frames; one that has begun is the first."""
        return frames * self.tokens_per_frame - (given - self.condition_tokens) % self.tokens_per_frame

    def place(self, token: int) -> TokenPlace:
        """Frame, row and column of ``token``; row and column are None for text and special tokens.

        Raises:
            ValueError: the token is in a frame and the layout has no grid.
        """
        frame = self.frame_of(token)
        if frame == CONDITION:
            return TokenPlace(frame, None, None)
        if self.frame.grid is None:
            raise ValueError("this layout has no grid: give grid, not tokens_per_frame, to place tokens")
        rows, columns = self.frame.grid
        offset = token - self.frame_start(frame) - self.frame.frame_start_tokens
        row, column = divmod(offset, columns + self.frame.row_end_tokens)
        if offset < 0 or row >= rows or column >= columns:
            return TokenPlace(frame, None, None)
        return TokenPlace(frame, row, column)

    def segments(self, start: int, stop: int) -> Iterator[Segment]:
        """Split the tokens ``[start, stop)`` where the condition ends and where frames end."""
        while start < stop:
            frame = self.frame_of(start)
            end = min(stop, self.frame_start(frame + 1))
            yield Segment(frame, start, end)
            start = end
