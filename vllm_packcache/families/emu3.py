"""Emu3, Emu3.5 and UniVLA's world model: decoders whose pictures state their size as text.

A picture begins with a head, in which every character of the size is a token::

    begin of image, "rows*columns", image token

In Emu3's prompts and UniVLA's it comes before the first frame, so that a client writes it; between UniVLA's frames and
before each of Emu3.5's it is a part of them. A layout makes those of the grid, with ``rows``, ``columns`` and
``digit_ids``.

Source: the public code of BAAI's Emu3 and Emu3.5 and of UniVLA.

This module is pure: it knows neither vLLM nor torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_packcache.core.layout import FrameLayout
from vllm_packcache.core.plan import REQUEST_PREFIX, VideoRequest
from vllm_packcache.families.base import Prompt, Server
from vllm_packcache.families.decoder import Decoder

SPECIAL_BEGIN = 151_643
"""The first id that is no text: those of special tokens follow, then visual ones."""

ROW_END = 151_846
FRAME_END = 151_847
BEGIN = 151_849
IMAGE_TOKEN = 151_851
IMAGE_BEGIN = 151_852
IMAGE_END = 151_853
VISUAL_BEGIN = 151_854

STAR = 9
DIGITS = tuple(range(15, 25))
CHARACTERS = {**{token: str(digit) for digit, token in enumerate(DIGITS)}, STAR: "*"}
"""Of the ids that a size is made of."""

TEMPERATURE, TOP_K = 1.0, 2048
"""Of Emu3's published sampling, and of UniVLA's with vLLM."""

NEGATIVE_PROMPT = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst quality, "
    "low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
)
"""That Emu3's published guidance leads away from."""

LONGEST_HEAD = 16
"""Tokens from where a head begins at the earliest to its end: three numbers of four digits, and what separates them."""


class Emu3(Decoder):
    """Causal streams, whose prompts must not state another size than their frames have."""

    name = "Emu3"
    architectures = ("Emu3ForCausalLM", "Emu3MoE")
    model = "vllm_packcache.models.emu3:Emu3ForCausalLM"
    config = "vllm_packcache.models.emu3_config:Emu3Config"

    def check_layout(self, frame: FrameLayout, axis_scale: tuple[int, int, int] | None) -> None:
        """See `Family.check_layout`."""
        del frame
        if axis_scale is not None:
            raise ValueError("axis_scale is for positions of three axes, and those of Emu3 have one: leave it out")

    def request(self, server: Server, extra_args: Mapping[str, Any] | None, prompt: Prompt) -> VideoRequest | None:
        """See `Family.request`."""
        made = super().request(server, extra_args, prompt)
        # A front end sees of a session's later turns what they add.
        if made is None or made.turn is not None or isinstance(prompt, int):
            return made
        grid = made.streams[0].plan.layout.frame.grid
        condition = prompt[: made.streams[0].plan.layout.condition_tokens]
        negative = (("the negative prompt", own.condition) for own in made.streams[1:])
        for name, ids in (("the prompt", condition), *negative):
            stated = stated_size(ids)
            if stated is not None and grid is not None and stated != grid:
                rows, columns = stated
                raise ValueError(
                    f"{name} states a picture of {rows} x {columns}, and frames have {grid[0]} x {grid[1]}: give "
                    f"{REQUEST_PREFIX}grid: [{rows}, {columns}], or state the size of the frames"
                )
        return made

    def negative_condition(self, condition: Sequence[int]) -> tuple[int, ...] | None:
        """A prompt without its text: begin of sequence, and all from the first head on."""
        # Elsewhere text comes behind a picture too, and what is left of it is the template's to say.
        if stated_size(condition) is None:
            return None
        return (condition[0], *condition[max(1, list(condition).index(IMAGE_BEGIN)) :])


def is_text(id: int) -> bool:
    """Whether an id may stand in the text of a prompt."""
    return 0 <= id < SPECIAL_BEGIN


def head(grid: tuple[int, int], frames: int | None = None) -> list[int]:
    """What a picture begins with.

    Args:
        grid: rows and columns, that it states.
        frames: that it states before them, as UniVLA's do; None: as Emu3's, none.
    """
    numbers = "*".join(str(number) for number in ((*grid,) if frames is None else (frames, *grid)))
    size = [STAR if character == "*" else DIGITS[int(character)] for character in numbers]
    return [IMAGE_BEGIN, *size, IMAGE_TOKEN]


def stated_size(prompt: Sequence[int]) -> tuple[int, int] | None:
    """Rows and columns in the head that a prompt ends with; None: it ends with none."""
    if not prompt or prompt[-1] != IMAGE_TOKEN:
        return None
    end = list(prompt[-LONGEST_HEAD:-1])
    if IMAGE_BEGIN not in end:
        return None
    head = end[len(end) - end[::-1].index(IMAGE_BEGIN) :]
    numbers = "".join(CHARACTERS.get(token, "?") for token in head).split("*")
    # UniVLA's has a number of frames before them.
    if len(numbers) not in (2, 3) or not all(number.isdecimal() for number in numbers):
        return None
    return int(numbers[-2]), int(numbers[-1])
