"""The models whose videos are judged, and how each makes them under a policy: one file for both kinds of generation."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.bundled import CAUSAL, MASKED, identity
from benchmarks.formats import FLOAT32, FORMATS
from benchmarks.quality import history
from benchmarks.quality.cached import InFormats, all_in_formats
from benchmarks.quality.variants import (
    BLOCK_SIZE,
    CHANGED,
    PACKCACHE,
    Shape,
    Variant,
    Variants,
    all_variants,
    in_passes,
    policies_only,
    whole_frames,
    yardsticks,
)
from benchmarks.training.live import SPARSELY
from vllm_packcache.config.errors import ConfigError, shown
from vllm_packcache.core.packing import HISTORY_FORMATS
from vllm_packcache.demo.masked import bundle
from vllm_packcache.demo.masked import tokenizer as masked_tokenizer
from vllm_packcache.demo.scores import sequence, true_frames
from vllm_packcache.demo.tokenizer import (
    CONDITION_TOKENS,
    FRAME_TOKENS,
    MODEL_DIR,
    TRAINED_FRAMES,
    VideoTokenizer,
    world_prompt,
)
from vllm_packcache.demo.world import make_world
from vllm_packcache.families import lumos
from vllm_packcache.families.lumos import MaskedOptions
from vllm_packcache.families.schedule import computed_passes, schedule
from vllm_packcache.tools.machine import sha256

if TYPE_CHECKING:
    from benchmarks.training.masked_sparse_video import Request

Int64 = npt.NDArray[np.int64]

Make = Callable[[range], Int64]
"""From seeds of V worlds to frames [V, T, 16, 16]: token ids of the demo's tokenizer, whatever the model's are."""

AT_ONCE, ONE_BY_ONE = 50, 4
"""Worlds of a part of the work, where they are made together and where they are not."""


class Generator(ABC):
    """A model of the demo's worlds.

    Attributes:
        benchmark: what its results are called.
        trained_frames: of the longest videos that the model was trained on.
    """

    benchmark: ClassVar[str]
    trained_frames: ClassVar[int]

    @property
    @abstractmethod
    def videos(self) -> int:
        """V, that every variant makes by default."""

    @property
    @abstractmethod
    def lengths(self) -> int:
        """As many of ``trained_frames`` the longest videos have by default."""

    @property
    @abstractmethod
    def how(self) -> str:
        """How its videos are made, in words."""

    @property
    @abstractmethod
    def variants(self) -> Variants:
        """What is compared."""

    @property
    def pairs(self) -> Iterator[tuple[str, str]]:
        """Names of variants whose videos are compared world by world."""
        names = [variant.name for variant in self.variants.named]
        return ((who, name) for who in (PACKCACHE, CHANGED) for name in names if name != who)

    @property
    @abstractmethod
    def described(self) -> Mapping[str, Any]:
        """What of it decides what is made."""

    def about(self, variant: Variant) -> Mapping[str, Any]:
        """What else is to be said of a variant."""
        del variant
        return {}

    @abstractmethod
    def is_sparse(self, variant: Variant, frames: int) -> bool:
        """Whether what is computed is what heads look at (`benchmarks.training.sparse`), for many videos at once."""

    @abstractmethod
    def maker(self, variant: Variant, frames: int) -> Make:
        """What makes videos of so many frames under a variant."""

    def at_once(self, variant: Variant, frames: int) -> int:
        """How many videos a part of the work has."""
        return AT_ONCE if self.is_sparse(variant, frames) else ONE_BY_ONE


class Short:
    """Videos of the trained length, and fewer: each takes long, or is made many times."""

    videos = 50
    lengths = 1


@dataclass(frozen=True)
class Causal(Generator):
    """The bundled model, which makes one token after the other: greedily.

    Args:
        policies: names of some that are compared besides.
    """

    policies: tuple[str, ...] = ()

    benchmark = "quality"
    trained_frames = TRAINED_FRAMES

    @property
    def videos(self) -> int:
        """Many."""
        return 200

    @property
    def lengths(self) -> int:
        """Four."""
        return 4

    @property
    def how(self) -> str:
        """As long as there has been this benchmark, and what is left out."""
        return f"greedy, float32, generated from the condition alone; {SPARSELY}"

    @cached_property
    def variants(self) -> Variants:
        """All there are."""
        return all_variants(Shape("demo", CONDITION_TOKENS)).beside(self.policies)

    @cached_property
    def described(self) -> Mapping[str, Any]:
        """The model."""
        return identity(CAUSAL)

    def is_sparse(self, variant: Variant, frames: int) -> bool:
        """Where heads find what they look at, or where the video begins."""
        from benchmarks.training import sparse_video

        return variant.cache == FLOAT32.name and sparse_video.is_computable(variant.plan(), BLOCK_SIZE, frames)

    def maker(self, variant: Variant, frames: int) -> Make:
        """Sparsely, else with a decoder that guesses: the true frames, and what it makes does not depend on that."""
        from benchmarks.quality.decoder import Second, VideoCache, generate
        from benchmarks.training import sparse_video
        from benchmarks.training.llama import load_pretrained

        model, tokenizer, plan = load_pretrained(MODEL_DIR), VideoTokenizer(), variant.plan()
        is_sparse = self.is_sparse(variant, frames)

        def cache() -> VideoCache:
            return VideoCache(model.size, plan, BLOCK_SIZE, frames, FORMATS[variant.cache])

        def make(seed: int) -> Int64:
            world = make_world(seed)
            prompt, second = world_prompt(tokenizer, world), None
            if variant.scale != 1:
                # As long as the first, so that the plan is that of both.
                without = sparse_video.without_words(tokenizer, np.array(prompt))
                second = Second(cache(), without.tolist(), variant.scale)
            truth = sequence(tokenizer, true_frames(tokenizer, world, frames)[1:]).reshape(frames, FRAME_TOKENS)
            return generate(model, cache(), prompt, frames, _draft(truth), second)

        def make_all(seeds: range) -> Int64:
            if is_sparse:
                prompts = np.array([world_prompt(tokenizer, make_world(seed)) for seed in seeds])
                ids = sparse_video.generate(model, tokenizer, plan, BLOCK_SIZE, prompts, frames, variant.scale)
            else:
                ids = np.stack([make(seed) for seed in seeds])
            return np.stack([tokenizer.frames_from_ids(own.reshape(-1).tolist()) for own in ids])

        return make_all


@dataclass(frozen=True)
class Guided(Short, Causal):
    """The same model, whose videos are led away from those that it makes of the same picture without words.

    Args:
        scales: of guidance, that every policy is tried with besides none.
    """

    scales: tuple[float, ...] = (1.25, 1.5, 2.0, 3.0)

    benchmark = "quality-guided"

    @property
    def how(self) -> str:
        """As those without guidance, and what they are led away from."""
        return f"{super().how}; guidance leads away from the same picture with an empty text, the likeliest token wins"

    @cached_property
    def variants(self) -> Variants:
        """The yardsticks, without guidance and with each scale."""
        return yardsticks(Shape("demo", CONDITION_TOKENS)).beside(self.policies).guided(self.scales)

    @property
    def pairs(self) -> Iterator[tuple[str, str]]:
        """Each guided variant and the same policy without; under each scale the policies and the full cache."""
        policies = [variant for variant in self.variants.named if variant.scale == 1]
        for scale in (1, *self.scales):
            full, *others = (own.guided(scale).name for own in policies)
            yield from ((who, full) for who in others)
            if scale != 1:
                yield from ((own.guided(scale).name, own.name) for own in policies)


@dataclass(frozen=True)
class Cached(Short, Causal):
    """The same model, whose keys and values are kept in bfloat16 and in fewer bits.

    Args:
        formats: of 8 bits.
    """

    formats: tuple[str, ...] = ("int8_per_token_head", "fp8_e4m3")

    benchmark = "quality-cached"

    @property
    def how(self) -> str:
        """What is rounded, and when."""
        return (
            "greedy, float32, generated from the condition alone; keys and values are rounded when they are written, "
            "keys once more whenever the window slides, and read as they are then; fp8_e4m3 is rounded to nearest, as "
            "on GPUs; equal bytes: the longest history whose blocks, condition and newest frame included, take no more "
            "than those of the same policy in bfloat16, the window of the paper's rule as much longer"
        )

    @cached_property
    def policies_in_formats(self) -> tuple[InFormats, ...]:
        """What is compared, by policy."""
        return all_in_formats(Shape("demo", CONDITION_TOKENS), self.formats)

    @cached_property
    def variants(self) -> Variants:
        """Each policy in bfloat16, in the formats at equal tokens, and at equal bytes."""
        first, *others = [variant for own in self.policies_in_formats for variant in own.all]
        return Variants(first, tuple(others))

    @property
    def pairs(self) -> Iterator[tuple[str, str]]:
        """Each format and bfloat16, of the same policy."""
        return (pair for own in self.policies_in_formats for pair in own.pairs)


@dataclass(frozen=True)
class Masked(Generator):
    """A model in Lumos-1's architecture, which makes a frame at once in steps: image to video, guided.

    Args:
        checkpoint: its folder, with the ids of the bundled one; None: the bundled one.
        options: how frames are made; the seed is that of the world, for every policy the same.
        policies: names of some that are compared besides.
    """

    checkpoint: Path | None = None
    options: MaskedOptions = bundle.OPTIONS
    policies: tuple[str, ...] = ()

    benchmark = "quality-masked"
    trained_frames = bundle.TRAINED_FRAMES

    @property
    def videos(self) -> int:
        """Fewer of a model that nobody knows how to compute sparsely."""
        return 8 if self.checkpoint else 50

    @property
    def lengths(self) -> int:
        """The same."""
        return 1 if self.checkpoint else 4

    @property
    def how(self) -> str:
        """With the options that matter most."""
        own = self.options
        return (
            f"image to video, float32, {own.steps} + 1 passes a frame, guidance {own.guidance:g}; noise depends on "
            "the world, the frame and the step, not on the policy"
            f"{'' if self.checkpoint else f'; {SPARSELY}'}"
        )

    @property
    def shape(self) -> Shape:
        """Of its videos."""
        # Where the text is not whole, nothing can be told of these videos.
        sink = -(-_MOST_TEXT // BLOCK_SIZE) * BLOCK_SIZE
        return Shape(bundle.PRESET, _USUAL_TEXT + masked_tokenizer.FRAME.tokens_per_frame, sink)

    @cached_property
    def variants(self) -> Variants:
        """The policies: a video takes many times as long as one that is made token by token."""
        return policies_only(self.shape).beside(self.policies)

    @cached_property
    def described(self) -> Mapping[str, Any]:
        """The model, and how its frames are made."""
        if self.checkpoint is None:
            model = identity(MASKED)
        else:
            model = {"name": str(self.checkpoint), "sha256": sha256(self.checkpoint / "model.safetensors")}
        return {**model, "options": asdict(self.options)}

    def is_sparse(self, variant: Variant, frames: int) -> bool:
        """Of the bundled model, where all of the text lives."""
        from benchmarks.training import masked_sparse_video

        plan = variant.plan(_MOST_TEXT + masked_tokenizer.FRAME.tokens_per_frame)
        return self.checkpoint is None and masked_sparse_video.is_computable(plan, BLOCK_SIZE, frames)

    def request(self, variant: Variant, frames: int, seed: int) -> Request:
        """What a world's video is made of."""
        from benchmarks.training.masked_sparse_video import Request

        world, text = make_world(seed), masked_tokenizer.build_text_tokenizer()
        ids = masked_tokenizer.prompt(world.prompt, frames, text) + masked_tokenizer.world_frame(world, 0).tolist()
        return Request(ids, variant.plan(len(ids)), replace(self.options, **variant.made, seed=seed))

    def maker(self, variant: Variant, frames: int) -> Make:
        """With the published loop, of the bundled model sparsely, else on live tokens only."""
        from benchmarks.quality.live_lumos import LiveLumos
        from benchmarks.training import masked_sparse_video
        from benchmarks.training.masked_bundle import load_bundle
        from vllm_packcache.reference.masked_video import generate_masked

        offset = VideoTokenizer().visual_offset
        request = partial(self.request, variant, frames)
        if self.is_sparse(variant, frames):
            small = load_bundle()
            return lambda seeds: (
                masked_sparse_video.generate(small, [request(seed) for seed in seeds], BLOCK_SIZE, frames) + offset
            )
        with ExitStack() as stack:
            folder = self.checkpoint or bundle.write_checkpoint(stack.enter_context(TemporaryDirectory()))
            model = LiveLumos.load(folder)
        fading = history.fading(variant.history)

        def make(seed: int) -> Int64:
            own = request(seed)
            made = generate_masked(model, own.prompt, frames, own.plan, own.options, BLOCK_SIZE, fading)
            return np.stack([lumos.codes_of_frame(ids, masked_tokenizer.GRID_SHAPE) for ids in made.frames.numpy()])

        return lambda seeds: np.stack([make(seed) for seed in seeds]) + offset


