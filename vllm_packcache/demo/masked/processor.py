"""The bundled masked model behind the API for videos: a sentence, with or without a picture, frame by frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np

from vllm_packcache.config.server import ServerConfig
from vllm_packcache.core.plan import Role
from vllm_packcache.demo.masked.bundle import OPTIONS, PRESET
from vllm_packcache.demo.masked.tokenizer import FRAME, GRID_SHAPE, MAX_SECONDS, RATE, build_text_tokenizer
from vllm_packcache.demo.processor import FRAMES_PER_SECOND, SHORTER, check_frames, check_picture, png_url
from vllm_packcache.demo.tokenizer import SIZE, TEXT_TOKENS, VideoTokenizer, readable
from vllm_packcache.demo.world import make_world
from vllm_packcache.families import lumos
from vllm_packcache.media.pictures import Pixels
from vllm_packcache.media.processors import base
from vllm_packcache.media.processors.base import Asked, Int64, Kept, Prepared
from vllm_packcache.media.processors.lumos import OWN_OPTIONS, prompt_of, split

FRAMES = 16
"""More than the model was trained on."""
EXAMPLE = 10_027
"""Seed of the world that is shown when nobody gives a picture or a sentence."""


class MaskedDemoProcessor:
    """See `vllm_packcache.media.processors.base.VideoProcessor`. A given picture is the first one of a video.

    Args:
        server: its configuration.
        max_model_len: most tokens of a sequence; None: not known.

    Raises:
        ValueError: the server's frames are none of this model.
    """

    name = "demo_masked"
    role: Role | None = "canvas"

    def __init__(self, server: ServerConfig | None = None, max_model_len: int | None = None) -> None:
        if server is not None:
            options = {"grid": list(GRID_SHAPE), "frames": 1}
            check_frames(server, options, lumos.text_prompt([], 1, RATE), FRAME.tokens_per_frame, PRESET)
        self._server, self._most = server, max_model_len
        self._pictures = VideoTokenizer()
        self._words = build_text_tokenizer()

    def about(self) -> dict[str, Any]:
        """See `VideoProcessor.about`."""
        most = base.most_frames(self._most, lumos.LEAST_TEXT_TOKENS + TEXT_TOKENS, FRAME.tokens_per_frame, 0)
        return {
            "name": self.name,
            "text": True,
            "sizes": [f"{SIZE}x{SIZE}"],
            "size": f"{SIZE}x{SIZE}",
            "fps": FRAMES_PER_SECOND,
            "frames": min(FRAMES, most),
            "frames_step": 1,
            "most_frames": min(MAX_SECONDS, most),
            "picture": "optional",
            "clip": False,
            "options": base.masked_ranges(self._server, OPTIONS),
            "examples": [self._example],
        }

    def prepare(self, asked: Asked) -> Prepared:
        """See `VideoProcessor.prepare`."""
        how, _ = base.told(asked, "canvas", OWN_OPTIONS)
        base.no_ids(asked)
        check_picture(asked)
        pictures = base.pictures_asked(asked, FRAMES_PER_SECOND, FRAMES)
        given = np.empty((0, *GRID_SHAPE), np.int64)
        if asked.picture is not None:
            given = self._pictures.encode_image(asked.picture)[None] - self._pictures.visual_offset
        made = pictures - len(given)
        if not 1 <= made <= MAX_SECONDS:
            raise ValueError(
                f"num_frames must lie between {1 + len(given)} and {MAX_SECONDS + len(given)}, not {pictures}: the "
                "model was shown no longer ones"
            )
        options = {**self._usual(), **how, "frames": made, "condition_frames": len(given)}
        return self._prepared(prompt_of(self._text(asked.prompt, made), given), options, given, pictures)

    def extend(self, kept: Kept, asked: Asked) -> Prepared:
        """See `VideoProcessor.extend`. The text states the duration that it stated at first."""
        how, _ = base.told(asked, "canvas", OWN_OPTIONS)
        base.no_ids(asked)
        base.nothing_given(asked)
        check_picture(asked)
        added = base.pictures_asked(asked, FRAMES_PER_SECOND)
        text, frames = split(kept.prompt_ids)
        if asked.prompt.strip():
            text = self._text(asked.prompt, text[-2] - lumos.NUMBER_ZERO)
        made = [lumos.codes_of_frame(ids, GRID_SHAPE)[None] for ids in kept.frame_ids]
        given = np.concatenate([kept.given.reshape(-1, *GRID_SHAPE), *made])
        options = {**kept.options, **how, "frames": added}
        prompt_ids = [*text, *frames, *kept.frame_ids.ravel().tolist()]
        return self._prepared(prompt_ids, options, given, kept.pictures + added)

    def decoder(self, prepared: Prepared) -> _Decoder:
        """See `VideoProcessor.decoder`."""
        return _Decoder(self._pictures, prepared.given)

    def _usual(self) -> dict[str, Any]:
        """How the demo's videos are made, as a request says it; nothing, where the server says how."""
        if self._server is not None and self._server.passes is not None:
            return {}
        return {name: int(value) if isinstance(value, bool) else value for name, value in asdict(OPTIONS).items()}

    def _text(self, prompt: str, frames: int) -> list[int]:
        """The prompt without frames; the number of those to make is stated as its duration."""
        words = self._words.encode(readable(prompt), add_special_tokens=False).ids
        return lumos.text_prompt(words[:TEXT_TOKENS], frames, RATE)

    def _prepared(self, prompt_ids: list[int], options: dict[str, Any], given: Int64, pictures: int) -> Prepared:
        made = options["frames"]
        base.check_length(len(prompt_ids) + made * FRAME.tokens_per_frame, self._most, SHORTER)
        return Prepared(
            prompt_ids=prompt_ids,
            options={**options, "grid": list(GRID_SHAPE)},
            sampling={},
            tokens_per_frame=FRAME.tokens_per_frame,
            made=made,
            given=given,
            size=(SIZE, SIZE),
            fps=FRAMES_PER_SECOND,
            pictures=pictures,
        )

    @cached_property
    def _example(self) -> dict[str, str]:
        world = make_world(EXAMPLE)
        codes = world.frame_ids(0)[None] + self._pictures.visual_offset
        return {"prompt": world.prompt, "picture": png_url(self._pictures.decode_frames(codes)[0])}


class _Decoder:
    """See `vllm_packcache.media.processors.base.Decoder`.

    Args:
        pictures: of codewords.
        given: codewords of the frames that are known, [g, 16, 16].
    """

    def __init__(self, pictures: VideoTokenizer, given: Int64) -> None:
        self._pictures, self._given = pictures, given

    def given(self) -> list[Pixels]:
        """See `Decoder.given`."""
        return [self._decoded(codes) for codes in self._given]

    def add(self, ids: Sequence[int]) -> Pixels:
        """See `Decoder.add`."""
        return self._decoded(lumos.codes_of_frame(ids, GRID_SHAPE))

    def whole(self) -> None:
        """See `Decoder.whole`."""

    def _decoded(self, codes: Int64) -> Pixels:
        return self._pictures.decode_frames(codes[None] + self._pictures.visual_offset)
