"""What `benchmarks.masked` runs: sizes, videos, and how much arithmetic a frame is."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from benchmarks.engine_process import Device
from benchmarks.model import ModelShape
from vllm_packcache.config.server import REQUEST_PREFIX, ServerConfig
from vllm_packcache.core.policies import PAPER, Policy
from vllm_packcache.core.retention import Retention
from vllm_packcache.families import LUMOS, lumos
from vllm_packcache.families.lumos import CanvasRequest

SEED = 0
POLICY = PAPER
BLOCK_SIZE = 32

SECONDS, RATE = 4, 12
"""What every prompt states of its video."""

TEXT_IDS = 8000
"""Ids below this are of text."""

SPECIAL_TOKENS = len(lumos.text_prompt([], SECONDS, RATE))
"""Of a prompt's text."""

LAST_FRAME: Mapping[str, Any] = {"window": 1, "history_frames": 1}
"""With these packcache is a sliding window over the last frame."""

RATIOS = {
    "full / packcache": ("full", "packcache"),
    "packcache / short": ("packcache", "short"),
    "full / last frame": ("full", "last frame"),
}
"""Ratios of times of the last frame: name, and the videos that it divides."""

TOGETHER, APART = BATCH = ("together", "apart")
BATCH_RATIOS = {"together / apart": BATCH}

PUBLISHED_FRAMES = 13
"""Latent frames of 48 pictures, the conditioning image included."""

PUBLISHED_MASK_BYTES = 8 + 4
"""Bytes that an element of the published code's attention mask takes at its peak.

`create_attention_mask_t2v` computes ``1.0 - mask.type(sequence.dtype)``: there are an int64 copy of the mask and its
float32 result at once.
"""


class Work(NamedTuple):
    """Floating-point operations of making a frame.

    Attributes:
        linear: of the layers' matrices.
        attention: of queries with keys, and of probabilities with values.
        head: of the visual rows of the output layer.
    """

    linear: int
    attention: int
    head: int

    @property
    def total(self) -> int:
        """All."""
        return sum(self)


@dataclass(frozen=True)
class MeasuredVideo:
    """A request that makes one frame.

    Args:
        grid: of its frames.
        text: ids of text.
        given: frames of the video that are there, the conditioning image not counted.
        image: whether there is one.
        options: of the request, without prefix.
    """

    grid: lumos.Grid
    text: int
    given: int
    image: bool = True
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @cached_property
    def ids(self) -> list[int]:
        """The prompt."""
        random = np.random.default_rng(SEED)
        ids = lumos.text_prompt(random.integers(1, TEXT_IDS, self.text).tolist(), SECONDS, RATE)
        for _ in range(self.image + self.given):
            # The first code: no model has fewer.
            ids += lumos.frame_of_codes(np.zeros(self.grid, dtype=np.int64)).tolist()
        return ids

    @property
    def extra_args(self) -> dict[str, Any]:
        """Options of the request as a server gets them."""
        own = {"grid": list(self.grid), "frames": 1, "condition_frames": int(self.image), "seed": SEED}
        return {f"{REQUEST_PREFIX}{name}": value for name, value in (own | dict(self.options)).items()}

    @property
    def tokens_per_frame(self) -> int:
        """F."""
        return lumos.frame_layout(self.grid).tokens_per_frame

    @property
    def total_tokens(self) -> int:
        """Of the prompt and the frame that is made."""
        return len(self.ids) + self.tokens_per_frame