_GUIDED = replace(bundle.OPTIONS, steps=8, guidance=1.5)


@dataclass(frozen=True)
class Passes(Short, Masked):
    """The bundled masked model, of whose passes something is left out, beside fewer plain passes.

    Args:
        whole: numbers of passes that something is left out of.
        fewer: plain numbers of passes besides.
        less: what is left out, by number of passes.
        also: options of requests that are compared besides.
        looked_at: worlds, and frames of each, whose logits are looked at.
    """

    options: MaskedOptions = _GUIDED
    whole: tuple[int, ...] = (8, 16)
    fewer: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 12)
    less: Mapping[int, tuple[Mapping[str, Any], ...]] = field(default_factory=lambda: LESS, hash=False)
    also: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)
    looked_at: tuple[int, int] = (10, 1)

    benchmark = "quality-passes"

    @cached_property
    def variants(self) -> Variants:
        """One policy, the default."""
        fewer, less = list(self.fewer), {steps: list(own) for steps, own in self.less.items()}
        for own in self.also:
            steps = own.get("steps", self.options.steps)
            if steps not in (*self.whole, *fewer):
                fewer.append(steps)
            if left_out := {name: value for name, value in own.items() if name != "steps"}:
                less.setdefault(steps, []).append(left_out)
        variants = in_passes(self.shape, self.whole, fewer, less)
        # What is wrong with it is known before hours have passed.
        for variant in variants.named:
            self.options_of(variant)
        return variants

    @property
    def how(self) -> str:
        """What all have in common, and what a cost is."""
        return (
            f"image to video, float32, guidance {self.options.guidance:g}, under the default policy; noise depends on "
            "the world, the frame and the step; rows are those that the model computes of a frame, in both streams and "
            f"with the commit; {SPARSELY}"
        )

    def options_of(self, variant: Variant) -> MaskedOptions:
        """How a variant's frames are made.

        Raises:
            ConfigError: an option is none, or impossible.
        """
        try:
            return replace(self.options, **variant.made)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"--made: {error}") from None

    def about(self, variant: Variant) -> Mapping[str, Any]:
        """How its frames are made, and what they cost."""
        return {"made": dict(variant.made), **cost(self.options_of(variant), masked_tokenizer.GRID_SHAPE)._asdict()}

    @property
    def pairs(self) -> Iterator[tuple[str, str]]:
        """Each with the same number of whole passes, and with the most plain passes that have no more rows."""
        variants = [own for own in self.variants.named if set(own.made) != {"steps"}]
        plain = {own.made["steps"]: own for own in self.variants.named if set(own.made) == {"steps"}}
        rows = {steps: self.about(own)["rows"] for steps, own in plain.items()}
        for steps, own in plain.items():
            yield from ((own.name, plain[most].name) for most in self.whole if steps < most)
        for own in variants:
            yield own.name, plain[own.made["steps"]].name
            if fewer := [steps for steps in plain if rows[steps] <= self.about(own)["rows"]]:
                yield own.name, plain[max(fewer)].name


