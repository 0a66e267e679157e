"""Emu3 and UniVLA's world model with their tokenizers: a sentence becomes a picture, or a picture a video.

What is asked for is written as the models were trained to read it. Emu3 makes one picture of a text. UniVLA goes on
from a picture, frame by frame. Which of the two is served is read off the server's layout, that of the preset ``emu3``
or ``univla``. Both state the size of their frames, so that a client may ask for any.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vllm_packcache.config.errors import shown
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.core.layout import FrameLayout
from vllm_packcache.core.plan import Role
from vllm_packcache.families import emu3
from vllm_packcache.media.emu3_tokenizer import Emu3Tokenizer
from vllm_packcache.media.pictures import Pixels, fit, used
from vllm_packcache.media.processors import base
from vllm_packcache.media.processors.base import Asked, Int64, Kept, Prepared
from vllm_packcache.media.processors.pictures import visual_ids
from vllm_packcache.media.text_tokenizer import TextTokenizer
from vllm_packcache.media.video_tokenizer import OneAtATime, VideoTokenizer

PICTURE_SIZES = ((720, 720), (960, 544), (544, 960), (512, 512))
"""Width and height of pictures: of the published area of 518,400 pixels, and of 262,144."""

VIDEO_SIZES = ((256, 256), (200, 200), (240, 192))
"""Of the frames in UniVLA's public code."""

VIDEO_FRAMES = 6
"""Of a video where a client does not say: the given picture and five more, as UniVLA was trained and is shown."""

VIDEO_FRAMES_PER_SECOND = 5
"""Where a client does not say: videos of robots have many rates, and no prompt states one."""

TIKTOKEN_FILE = "emu3.tiktoken"
"""The text tokenizer as BAAI publishes it, beside code that reads it."""

OWN_OPTIONS = ("grid", "tokens_per_frame", "frames", "condition_tokens", "condition_image_tokens", "given_ids")
"""Of a request: they follow from what is asked for."""

PICTURE_END = (emu3.FRAME_END,)
VIDEO_END = (
    emu3.FRAME_END, emu3.IMAGE_END, emu3.IMAGE_BEGIN, emu3.DIGITS[1], emu3.STAR, "rows", emu3.STAR, "columns",
    emu3.IMAGE_TOKEN,
)  # fmt: skip
"""``frame_end_ids`` of the two presets."""

SHORTER = "ask for fewer frames, or smaller ones"


