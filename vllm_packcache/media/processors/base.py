"""What turns a client's request for a video into token ids, and the ids that are made into pictures.

A model that makes pictures has a tokenizer, which the server's operator names; a `VideoProcessor` is what the API for
videos needs of it. Each is one file. What is common to them is here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import numpy.typing as npt

from vllm_packcache.config.errors import ConfigError, shown
from vllm_packcache.config.guidance import GUIDANCE_KEY, MAX_GUIDANCE, GuidanceConfig
from vllm_packcache.config.server import CONFIG_FLAG, REQUEST_PREFIX, ServerConfig
from vllm_packcache.core.layout import MAX_FRAMES
from vllm_packcache.core.plan import Role
from vllm_packcache.families import lumos
from vllm_packcache.media.pictures import Pixels

Int64 = npt.NDArray[np.int64]

FLAG = "--video-tokenizer"
"""By which an operator names a processor."""

BUNDLED = {
    "demo": "vllm_packcache.demo.processor:DemoProcessor",
    "demo_masked": "vllm_packcache.demo.masked.processor:MaskedDemoProcessor",
}
"""Processors of the bundled models. They are found by name: what serves imports no demo."""

IDS = "ids"
"""Says in words that there is no tokenizer."""

TEXT_FILE = "tokenizer.json"
"""The text tokenizer in a folder with those of a model."""

COSMOS_FILES = (TEXT_FILE, "encoder.jit", "decoder.jit")
"""What a folder with the tokenizers of a Lumos-1 has."""

EMU3_FILES = (TEXT_FILE, "config.json", "*.safetensors")
"""What a folder with those of an Emu3 or of UniVLA's world model has: all but the text is of the vision tokenizer."""


class Folder(NamedTuple):
    """A kind of folders that an operator may name.

    Args:
        files: patterns of what is in it; those after the first tell it from the others.
        role: how the models make frames that it is for.
        processor: ``module:class``.
    """

    files: tuple[str, ...]
    role: Role
    processor: str


FOLDERS = (
    Folder(COSMOS_FILES, "canvas", "vllm_packcache.media.processors.lumos:LumosProcessor"),
    Folder(EMU3_FILES, "causal", "vllm_packcache.media.processors.emu3:Emu3Processor"),
)

MOST_SEED = 2**63 - 1
"""Largest seed: both PyTorch's generators and the noise of masked models take it."""

MOST_FRAMES_PER_SECOND = 240

MOST_TEMPERATURE = 100.0
"""Above it what is drawn is as good as random."""

OPTION_OF_FIELD = {"seed": "seed", "guidance": "guidance_scale", "steps": "num_inference_steps"}
"""How a masked model's options are called by clients; of a causal one's ``guidance`` alone."""

NEGATIVE = "negative_prompt_ids"
"""Option of a guided request: the condition of its second stream."""

