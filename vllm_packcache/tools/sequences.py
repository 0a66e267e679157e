"""Token ids of videos: files that the command line reads and the demos write, and an example."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_packcache.config.errors import ConfigError, shown, shown_path
from vllm_packcache.core.layout import FrameLayout
from vllm_packcache.core.policies.base import Int64, Tokens

FORM = '{"token_ids": [...], "condition_tokens": n}'
"""What one video looks like."""


class VideoIds(BaseModel):
    """One video in a file: condition and frames in one sequence.

    Args:
        token_ids: of all of it.
        condition_tokens: how many of them stand before frame 0.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    # As wide as vLLM keeps them.
    token_ids: list[Annotated[int, Field(ge=0, lt=2**31)]]
    condition_tokens: Annotated[int, Field(ge=0)]


def read_video(path: Path, condition_tokens: int) -> VideoIds:
    """The video of a file: a list of ids, or an object as `FORM`, of which others may follow: the first counts.

    Args:
        path: of the file, JSON.
        condition_tokens: of a list, which does not say.

    Raises:
        ConfigError: it cannot be read, or holds no video. The message names the file and the remedy.
    """
    remedy = f"give a JSON list of all token ids, or {FORM}"
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
    except OSError as error:
        raise ConfigError(f"{shown_path(path)} cannot be read: {error.strerror}: {remedy}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{shown_path(path)} is not text: {remedy}") from None
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    # What is nested very deeply overflows the stack, and Python reads no number of thousands of digits.
    except (ValueError, RecursionError):
        raise ConfigError(f"{shown_path(path)} must hold token ids, not {shown(text)}: {remedy}") from None
    rest = text[end:].lstrip()
    if rest and not (isinstance(value, dict) and rest.startswith("{")):
        raise ConfigError(f"{shown_path(path)}: behind the video stands {shown(rest)}: {remedy}")
    if isinstance(value, list):
        value = {"token_ids": value, "condition_tokens": condition_tokens}
    if not isinstance(value, dict):
        raise ConfigError(f"{shown_path(path)} must hold token ids, not {shown(value)}: {remedy}")
    try:
        return VideoIds.model_validate(value)
    except ValidationError as error:
        raise ConfigError(f"{shown_path(path)}: {_first(error.errors()[0])}: {remedy}") from None


def write_video(path: Path, token_ids: list[int], condition_tokens: int) -> None:
    """Write a video as `read_video` reads it.

    Raises:
        OSError: the file cannot be written.
    """
    video = VideoIds(token_ids=token_ids, condition_tokens=condition_tokens)
    path.write_text(video.model_dump_json() + "\n", encoding="utf-8")


def example_frames(frame: FrameLayout, frames: int) -> Int64:
    """Ids of a video in which one thing, a quarter of the picture high and wide, goes to and fro before a still wall.

    Args:
        frame: the shape of a frame; without a grid it counts as one row.
        frames: T.

    Returns:
        [T * F].
    """
    rows, columns = frame.grid or (1, frame.tokens_per_frame)
    height, width = -(-rows // 4), -(-columns // 4)
    way, step = columns - width, max(1, columns // 8)
    thing = 1 + np.arange(height * width).reshape(height, width)
    first = frame.frame_start_tokens + (rows - height) // 2 * (columns + frame.row_end_tokens)
    cells = first + np.arange(height)[:, None] * (columns + frame.row_end_tokens) + np.arange(width)
    ids = np.zeros((frames, frame.tokens_per_frame), dtype=np.int64)
    for number, picture in enumerate(ids):
        gone = step * number % max(1, 2 * way)
        picture[cells + min(gone, 2 * way - gone)] = thing
    return ids.ravel()


def lookup(ids: Int64) -> Tokens:
    """What a policy asks for tokens, of a sequence that is known as a whole."""
    return partial(_between, ids)


def _between(ids: Int64, start: int, stop: int) -> Int64:
    return ids[start:stop]


def _first(error: Any) -> str:
    """What is wrong, in words."""
    name, *item = error["loc"]
    where = shown(name)[1:-1] + "".join(f", item {number + 1}" for number in item)
    given = "" if error["type"] == "missing" else f", not {shown(error['input'])}"
    return f"{where}: {error['msg'][0].lower()}{error['msg'][1:]}{given}"
