"""The models whose videos are judged, and how each makes them under a policy: one file for both kinds of generation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from benchmarks.bundled import CAUSAL, MASKED, identity
from benchmarks.quality.variants import BLOCK_SIZE, Shape, Variant, Variants, all_variants, policies_only
from vllm_packcache.demo.masked import bundle
from vllm_packcache.demo.masked import tokenizer as masked_tokenizer
from vllm_packcache.demo.scores import sequence
from vllm_packcache.demo.tokenizer import (
    CONDITION_TOKENS,
    FRAME_TOKENS,
    MODEL_DIR,
    TRAINED_FRAMES,
    VideoTokenizer,
    world_prompt,
)
from vllm_packcache.demo.world import World
from vllm_packcache.families import lumos
from vllm_packcache.families.lumos import MaskedOptions
from vllm_packcache.tools.machine import sha256

Int64 = npt.NDArray[np.int64]

Make = Callable[[int, World, Int64], Int64]
"""From a world's seed, the world and its true frames [T + 1, 16, 16], which may only make it fast, to frames
[T, 16, 16]: token ids of the demo's tokenizer, whatever the ids of the model are."""


class Generator(ABC):
    """A model of the demo's worlds.

    Attributes:
        benchmark: what its results are called.
        trained_frames: of the longest videos that the model was trained on.
        videos: V, that every variant makes by default.
        lengths: as many of ``trained_frames`` the longest videos have by default.
    """

    benchmark: ClassVar[str]
    trained_frames: ClassVar[int]
    videos: ClassVar[int]
    lengths: ClassVar[int]

    @property
    @abstractmethod
    def how(self) -> str:
        """How its videos are made, in words."""

    @property
    @abstractmethod
    def variants(self) -> Variants:
        """What is compared."""

    @property
    @abstractmethod
    def described(self) -> Mapping[str, Any]:
        """What of it decides what is made."""

    @abstractmethod
    def maker(self, variant: Variant, frames: int) -> Make:
        """What makes videos of so many frames under a variant."""


@dataclass(frozen=True)
class Causal(Generator):
    """The bundled model, which makes one token after the other: greedily.

    Args:
        policies: names of some that are compared besides.
    """

    policies: tuple[str, ...] = ()

    benchmark = "quality"
    trained_frames = TRAINED_FRAMES
    videos = 200
    lengths = 4

    @property
    def how(self) -> str:
        """As long as there has been this benchmark."""
        return "greedy, float32, generated from the condition alone"

    @cached_property
    def variants(self) -> Variants:
        """All there are."""
        return all_variants(Shape("demo", CONDITION_TOKENS)).beside(self.policies)

    @cached_property
    def described(self) -> Mapping[str, Any]:
        """The model."""
        return identity(CAUSAL)

    def maker(self, variant: Variant, frames: int) -> Make:
        """With a decoder that guesses, which the true frames help; what it makes does not depend on the guess."""
        from benchmarks.quality.decoder import VideoCache, generate
        from benchmarks.training.llama import load_pretrained

        model, tokenizer, plan = load_pretrained(MODEL_DIR), VideoTokenizer(), variant.plan()

        def make(seed: int, world: World, truth: Int64) -> Int64:
            del seed
            cache = VideoCache(model.size, plan, BLOCK_SIZE, frames)
            draft = _draft(sequence(tokenizer, truth[1:]).reshape(frames, FRAME_TOKENS))
            ids = generate(model, cache, world_prompt(tokenizer, world), frames, draft)
            return tokenizer.frames_from_ids(ids.reshape(-1).tolist())

        return make


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
    videos = 8
    lengths = 1

    @property
    def how(self) -> str:
        """With the options that matter most."""
        own = self.options
        return (
            f"image to video, float32, {own.steps} + 1 passes a frame, guidance {own.guidance:g}; noise depends on "
            "the world, the frame and the step, not on the policy"
        )

    @cached_property
    def variants(self) -> Variants:
        """The policies: a video takes many times as long as one that is made token by token."""
        shape = Shape(bundle.PRESET, _USUAL_TEXT + masked_tokenizer.FRAME.tokens_per_frame)
        return policies_only(shape).beside(self.policies)

    @cached_property
    def described(self) -> Mapping[str, Any]:
        """The model, and how its frames are made."""
        if self.checkpoint is None:
            model = identity(MASKED)
        else:
            model = {"name": str(self.checkpoint), "sha256": sha256(self.checkpoint / "model.safetensors")}
        return {**model, "options": asdict(self.options)}

    def maker(self, variant: Variant, frames: int) -> Make:
        """With the published loop of the reference, on live tokens only."""
        from benchmarks.quality.live_lumos import LiveLumos
        from vllm_packcache.reference.masked_video import generate_masked

        with ExitStack() as stack:
            folder = self.checkpoint or bundle.write_checkpoint(stack.enter_context(TemporaryDirectory()))
            model = LiveLumos.load(folder)
        text, offset = masked_tokenizer.build_text_tokenizer(), VideoTokenizer().visual_offset

        def make(seed: int, world: World, truth: Int64) -> Int64:
            del truth
            ids = masked_tokenizer.prompt(world.prompt, frames, text) + masked_tokenizer.world_frame(world, 0).tolist()
            options = replace(self.options, seed=seed)
            made = generate_masked(model, ids, frames, variant.plan(len(ids)), options, BLOCK_SIZE)
            grid = masked_tokenizer.GRID_SHAPE
            return np.stack([lumos.codes_of_frame(ids, grid) for ids in made.frames.numpy()]) + offset

        return make


_USUAL_TEXT = 21
"""Tokens of a prompt before the picture, which has 12 to 24 of them, on average."""


def _draft(truth: Int64) -> Callable[[Int64], Int64]:
    """A guess of the next frame, [257]: the true one, or the last one once the video has gone its own way."""

    def guess(made: Int64) -> Int64:
        number = len(made)
        if number >= 2 and (made[-1] != truth[number - 1]).sum() > (made[-1] != made[-2]).sum():
            return made[-1]
        return truth[number]

    return guess
