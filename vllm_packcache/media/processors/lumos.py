"""Lumos-1 with its tokenizers: a sentence, and a picture or a video, become a video, a latent frame at a time.

What is asked for is written as the model was trained to read it: the text states size, duration and rate; a picture is
the first latent frame, the frames of a video to continue follow it. The server makes the latent frames that are left.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np

from vllm_packcache.config.errors import shown
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.core.plan import Role
from vllm_packcache.families import lumos
from vllm_packcache.families.lumos import FRAMES_PER_LATENT, PIXELS_PER_TOKEN
from vllm_packcache.media.pictures import Pixels, fit, used
from vllm_packcache.media.processors import base
from vllm_packcache.media.processors.base import Asked, Kept, Prepared
from vllm_packcache.media.text_tokenizer import TextTokenizer
from vllm_packcache.media.video_tokenizer import Codes, CosmosTokenizer, OneAtATime, VideoTokenizer
from vllm_packcache.media.videos import Clip, read_video

SIZES = ((448, 256), (672, 384), (768, 480))
"""Width and height of the published sizes; of the second the model's videos are shown."""

FRAMES_PER_SECOND = 8
SECONDS = 6

LARGEST_NUMBER = lumos.MASK - lumos.NUMBER_ZERO - 1
"""A prompt and a frame state numbers up to this one: the next id is the mask's."""

OWN_OPTIONS = ("grid", "frames", "condition_frames")
"""Of a request: they follow from what is asked for."""

PREVIEW_RUN = 3
"""Latent frames that are decoded for the pictures of the last of them: earlier ones hardly change these."""

LONGEST_RUN = 13
"""Latent frames that are decoded at once: so many have the published videos, of 48 frames."""

RUN_CONTEXT = 4
"""Of a run that is not the first: latent frames of the one before, whose pictures are not taken."""


class Names(NamedTuple):
    """What options are called in messages."""

    size: str
    frames: str
    rate: str


FIELDS = Names("size", "num_frames", "fps")
"""To clients of the API."""


@dataclass(frozen=True)
class Stated:
    """What a prompt states of a video.

    Args:
        width: of a frame, in pixels.
        height: of a frame.
        frames: of the whole video, with what is given of it.
        rate: frames a second.
        names: of these, in messages.

    Raises:
        ValueError: a prompt cannot state this.
    """

    width: int
    height: int
    frames: int
    rate: int
    names: Names = FIELDS

    def __post_init__(self) -> None:
        names = self.names
        try:
            lumos.grid_of(self.width, self.height)
        except ValueError as error:
            raise ValueError(f"{names.size}: {error}") from None
        if max(self.width, self.height) > LARGEST_NUMBER * lumos.PIXELS_PER_SIZE:
            most = LARGEST_NUMBER * lumos.PIXELS_PER_SIZE
            raise ValueError(f"{names.size}: sides are {most} at most, not {self.width} x {self.height}")
        check_rate(self.rate, names)
        if self.frames % self.rate or not 1 <= self.seconds <= LARGEST_NUMBER:
            raise ValueError(
                f"{names.frames} {self.frames} at {names.rate} {self.rate}: a prompt states whole seconds, 1 to "
                f"{LARGEST_NUMBER}; give {names.frames} a multiple of {self.rate} up to {LARGEST_NUMBER * self.rate}"
            )

    @property
    def seconds(self) -> int:
        """Duration."""
        return self.frames // self.rate

    @property
    def grid(self) -> lumos.Grid:
        """Of the visual tokens."""
        return lumos.grid_of(self.width, self.height)

    @property
    def latent_frames(self) -> int:
        """Of the whole video."""
        return latent_frames(self.frames)

    def text(self, tokenizer: TextTokenizer, caption: str) -> list[int]:
        """The prompt without frames.

        Raises:
            ValueError: the caption cannot stand before a video.
        """
        # What is no text, as half a character is none, is marked.
        caption = caption.encode("utf-8", "replace").decode()
        ids = tokenizer.encode(lumos.question(caption, self.width, self.height, self.seconds, self.rate))
        return lumos.text_prompt(ids, self.seconds, self.rate)

    def used(self, clip: Clip, what: str) -> Pixels:
        """Frames of a video with which this one begins: of its end so many as can be encoded, 1 + 4 k.

        Args:
            clip: the video, as much of it as this one has frames.
            what: it is, in messages.

        Raises:
            ValueError: it is as long as this one.
        """
        if clip.total >= self.frames:
            raise ValueError(
                f"{what} has {clip.total} frames at {self.names.rate} {self.rate} ({float(clip.seconds):.1f} s), and "
                f"{self.names.frames} asks for {self.frames} in all: ask for more, or give the end of it alone"
            )
        return clip.frames[(clip.total - 1) % FRAMES_PER_LATENT :]

    def left(self, given: int) -> int:
        """Latent frames to make.

        Args:
            given: so many are known.

        Raises:
            ValueError: there are none.
        """
        if given >= self.latent_frames:
            raise ValueError(
                f"{self.names.frames} {self.frames} are {self.latent_frames} latent frames, of which {given} are "
                "given: ask for more frames"
            )
        return self.latent_frames - given

    def cut(self, width: int, height: int) -> str:
        """What of a picture of this size is used, in words."""
        return used((width, height), (self.width, self.height))


