"""Masked, frame-parallel generation as Lumos-1 does it: ids, sequences, the schedule, re-masking, noise.

A video is one sequence; a frame is made in a fixed number of steps, in each of which the model sees the whole frame,
some of its visual tokens still being the mask token::

    [ bos, text, separator, video begin, duration, rate ][ conditioning image ][ frame 0 ][ frame 1 ] ...

    frame = begin, height, width, then every row: its visual tokens and a newline, then end

Whatever a step decides beyond the model's logits is here and is a pure function of the request, the frame and the step:
how many tokens stay masked, how much noise there is, and the noise itself. So a frame that is made again, in another
batch or after a preemption, is the same frame.

Source: Lumos-1, arXiv 2507.08801, and its public inference code.

This module is pure: it knows neither vLLM nor torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import Field

from vllm_packcache.core.layout import MAX_FRAMES, FrameLayout, VideoLayout
from vllm_packcache.core.plan import REQUEST_PREFIX, Plan, Stream, VideoRequest
from vllm_packcache.core.positions import Positions
from vllm_packcache.core.shown import shown
from vllm_packcache.families.base import Family, Prompt, Server
from vllm_packcache.families.checkpoint import DecoderConfig, require, rope_of

Int64 = npt.NDArray[np.int64]

Grid = tuple[int, int]
"""(rows, columns) of a frame's visual tokens."""

ARCHITECTURES = ("ChameleonXLLMXForConditionalGeneration", "ChameleonMMRoPEForConditionalGeneration")
"""Names under which checkpoints are published: of the class that trains, and of the one that generates."""

BOS = 0
SEPARATOR = 8710
VIDEO_BEGIN = 9004
VIDEO_END = 9005
FRAME_BEGIN = 8197
FRAME_END = 8196
NEWLINE = 8803
MASK = 9003
NUMBER_ZERO = 8804
"""The id of the number n (a duration, a rate, a size) is this plus n."""
VISUAL_BEGIN = 65_536
"""The id of visual code c is this plus c; it and all ids above are visual."""

PIXELS_PER_TOKEN = 8
"""Of the video tokenizer (Cosmos DV4x8x8), in both directions."""
PIXELS_PER_SIZE = 32
"""Unit of the height and the width that a frame states."""
FRAMES_PER_LATENT = 4
"""Frames of the video that a latent frame stands for, the first of them excepted: it stands for one."""

FRAME_START_TOKENS = 3
ROW_END_TOKENS = 1
FRAME_END_TOKENS = 1

VIDEO_START_TOKENS = 3
"""Video begin, duration and rate: what the unconditional stream has for a prompt."""
LEAST_TEXT_TOKENS = 2 + VIDEO_START_TOKENS
"""Tokens of a prompt without words: begin of the sequence and separator come first."""

STRUCTURE = frozenset({BOS, SEPARATOR, VIDEO_BEGIN, VIDEO_END, FRAME_BEGIN, FRAME_END, NEWLINE, MASK})
"""Ids that mean something only where the grammar of a sequence has them: no text holds one."""

MAX_STEPS = 1000
"""Most passes of a frame, twenty times the published number: each costs a pass over two streams."""
MAX_GUIDANCE = 1000.0
"""Most guidance, either way: far beyond what changes a token, and far below what overflows float32."""
MAX_TEMPERATURE = 1000.0
"""Most noise: beyond it the order in which tokens become known is random already."""

LEAST_PROBABILITY = 1e-20
"""Confidence is the logarithm of a probability that is this at least."""

MM_ROPE_SCALE = (4, 8, 8)
"""By how much a position grows with a frame, a row and a column (see `vllm_packcache.core.positions`)."""


HEAD_NORM_EPS = 1e-5
"""Epsilon of the norms of queries and keys, whatever the configuration says of the others."""

AXES_PERIOD = 16
"""The axis of a rotary channel repeats so often: only if it divides D/2 do both channels of a pair have one axis."""