SESSION_OPTIONS = ("session_tokens", "forget_frames", "forget_from")
"""Of turns of a session, which a video is not."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Asked:
    """What a client wants. Types are as said, values may be any; None: the client does not say.

    Args:
        prompt: what is to be seen.
        size: width and height in pixels.
        frames: pictures of the whole video; of those that are added, where a video is extended.
        seconds: duration of the same; counts only without ``frames``.
        fps: pictures a second.
        picture: that it begins with, of any size.
        clip: file of a video that it begins with.
        seed: of all that is random.
        guidance: how much the prompt counts, where videos are guided.
        steps: passes of a frame, of models that make frames in passes.
        negative_prompt: what is not to be seen, where causal videos are guided.
        temperature: of tokens that are drawn one by one.
        top_p: of the same.
        top_k: of the same.
        ids: the prompt as token ids, where no text is read.
        options: the request's own options, without prefix.
    """

    prompt: str
    size: tuple[int, int] | None = None
    frames: int | None = None
    seconds: float | None = None
    fps: int | None = None
    picture: Pixels | None = None
    clip: Path | None = None
    seed: int | None = None
    guidance: float | None = None
    steps: int | None = None
    negative_prompt: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    ids: tuple[int, ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """What the engine is asked for.

    Args:
        prompt_ids: condition and all frames that are given.
        options: of the request, without prefix.
        sampling: of vLLM's ``SamplingParams``, without ``max_tokens``.
        tokens_per_frame: F.
        made: (latent) frames to make.
        given: codes of the (latent) frames that are known, [g, rows, columns].
        size: width and height of a picture; 0 and 0: there are none.
        fps: pictures a second.
        pictures: of the finished video, those of what is given included; 0: token ids alone are made.
        notes: what is used of a picture or a video that the client has given, in words.
    """

    prompt_ids: list[int]
    options: dict[str, Any]
    sampling: dict[str, Any]
    tokens_per_frame: int
    made: int
    given: Int64
    size: tuple[int, int]
    fps: int
    pictures: int
    notes: tuple[str, ...] = ()

    @property
    def frames(self) -> int:
        """Of the finished video: its pictures, or its frames where there are none."""
        return self.pictures or self.made + len(self.given)


@dataclass(frozen=True, kw_only=True, eq=False)
class Kept:
    """What is known of a finished video that is to be extended.

    Args:
        prompt_ids: as they were in `Prepared`.
        frame_ids: as the engine made them, [n, F].
        given: as in `Prepared`.
        size: as in `Prepared`.
        fps: as in `Prepared`.
        pictures: as in `Prepared`.
        options: as in `Prepared`.
    """

    prompt_ids: list[int]
    frame_ids: Int64
    given: Int64
    size: tuple[int, int]
    fps: int
    pictures: int
    options: Mapping[str, Any]


class Decoder(Protocol):
    """Makes the pictures of one video. It may block, and is called by one thread at a time."""

    def given(self) -> Sequence[Pixels]:
        """Pictures of what is given: a run uint8 [n, H, W, 3] for each (latent) frame."""
        ...

    def add(self, ids: Sequence[int]) -> Pixels:
        """Pictures of the next (latent) frame that was made.

        Args:
            ids: its tokens, F of them.

        Returns:
            uint8, [n, H, W, 3]; n is 0 where ids alone are made.

        Raises:
            ValueError: these are no tokens of a frame, or they cannot be decoded.
        """
        ...

    def whole(self) -> Iterator[Pixels] | None:
        """Runs of pictures of the finished video, [n, H, W, 3], as well as they can be made; None: as `add` made them.

        They are as many as `Prepared.pictures`, and never all in memory.

        Raises:
            ValueError: they cannot be decoded.
        """
        ...


class VideoProcessor(Protocol):
    """What is to be known of a model's video tokenizer. Its methods may block, and several threads call them."""

    name: str
    """For people."""

    role: Role | None
    """How the models make frames that it is for; None: any."""

    def about(self) -> dict[str, Any]:
        """What a page needs to know to ask for a video, as JSON."""
        ...

    def prepare(self, asked: Asked) -> Prepared:
        """What the engine is asked for.

        Raises:
            ValueError: no such video can be made; the message is one sentence, which names the field.
        """
        ...

    def extend(self, kept: Kept, asked: Asked) -> Prepared:
        """The same of a video that goes on: the condition stays, and all frames that are there are given.

        With the same prompt its frames are those of a video that was longer from the beginning.

        Raises:
            ValueError: as `prepare`.
        """
        ...

    def decoder(self, prepared: Prepared) -> Decoder:
        """What makes its pictures."""
        ...


def processor_of(
    name: str | None, *, role: Role, server: ServerConfig | None = None, max_model_len: int | None = None
) -> VideoProcessor:
    """What an operator has named.

    Args:
        name: of a bundled one; ``module:object``, where the object is a `VideoProcessor`, or makes pictures of ids (see
            `vllm_packcache.media.processors.pictures`), and a class is called without arguments; a folder of one
            of `FOLDERS`; `IDS` or None: there is no tokenizer, and clients send and get ids.
        role: how the server's model makes frames.
        server: its configuration.
        max_model_len: most tokens of a sequence; None: not known.

    Raises:
        ConfigError: there is none such, it cannot be used, or it is for other models.
    """
    try:
        found = _found(name, role, server, max_model_len)
        _check_role(found.role, role)
    except (ValueError, OSError) as error:
        raise ConfigError(f"{FLAG} {shown(name)}: {' '.join(str(error).split())}") from None
    return found