class LumosProcessor:
    """See `vllm_packcache.media.processors.base.VideoProcessor`. Frames of the protocol are latent frames.

    Args:
        folder: of both tokenizers.
        server: its configuration; None: not known.
        max_model_len: most tokens of a sequence; None: not known.

    Raises:
        OSError: a file is missing.
        ValueError: a file is none of a tokenizer.
    """

    name = "lumos"
    role: Role | None = "canvas"

    def __init__(self, folder: Path, server: ServerConfig | None = None, max_model_len: int | None = None) -> None:
        base.check_files(folder, base.COSMOS_FILES)
        self._text = TextTokenizer(folder)
        self._video: VideoTokenizer = OneAtATime(CosmosTokenizer(folder))
        self._server, self._most = server, max_model_len
        self._most_tokens: int | None = None
        self._size = SIZES[1]
        if server is not None and server.grid is not None:
            rows, columns = server.grid
            self._most_tokens = lumos.frame_layout(server.grid).tokens_per_frame
            self._size = columns * PIXELS_PER_TOKEN, rows * PIXELS_PER_TOKEN
        self._decoded: set[lumos.Grid] = set()

    def about(self) -> dict[str, Any]:
        """See `VideoProcessor.about`."""
        tokens = lumos.frame_layout(lumos.grid_of(*self._size)).tokens_per_frame
        sizes = [size for size in SIZES if self._fits(lumos.grid_of(*size))]
        latent = base.most_frames(self._most, lumos.LEAST_TEXT_TOKENS, tokens, 0)
        seconds = min(LARGEST_NUMBER, max(1, pictures_of(latent) // FRAMES_PER_SECOND))
        return {
            "name": self.name,
            "text": True,
            "sizes": [f"{width}x{height}" for width, height in dict.fromkeys([*sizes, self._size])],
            "size": f"{self._size[0]}x{self._size[1]}",
            "fps": FRAMES_PER_SECOND,
            "frames": min(SECONDS, seconds) * FRAMES_PER_SECOND,
            "frames_step": FRAMES_PER_SECOND,
            "most_frames": seconds * FRAMES_PER_SECOND,
            "picture": "optional",
            "clip": True,
            "options": base.masked_ranges(self._server),
            "examples": [],
        }

    def prepare(self, asked: Asked) -> Prepared:
        """See `VideoProcessor.prepare`."""
        how, _ = base.told(asked, "canvas", OWN_OPTIONS)
        base.no_ids(asked)
        if asked.picture is not None and asked.clip is not None:
            raise ValueError("input_reference must be a picture or a video, not both")
        rate = FRAMES_PER_SECOND if asked.fps is None else asked.fps
        width, height = self._size if asked.size is None else asked.size
        check_rate(rate)
        stated = Stated(width, height, base.pictures_asked(asked, rate, SECONDS * rate), rate)
        text = stated.text(self._text, asked.prompt)
        self._check(stated.grid, len(text), stated.latent_frames)
        given, notes = self._given(asked, stated)
        options = {**how, "frames": stated.left(len(given)), "condition_frames": min(1, len(given))}
        return self._prepared(prompt_of(text, given), options, given, (width, height), rate, stated.frames, notes)

    def extend(self, kept: Kept, asked: Asked) -> Prepared:
        """See `VideoProcessor.extend`. With another prompt the text states the whole duration, as it was trained to."""
        how, _ = base.told(asked, "canvas", OWN_OPTIONS)
        base.no_ids(asked)
        base.nothing_given(asked)
        base.check_size(asked, kept.size, "an extension has the size of its video")
        base.check_fps(asked, kept.fps, "an extension has the rate of its video")
        pictures = kept.pictures + base.pictures_asked(asked, kept.fps)
        text, frames = split(kept.prompt_ids)
        if asked.prompt.strip():
            text = self._restated(text, asked.prompt, kept, pictures)
        grid = lumos.grid_of(*kept.size)
        self._check(grid, len(text), latent_frames(pictures))
        made = [lumos.codes_of_frame(ids, grid)[None] for ids in kept.frame_ids]
        given = np.concatenate([kept.given.reshape(-1, *grid), *made])
        left = latent_frames(pictures) - len(given)
        if left < 1:
            raise ValueError(
                f"seconds must add a latent frame, of {FRAMES_PER_LATENT} pictures, to the {kept.pictures} pictures of "
                "the video: ask for more"
            )
        options = {**kept.options, **how, "frames": left}
        prompt_ids = [*text, *frames, *kept.frame_ids.ravel().tolist()]
        return self._prepared(prompt_ids, options, given, kept.size, kept.fps, pictures)

    def decoder(self, prepared: Prepared) -> _Decoder:
        """See `VideoProcessor.decoder`."""
        return _Decoder(self._video, prepared)

    def _given(self, asked: Asked, stated: Stated) -> tuple[Codes, tuple[str, ...]]:
        """Codes of what a client gives of a video, and what is used of it in words.

        A picture is the first latent frame. Of a video that is to be continued the first frame is the conditioning
        image, which is kept for ever, and the others are frames as if they had been made.
        """
        if asked.picture is not None:
            height, width, _ = asked.picture.shape
            codes = self._video.encode(fit(asked.picture, stated.width, stated.height)[None])
            return codes, (f"picture: {stated.cut(width, height)}",)
        if asked.clip is None:
            return np.empty((0, *stated.grid), np.int64), ()
        try:
            clip = read_video(asked.clip, stated.width, stated.height, stated.rate, stated.frames, of_client=True)
        except OSError as error:
            # The client knows nothing of the file that its video is in.
            raise ValueError(f"input_reference {str(error).removeprefix(f'{asked.clip} ')}") from None
        used = stated.used(clip, "input_reference")
        which = "all" if len(used) == clip.total else f"the last {len(used)} of"
        words = f"{which} {clip.total} frames at {stated.rate} a second, {stated.cut(*clip.size)}"
        return self._video.encode(used), (f"video: {', '.join(clip.notes)}; used: {words}",)

    def _restated(self, text: list[int], caption: str, kept: Kept, pictures: int) -> list[int]:
        """The text of a video that goes on: as it was if the caption is the same."""
        seconds, rate = (number - lumos.NUMBER_ZERO for number in text[-2:])
        if Stated(*kept.size, seconds * rate, rate).text(self._text, caption) == text:
            return text
        return Stated(*kept.size, pictures, kept.fps).text(self._text, caption)

    def _fits(self, grid: lumos.Grid) -> bool:
        return self._most_tokens is None or lumos.frame_layout(grid).tokens_per_frame <= self._most_tokens

    def _check(self, grid: lumos.Grid, text_tokens: int, latent: int) -> None:
        """Check what can be known of a video before anything is encoded, which takes memory with its size.

        Raises:
            ValueError: it is too large or too long, or cannot be decoded once it is made.
        """
        tokens = lumos.frame_layout(grid).tokens_per_frame
        if not self._fits(grid):
            raise ValueError(
                f"size: frames of {grid[1] * PIXELS_PER_TOKEN}x{grid[0] * PIXELS_PER_TOKEN} have {tokens} tokens, and "
                f"this server makes them of {self._most_tokens} at most: ask for a smaller size"
            )
        base.check_length(text_tokens + latent * tokens, self._most, "ask for fewer frames, or smaller ones")
        if grid not in self._decoded:
            self._video.decode(np.zeros((1, *grid), np.int64))
            self._decoded.add(grid)

    @staticmethod
    def _prepared(
        prompt_ids: list[int],
        options: dict[str, Any],
        given: Codes,
        size: tuple[int, int],
        fps: int,
        pictures: int,
        notes: tuple[str, ...] = (),
    ) -> Prepared:
        grid = lumos.grid_of(*size)
        return Prepared(
            prompt_ids=prompt_ids,
            options={**options, "grid": list(grid)},
            sampling={},
            tokens_per_frame=lumos.frame_layout(grid).tokens_per_frame,
            made=options["frames"],
            given=given,
            size=size,
            fps=fps,
            pictures=pictures,
            notes=notes,
        )


class _Decoder:
    """See `vllm_packcache.media.processors.base.Decoder`.

    A latent frame is seen with those before it. While a video is made, each is decoded with a few of these; in the end
    the whole is, or long runs of it.

    Args:
        video: its tokenizer.
        prepared: of the video.
    """

    def __init__(self, video: VideoTokenizer, prepared: Prepared) -> None:
        self._video, self._pictures = video, prepared.pictures
        self._grid = lumos.grid_of(*prepared.size)
        self._given = len(prepared.given)
        self._codes = list(prepared.given)

    def given(self) -> Sequence[Pixels]:
        """See `Decoder.given`. Each run is decoded when it is looked at."""
        return _Runs(self, self._given)

    def add(self, ids: Sequence[int]) -> Pixels:
        """See `Decoder.add`."""
        self._codes.append(lumos.codes_of_frame(ids, self._grid))
        return self.run(len(self._codes) - 1, len(self._codes), PREVIEW_RUN - 1)

    def whole(self) -> Iterator[Pixels]:
        """See `Decoder.whole`."""
        begin = 0
        while begin < len(self._codes):
            end = min(begin + LONGEST_RUN - (RUN_CONTEXT if begin else 0), len(self._codes))
            yield self.run(begin, end, RUN_CONTEXT)
            begin = end

    def run(self, begin: int, end: int, context: int) -> Pixels:
        """Pictures of latent frames, [n, H, W, 3].

        Args:
            begin: the first of them.
            end: the first that is none of them.
            context: so many before them are decoded too, where there are so many; 1 or more.
        """
        decoded = self._video.decode(np.stack(self._codes[max(0, begin - context) : end]))
        before, after = pictures_of(begin), pictures_of(end)
        return decoded[len(decoded) - (after - before) :][: self._pictures - before]


class _Runs(Sequence[Pixels]):
    """Pictures of each of the first latent frames of a video.

    Args:
        decoder: of the video.
        count: latent frames.
    """

    def __init__(self, decoder: _Decoder, count: int) -> None:
        self._decoder, self._numbers = decoder, range(count)

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, place: int) -> Pixels: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Pixels]: ...
    def __getitem__(self, place: int | slice) -> Pixels | Sequence[Pixels]:
        if isinstance(place, slice):
            return [self[number] for number in self._numbers[place]]
        number = self._numbers[place]
        return self._decoder.run(number, number + 1, PREVIEW_RUN - 1)


