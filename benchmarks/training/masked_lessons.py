"""What the masked demo model learns from; see `benchmarks.training.lessons`, whose videos these are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from benchmarks.training.lessons import (
    ASKED_CHANGED,
    ASKED_ELSEWHERE,
    ASKED_NEAR,
    EMERGING_WEIGHT,
    FIRST_WEIGHT,
    MENDED,
    MOST_NOISE,
    NOISY,
    TEXT_DROPPED,
    Bool,
    Int64,
    near_objects,
    shown_world,
    what_is_kept,
)
from vllm_packcache.demo.masked.tokenizer import MAX_SECONDS, build_text_tokenizer, prompt
from vllm_packcache.demo.world import GRID, PHOTO, opening, palette
from vllm_packcache.families import lumos

IMAGE_DROPPED = 0.15
"""Share of videos without a conditioning image: they begin as the text alone says (`world.opening`)."""
ALL_MASKED = 0.5
"""Share of frames of which nothing is known: every frame begins so."""
CONFIDENT_FIRST = 0.5
"""Of the others, the share of which objects stay masked longest: the most confident tokens come first."""
REMASKED, MOST_REMASKED = 0.3, 0.8
"""Share of videos of whose committed frames a part is masked, and the largest such part."""
ASKED_OPENING = 0.4
"""Of a frame that nothing precedes, the share of its tokens."""


@dataclass
class MaskedLesson:
    """A video to learn; what a token is, is its code.

    Attributes:
        seed: of everything that is random about it.
        text: ids of the prompt.
        image: whether there is a conditioning image.
        true: the image or what would be it, and T frames, [1 + T, 16, 16].
        seen: the same as the model sees it, with mistakes.
        weights: of the frames' tokens in the loss, [T, 16, 16]; 0: what nobody can know.
        chance: with which a visit asks for each of them, [T, 16, 16].
        near: which are where objects are or were, or beside that, bool [T, 16, 16].
        changed: which differ from the frame before, or come out from behind the pillar, bool [T, 16, 16].
        window: frames that are kept.
        dropped: rows of each frame that are missing once it is older than the last one, bool [T, 16].
        remasked: places of every committed frame that are masked, bool [16, 16].
        visits: so far.
    """

    seed: int
    text: list[int]
    image: bool
    true: Int64
    seen: Int64
    weights: npt.NDArray[np.float64]
    chance: npt.NDArray[np.float64]
    near: Bool
    changed: Bool
    window: int
    dropped: Bool
    remasked: Bool
    visits: int = 0

    def masked(self) -> Bool:
        """Which tokens of the frames are masked at this visit, bool [T, 16, 16]."""
        rng = np.random.default_rng((self.seed, 5, self.visits))
        masked = np.ones_like(self.near)
        for frame, near in zip(masked, self.near, strict=True):
            if rng.random() >= ALL_MASKED:
                count = max(1, math.floor(frame.size * math.cos(math.pi / 2 * rng.random())))
                order = rng.random(frame.shape)
                if rng.random() < CONFIDENT_FIRST:
                    order -= near * rng.uniform(0, 1.5)
                frame[:] = order <= np.partition(order, count - 1, axis=None)[count - 1]
        return masked

    def asked(self, masked: Bool) -> Bool:
        """Which of the masked tokens this visit asks for, bool [T, 16, 16]."""
        rng = np.random.default_rng((self.seed, 3, self.visits))
        asked = rng.random(self.chance.shape) < self.chance
        asked.flat[rng.integers(asked.size, size=ASKED_ELSEWHERE)] = True
        wanted: Bool = asked & masked & (self.weights > 0)
        return wanted

    def visited(self, asked: Bool, said: Int64) -> None:
        """What the model said of the tokens that were asked for: it sees that when it comes again."""
        rng = np.random.default_rng((self.seed, 4, self.visits))
        self.visits += 1
        self.seen[1:][asked] = said
        mended = 1 + np.flatnonzero(rng.random(len(asked)) < MENDED)
        self.seen[mended] = self.true[mended]


def make_lesson(seed: int, frames: int) -> MaskedLesson:
    """The lesson of a seed; it shows the world of this seed or of the next, in which more is hidden."""
    rng = np.random.default_rng((seed, 2))
    video = shown_world(rng, seed, frames)
    image = video.scene == PHOTO or rng.random() >= IMAGE_DROPPED
    if not image:
        video = opening(video)
    first = 0 if image else -1
    text = prompt(video.prompt, int(rng.integers(1, MAX_SECONDS + 1)), _words())
    if rng.random() < TEXT_DROPPED:
        text = text[-lumos.VIDEO_START_TOKENS :]
    true = np.stack([video.frame_ids(max(k, 0)) for k in range(first, first + 1 + frames)])
    shown = range(first + 1, first + 1 + frames)
    emerging = np.stack([video.emerging(k) if k else np.zeros((GRID, GRID), bool) for k in shown])
    changed = (true[1:] != true[:-1]) | emerging
    near = near_objects(video, shown)
    weights = np.where(emerging, EMERGING_WEIGHT, 1.0)
    chance = np.where(changed, ASKED_CHANGED, np.where(near, ASKED_NEAR, 0.0))
    if image:
        weights[0] = FIRST_WEIGHT
    else:
        chance[0] = ASKED_OPENING
    if video.scene == PHOTO:
        # What an object hides in frame 0 of a photo cannot be known.
        weights[(true[1:] == video.background) & video.unseen()] = 0.0
    window, dropped = what_is_kept(rng, frames)
    remasked = np.zeros((GRID, GRID), bool)
    if rng.random() < REMASKED:
        remask = rng.uniform(0, MOST_REMASKED)
        ids = lumos.committed(lumos.frame_of_codes(true[0]), remask)
        remasked = (ids[lumos.visual_offsets((GRID, GRID))] == lumos.MASK).reshape(GRID, GRID)
    seen = true.copy()
    if rng.random() < NOISY:
        _disturb(seen, true, near, rng)
    return MaskedLesson(seed, text, image, true, seen, weights, chance, near, changed, window, dropped, remasked)


_words = cache(build_text_tokenizer)


def _disturb(seen: Int64, true: Int64, near: Bool, rng: np.random.Generator) -> None:
    """Random mistakes: what was there a frame before, what is beside that, or anything."""
    share = np.where(near, MOST_NOISE, MOST_NOISE / 20) * rng.random() ** 2
    wrong = rng.random(share.shape) < share
    anything = rng.integers(len(palette().patches), size=share.shape)
    beside = np.roll(true[:-1], rng.integers(-2, 3), axis=2)
    kind = rng.integers(3, size=share.shape)
    seen[1:] = np.where(wrong, np.choose(kind, (anything, beside, true[:-1])), seen[1:])