LESS: Mapping[int, tuple[Mapping[str, Any], ...]] = {
    8: (
        {"refresh": 8},
        {"reuse": 0.1},
        {"reuse": 0.2},
        {"guidance_interval": 2},
        {"guidance_until": 0.5},
        {"guidance_from": 0.5},
        {"refresh": 8, "reuse": 0.1, "guidance_interval": 2},
    ),
    16: (
        {"refresh": 8},
        {"reuse": 0.05},
        {"reuse": 0.1},
        {"guidance_interval": 2},
        {"refresh": 8, "reuse": 0.02, "guidance_interval": 2},
        {"refresh": 8, "reuse": 0.05, "guidance_interval": 2},
    ),
}
"""What is left out, by number of passes."""


def made_of(text: str) -> Mapping[str, Any]:
    """Options of requests as they are written, ``steps=8,refresh=4``.

    Raises:
        ConfigError: they are not; what an option may be is asked where frames are made.
    """
    names = {field.name for field in fields(MaskedOptions)} - {"seed"}
    options: dict[str, Any] = {}
    for own in text.split(","):
        name, equals, value = own.strip().partition("=")
        try:
            number = json.loads(value) if equals else None
        except ValueError:
            number = None
        if name not in names or name in options or isinstance(number, bool) or not isinstance(number, int | float):
            raise ConfigError(
                f"--made must be options of requests and numbers, such as steps=8,refresh=4, not {shown(text)}"
            )
        options[name] = number
    return options


