"""Models whose operator names what makes pictures of their ids: any that make a grid of ids token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import numpy as np

from vllm_packcache.config.server import REQUEST_PREFIX, ServerConfig
from vllm_packcache.core.layout import FrameLayout, VideoLayout
from vllm_packcache.core.plan import Role
from vllm_packcache.media.pictures import Pixels, fit
from vllm_packcache.media.processors import base
from vllm_packcache.media.processors.base import Asked, Int64, Kept, Prepared
from vllm_packcache.media.processors.ids import CONDITION_OPTIONS, SHORTER, checked_ids, continued, layout_of

FRAMES = 16
"""Of a video where a client does not say."""

FRAMES_PER_SECOND = 8
"""Where neither the client nor the operator's object says."""


class Pictures(Protocol):
    """What an operator names: pictures of frames, each by itself.

    It may have more than is said here: ``encode``, the inverse of ``decode``; ``prompt(text, picture)``, the ids of a
    prompt, where the picture is uint8 [H, W, 3] of ``size`` or None; and ``fps``, pictures a second. Of what it finds
    wrong it raises a ValueError.
    """

    size: tuple[int, int]
    """Width and height in pixels."""

    def decode(self, ids: Int64) -> Pixels:
        """The picture of a frame.

        Args:
            ids: of its visual tokens, [rows, columns].

        Returns:
            uint8, [H, W, 3].

        Raises:
            ValueError: these are no ids of a picture.
        """
        ...


def are_pictures(found: object) -> bool:
    """Whether an object has what `Pictures` must have."""
    return callable(getattr(found, "decode", None)) and hasattr(found, "size")


class PicturesProcessor:
    """See `vllm_packcache.media.processors.base.VideoProcessor`.

    Where the layout says that the condition ends in a picture, that one is the first of the video. A prompt is text,
    with or without a picture, where the operator's object has ``prompt``, and token ids otherwise.

    Args:
        name: by which the operator has named it.
        pictures: the object.
        server: its configuration, which says how frames are made up where a request does not.
        max_model_len: most tokens of a sequence; None: not known.

    Raises:
        ValueError: the object makes no pictures.
    """

    role: Role | None = "causal"

    def __init__(self, name: str, pictures: object, server: ServerConfig, max_model_len: int | None = None) -> None:
        if not are_pictures(pictures):
            raise ValueError("it must have size and decode, or all that a video processor has: it has not")
        self.name, self._pictures = name, cast(Pictures, pictures)
        self._server, self._most = server, max_model_len
        self._prompt = getattr(pictures, "prompt", None)
        self._fps = int(getattr(pictures, "fps", FRAMES_PER_SECOND))
        width, height = self._pictures.size
        self._size = int(width), int(height)

    def about(self) -> dict[str, Any]:
        """See `VideoProcessor.about`."""
        tokens = base.usual_tokens(self._server)
        size = f"{self._size[0]}x{self._size[1]}"
        most = base.most_frames(self._most, 0, tokens, 0)
        return {
            "name": self.name,
            "text": self._prompt is not None,
            "sizes": [size],
            "size": size,
            "fps": self._fps,
            "frames": min(FRAMES, most),
            "frames_step": 1,
            "most_frames": most,
            "picture": "none" if self._prompt is None else "optional",
            "clip": False,
            "options": base.ranges(self._server.guidance, text=self._prompt is not None),
            "examples": [],
        }

    def prepare(self, asked: Asked) -> Prepared:
        """See `VideoProcessor.prepare`."""
        own, sampling = base.told(asked, "causal", ("frames",), self._server.guidance)
        base.check_size(asked, self._size, "this server's video tokenizer has one size")
        fps = base.rate_asked(asked, self._fps)
        pictures = base.pictures_asked(asked, fps, FRAMES)
        ids = self._ids(asked)
        layout = layout_of(self._server, {**base.unguided(own, self._server.guidance), "frames": 1}, ids)
        own = self._guided(asked, own, len(ids) - layout.condition_tokens)
        return self._prepared(ids, own, sampling, self._given(layout, ids), pictures, fps)

    def extend(self, kept: Kept, asked: Asked) -> Prepared:
        """See `VideoProcessor.extend`. Conditions stay as they are: another prompt is not read."""
        own, sampling = base.told(asked, "causal", ("frames", *CONDITION_OPTIONS), self._server.guidance)
        base.no_ids(asked)
        if asked.negative_prompt:
            raise ValueError("negative_prompt must be left out: a video goes on with the one that it began with")
        base.nothing_given(asked)
        base.check_size(asked, kept.size, "an extension has the size of its video")
        base.check_fps(asked, kept.fps, "an extension has the rate of its video")
        added = base.pictures_asked(asked, kept.fps)
        ids, options = continued(self._server, kept, own)
        options = base.guided(asked, options, self._server.guidance, None)
        frame = layout_of(self._server, options, ids).frame
        given = np.stack([*kept.given, *(visual_ids(frame, own_ids) for own_ids in kept.frame_ids)])
        return self._prepared(ids, options, sampling, given, kept.pictures + added, kept.fps)

    def decoder(self, prepared: Prepared) -> _Decoder:
        """See `VideoProcessor.decoder`."""
        layout = layout_of(self._server, prepared.options, prepared.prompt_ids)
        return _Decoder(self._pictures, layout.frame, prepared)

    def _ids(self, asked: Asked) -> list[int]:
        """The prompt, as the client gives it or as the operator's object makes it."""
        if asked.clip is not None:
            raise ValueError("input_reference must be a picture, not a video: send a PNG, JPEG or WebP file")
        if asked.ids is not None or self._prompt is None:
            if asked.picture is not None:
                raise ValueError("input_reference must be left out: the prompt is token ids, which hold any picture")
            return checked_ids(asked)
        return self._read(asked, asked.prompt)

    def _read(self, asked: Asked, text: str) -> list[int]:
        """A text with the picture that the client gives, if it gives one, as the operator's object reads them."""
        assert self._prompt is not None
        picture = None if asked.picture is None else fit(asked.picture, *self._size)
        return [int(own) for own in self._prompt(text, picture)]

    def _guided(self, asked: Asked, own: Mapping[str, Any], behind: int) -> dict[str, Any]:
        """Options with those of the second stream, where ``behind`` tokens of a prompt are none of its condition."""
        if asked.ids is not None or self._prompt is None:
            return base.guided(asked, own, self._server.guidance, None)

        def condition(text: str) -> list[int]:
            ids = self._read(asked, text)
            return ids[: len(ids) - behind]

        return base.guided(asked, own, self._server.guidance, condition)

    def _given(self, layout: VideoLayout, ids: list[int]) -> Int64:
        """Visual ids of the pictures that a prompt holds, [g, rows, columns]."""
        grid = _grid(layout.frame)
        begin = layout.condition_tokens - layout.condition_image_tokens
        given = []
        if layout.condition_image_tokens == grid[0] * grid[1]:
            given = [np.array(ids[begin : layout.condition_tokens]).reshape(grid)]
            begin = layout.condition_tokens
        if (layout.condition_tokens - begin) % layout.tokens_per_frame:
            begin = layout.condition_tokens
        for start in range(begin, len(ids), layout.tokens_per_frame):
            given.append(visual_ids(layout.frame, ids[start : start + layout.tokens_per_frame]))
        return np.array(given, np.int64).reshape(-1, *grid)

    def _prepared(
        self, ids: list[int], own: dict[str, Any], sampling: dict[str, Any], given: Int64, pictures: int, fps: int
    ) -> Prepared:
        made = pictures - len(given)
        if made < 1:
            raise ValueError(
                f"num_frames must be more than the {len(given)} pictures that are given, not {pictures}: they are the "
                "first ones of the video"
            )
        options = {**own, "frames": made}
        layout = layout_of(self._server, options, ids)
        base.check_length(len(ids) + made * layout.tokens_per_frame, self._most, SHORTER)
        return Prepared(
            prompt_ids=ids,
            options=options,
            sampling=sampling,
            tokens_per_frame=layout.tokens_per_frame,
            made=made,
            given=given,
            size=self._size,
            fps=fps,
            pictures=pictures,
        )