@dataclass(frozen=True, kw_only=True)
class MaskedPlan:
    """Sizes of everything that is run.

    Args:
        model: what is timed.
        of: what it is, in words.
        layers: of the model that is reported; all layers are alike.
        steps: of a frame that is timed.
        steps_reported: of a frame that is reported.
        grid: of the video whose last frame is timed.
        text: ids of text of every prompt.
        frames: of that video after its conditioning image, the one that is made included.
        rounds: frames of each kind that are timed.
        batch_grid: of the videos that are made together, and one after another.
        batch_given: frames of each that are there.
        batch_rounds: how often.
        videos: how many.
        device: where.
        threads: OpenMP threads.
        policy: of the server.
        precision: in how many bits older frames are held, as in a configuration; nothing: as they were written.
    """

    model: ModelShape
    of: str
    layers: int
    steps: int
    steps_reported: int
    grid: lumos.Grid
    text: int
    frames: int
    rounds: int
    batch_grid: lumos.Grid
    batch_given: int
    batch_rounds: int
    videos: int = 4
    device: Device = "cpu"
    threads: int = 1
    policy: Policy = POLICY
    precision: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        """What all videos have in common."""
        return {"steps": self.steps}

    @property
    def described(self) -> str:
        """What is made, and what is reckoned of it."""
        rows, columns = self.grid
        video = (
            f"frame {self.frames} after a conditioning image, {rows} x {columns} visual tokens "
            f"({self.last_frame().tokens_per_frame:,} in all), both streams of guidance, {self.layers} layers "
            f"{self.of}, {self.steps_reported} steps and the commit"
        )
        if (self.layers, self.steps_reported) == (self.model.layers, self.steps):
            return f"{video}: all of it timed"
        layers = f"{self.model.layers} layer{'s' if self.model.layers > 1 else ''}"
        return (
            f"{video}: enter + {self.steps_reported} x step + commit, reckoned from {layers}, {self.steps} steps and "
            "the commit, which are timed"
        )

    def last_frame(self, given: int | None = None, *, image: bool = True, **options: Any) -> MeasuredVideo:
        """The video of which the last frame is to be made; ``given``: another number of frames before it."""
        given = self.frames - 1 if given is None else given
        return MeasuredVideo(self.grid, self.text, given, image, self.options | options)

    @cached_property
    def cases(self) -> dict[str, MeasuredVideo]:
        """Videos of which a frame is timed."""
        return {
            "full": self.last_frame(policy="full"),
            "packcache": self.last_frame(),
            "short": self.short,
            "last frame": self.last_frame(**LAST_FRAME),
        }

    @property
    def short(self) -> MeasuredVideo:
        """One that keeps all it has, and has as many tokens in its streams together as packcache reads.

        Text makes up for what is not a whole frame. It is in the conditional stream alone: what packcache keeps beyond
        whole frames in the other one is in this one here.
        """
        read, frame = sum(self.live(self.last_frame())), self.last_frame().tokens_per_frame
        # In both streams: the start of the video, the conditioning image, the frame that is made.
        least = SPECIAL_TOKENS + lumos.VIDEO_START_TOKENS + 4 * frame
        given, text = divmod(read - least, 2 * frame)
        return MeasuredVideo(self.grid, text, given, options=self.options | {"policy": "full"})

    @property
    def batch(self) -> MeasuredVideo:
        """Each of the videos that are made together."""
        return MeasuredVideo(self.batch_grid, self.text, self.batch_given, options=self.options)

    @property
    def additional_config(self) -> dict[str, Any]:
        """What switches the plugin on."""
        return {
            "kv_cache_policy": self.policy.name,
            "kv_cache_policy_config": dataclasses.asdict(self.policy)
            | {"layout": {"grid": list(self.grid)}}
            | ({"precision": dict(self.precision)} if self.precision else {}),
        }

    @cached_property
    def config(self) -> ServerConfig:
        """Of the server."""
        config = ServerConfig.from_additional_config(self.additional_config, LUMOS)
        assert config is not None, "a family of canvases is always on"
        return config

    def planned(self, video: MeasuredVideo) -> CanvasRequest:
        """What the engine makes of a request."""
        return LUMOS.request(self.config, video.extra_args, video.ids)

    def live(self, video: MeasuredVideo) -> list[int]:
        """Tokens that the frame's own read, in each stream."""
        plan = self.planned(video)
        lengths = []
        for stream in (own.plan for own in plan.streams):
            layout = stream.layout
            last = layout.frame_start(video.given + 1) - 1
            lengths.append(Retention(layout, stream.policy, BLOCK_SIZE).live_tokens(last) + 1)
        return lengths

    def unknown(self, video: MeasuredVideo, steps: int) -> list[int]:
        """Tokens of the frame that are unknown before each step."""
        rows, columns = video.grid
        tokens = unknown = rows * columns
        counts = []
        for step in range(steps):
            counts.append(unknown)
            unknown = lumos.still_masked(step, steps, tokens, unknown)
        return counts

    def work(self, video: MeasuredVideo, *, layers: int, steps: int) -> Work:
        """Of making a frame in both streams: all steps and the commit, which needs no output layer."""
        live, model = self.live(video), self.model
        passes, frame = (steps + 1) * layers, video.tokens_per_frame
        codes = model.vocab - lumos.VISUAL_BEGIN
        return Work(
            passes * len(live) * frame * 2 * model.layer_weights,
            passes * 4 * model.heads * model.head_size * frame * sum(live),
            sum(self.unknown(video, steps)) * len(live) * 2 * model.hidden * codes,
        )

    def floor(self, above: MeasuredVideo, below: MeasuredVideo, *, layers: int, steps: int) -> float:
        """The ratio of their work."""
        return self.work(above, layers=layers, steps=steps).total / self.work(below, layers=layers, steps=steps).total

    @property
    def readings(self) -> dict[str, int]:
        """Other videos that have 13 pictures: with how many frames given, beside an image or without one."""
        return {"the image is the first of them": self.frames - 2, "no image": self.frames - 1}

    def reading(self, name: str, **options: Any) -> MeasuredVideo:
        """The video of a reading."""
        return self.last_frame(self.readings[name], image=name != "no image", **options)

    @property
    def max_model_len(self) -> int:
        """Longest sequence of all."""
        return max(video.total_tokens for video in (*self.cases.values(), self.batch)) + BLOCK_SIZE

    @property
    def max_num_batched_tokens(self) -> int:
        """Of a step: a frame; and what all videos that are made together need, so that none is behind the others."""
        together = max(self.text + SPECIAL_TOKENS, self.batch.tokens_per_frame)
        return max(self.last_frame().tokens_per_frame, self.videos * together)

    @property
    def kv_blocks(self) -> int:
        """Blocks of the KV cache: for the longest video in both streams and all that are made together."""
        longest = max(sum(_blocks(length) for length in self._lengths(video)) for video in self.cases.values())
        together = self.videos * sum(_blocks(length) for length in self._lengths(self.batch))
        # Where steps are scheduled ahead of the ones in flight, a frame more; and vLLM keeps one for itself.
        return max(longest, together) + 2 * _blocks(self.max_num_batched_tokens) + 1

    def _lengths(self, video: MeasuredVideo) -> Sequence[int]:
        plan = self.planned(video)
        start = plan.conditional.layout.condition_tokens
        return [video.total_tokens - start + own.plan.layout.condition_tokens for own in plan.streams]

    def cache_bytes(self, blocks: int) -> int:
        """Bytes of blocks of the KV cache of the model that is reported, in bfloat16."""
        reported = dataclasses.replace(self.model, layers=self.layers, dtype="bfloat16", bytes_per_element=2)
        return blocks * BLOCK_SIZE * reported.kv_bytes_per_token

    @property
    def published_mask_bytes(self) -> int:
        """What the published code's attention mask takes at its peak, for its 13 frames."""
        return (PUBLISHED_FRAMES * self.last_frame().tokens_per_frame) ** 2 * PUBLISHED_MASK_BYTES


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_SIZE)