class Emu3Processor:
    """See `vllm_packcache.media.processors.base.VideoProcessor`.

    Args:
        folder: of both tokenizers, with `base.EMU3_FILES`.
        server: its configuration; None: not known.
        max_model_len: most tokens of a sequence; None: not known.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is missing or none of a tokenizer, or the server's frames are of other models.
    """

    name = "emu3"
    role: Role | None = "causal"

    def __init__(self, folder: Path, server: ServerConfig | None = None, max_model_len: int | None = None) -> None:
        _check_files(folder)
        layout, self._guidance = (None, None) if server is None else (server.layout, server.guidance)
        continues = None
        if layout is not None and layout.frame_layout().frame_start_tokens == 0:
            rows, ends = (layout.row_end_tokens, layout.row_end_ids, layout.last_row_end_ids), layout.frame_end_ids
            if rows == (1, (emu3.ROW_END,), None) and ends == PICTURE_END:
                continues = False
            elif rows[0] == 0 and ends == VIDEO_END and layout.digit_ids == emu3.DIGITS:
                continues = True
        if layout is None or layout.grid is None or continues is None:
            raise ValueError(
                "it is for frames as the presets emu3 and univla have them, and the server's layout is another: give "
                "--kv-cache-policy-config with layout: emu3 or univla, or leave the tokenizer out for token ids alone"
            )
        self._text = TextTokenizer(folder, emu3.is_text)
        tokenizer = Emu3Tokenizer(folder)
        last = emu3.VISUAL_BEGIN + tokenizer.codes - 1
        if layout.visual_ids != (emu3.VISUAL_BEGIN, last):
            raise ValueError(
                f"it has {tokenizer.codes} codes, for visual_ids [{emu3.VISUAL_BEGIN}, {last}], and the server's "
                f"layout has {shown(layout.visual_ids)}: give the model's own tokenizer"
            )
        self._pictures: VideoTokenizer = OneAtATime(tokenizer)
        self._codes, self._pixels = tokenizer.codes, tokenizer.pixels_per_token
        self._layout, self._continues, self._most = layout, continues, max_model_len
        self._fps, self._frames = (VIDEO_FRAMES_PER_SECOND, VIDEO_FRAMES) if continues else (1, 1)
        self._size = layout.grid[1] * self._pixels, layout.grid[0] * self._pixels
        self._decoded: set[tuple[int, int]] = set()

    def about(self) -> dict[str, Any]:
        """See `VideoProcessor.about`."""
        sizes = [size for size in (VIDEO_SIZES if self._continues else PICTURE_SIZES) if self._fits(size)]
        grid = self._grid(self._size)
        most = 1
        if self._continues:
            condition = 1 + len(self._opening(grid, self._blank(grid), 1))
            most = base.most_frames(self._most, condition, self._frame(grid).tokens_per_frame, 1)
        return {
            "name": self.name,
            "text": True,
            "sizes": [f"{width}x{height}" for width, height in dict.fromkeys([self._size, *sizes])],
            "size": f"{self._size[0]}x{self._size[1]}",
            "fps": self._fps,
            "frames": min(self._frames, most),
            "frames_step": 1,
            "most_frames": most,
            "picture": "required" if self._continues else "none",
            "clip": False,
            "options": self._ranges(),
            "examples": [],
        }

    def prepare(self, asked: Asked) -> Prepared:
        """See `VideoProcessor.prepare`."""
        own, sampling = self._told(asked)
        base.no_ids(asked)
        if asked.clip is not None:
            raise ValueError("input_reference must be a picture, not a video: send a PNG, JPEG or WebP file")
        size = self._size if asked.size is None else asked.size
        grid = self._grid(size)
        fps = base.rate_asked(asked, self._fps)
        pictures = base.pictures_asked(asked, fps, self._frames)
        given, made = self._blank(grid), pictures - self._continues
        if not self._continues:
            if asked.picture is not None:
                raise ValueError("input_reference must be left out: this model makes a picture of a text alone")
            if pictures != 1:
                raise ValueError(
                    f"num_frames must be 1, not {pictures}: this server makes pictures, and weights of Emu3 that make "
                    "videos are not published"
                )
        elif made < 1:
            raise ValueError(f"num_frames must be 2 or more, not {pictures}: the given picture is the first one")
        opening = self._opening(grid, given, made)
        text = self._read(asked.prompt)
        self._check(grid, len(text) + len(opening), made)
        notes: tuple[str, ...] = ()
        if self._continues:
            if asked.picture is None:
                raise ValueError("input_reference is needed: this model goes on from a picture, so send one")
            given = self._pictures.encode(fit(asked.picture, *size)[None])
            opening = self._opening(grid, given, made)
            notes = (f"picture: {used((asked.picture.shape[1], asked.picture.shape[0]), size)}",)
        return Prepared(
            prompt_ids=[*text, *opening],
            options={
                **self._guided(asked, own, opening),
                **self._options(grid, made),
                "condition_image_tokens": len(opening) * self._continues,
            },
            sampling=sampling,
            tokens_per_frame=self._frame(grid).tokens_per_frame,
            made=made,
            given=given,
            size=size,
            fps=fps,
            pictures=pictures,
            notes=notes,
        )

    def extend(self, kept: Kept, asked: Asked) -> Prepared:
        """See `VideoProcessor.extend`. The condition still states the number of frames that was asked for first."""
        own, sampling = self._told(asked)
        base.no_ids(asked)
        base.nothing_given(asked)
        if not self._continues:
            raise ValueError("video must be one that can go on, and this model makes single pictures: make another")
        base.check_size(asked, kept.size, "an extension has the size of its video")
        base.check_fps(asked, kept.fps, "an extension has the rate of its video")
        added = base.pictures_asked(asked, kept.fps)
        grid = self._grid(kept.size)
        end = kept.options.get("condition_tokens", len(kept.prompt_ids))
        condition, opening = kept.prompt_ids[:end], kept.prompt_ids[:end][-kept.options["condition_image_tokens"] :]
        if asked.prompt.strip():
            condition = [*self._read(asked.prompt), *opening]
        history = [*kept.prompt_ids[end:], *kept.frame_ids.ravel().tolist()]
        self._check(grid, len(condition) + len(history), added)
        made = [self.codes_of(grid, ids)[None] for ids in kept.frame_ids]
        return Prepared(
            prompt_ids=[*condition, *history],
            options={
                **self._guided(asked, {**kept.options, **own}, opening),
                **self._options(grid, added),
                "condition_tokens": len(condition),
            },
            sampling=sampling,
            tokens_per_frame=self._frame(grid).tokens_per_frame,
            made=added,
            given=np.concatenate([kept.given.reshape(-1, *grid), *made]),
            size=kept.size,
            fps=kept.fps,
            pictures=kept.pictures + added,
        )

    def decoder(self, prepared: Prepared) -> _Decoder:
        """See `VideoProcessor.decoder`."""
        return _Decoder(self, self._pictures, self._grid(prepared.size), prepared.given)

    def codes_of(self, grid: tuple[int, int], ids: Sequence[int] | Int64) -> Int64:
        """Codes of a frame, [rows, columns], of all its ids.

        Raises:
            ValueError: they are too many or too few, or none of the tokenizer's.
        """
        codes = visual_ids(self._frame(grid), ids) - emu3.VISUAL_BEGIN
        if codes.min() < 0 or codes.max() >= self._codes:
            last = emu3.VISUAL_BEGIN + self._codes - 1
            raise ValueError(f"a frame must have visual ids from {emu3.VISUAL_BEGIN} to {last}, and has others")
        return codes

    def _told(self, asked: Asked) -> tuple[dict[str, Any], dict[str, Any]]:
        own, sampling = base.told(asked, "causal", OWN_OPTIONS, self._guidance)
        if asked.temperature is None:
            sampling["temperature"] = emu3.TEMPERATURE
        return own, {"top_k": emu3.TOP_K, **sampling}

    def _guided(self, asked: Asked, options: dict[str, Any], opening: list[int]) -> dict[str, Any]:
        """Options with those of the second stream, whose condition has the same opening behind another text."""
        usual = "" if self._continues else emu3.NEGATIVE_PROMPT
        return base.guided(asked, options, self._guidance, lambda text: [*self._read(text or usual), *opening])

    def _ranges(self) -> dict[str, Any]:
        ranges = base.ranges(self._guidance)
        return {**ranges, "temperature": {**ranges["temperature"], "default": emu3.TEMPERATURE}}

    @staticmethod
    def _options(grid: tuple[int, int], frames: int) -> dict[str, Any]:
        return {"grid": list(grid), "frames": frames}

    def _read(self, text: str) -> list[int]:
        """A text as a prompt begins with it. What is no text, as half a character is none, is marked."""
        text = unicodedata.normalize("NFC", text).encode("utf-8", "replace").decode()
        return [emu3.BEGIN, *self._text.encode(text)]

    def _opening(self, grid: tuple[int, int], given: Int64, frames: int) -> list[int]:
        """What stands between the text and the first frame that is made.

        Args:
            grid: rows and columns.
            given: codes of the given picture, [1, rows, columns]; [0, rows, columns]: there is none.
            frames: that are made, which UniVLA's first head states.
        """
        if not len(given):
            return emu3.head(grid)
        picture = (given[0] + emu3.VISUAL_BEGIN).ravel().tolist()
        return [*emu3.head(grid, 1), *picture, emu3.FRAME_END, emu3.IMAGE_END, *emu3.head(grid, frames)]

    def _blank(self, grid: tuple[int, int]) -> Int64:
        return np.zeros((int(self._continues), *grid), np.int64)

    def _grid(self, size: tuple[int, int]) -> tuple[int, int]:
        width, height = size
        if min(size) < 1 or width % self._pixels or height % self._pixels:
            raise ValueError(
                f"size must have sides that are multiples of {self._pixels}, not {base.shown_size(width, height)}"
            )
        return height // self._pixels, width // self._pixels

    def _frame(self, grid: tuple[int, int]) -> FrameLayout:
        try:
            return self._layout.model_copy(update={"grid": grid, "tokens_per_frame": None}).frame_layout()
        except ValueError as error:
            raise ValueError(f"size: {error}") from None

    def _fits(self, size: tuple[int, int]) -> bool:
        grid = self._grid(size)
        tokens = 1 + len(self._opening(grid, self._blank(grid), 1)) + self._frame(grid).tokens_per_frame
        return self._most is None or tokens <= self._most

    def _check(self, grid: tuple[int, int], tokens: int, frames: int) -> None:
        """Check what can be known of a video before a picture is encoded, which takes memory with its size.

        Raises:
            ValueError: it is too long, or cannot be decoded once it is made.
        """
        base.check_length(tokens + frames * self._frame(grid).tokens_per_frame, self._most, SHORTER)
        if grid not in self._decoded:
            self._pictures.decode(np.zeros((1, *grid), np.int64))
            self._decoded.add(grid)