@dataclass(frozen=True)
class LumosConfig(DecoderConfig):
    """The part of a checkpoint's ``config.json`` that the computation needs.

    Args:
        swin_norm: what attention and MLP give is normed, not what they get.
        visual_codes: V, codes of the video tokenizer: all ids from `VISUAL_BEGIN` on.
    """

    swin_norm: bool
    visual_codes: int

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> LumosConfig:
        """Read a ``config.json`` as published; what it leaves out has the default of its class.

        Raises:
            ValueError: the checkpoint is no Lumos-1.
        """
        architectures = config.get("architectures") or [ARCHITECTURES[0]]
        if architectures[0] not in ARCHITECTURES:
            raise ValueError(
                f"vllm-packcache supports architectures {', '.join(ARCHITECTURES)}, not {architectures[0]}"
            )
        require(
            {
                "model_type": (config.get("model_type"), "chameleon"),
                "mm_rope": (config.get("mm_rope", False), True),
                "hidden_act": (config.get("hidden_act", "silu"), "silu"),
                "attention_bias": (config.get("attention_bias", False), False),
                "mlp_bias": (config.get("mlp_bias", False), False),
            }
        )
        heads = config["num_attention_heads"]
        head_dim = config["hidden_size"] // heads
        if head_dim % (2 * AXES_PERIOD):
            raise ValueError(
                f"head_dim is {head_dim}: it must be a multiple of {2 * AXES_PERIOD}, or the two channels that rotary "
                "embedding turns together would have different axes"
            )
        visual_codes = config["vocab_size"] - VISUAL_BEGIN
        if visual_codes < 1:
            raise ValueError(f"vocab_size is {config['vocab_size']}: ids from {VISUAL_BEGIN} on are the visual ones")
        return cls(
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads", 32),
            head_dim=head_dim,
            rope_theta=rope_of(config)["rope_theta"],
            norm_eps=config.get("rms_norm_eps", 1e-5),
            tied=config.get("tie_word_embeddings", False),
            swin_norm=config.get("swin_norm", False),
            visual_codes=visual_codes,
        )


@dataclass(frozen=True, kw_only=True)
class MaskedOptions:
    """How a request's frames are made. The defaults are the published ones, quirks included.

    Args:
        seed: of the noise, 0 to 2^64 - 1.
        steps: passes of a frame in which tokens are chosen, at most `MAX_STEPS`; one more commits it.
        guidance: s, by which the logits move away from the unconditional ones: ``u + s (c - u)``, at most
            `MAX_GUIDANCE` either way. 1: there is no unconditional stream.
        temperature: tau of the confidence's noise before the first step, at most `MAX_TEMPERATURE`.
        remask: share of a finished frame's content that is committed as mask tokens; 0: none.
        reset_temperature: published is False: tau decays to 0 over the first frame that is made and stays there. True:
            every frame begins with ``temperature``.
        share_history: published is True: both streams commit the same tokens. False: the unconditional stream commits
            nothing but mask tokens where visual ones are, which the public code's comments say was meant.
        refresh: every so many computed passes the model computes the whole frame, in between only what is not settled;
            at most `MAX_STEPS`. 1, as published: always the whole frame.
        reuse: a pass before which a smaller share of the frame's tokens became known, since the last computed pass, is
            not computed, but draws anew by what that one has left. 0, as published: every pass is computed.
        guidance_interval: the unconditional stream is computed in every so-many-th computed pass; at most `MAX_STEPS`.
            1, as published: in each.
        guidance_from: share of the passes before which there is no guidance; published is 0.
        guidance_until: share of the passes from which on there is none; published is 1.

    What is computed then, in which pass, is in `vllm_packcache.families.schedule`.

    Raises:
        ValueError: a number is impossible; the message names it.
    """

    # Read out of a request: an unknown option is an error, and 3.0 or "3" is no integer.
    __pydantic_config__: ClassVar = {"extra": "forbid", "strict": True}

    seed: int = 0
    steps: int = 50
    guidance: float = 15.0
    temperature: float = 1.0
    remask: float = 0.7
    reset_temperature: bool = False
    share_history: bool = True
    refresh: int = 1
    reuse: float = 0.0
    guidance_interval: int = 1
    guidance_from: float = 0.0
    guidance_until: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must lie between 0 and 2^64 - 1, not {shown(self.seed)}")
        if not 1 <= self.steps <= MAX_STEPS:
            raise ValueError(f"steps must be 1 or more and at most {MAX_STEPS}, not {shown(self.steps)}")
        if not abs(self.guidance) <= MAX_GUIDANCE:
            raise ValueError(
                f"guidance must lie between -{MAX_GUIDANCE:g} and {MAX_GUIDANCE:g}, not {shown(self.guidance)}"
            )
        if not 0 <= self.temperature <= MAX_TEMPERATURE:
            raise ValueError(
                f"temperature must be 0 or more and at most {MAX_TEMPERATURE:g}, not {shown(self.temperature)}"
            )
        if not 0 <= self.remask <= 1:
            raise ValueError(f"remask must lie between 0 and 1, not {shown(self.remask)}")
        for name in ("refresh", "guidance_interval"):
            if not 1 <= (number := getattr(self, name)) <= MAX_STEPS:
                raise ValueError(f"{name} must be 1 or more and at most {MAX_STEPS}, not {shown(number)}")
        for name in ("reuse", "guidance_from", "guidance_until"):
            if not 0 <= (share := getattr(self, name)) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, not {shown(share)}")
        if not self.guided:
            for name, usual in (("guidance_interval", 1), ("guidance_from", 0), ("guidance_until", 1)):
                if (given := getattr(self, name)) != usual:
                    raise ValueError(
                        f"{name} is {shown(given)}, and with a guidance of 1 there is no unconditional stream: leave "
                        "it out"
                    )
        elif not any(map(self.guides, range(self.steps))):
            raise ValueError(
                f"guidance_from {shown(self.guidance_from)} and guidance_until {shown(self.guidance_until)} leave none "
                f"of {self.steps} passes with guidance: give a guidance of 1 instead"
            )

    @property
    def guided(self) -> bool:
        """Whether there is an unconditional stream."""
        return self.guidance != 1

    def guides(self, step: int) -> bool:
        """Whether tokens are drawn with guidance in a step."""
        return self.guided and self.guidance_from <= step / self.steps < self.guidance_until

    @property
    def fresh(self) -> bool:
        """Whether every pass draws by what it computed itself and of the whole frame, as published."""
        return (self.refresh, self.reuse, self.guidance_interval) == (1, 0, 1)


