"""The models whose videos are judged, and how each makes them under a policy: one file for both kinds of generation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from benchmarks.bundled import CAUSAL, MASKED, identity
from benchmarks.formats import FLOAT32, FORMATS
from benchmarks.quality.cached import InFormats, all_in_formats
from benchmarks.quality.variants import (
    BLOCK_SIZE,
    CHANGED,
    PACKCACHE,
    Shape,
    Variant,
    Variants,
    all_variants,
    policies_only,
    yardsticks,
)
from benchmarks.training.live import SPARSELY
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
from vllm_packcache.tools.machine import sha256

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

    @abstractmethod
    def is_sparse(self, variant: Variant, frames: int) -> bool:
        """Whether what is computed is what heads look at (`benchmarks.training.sparse`), for many videos at once."""

    @abstractmethod
    def maker(self, variant: Variant, frames: int) -> Make:
        """What makes videos of so many frames under a variant."""

    def at_once(self, variant: Variant, frames: int) -> int:
        """How many videos a part of the work has."""
        return AT_ONCE if self.is_sparse(variant, frames) else ONE_BY_ONE


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
class Guided(Causal):
    """The same model, whose videos are led away from those that it makes of the same picture without words.

    Args:
        scales: of guidance, that every policy is tried with besides none.
    """

    scales: tuple[float, ...] = (1.25, 1.5, 2.0, 3.0)

    benchmark = "quality-guided"

    @property
    def videos(self) -> int:
        """Fewer: each policy makes them once for every scale, of two streams."""
        return 50

    @property
    def lengths(self) -> int:
        """The trained length."""
        return 1

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
class Cached(Causal):
    """The same model, whose keys and values are kept in bfloat16 and in fewer bits.

    Args:
        formats: of 8 bits.
    """

    formats: tuple[str, ...] = ("int8_per_token_head", "fp8_e4m3")

    benchmark = "quality-cached"

    @property
    def videos(self) -> int:
        """Fewer: every token is computed whole."""
        return 50

    @property
    def lengths(self) -> int:
        """The trained length."""
        return 1

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

    @cached_property
    def variants(self) -> Variants:
        """The policies: a video takes many times as long as one that is made token by token."""
        # Where the text is not whole, nothing can be told of these videos.
        sink = -(-_MOST_TEXT // BLOCK_SIZE) * BLOCK_SIZE
        shape = Shape(bundle.PRESET, _USUAL_TEXT + masked_tokenizer.FRAME.tokens_per_frame, sink)
        return policies_only(shape).beside(self.policies)

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

    def maker(self, variant: Variant, frames: int) -> Make:
        """With the published loop, of the bundled model sparsely, else on live tokens only."""
        from benchmarks.quality.live_lumos import LiveLumos
        from benchmarks.training import masked_sparse_video
        from benchmarks.training.masked_bundle import load_bundle
        from vllm_packcache.reference.masked_video import generate_masked

        text, offset = masked_tokenizer.build_text_tokenizer(), VideoTokenizer().visual_offset

        def request(seed: int) -> masked_sparse_video.Request:
            world = make_world(seed)
            ids = masked_tokenizer.prompt(world.prompt, frames, text) + masked_tokenizer.world_frame(world, 0).tolist()
            return masked_sparse_video.Request(ids, variant.plan(len(ids)), replace(self.options, seed=seed))

        if self.is_sparse(variant, frames):
            small = load_bundle()
            return lambda seeds: (
                masked_sparse_video.generate(small, [request(seed) for seed in seeds], BLOCK_SIZE, frames) + offset
            )
        with ExitStack() as stack:
            folder = self.checkpoint or bundle.write_checkpoint(stack.enter_context(TemporaryDirectory()))
            model = LiveLumos.load(folder)

        def make(seed: int) -> Int64:
            own = request(seed)
            made = generate_masked(model, own.prompt, frames, own.plan, own.options, BLOCK_SIZE)
            return np.stack([lumos.codes_of_frame(ids, masked_tokenizer.GRID_SHAPE) for ids in made.frames.numpy()])

        return lambda seeds: np.stack([make(seed) for seed in seeds]) + offset


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