def _found(name: str | None, role: Role, server: ServerConfig | None, max_model_len: int | None) -> VideoProcessor:
    # Where nobody says how frames are made up, every request must.
    plain = ServerConfig.parse("full", {}) if server is None else server
    if name is None or name == IDS:
        from vllm_packcache.media.processors.ids import IdsProcessor

        return IdsProcessor(plain, max_model_len)
    if name in BUNDLED:
        bundled = resolve_name(BUNDLED[name])
        # Before it is held against a server of other models.
        _check_role(bundled.role, role)
        return cast(VideoProcessor, bundled(server, max_model_len))
    if Path(name).is_dir():
        folder = _folder(Path(name), role)
        # Before anything of it is read.
        _check_role(folder.role, role)
        return cast(VideoProcessor, resolve_name(folder.processor)(Path(name), server, max_model_len))
    if ":" not in name:
        raise ValueError(
            f"it must be {', '.join(BUNDLED)}, module:object, a folder with "
            f"{' or with '.join(', '.join(folder.files) for folder in FOLDERS)}, or {IDS} for token ids alone: give "
            "one of them"
        )
    named = load(name)
    if all(callable(getattr(named, method, None)) for method in ("prepare", "extend", "decoder", "about")):
        return cast(VideoProcessor, named)
    from vllm_packcache.media.processors.pictures import PicturesProcessor

    _check_role(PicturesProcessor.role, role)
    return PicturesProcessor(name, named, plain, max_model_len)


def _folder(path: Path, role: Role) -> Folder:
    """Of which kind a folder is: of the served model's, unless it has files of another one only."""
    kinds = sorted(FOLDERS, key=lambda folder: folder.role != role)
    return next((kind for kind in kinds if len(missing_files(path, kind.files[1:])) < len(kind.files) - 1), kinds[0])


def missing_files(path: Path, files: Sequence[str]) -> list[str]:
    """Patterns of which a folder has no file."""
    return [file for file in files if not any(found.is_file() for found in path.glob(file))]


def check_files(path: Path, files: Sequence[str]) -> None:
    """Check that a folder has all files of its kind.

    Raises:
        ValueError: it has not.
    """
    if missing := missing_files(path, files):
        raise ValueError(f"the folder must have {', '.join(files)}, and has no {' and no '.join(missing)}")


def _check_role(own: Role | None, role: Role) -> None:
    if own in (None, role):
        return
    made = {"causal": "token by token", "canvas": "in whole frames"}
    raise ValueError(
        f"it must be of a model that makes videos {made[role]}, as the served one does, and is of one that makes them "
        f"{made[own]}: give the model's own, or leave it out for token ids alone"
    )


def load(name: str) -> Any:
    """An object by ``module:object``; a class is called without arguments.

    Raises:
        ValueError: there is none, or it fails.
    """
    try:
        found = resolve_name(name)
        return found() if isinstance(found, type) else found
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
        raise ValueError(f"it must be module:object of something that can be imported, and cannot: {reason}") from None


# Fields that most processors read alike