def latent_frames(pictures: int) -> int:
    """Latent frames of a video of so many pictures."""
    return lumos.latent_frames(1, pictures)


def pictures_of(latent: int) -> int:
    """Pictures that so many latent frames stand for."""
    return 0 if latent == 0 else 1 + (latent - 1) * FRAMES_PER_LATENT


def prompt_of(text: Sequence[int], given: Codes) -> list[int]:
    """Text, and the frames that are given.

    Args:
        text: of `Stated.text`.
        given: their codes, [g, rows, columns].
    """
    return [*text, *(id for codes in given for id in lumos.frame_of_codes(codes).tolist())]


def split(prompt_ids: Sequence[int]) -> tuple[list[int], list[int]]:
    """Text and frames of a prompt, with a duration and a rate at the end of the text."""
    end = list(prompt_ids).index(lumos.VIDEO_BEGIN) + lumos.VIDEO_START_TOKENS
    return list(prompt_ids[:end]), list(prompt_ids[end:])


def check_rate(rate: int, names: Names = FIELDS) -> None:
    """Check that a prompt can state a rate.

    Raises:
        ValueError: it cannot.
    """
    if not 1 <= rate <= LARGEST_NUMBER:
        raise ValueError(f"{names.rate} lies between 1 and {LARGEST_NUMBER}, not {shown(rate)}")