class Cost(NamedTuple):
    """What the model computes of a frame, its commit included.

    Args:
        rows: tokens of both streams that go through all layers.
        forwards: times that the model runs.
    """

    rows: int
    forwards: int


def cost(options: MaskedOptions, grid: lumos.Grid) -> Cost:
    """What frames of a grid cost that are made so."""
    passes = schedule(options, grid)
    commit = lumos.frame_layout(grid).tokens_per_frame * (2 if options.guided else 1)
    return Cost(commit + sum(sum(own.rows) for own in passes), computed_passes(options, grid))


@dataclass(frozen=True)
class Encoded(Short, Masked):
    """The bundled masked model, whose older frames are held in fewer bits.

    Args:
        formats: of the history.
        budget: whole frames that are kept as they were written.
    """

    formats: tuple[str, ...] = HISTORY_FORMATS
    budget: int = 3

    benchmark = "quality-history"

    @property
    def how(self) -> str:
        """What is encoded, and what is compared."""
        return (
            f"image to video, float32, {self.options.steps} + 1 passes a frame, guidance {self.options.guidance:g}, "
            "whole frames, positions re-based; a frame that is older than the newest is what a decoder makes of its "
            "bytes; equal bytes: as many frames as fit into the blocks of those that are as they were written, in "
            "bfloat16; all but the full cache is computed whole"
        )

    @cached_property
    def kept(self) -> InFormats:
        """The last frames in each format, at equal tokens and at equal bytes."""
        return history.in_formats(whole_frames(self.shape)[1], self.formats, self.budget, self.trained_frames)

    @cached_property
    def variants(self) -> Variants:
        """The full cache besides."""
        return Variants(whole_frames(self.shape)[0], self.kept.all)

    @property
    def pairs(self) -> Iterator[tuple[str, str]]:
        """Each format and the history as it was written."""
        return self.kept.pairs

    def about(self, variant: Variant) -> Mapping[str, Any]:
        """How its history is kept, and what it takes."""
        return {"cache": variant.history, "bytes": history.held_bytes(variant, self.trained_frames)}

    def is_sparse(self, variant: Variant, frames: int) -> bool:
        """What is rounded has to be computed, and what that is compared with too."""
        return variant not in self.kept.all and super().is_sparse(variant, frames)


_USUAL_TEXT, _MOST_TEXT = 21, 24
"""Tokens of a prompt before the picture: on average, and at most."""


def _draft(truth: Int64) -> Callable[[Int64], Int64]:
    """A guess of the next frame, [257]: the true one, or the last one once the video has gone its own way."""

    def guess(made: Int64) -> Int64:
        number = len(made)
        if number >= 2 and (made[-1] != truth[number - 1]).sum() > (made[-1] != made[-2]).sum():
            return made[-1]
        return truth[number]

    return guess
