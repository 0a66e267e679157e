"""Models without a tokenizer: a client's token ids are the prompt, and it gets the ids that are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vllm_packcache.config.errors import shown
from vllm_packcache.config.server import REQUEST_PREFIX, ServerConfig
from vllm_packcache.core.grammar import LARGEST_ID
from vllm_packcache.core.layout import VideoLayout
from vllm_packcache.core.plan import Role
from vllm_packcache.media.pictures import Pixels
from vllm_packcache.media.processors import base
from vllm_packcache.media.processors.base import Asked, Kept, Prepared

FRAMES = 16
"""That a page asks for at first."""

SHORTER = "ask for fewer frames"

CONDITION_OPTIONS = ("condition_tokens", "condition_frames", "condition_image_tokens", "grid", "tokens_per_frame")
"""Of a request: those of a video stay as they are when it is extended."""


class IdsProcessor:
    """See `vllm_packcache.media.processors.base.VideoProcessor`. There are no pictures, and no text is read.

    Args:
        server: its configuration, which says how frames are made up where a request does not.
        max_model_len: most tokens of a sequence; None: not known.
    """

    name = "ids"
    role: Role | None = None

    def __init__(self, server: ServerConfig, max_model_len: int | None = None) -> None:
        self._server, self._most = server, max_model_len

    def about(self) -> dict[str, Any]:
        """See `VideoProcessor.about`."""
        tokens = base.usual_tokens(self._server)
        most = base.most_frames(self._most, 0, tokens, 0)
        return {
            "name": self.name,
            "text": False,
            "sizes": [],
            "size": None,
            "fps": 1,
            "frames": min(FRAMES, most),
            "frames_step": 1,
            "most_frames": most,
            "picture": "none",
            "clip": False,
            "options": self._ranges(),
            "examples": [],
        }

    def _ranges(self) -> dict[str, dict[str, Any]]:
        if self._server.family.role == "canvas":
            return base.masked_ranges(self._server)
        return base.ranges(self._server.guidance, text=False)

    def prepare(self, asked: Asked) -> Prepared:
        """See `VideoProcessor.prepare`."""
        own, sampling = base.told(asked, self._server.family.role, guidance=self._server.guidance)
        _no_pictures(asked)
        ids = checked_ids(asked)
        own = base.guided(asked, own, self._server.guidance, None)
        frames = own.pop("frames", asked.frames)
        if asked.frames not in (None, frames):
            raise ValueError(f"num_frames and {REQUEST_PREFIX}frames must not contradict each other: leave one out")
        return self._prepared(ids, own, sampling, frames)

    def extend(self, kept: Kept, asked: Asked) -> Prepared:
        """See `VideoProcessor.extend`."""
        taken = ("frames", *CONDITION_OPTIONS)
        own, sampling = base.told(asked, self._server.family.role, taken, self._server.guidance)
        base.no_ids(asked)
        _no_pictures(asked)
        ids, options = continued(self._server, kept, own)
        options = base.guided(asked, options, self._server.guidance, None)
        return self._prepared(ids, options, sampling, asked.frames)

    def decoder(self, prepared: Prepared) -> _Decoder:
        """See `VideoProcessor.decoder`."""
        return _Decoder(prepared.tokens_per_frame)

    def _prepared(
        self, ids: list[int], options: dict[str, Any], sampling: dict[str, Any], frames: int | None
    ) -> Prepared:
        if frames is None:
            raise ValueError("num_frames is needed: this server has no video tokenizer, so say how many are to be made")
        options = {**options, "frames": frames}
        layout = layout_of(self._server, options, ids)
        base.check_length(len(ids) + frames * layout.tokens_per_frame, self._most, SHORTER)
        return Prepared(
            prompt_ids=ids,
            options=options,
            sampling=sampling,
            tokens_per_frame=layout.tokens_per_frame,
            made=frames,
            given=np.empty((0, 0, 0), np.int64),
            size=(0, 0),
            fps=1,
            pictures=0,
        )


class _Decoder:
    """See `vllm_packcache.media.processors.base.Decoder`.

    Args:
        tokens_per_frame: F.
    """

    def __init__(self, tokens_per_frame: int) -> None:
        self._tokens_per_frame = tokens_per_frame

    def given(self) -> list[Pixels]:
        """See `Decoder.given`."""
        return []

    def add(self, ids: Sequence[int]) -> Pixels:
        """See `Decoder.add`."""
        if len(ids) != self._tokens_per_frame:
            raise ValueError(f"a frame must have {self._tokens_per_frame} tokens, not {len(ids)}")
        return np.empty((0, 0, 0, 3), np.uint8)

    def whole(self) -> None:
        """See `Decoder.whole`."""


def checked_ids(asked: Asked) -> list[int]:
    """The ids that a client gives for a prompt.

    Raises:
        ValueError: there are none, or they are no ids.
    """
    if not asked.ids:
        raise ValueError("prompt_ids is needed: this server reads no text, so give the prompt as a list of token ids")
    for own in asked.ids:
        if not 0 <= own <= LARGEST_ID:
            raise ValueError(f"prompt_ids must be token ids from 0 to {LARGEST_ID}, not {shown(own)}")
    return list(asked.ids)


def layout_of(server: ServerConfig, options: Mapping[str, Any], ids: list[int]) -> VideoLayout:
    """Where the frames of a request are.

    Args:
        server: its configuration.
        options: of the request, without prefix.
        ids: of its prompt.

    Raises:
        ValueError: an option or the prompt is wrong, or the prompt ends in the middle of a frame.
    """
    request = server.request({f"{REQUEST_PREFIX}{name}": value for name, value in options.items()}, ids)
    if request is None:
        raise ValueError(
            f"{REQUEST_PREFIX}grid or {REQUEST_PREFIX}tokens_per_frame is needed: this server was started without a "
            "layout"
        )
    layout = request.streams[0].plan.layout
    if (len(ids) - layout.condition_tokens) % layout.tokens_per_frame:
        raise ValueError(
            f"prompt_ids must be a condition of {layout.condition_tokens} tokens and whole frames of "
            f"{layout.tokens_per_frame}, not {len(ids)} tokens: give all of the last frame"
        )
    return layout


def continued(server: ServerConfig, kept: Kept, own: Mapping[str, Any]) -> tuple[list[int], dict[str, Any]]:
    """Prompt and options of a request that goes on with a video: its condition stays the condition.

    Args:
        server: its configuration.
        kept: the video.
        own: options that the request gives itself.
    """
    layout = layout_of(server, base.unguided(kept.options, server.guidance), kept.prompt_ids)
    # What a client gave for frames was for those that are there.
    options = {name: value for name, value in kept.options.items() if name != "given_ids"}
    condition = {"condition_tokens": layout.condition_tokens}
    if server.family.role == "canvas":
        condition = {"condition_frames": layout.condition_image_tokens // layout.tokens_per_frame}
    return [*kept.prompt_ids, *kept.frame_ids.ravel().tolist()], {**options, **own, **condition}


def _no_pictures(asked: Asked) -> None:
    for name, value in {
        "size": asked.size,
        "fps": asked.fps,
        "seconds": asked.seconds,
        "input_reference": asked.clip if asked.picture is None else asked.picture,
    }.items():
        if value is not None:
            raise ValueError(
                f"{name} must be left out: this server has no video tokenizer, it makes token ids and no pictures"
            )