LAYERS = 28
"""Of the model of 3 billion parameters."""

LUMOS_3B = ModelShape(
    layers=LAYERS,
    heads=24,
    kv_heads=8,
    head_size=128,
    hidden=3072,
    intermediate=8192,
    vocab=129_536,
    dtype="bfloat16",
    bytes_per_element=2,
)
"""The geometry of Llama 3.2 3B with the vocabulary of Lumos-1."""

OF_3B = "of the size of a model of 3 billion parameters"

QUICK = MaskedPlan(
    model=ModelShape(
        layers=1,
        heads=2,
        kv_heads=1,
        head_size=32,
        hidden=64,
        intermediate=128,
        vocab=lumos.VISUAL_BEGIN + 64,
        dtype="bfloat16",
        bytes_per_element=2,
    ),
    of="of a tiny model",
    layers=3,
    steps=2,
    steps_reported=50,
    grid=(8, 12),
    text=30,
    frames=13,
    rounds=2,
    batch_grid=(3, 4),
    batch_given=3,
    batch_rounds=2,
)
ON_CPU = MaskedPlan(
    model=dataclasses.replace(LUMOS_3B, layers=1),
    of=OF_3B,
    layers=LAYERS,
    steps=2,
    steps_reported=50,
    grid=(48, 84),
    text=267,
    frames=13,
    rounds=2,
    batch_grid=(16, 16),
    batch_given=3,
    batch_rounds=2,
)
ON_GPU = MaskedPlan(
    model=LUMOS_3B,
    of=OF_3B,
    layers=LAYERS,
    steps=50,
    steps_reported=50,
    grid=(48, 84),
    text=267,
    frames=13,
    rounds=5,
    batch_grid=(48, 84),
    batch_given=3,
    batch_rounds=3,
    device="cuda",
)
"""Nothing is reckoned: all layers and all steps are timed."""