def pictures_asked(asked: Asked, fps: int, default: int | None = None) -> int:
    """How many pictures a client wants.

    Args:
        asked: by the client.
        fps: pictures a second.
        default: where the client does not say; None: it must.

    Raises:
        ValueError: it is no number of pictures.
    """
    if asked.frames is not None:
        if not 1 <= asked.frames <= MAX_FRAMES:
            raise ValueError(f"num_frames must lie between 1 and {MAX_FRAMES}, not {shown(asked.frames)}")
        return asked.frames
    if asked.seconds is None:
        if default is None:
            raise ValueError("seconds or num_frames is needed: say how much is to be made")
        return default
    if not (math.isfinite(asked.seconds) and 0 < asked.seconds * fps <= MAX_FRAMES):
        raise ValueError(f"seconds must lie between {1 / fps:g} and {MAX_FRAMES // fps}, not {shown(asked.seconds)}")
    pictures = round(asked.seconds * fps)
    if pictures < 1 or not math.isclose(pictures, asked.seconds * fps, rel_tol=1e-6):
        raise ValueError(
            f"seconds must be whole pictures, of which there are {fps} a second, not {shown(asked.seconds)}: give a "
            f"multiple of {1 / fps:g}, or num_frames"
        )
    return pictures


def check_size(asked: Asked, size: tuple[int, int], why: str) -> None:
    """Check that a client wants no other size.

    Raises:
        ValueError: it does.
    """
    if asked.size not in (None, size):
        wide, high = asked.size or size
        raise ValueError(f"size must be {size[0]}x{size[1]}, not {shown_size(wide, high)}: {why}")


def check_fps(asked: Asked, fps: int, why: str) -> None:
    """Check that a client wants no other rate.

    Raises:
        ValueError: it does.
    """
    if asked.fps not in (None, fps):
        raise ValueError(f"fps must be {fps}, not {shown(asked.fps)}: {why}")


def rate_asked(asked: Asked, default: int) -> int:
    """Pictures a second of a video that may have any rate.

    Raises:
        ValueError: it is none that is shown.
    """
    fps = default if asked.fps is None else asked.fps
    if not 1 <= fps <= MOST_FRAMES_PER_SECOND:
        raise ValueError(f"fps must lie between 1 and {MOST_FRAMES_PER_SECOND}, not {shown(fps)}")
    return fps


def shown_size(width: int, height: int) -> str:
    """A size that a client has given, in a message."""
    return f"{shown(width)}x{shown(height)}"


def no_ids(asked: Asked) -> None:
    """Refuse a prompt of ids where text is read.

    Raises:
        ValueError: there is one.
    """
    if asked.ids is not None:
        raise ValueError("prompt_ids is for servers that read no text: leave it out, and give prompt")


