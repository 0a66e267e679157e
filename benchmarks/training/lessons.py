"""What the demo model learns from: videos of the world, with mistakes in the past that the model sees.

A model that only ever sees the truth copies its first mistake for ever. So a video is visited several times, and what
the model said on one visit is what it sees of the past on the next, while what it should say stays true.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from vllm_packcache.demo.tokenizer import CONDITION_TOKENS, FRAME_TOKENS, TEXT_TOKENS, VideoTokenizer, video_ids
from vllm_packcache.demo.world import GRID, OBJECT_CELLS, PHOTO, World, make_world

Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]

SEEDS_PER_VIDEO = 2
"""A video is that of one of so many worlds, of which the others hide less."""
PHOTO_SHARE = 0.12
TEXT_DROPPED = 0.1
"""Share of videos without a text: what an unconditional stream of guidance sees."""
WINDOWED = 0.25
"""Share of videos of which only the last frames are there, as with a policy that keeps whole frames."""
THINNED = 0.2
"""Share of videos of whose older frames rows are missing, as with a policy that keeps blocks."""
LONGEST_WINDOW = 12
NOISY, MOST_NOISE = 0.7, 0.04
"""Share of videos with random mistakes, and the largest share of such tokens where objects are."""
MENDED = 0.3
"""Share of frames that are true again when a video is visited anew."""

EMERGING_WEIGHT = 3.0
"""Loss weight of a part of an object that comes out from behind the pillar; rare, and what memory is for."""
FIRST_WEIGHT = 3.0
"""The same in the first frame: which way things go, only the text says, and a mistake there is one for ever."""
ASKED_CHANGED, ASKED_NEAR, ASKED_ELSEWHERE = 0.7, 0.2, 64
"""Of a visit: shares of the tokens that change and of those near objects, and how many others."""
ELSEWHERE_WEIGHT = 10.0
"""Loss weight of a token that is nowhere near, and asked for a fortieth as often as one that changes."""


@dataclass
class Lesson:
    """A video to learn.

    Attributes:
        seed: of everything that is random about it.
        true: the sequence, int64 [L].
        seen: the same as the model sees it, with mistakes.
        weights: of the frames' tokens in the loss, [T, F]; 0: what nobody can know.
        changed: which of these differ from the frame before, or come out from behind the pillar, bool [T, F].
        near: which are where objects are or were a frame before, or beside that, bool [T, F].
        window: frames that are kept.
        dropped: rows of each frame that are missing once it is older than the last one, bool [T, 16].
        visits: so far.
    """

    seed: int
    true: Int64
    seen: Int64
    weights: npt.NDArray[np.float64]
    changed: Bool
    near: Bool
    window: int
    dropped: Bool
    visits: int = 0

    @property
    def frames(self) -> Int64:
        """The frames as the model sees them, [T, F]: a view."""
        return self.seen[CONDITION_TOKENS:].reshape(-1, FRAME_TOKENS)

    def asked(self) -> Int64:
        """Places in the sequence of the tokens that this visit asks for, ascending."""
        rng = np.random.default_rng((self.seed, 3, self.visits))
        chance = np.where(self.changed, ASKED_CHANGED, np.where(self.near, ASKED_NEAR, 0.0))
        asked = rng.random(chance.shape) < chance
        elsewhere = rng.integers(asked.size, size=ASKED_ELSEWHERE)
        asked.flat[elsewhere] = True
        # The end of a frame, which says that another begins.
        asked[rng.integers(len(asked)), 0] = True
        places: Int64 = CONDITION_TOKENS + np.flatnonzero(asked & (self.weights > 0))
        return places

    def visited(self, places: Int64, said: Int64) -> None:
        """What the model said of the tokens that were asked for: it sees that when it comes again."""
        rng = np.random.default_rng((self.seed, 4, self.visits))
        self.visits += 1
        self.seen[places] = said
        true = self.true[CONDITION_TOKENS:].reshape(-1, FRAME_TOKENS)
        mended = rng.random(len(true)) < MENDED
        self.frames[mended] = true[mended]
        # Where a frame begins is never in doubt.
        self.frames[:, 0] = true[:, 0]


def make_lesson(tokenizer: VideoTokenizer, seed: int, frames: int) -> Lesson:
    """The lesson of a seed; it shows the world of this seed or of the next, in which more is hidden."""
    rng = np.random.default_rng((seed, 1))
    video = shown_world(rng, seed, frames)
    true = video_ids(tokenizer, video, frames)
    if rng.random() < TEXT_DROPPED:
        true[1 : 1 + TEXT_TOKENS] = tokenizer.pad_id
    cells = true[CONDITION_TOKENS:].reshape(frames, FRAME_TOKENS)[:, 1:].reshape(frames, GRID, GRID)
    before = np.concatenate(
        [true[CONDITION_TOKENS - GRID * GRID : CONDITION_TOKENS].reshape(1, GRID, GRID), cells[:-1]]
    )
    emerging = np.stack([video.emerging(k) for k in range(1, frames + 1)])
    changed = (cells != before) | emerging
    weights = np.where(emerging, EMERGING_WEIGHT, 1.0)
    weights[0] = FIRST_WEIGHT
    if video.scene == PHOTO:
        # What an object hides in frame 0 of a photo cannot be known.
        weights[(cells == video.background + tokenizer.visual_offset) & video.unseen()] = 0.0
    near = near_objects(video, range(1, frames + 1))
    # What is asked for less often counts as much more: else the model would see things move where nothing does.
    weights *= np.where(changed, 1.0, np.where(near, ASKED_CHANGED / ASKED_NEAR, ELSEWHERE_WEIGHT))
    window, dropped = what_is_kept(rng, frames)
    lesson = Lesson(
        seed, true, true.copy(), _flat(weights, 1.0), _flat(changed, False), _flat(near, False), window, dropped
    )
    if rng.random() < NOISY:
        _disturb(lesson, tokenizer, rng)
    return lesson


def _disturb(lesson: Lesson, tokenizer: VideoTokenizer, rng: np.random.Generator) -> None:
    """Random mistakes: what was there a frame before, what is near, or anything."""
    share = np.where(lesson.near, MOST_NOISE, MOST_NOISE / 20) * rng.random() ** 2
    share[:, 0] = 0.0
    wrong = CONDITION_TOKENS + np.flatnonzero(rng.random(share.shape) < share)
    anything = rng.integers(tokenizer.visual_offset, tokenizer.vocab_size, len(wrong))
    beside = lesson.true[wrong - FRAME_TOKENS + rng.integers(-2, 3, len(wrong))]
    stale = lesson.true[wrong - FRAME_TOKENS]
    kind = rng.integers(3, size=len(wrong))
    said = np.choose(kind, (anything, beside, stale))
    lesson.seen[wrong] = np.where(said >= tokenizer.visual_offset, said, anything)


_Cell = TypeVar("_Cell", np.float64, np.bool_)


def _flat(cells: npt.NDArray[_Cell], first: float) -> npt.NDArray[_Cell]:
    """Of the cells [T, 16, 16], the tokens of their frames [T, F]."""
    frames = np.full((len(cells), FRAME_TOKENS), first, cells.dtype)
    frames[:, 1:] = cells.reshape(len(cells), -1)
    return frames


def shown_world(rng: np.random.Generator, seed: int, frames: int) -> World:
    """The world of a seed, or the one of it and the next ones in whose first frames objects are hidden most often."""
    choice = [make_world(seed + i, PHOTO_SHARE) for i in range(rng.integers(1, 1 + SEEDS_PER_VIDEO))]

    def hidden(video: World) -> int:
        return sum(video.hidden(i, k) for i in range(len(video.objects)) for k in range(1, frames + 1))

    return max(choice, key=hidden)


def what_is_kept(rng: np.random.Generator, frames: int) -> tuple[int, Bool]:
    """What a video is to be made with: ``window`` and ``dropped``, as of `Lesson`."""
    dropped = np.zeros((frames, GRID), bool)
    kind = rng.random()
    if kind < WINDOWED:
        return int(rng.integers(1, LONGEST_WINDOW + 1)), dropped
    if kind < WINDOWED + THINNED:
        return LONGEST_WINDOW, rng.random(dropped.shape) < rng.uniform(0.2, 1.0)
    return LONGEST_WINDOW * frames, dropped


def near_objects(video: World, frames: range) -> Bool:
    """Cells within one of where an object is, or was a frame before, and where one comes out of hiding, [T, 16, 16]."""
    near = np.zeros((len(frames), GRID, GRID), bool)
    for thing in video.objects:
        rows = slice(max(0, thing.row - 1), thing.row + OBJECT_CELLS + 1)
        for number, k in enumerate(frames):
            first, last = sorted((thing.column(k - 1), thing.column(k)))
            near[number, rows, max(0, first - 1) : last + OBJECT_CELLS + 1] = True
        if video.pillar:
            # Most of the time nothing comes out there, which is learned too.
            lane, right = slice(thing.row, thing.row + OBJECT_CELLS), video.pillar.left + video.pillar.width
            near[:, lane, video.pillar.left - OBJECT_CELLS : video.pillar.left] = True
            near[:, lane, right : right + OBJECT_CELLS] = True
    return near
