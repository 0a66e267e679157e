"""The bundled model behind the API for videos: a picture and a sentence become a video, token by token."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from vllm_packcache.config.server import REQUEST_PREFIX, ServerConfig
from vllm_packcache.core.plan import Role
from vllm_packcache.demo.tokenizer import (
    CONDITION_TOKENS,
    FRAME_TOKENS,
    GRID,
    SIZE,
    VideoTokenizer,
    readable,
)
from vllm_packcache.media.pictures import Pixels
from vllm_packcache.media.processors import base
from vllm_packcache.media.processors.base import Asked, Int64, Kept, Prepared

ASSETS = Path(__file__).parent / "assets"
FRAMES = 20
"""More than the model was trained on."""
FRAMES_PER_SECOND = 4

OWN_OPTIONS = ("grid", "tokens_per_frame", "frames", "condition_tokens", "condition_image_tokens", "given_ids")
"""Of a request: they follow from what the model is."""

SHORTER = "ask for fewer frames"


class DemoProcessor:
    """See `vllm_packcache.media.processors.base.VideoProcessor`. The given picture is the first one of a video.

    Args:
        server: its configuration.
        max_model_len: most tokens of a sequence; None: not known.

    Raises:
        ValueError: the server's frames are none of this model.
    """

    name = "demo"
    role: Role | None = "causal"

    def __init__(self, server: ServerConfig | None = None, max_model_len: int | None = None) -> None:
        if server is not None:
            options = base.unguided(self._options(1), server.guidance)
            check_frames(server, options, CONDITION_TOKENS, FRAME_TOKENS, "demo")
        self._guidance = None if server is None else server.guidance
        self._most = max_model_len
        self._tokenizer = VideoTokenizer()

    def about(self) -> dict[str, Any]:
        """See `VideoProcessor.about`."""
        most = base.most_frames(self._most, CONDITION_TOKENS, FRAME_TOKENS, 1)
        return {
            "name": self.name,
            "text": True,
            "sizes": [f"{SIZE}x{SIZE}"],
            "size": f"{SIZE}x{SIZE}",
            "fps": FRAMES_PER_SECOND,
            "frames": min(FRAMES, most),
            "frames_step": 1,
            "most_frames": most,
            "picture": "required",
            "clip": False,
            "options": base.ranges(self._guidance),
            "examples": [self._example],
        }

    def prepare(self, asked: Asked) -> Prepared:
        """See `VideoProcessor.prepare`."""
        own, sampling = base.told(asked, "causal", OWN_OPTIONS, self._guidance)
        base.no_ids(asked)
        check_picture(asked)
        if asked.picture is None:
            raise ValueError("input_reference is needed: this model goes on from a picture, so send one")
        pictures = base.pictures_asked(asked, FRAMES_PER_SECOND, FRAMES)
        if pictures < 2:
            raise ValueError(f"num_frames must be 2 or more, not {pictures}: the given picture is the first one")
        base.check_length(CONDITION_TOKENS + (pictures - 1) * FRAME_TOKENS, self._most, SHORTER)
        picture = self._tokenizer.encode_image(asked.picture)
        own = base.guided(asked, own, self._guidance, lambda text: self._condition(text, picture))
        return Prepared(
            prompt_ids=self._condition(asked.prompt, picture),
            options={**own, **self._options(pictures - 1)},
            sampling=sampling,
            tokens_per_frame=FRAME_TOKENS,
            made=pictures - 1,
            given=picture[None] - self._tokenizer.visual_offset,
            size=(SIZE, SIZE),
            fps=FRAMES_PER_SECOND,
            pictures=pictures,
        )

    def extend(self, kept: Kept, asked: Asked) -> Prepared:
        """See `VideoProcessor.extend`."""
        own, sampling = base.told(asked, "causal", OWN_OPTIONS, self._guidance)
        base.no_ids(asked)
        base.nothing_given(asked)
        check_picture(asked)
        added = base.pictures_asked(asked, FRAMES_PER_SECOND)
        history = [*kept.prompt_ids[CONDITION_TOKENS:], *kept.frame_ids.ravel().tolist()]
        base.check_length(CONDITION_TOKENS + len(history) + added * FRAME_TOKENS, self._most, SHORTER)
        picture = np.array(kept.prompt_ids[CONDITION_TOKENS - GRID * GRID : CONDITION_TOKENS])
        own = base.guided(asked, {**kept.options, **own}, self._guidance, lambda text: self._condition(text, picture))
        condition = kept.prompt_ids[:CONDITION_TOKENS]
        if readable(asked.prompt):
            condition = self._condition(asked.prompt, picture)
        decoder = _Decoder(self._tokenizer, kept.given)
        return Prepared(
            prompt_ids=[*condition, *history],
            options={**own, **self._options(added), "condition_tokens": CONDITION_TOKENS},
            sampling=sampling,
            tokens_per_frame=FRAME_TOKENS,
            made=added,
            given=np.concatenate([kept.given, *(decoder.codes(ids)[None] for ids in kept.frame_ids.tolist())]),
            size=kept.size,
            fps=kept.fps,
            pictures=kept.pictures + added,
        )

    def decoder(self, prepared: Prepared) -> _Decoder:
        """See `VideoProcessor.decoder`."""
        return _Decoder(self._tokenizer, prepared.given)

    def _condition(self, text: str, picture: Int64) -> list[int]:
        """A sentence and a picture, token ids [16, 16], as the model reads them."""
        return self._tokenizer.build_prompt_from_ids(readable(text), picture)

    @staticmethod
    def _options(frames: int) -> dict[str, Any]:
        return {"grid": [GRID, GRID], "frames": frames}

    @cached_property
    def _example(self) -> dict[str, str]:
        text = (ASSETS / "example_prompt.txt").read_text(encoding="utf-8")
        return {"prompt": readable(text), "picture": data_url((ASSETS / "example.png").read_bytes())}


class _Decoder:
    """See `vllm_packcache.media.processors.base.Decoder`. Wrong ids are mended as in `VideoTokenizer.frames_from_ids`.

    Args:
        tokenizer: of the model.
        given: codewords of the given picture and of frames that were made before, [1 + n, 16, 16].
    """

    def __init__(self, tokenizer: VideoTokenizer, given: Int64) -> None:
        self._tokenizer, self._given = tokenizer, given
        # The given picture is no frame that was made: the first frame is mended without one before it.
        self._before: npt.NDArray[np.int64] | None = given[-1] if len(given) > 1 else None

    def given(self) -> list[Pixels]:
        """See `Decoder.given`."""
        return [self._pictures(codes) for codes in self._given]

    def add(self, ids: Sequence[int]) -> Pixels:
        """See `Decoder.add`."""
        return self._pictures(self.codes(ids))

    def whole(self) -> None:
        """See `Decoder.whole`."""
        return None

    def codes(self, ids: Sequence[int]) -> Int64:
        """Codewords of the next frame, [16, 16]."""
        if len(ids) != FRAME_TOKENS:
            raise ValueError(f"a frame must have {FRAME_TOKENS} tokens, not {len(ids)}")
        offset = self._tokenizer.visual_offset
        before = None if self._before is None else self._before + offset
        self._before = self._tokenizer.frame_from_ids(ids, before) - offset
        return self._before

    def _pictures(self, codes: Int64) -> Pixels:
        return self._tokenizer.decode_frames(codes[None] + self._tokenizer.visual_offset)


def check_picture(asked: Asked) -> None:
    """Check what a client says of the pictures of a bundled model.

    Raises:
        ValueError: it has no such pictures, or cannot go on from what is given.
    """
    base.check_size(asked, (SIZE, SIZE), "the bundled model has one size")
    base.check_fps(asked, FRAMES_PER_SECOND, "the bundled model has one rate")
    if asked.clip is not None:
        raise ValueError("input_reference must be a picture, not a video: send a PNG, JPEG or WebP file")


def check_frames(server: ServerConfig, options: dict[str, Any], prompt: Any, tokens: int, preset: str) -> None:
    """Check that a server makes frames of a bundled model.

    Args:
        server: its configuration.
        options: of a request.
        prompt: of the same, as `ServerConfig.request` takes it.
        tokens: of a frame.
        preset: that such a server has.

    Raises:
        ValueError: it makes others.
    """
    request = server.request({f"{REQUEST_PREFIX}{name}": value for name, value in options.items()}, prompt)
    assert request is not None
    found = request.streams[0].plan.layout.tokens_per_frame
    if found != tokens:
        raise ValueError(
            f"frames of this model have {tokens} tokens, and the server's layout makes them of {found}: give "
            f"--kv-cache-policy-config with layout: {preset}"
        )


def png_url(pixels: Pixels) -> str:
    """A picture [H, W, 3] as a data URL."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return data_url(file.getvalue())


def data_url(png: bytes) -> str:
    """A PNG file as a data URL."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