class _Decoder:
    """See `vllm_packcache.media.processors.base.Decoder`. Each frame is a picture by itself.

    Args:
        processor: that knows frames.
        pictures: the tokenizer.
        grid: rows and columns.
        given: codes of frames that are known, [g, rows, columns].
    """

    def __init__(self, processor: Emu3Processor, pictures: VideoTokenizer, grid: tuple[int, int], given: Int64) -> None:
        self._processor, self._pictures, self._grid, self._given = processor, pictures, grid, given

    def given(self) -> list[Pixels]:
        """See `Decoder.given`."""
        return [self._pictures.decode(codes[None]) for codes in self._given]

    def add(self, ids: Sequence[int]) -> Pixels:
        """See `Decoder.add`."""
        return self._pictures.decode(self._processor.codes_of(self._grid, ids)[None])

    def whole(self) -> None:
        """See `Decoder.whole`."""


def _check_files(folder: Path) -> None:
    if not (folder / base.TEXT_FILE).is_file() and (folder / TIKTOKEN_FILE).is_file():
        raise ValueError(
            f"the folder has the text tokenizer as {TIKTOKEN_FILE} alone, which only code of the model's own reads, "
            f"and that is never run: put {base.TEXT_FILE} of Emu3-community/Emu3-Gen-hf beside it"
        )
    base.check_files(folder, base.EMU3_FILES)