def told(
    asked: Asked, role: Role, own: Sequence[str] = (), guidance: GuidanceConfig | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """How a client wants frames to be made.

    Args:
        asked: by the client.
        role: how the model makes them.
        own: options that the processor sets itself.
        guidance: of causal videos, as the server's configuration has it; None: it guides none.

    Returns:
        Options of the request, which `guided` completes for a causal model, and of ``SamplingParams``.

    Raises:
        ValueError: the model has no such option, a number is impossible, or two contradict each other.
    """
    for name in asked.options:
        if name in own:
            raise ValueError(f"{REQUEST_PREFIX}{name} must be left out: this server's video tokenizer sets it")
        if name in SESSION_OPTIONS:
            raise ValueError(f"{REQUEST_PREFIX}{name} must be left out: it is for sessions, which are no videos")
    if asked.seed is not None and not 0 <= asked.seed <= MOST_SEED:
        raise ValueError(f"seed must lie between 0 and 2^63 - 1, not {shown(asked.seed)}")
    if role == "canvas":
        return _masked(asked), {}
    return {**asked.options, **_scale(asked, guidance)}, _causal(asked)


def guided(
    asked: Asked,
    options: Mapping[str, Any],
    guidance: GuidanceConfig | None,
    condition: Callable[[str], Sequence[int]] | None,
) -> dict[str, Any]:
    """Options of a causal video, with those of its second stream where it has one.

    That stream's condition is the first one's with the negative prompt in place of the prompt. Where there is none its
    text is empty, which is what classifier-free guidance means, unless the server has ids for it.

    Args:
        asked: by the client.
        options: of the request by `told`, and of a video that is extended what it had.
        guidance: of the server; None: it guides no videos.
        condition: ids of the condition with another text in place of the prompt; None: there is no text.

    Raises:
        ValueError: a negative prompt cannot be used, or nothing is guided by it.
    """
    if guidance is None:
        return {**options}
    scale = options.get("guidance", guidance.scale)
    if asked.negative_prompt:
        if condition is None:
            raise ValueError(
                f"negative_prompt must be left out: the prompt is token ids, so give {REQUEST_PREFIX}{NEGATIVE}"
            )
        if NEGATIVE in asked.options:
            raise ValueError(f"negative_prompt and {REQUEST_PREFIX}{NEGATIVE} are the same: leave one out")
        if scale == 1 and asked.guidance is None and "guidance" not in asked.options:
            raise ValueError("negative_prompt is for guided videos: give guidance_scale too")
        return {**options, "guidance": scale, NEGATIVE: [*condition(asked.negative_prompt)]}
    if scale == 1:
        return {**options}
    if NEGATIVE in options or guidance.negative_prompt_ids is not None or condition is None:
        return {**options, "guidance": scale}
    empty = [*condition("")]
    if not empty:
        raise ValueError("negative_prompt is needed: without a text the prompt of this model has no tokens")
    return {**options, "guidance": scale, NEGATIVE: empty}


def unguided(options: Mapping[str, Any], guidance: GuidanceConfig | None) -> dict[str, Any]:
    """The same video in one stream: where its frames are is known before the condition of the second one."""
    return {**options, "guidance": 1} if guidance else {**options}


def _scale(asked: Asked, guidance: GuidanceConfig | None) -> dict[str, float]:
    """What a client says of guidance of a causal video."""
    scale, remedy = asked.guidance, f"{GUIDANCE_KEY}: true in {CONFIG_FLAG} lets it"
    if guidance is None and asked.negative_prompt:
        raise ValueError(f"negative_prompt must be left out: this server guides no videos; {remedy}")
    # Without guidance all videos are as with a scale of 1.
    if scale is None or (guidance is None and scale == 1):
        return {}
    if guidance is None:
        raise ValueError(f"guidance_scale must be left out: this server guides no videos; {remedy}")
    if not 0 < scale <= MAX_GUIDANCE:
        raise ValueError(f"guidance_scale must be above 0 and at most {MAX_GUIDANCE:g}, not {shown(scale)}")
    _same("guidance", scale, asked.options)
    return {"guidance": scale}


def _same(name: str, value: float, options: Mapping[str, Any]) -> None:
    if options.get(name, value) != value:
        raise ValueError(
            f"{OPTION_OF_FIELD[name]} and {REQUEST_PREFIX}{name} must not contradict each other: leave one out"
        )


def _causal(asked: Asked) -> dict[str, Any]:
    if asked.steps is not None:
        raise ValueError("num_inference_steps must be left out: this model makes one token after the other")
    if asked.temperature is not None and not 0 <= asked.temperature <= MOST_TEMPERATURE:
        raise ValueError(
            f"temperature must lie between 0 and {MOST_TEMPERATURE:g}, not {shown(asked.temperature)}: 0 always takes "
            "the likeliest token"
        )
    if asked.top_p is not None and not 0 < asked.top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, not {shown(asked.top_p)}")
    if asked.top_k is not None and not -1 <= asked.top_k < 2**31:
        raise ValueError(f"top_k must be 1 or more, or 0 for all tokens, not {shown(asked.top_k)}")
    given = {name: getattr(asked, name) for name in ("top_p", "top_k", "seed") if getattr(asked, name) is not None}
    return {"temperature": 0.0 if asked.temperature is None else asked.temperature, **given}


def _masked(asked: Asked) -> dict[str, Any]:
    if asked.negative_prompt:
        raise ValueError("negative_prompt must be left out: this model is guided by its prompt against no text at all")
    for name in ("temperature", "top_p", "top_k"):
        if getattr(asked, name) is not None:
            raise ValueError(
                f"{name} must be left out: this model makes frames in passes; the noise of these is "
                f"{REQUEST_PREFIX}temperature"
            )
    fields = {name: getattr(asked, name) for name in OPTION_OF_FIELD if getattr(asked, name) is not None}
    for name, value in fields.items():
        _same(name, value, asked.options)
    try:
        lumos.MaskedOptions(**fields)
    except ValueError as error:
        name, rest = str(error).split(" ", 1)
        raise ValueError(f"{OPTION_OF_FIELD[name]} {rest}") from None
    return {**asked.options, **fields}


def check_length(tokens: int, most: int | None, remedy: str) -> None:
    """Check that a sequence is not longer than the server's.

    Args:
        tokens: of the whole video.
        most: ``max_model_len``; None: not known.
        remedy: for the client.

    Raises:
        ValueError: it is.
    """
    if most is not None and tokens > most:
        raise ValueError(f"the video has {tokens} tokens, and this server makes sequences of at most {most}: {remedy}")


def most_frames(most: int | None, condition_tokens: int, tokens_per_frame: int, given: int) -> int:
    """Pictures of the longest video, for a page.

    Args:
        most: ``max_model_len``; None: not known.
        condition_tokens: before the first frame.
        tokens_per_frame: F.
        given: pictures that the condition is.
    """
    return MAX_FRAMES if most is None else given + max(1, (most - condition_tokens) // tokens_per_frame)


def usual_tokens(server: ServerConfig) -> int:
    """Tokens of a frame where a request does not say how it is made up; 1: the server does not say either."""
    if server.layout is None:
        return 1
    # Of a masked model's frames a server may be told the grid alone.
    own = lumos.frame_layout(server.grid) if server.family.role == "canvas" and server.grid else None
    return (own or server.layout.frame_layout()).tokens_per_frame


def seed_range() -> dict[str, float]:
    """The seed as an option of a page, whose numbers are exact up to 2^53."""
    return {"default": 0, "least": 0, "most": 2**53 - 1, "step": 1}


def ranges(guidance: GuidanceConfig | None = None, *, text: bool = True) -> dict[str, dict[str, Any]]:
    """Options of a page for a model that makes one token after the other.

    Args:
        guidance: as the server's configuration has it; None: it guides none.
        text: whether prompts are text.
    """
    options: dict[str, dict[str, Any]] = {"temperature": {"default": 0, "least": 0, "most": 2, "step": 0.1}}
    if guidance is not None:
        scale = guidance.scale
        options["guidance_scale"] = {"default": scale, "least": min(1, scale), "most": max(30, scale)}
        options["negative_prompt" if text else f"{REQUEST_PREFIX}{NEGATIVE}"] = {"default": ""}
    return {**options, "seed": seed_range()}


def masked_ranges(server: ServerConfig | None, own: lumos.MaskedOptions | None = None) -> dict[str, dict[str, Any]]:
    """Options of a page for a model that makes frames in passes.

    Args:
        server: its configuration, which may say how frames are made; None: not known.
        own: how they are made where it does not; None: as published.
    """
    said = None if server is None else server.passes
    usual = said or own or lumos.MaskedOptions()

    def number(name: str) -> dict[str, float]:
        # A browser refuses a default that is out of bounds.
        default = getattr(usual, name)
        return {"default": default, "least": 1, "most": max(200, default), "step": 1}

    shares = ("reuse", "guidance_from", "guidance_until")
    left_out = {name: number(name) for name in ("refresh", "guidance_interval")} | {
        name: {"default": getattr(usual, name), "least": 0, "most": 1} for name in shares
    }
    scale = usual.guidance
    return {
        "guidance_scale": {"default": scale, "least": min(1, scale), "most": max(30, scale)},
        "num_inference_steps": number("steps"),
        **{f"{REQUEST_PREFIX}{name}": bounds for name, bounds in left_out.items()},
        "seed": seed_range(),
    }


def nothing_given(asked: Asked) -> None:
    """Refuse a picture or a video where another one goes on.

    Raises:
        ValueError: there is one.
    """
    if asked.picture is not None or asked.clip is not None:
        raise ValueError("input_reference must be left out: the video that is extended is what is given")