class _Decoder:
    """See `vllm_packcache.media.processors.base.Decoder`.

    Args:
        pictures: of ids.
        frame: the shape of a frame.
        prepared: of the video.
    """

    def __init__(self, pictures: Pictures, frame: FrameLayout, prepared: Prepared) -> None:
        self._pictures, self._frame, self._prepared = pictures, frame, prepared

    def given(self) -> list[Pixels]:
        """See `Decoder.given`."""
        return [self._picture(ids) for ids in self._prepared.given]

    def add(self, ids: Sequence[int]) -> Pixels:
        """See `Decoder.add`."""
        return self._picture(visual_ids(self._frame, ids))

    def whole(self) -> None:
        """See `Decoder.whole`."""

    def _picture(self, ids: Int64) -> Pixels:
        picture = np.asarray(self._pictures.decode(ids))
        width, height = self._prepared.size
        if picture.dtype != np.uint8 or picture.shape != (height, width, 3):
            raise ValueError(
                f"the video tokenizer must make pictures uint8 [{height}, {width}, 3], not {picture.dtype} "
                f"{list(picture.shape)}"
            )
        return picture[None]


def visual_ids(frame: FrameLayout, ids: Sequence[int] | Int64) -> Int64:
    """Ids of the visual tokens of a frame, [rows, columns].

    Args:
        frame: its shape.
        ids: all its tokens, [F].

    Raises:
        ValueError: they are too many or too few, or the shape has no rows.
    """
    rows, columns = _grid(frame)
    if len(ids) != frame.tokens_per_frame:
        raise ValueError(f"a frame must have {frame.tokens_per_frame} tokens, not {len(ids)}")
    stride = columns + frame.row_end_tokens
    cells = np.asarray(ids, np.int64)[frame.frame_start_tokens :][: rows * stride]
    return cells.reshape(rows, stride)[:, :columns]


def _grid(frame: FrameLayout) -> tuple[int, int]:
    if frame.grid is None:
        raise ValueError(
            f"{REQUEST_PREFIX}grid is needed: pictures are made of rows and columns, and this server's layout has none"
        )
    return frame.grid