@dataclass(frozen=True)
class RequestOptions:
    """What a request says besides the policy's options and `MaskedOptions`.

    Args:
        policy: the server's, or ``full``: all is kept.
        grid: rows and columns of a frame; None: the server's.
        frames: how many to make; None: as many as ``max_tokens`` says.
        condition_frames: how many of the pictures in the prompt are conditioning images; None: all of them.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid", "strict": True}

    policy: str | None = None
    grid: Grid | None = None
    frames: Annotated[int, Field(ge=1, le=MAX_FRAMES)] | None = None
    condition_frames: Annotated[int, Field(ge=0)] | None = None


@dataclass(frozen=True)
class CanvasRequest(VideoRequest):
    """What a request makes: one stream of the whole prompt, and a guided one a second that begins with the video.

    Args:
        options: how frames are made.
        first_frame: number of the first frame that is made; those before it are given.
    """

    options: MaskedOptions
    first_frame: int

    @property
    def conditional(self) -> Plan:
        """Of the stream of the whole prompt."""
        return self.streams[0].plan

    @property
    def unconditional(self) -> Plan | None:
        """Of the stream that begins with the video; None: the request is not guided."""
        return self.streams[1].plan if len(self.streams) > 1 else None

    @property
    def grid(self) -> Grid:
        """Of its frames."""
        grid = self.conditional.layout.frame.grid
        assert grid is not None, "a frame is made of rows and columns"
        rows, columns = grid
        return rows, columns

    @property
    def text_tokens(self) -> int:
        """Tokens before the first picture."""
        layout = self.conditional.layout
        return layout.condition_tokens - layout.condition_image_tokens


# Sequences


def grid_of(width: int, height: int) -> Grid:
    """The grid of a video of ``width`` x ``height`` pixels.

    Raises:
        ValueError: a frame cannot state this size, which comes in units of `PIXELS_PER_SIZE`.
    """
    if width < PIXELS_PER_SIZE or height < PIXELS_PER_SIZE or width % PIXELS_PER_SIZE or height % PIXELS_PER_SIZE:
        raise ValueError(f"width and height must be multiples of {PIXELS_PER_SIZE} pixels, not {width} x {height}")
    return height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN


def latent_frames(seconds: int, rate: int) -> int:
    """Latent frames of a video: the first stands for one of its frames, each other for `FRAMES_PER_LATENT`."""
    return -(-(seconds * rate - 1) // FRAMES_PER_LATENT) + 1


def question(caption: str, width: int, height: int, seconds: int, rate: int) -> str:
    """The text that the model was trained to find before a video; ``width`` and ``height`` in pixels."""
    return (
        f"Generate a video with a resolution of {width}x{height}, consisting of {seconds * rate} frames at {rate} "
        f"frames per second, according to the following prompt:\n {caption}"
    )


def frame_layout(grid: Grid) -> FrameLayout:
    """The shape of a frame with its special tokens."""
    return FrameLayout.from_grid(grid, FRAME_START_TOKENS, ROW_END_TOKENS, FRAME_END_TOKENS)


def describes(frame: FrameLayout, axis_scale: Sequence[int] | None) -> bool:
    """Whether videos of such frames, on axes of such a scale, are made as this module says.

    Args:
        frame: the shape of a frame.
        axis_scale: by how much a position grows with a frame, a row and a column; None: positions have one axis.
    """
    if frame.grid is None or axis_scale is None:
        return False
    return tuple(axis_scale) == MM_ROPE_SCALE and frame == frame_layout(frame.grid)


def text_prompt(text_ids: Sequence[int], seconds: int, rate: int) -> list[int]:
    """The prompt of text to video; frames may follow it: a conditioning image, or a video to continue.

    Args:
        text_ids: of `question`, without the begin of the sequence.
        seconds: duration of the whole video.
        rate: its frames per second.
    """
    return [BOS, *text_ids, SEPARATOR, VIDEO_BEGIN, NUMBER_ZERO + seconds, NUMBER_ZERO + rate]


@lru_cache(maxsize=64)
def visual_offsets(grid: Grid) -> Int64:
    """Where in a frame its visual tokens are, row by row, [rows x columns]."""
    rows, columns = grid
    starts = FRAME_START_TOKENS + np.arange(rows) * (columns + ROW_END_TOKENS)
    offsets = (starts[:, None] + np.arange(columns)).ravel()
    offsets.flags.writeable = False
    return offsets


def masked_frame(grid: Grid) -> Int64:
    """Ids of a frame before its first step, [F]: every visual token is masked.

    A size that is no multiple of `PIXELS_PER_SIZE` is stated rounded down; positions follow the grid all the same.
    """
    rows, columns = grid
    ids = np.full(frame_layout(grid).tokens_per_frame, NEWLINE, dtype=np.int64)
    sizes = (NUMBER_ZERO + side * PIXELS_PER_TOKEN // PIXELS_PER_SIZE for side in (rows, columns))
    ids[:FRAME_START_TOKENS] = FRAME_BEGIN, *sizes
    ids[visual_offsets(grid)] = MASK
    ids[-1] = FRAME_END
    return ids


def frame_of_codes(codes: npt.ArrayLike) -> Int64:
    """Ids of the frame with these visual codes.

    Args:
        codes: [rows, columns].

    Returns:
        [F].
    """
    codes = np.asarray(codes, dtype=np.int64)
    rows, columns = codes.shape
    ids = masked_frame((rows, columns))
    ids[visual_offsets((rows, columns))] = VISUAL_BEGIN + codes.ravel()
    return ids


def codes_of_frame(ids: npt.ArrayLike, grid: Grid) -> Int64:
    """Visual codes of a finished frame: the inverse of `frame_of_codes`.

    Args:
        ids: [F].
        grid: of the frame.

    Returns:
        [rows, columns].

    Raises:
        ValueError: the ids are no such frame.
    """
    ids = np.asarray(ids, dtype=np.int64)
    empty = masked_frame(grid)
    if ids.shape != empty.shape:
        raise ValueError(f"a frame of grid {grid} has {len(empty)} tokens, not {ids.size}")
    visual = ids[visual_offsets(grid)]
    if (visual < VISUAL_BEGIN).any() or not np.array_equal(ids[empty != MASK], empty[empty != MASK]):
        raise ValueError(f"these tokens are no finished frame of grid {grid}")
    return visual.reshape(grid) - VISUAL_BEGIN


def video_layout(prompt_ids: Sequence[int], grid: Grid, condition_frames: int = 0) -> VideoLayout:
    """The layout of the video that a prompt begins.

    Args:
        prompt_ids: as of `text_prompt`, with any frames that are given.
        grid: of its frames.
        condition_frames: how many of the given frames are conditioning images; the others are frames of the video.

    Raises:
        ValueError: the prompt begins no video, or ends before its conditioning images do.
    """
    frame = frame_layout(grid)
    image = condition_frames * frame.tokens_per_frame
    if VIDEO_BEGIN not in prompt_ids:
        raise ValueError(f"the prompt has no video begin ({VIDEO_BEGIN}): end its text with it, a duration and a rate")
    condition = list(prompt_ids).index(VIDEO_BEGIN) + VIDEO_START_TOKENS + image
    if condition > len(prompt_ids):
        raise ValueError(
            f"the prompt has {len(prompt_ids)} tokens, but its text, duration, rate and {condition_frames} "
            f"conditioning images of {frame.tokens_per_frame} tokens need {condition}"
        )
    return VideoLayout(frame, condition, image)


def unconditional_layout(layout: VideoLayout) -> VideoLayout:
    """The same video in the unconditional stream, which begins with the video: no text precedes it."""
    image = layout.condition_image_tokens
    return VideoLayout(layout.frame, VIDEO_START_TOKENS + image, image)


def given_frames(prompt_ids: Sequence[int], layout: VideoLayout) -> int:
    """Frames of the video, after the condition, that the prompt holds: the first one made has this number.

    Raises:
        ValueError: the prompt is not of this layout, or ends within a frame.
    """
    text = layout.condition_tokens - layout.condition_image_tokens
    if VIDEO_BEGIN not in prompt_ids or list(prompt_ids).index(VIDEO_BEGIN) != text - VIDEO_START_TOKENS:
        raise ValueError(
            f"the layout has {text} tokens before the first picture, of which the last {VIDEO_START_TOKENS} must be "
            f"the prompt's first video begin ({VIDEO_BEGIN}), a duration and a rate"
        )
    frames, rest = divmod(len(prompt_ids) - layout.condition_tokens, layout.tokens_per_frame)
    if frames < 0 or rest:
        raise ValueError(
            f"the prompt has {len(prompt_ids)} tokens: a condition of {layout.condition_tokens} and whole frames of "
            f"{layout.tokens_per_frame} must make it up"
        )
    return frames


def is_text(id: int) -> bool:
    """Whether an id may stand in the text of a prompt."""
    return 0 <= id < VISUAL_BEGIN and id not in STRUCTURE


def check_text(prompt_ids: Sequence[int]) -> None:
    """Check what stands before the first picture: ids of structure stand where `text_prompt` puts them.

    Args:
        prompt_ids: as of `text_prompt`, with any frames that are given.

    Raises:
        ValueError: the prompt is not of this form, or its text holds an id of structure, which the model would obey.
    """
    ids = list(prompt_ids)
    if VIDEO_BEGIN not in ids:
        raise ValueError(f"the prompt has no video begin ({VIDEO_BEGIN}): end its text with it, a duration and a rate")
    begin = ids.index(VIDEO_BEGIN)
    if begin < 2 or ids[0] != BOS or ids[begin - 1] != SEPARATOR:
        raise ValueError(
            f"before the prompt's video begin ({VIDEO_BEGIN}) stand the begin of the sequence ({BOS}), the text and a "
            f"separator ({SEPARATOR})"
        )
    for wrong in (id for id in ids[1 : begin - 1] if not is_text(id)):
        raise ValueError(f"the text of the prompt holds {wrong}, which is no text to this model: leave it out")
    for number in ids[begin + 1 : begin + VIDEO_START_TOKENS]:
        if not NUMBER_ZERO <= number < MASK:
            raise ValueError(
                f"after the prompt's video begin ({VIDEO_BEGIN}) stand a duration and a rate, numbers from "
                f"{NUMBER_ZERO} (0) to {MASK - 1}, not {number}"
            )


# Steps


def still_masked(step: int, steps: int, tokens: int, unknown: int) -> int:
    """The rank that cuts: of a frame's visual tokens, those less confident than the one of this rank stay masked.

    So many stay masked after ``step``; fewer where several are exactly as confident as the one that cuts. The cosine
    schedule of MaskGIT (arXiv 2202.04200), ``floor(N cos(pi/2 (step + 1) / S))``, but one fewer than before at least,
    and at least one: it is the last step that fills in everything, without asking this. Computed in float32, as
    published: where the cosine is 1/2 and N even, that is one less than with exact numbers.

    Args:
        step: 0 to ``steps`` - 1.
        steps: S.
        tokens: N, visual tokens of a frame.
        unknown: how many of them are masked before the step.
    """
    angle = np.float32(np.float32((step + 1) / steps) * np.float32(math.pi)) * np.float32(0.5)
    scheduled = math.floor(np.float32(tokens) * np.float32(math.cos(angle)))
    return max(1, min(unknown - 1, scheduled))


def temperature(options: MaskedOptions, frames_before: int, step: int) -> float:
    """tau, by which the noise of the confidence is multiplied in a step.

    Every step multiplies it by ``1 - (step + 1) / S``, the last one by 0: unless it is reset, only the first frame has
    any.

    Args:
        options: of the request.
        frames_before: frames that the request has made before this one; given ones do not count.
        step: 0 to ``options.steps`` - 1.
    """
    if frames_before and not options.reset_temperature:
        return 0.0
    tau = options.temperature
    for done in range(step + 1):
        tau *= 1.0 - (done + 1) / options.steps
    return tau


class StepNoise(NamedTuple):
    """The random numbers of one step, for each of N visual tokens, row by row.

    Args:
        uniform: float64, [N], in [0, 1): which token is drawn. From probabilities p over the visual ids in ascending
            order, with cumulative sums P, the first id with ``P > uniform P_last``.
        gumbel: float32, [N]: of the confidence ``log p + tau gumbel``.
    """

    uniform: npt.NDArray[np.float64]
    gumbel: npt.NDArray[np.float32]


def step_noise(seed: int, frame: int, step: int, tokens: int) -> StepNoise:
    """The noise of one step: a pure function of its arguments.

    Philox4x64-10 (Salmon et al., SC 2011) with the key (``seed``, 0) and, for the i-th four numbers of 64 bits, i from
    1, the counter (i, 0, ``step``, ``frame``), least significant word first. The first N numbers make ``uniform``:
    their upper 53 bits times 2^-53. The next N make ``gumbel``: with u the upper 24 bits times 2^-24 (what a uniform
    float32 can be), ``-log(max(-log(max(u, 1e-20)), 1e-20))``, computed in float64 and rounded.

    Args:
        seed: of the request, 0 to 2^64 - 1.
        frame: number of the frame in the video's layout.
        step: 0 or more.
        tokens: N.
    """
    bits = np.random.Philox(key=seed, counter=np.array([0, 0, step, frame], dtype=np.uint64)).random_raw(2 * tokens)
    uniform = (bits[:tokens] >> np.uint64(11)).astype(np.float64) * 2.0**-53
    coarse = (bits[tokens:] >> np.uint64(40)).astype(np.float64) * 2.0**-24
    gumbel = -np.log(np.maximum(-np.log(np.maximum(coarse, 1e-20)), 1e-20))
    return StepNoise(uniform, gumbel.astype(np.float32))


# Commit


@lru_cache(maxsize=64)
def remasked(content: int, share: float) -> Int64:
    """Which tokens of a frame's content are committed as mask tokens, ascending: one periodic pattern.

    Of ``content`` tokens ``n = round(share content)``, one at least, at ``round(i content / n)`` in float32. With the
    published share of 0.7 and a content that 10 divides, the tokens whose index mod 10 is 2, 5 or 8 are kept.

    Args:
        content: tokens of a frame between its first and its last special tokens, newlines included.
        share: above 0 and at most 1, or 0: none.
    """
    if share == 0:
        return np.empty(0, dtype=np.int64)
    count = max(1, round(share * content))
    found = np.rint(np.arange(count, dtype=np.float32) * np.float32(content / count)).astype(np.int64)
    found.flags.writeable = False
    return found


@lru_cache(maxsize=64)
def committed_offsets(tokens: int, share: float) -> Int64:
    """Where in a frame of ``tokens`` tokens mask tokens are committed, ascending: newlines are masked like visual ones.

    Args:
        tokens: F.
        share: `MaskedOptions.remask`.
    """
    return FRAME_START_TOKENS + remasked(tokens - FRAME_START_TOKENS - FRAME_END_TOKENS, share)


def committed(ids: Int64, share: float) -> Int64:
    """The ids that a finished frame is committed with.

    Args:
        ids: [F], the frame.
        share: `MaskedOptions.remask`.

    Returns:
        [F].
    """
    ids = ids.copy()
    ids[committed_offsets(len(ids), share)] = MASK
    return ids


# Family


class Lumos(Family):
    """Lumos-1: canvases, in two streams where a request is guided. Every request is a video."""

    name = "Lumos-1"
    architectures = ARCHITECTURES
    model = "vllm_packcache.models.lumos:LumosForConditionalGeneration"
    role = "canvas"
    streams = 2
    options = (RequestOptions, MaskedOptions)
    least_text_tokens = LEAST_TEXT_TOKENS

    def check_layout(self, frame: FrameLayout, axis_scale: tuple[int, int, int] | None) -> None:
        """See `Family.check_layout`."""
        if frame.grid is None:
            raise ValueError("give grid: the frames of this model are made of rows and columns")
        own = frame_layout(frame.grid)
        if frame not in (own, FrameLayout.from_grid(frame.grid)):
            raise ValueError(
                f"frames of this model have frame_start_tokens: {own.frame_start_tokens}, row_end_tokens: "
                f"{own.row_end_tokens}, frame_end_tokens: {own.frame_end_tokens}: give these, or grid alone"
            )
        if axis_scale not in (None, MM_ROPE_SCALE):
            raise ValueError(
                f"axis_scale of this model is {list(MM_ROPE_SCALE)}, not {list(axis_scale or ())}: leave it out"
            )

    def describes(self, frame: FrameLayout, axis_scale: tuple[int, int, int] | None) -> bool:
        """See `Family.describes`."""
        return describes(frame, axis_scale)

    def other_layouts(self, layout: VideoLayout) -> tuple[VideoLayout, ...]:
        """See `Family.other_layouts`."""
        return (unconditional_layout(layout),)

    def request(self, server: Server, extra_args: Mapping[str, Any] | None, prompt: Prompt) -> CanvasRequest:
        """See `Family.request`.

        Args:
            server: the server's configuration.
            extra_args: of the request.
            prompt: of `text_prompt`, and any frames that are given. They are conditioning images; with
                ``condition_frames`` the first so many are, and the others begin the video.
        """
        if isinstance(prompt, int):
            raise ValueError(
                "this model makes videos: send the prompt as token ids (see vllm_packcache.families.lumos)"
            )
        policy, (options, made) = server.read(extra_args, *self.options)
        grid = options.grid or server.grid
        if grid is None:
            raise ValueError(f"{REQUEST_PREFIX}grid is needed: this server was started without a layout")
        check_text(prompt)
        try:
            layout = _layout_of(prompt, grid, options.condition_frames)
            first_frame = given_frames(prompt, layout)
            _check_frames(prompt, layout)
        except ValueError as error:
            raise ValueError(f"{REQUEST_PREFIX}grid {list(grid)} and the prompt: {error}") from None
        server.check_policy(policy, layout.frame)
        layouts = (layout, unconditional_layout(layout))[: 2 if made.guided else 1]
        streams = tuple(
            Stream(
                Plan(own, policy, Positions(own, server.window(policy), MM_ROPE_SCALE)),
                layout.condition_tokens - own.condition_tokens,
            )
            for own in layouts
        )
        return CanvasRequest(streams, options.frames, made, first_frame)


def _layout_of(prompt_ids: Sequence[int], grid: Grid, condition_frames: int | None) -> VideoLayout:
    if grid[0] * grid[1] < 2:
        raise ValueError("a frame needs two visual tokens at least: one stays masked until the last step")
    if condition_frames is None:
        text = video_layout(prompt_ids, grid).condition_tokens
        condition_frames = (len(prompt_ids) - text) // frame_layout(grid).tokens_per_frame
    return video_layout(prompt_ids, grid, condition_frames)


def _check_frames(prompt_ids: Sequence[int], layout: VideoLayout) -> None:
    """All frames that a prompt holds must be frames.

    Raises:
        ValueError: one is not.
    """
    assert layout.frame.grid is not None
    first = layout.condition_tokens - layout.condition_image_tokens
    for start in range(first, len(prompt_ids), layout.tokens_per_frame):
        codes_of_frame(prompt_ids[start : start + layout.tokens_per_frame], layout.frame.grid)
