"""The videos that a trainer visits in turn, each several times, and what they have become."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.training.lessons import SEEDS_PER_VIDEO

VIDEOS = 10
"""Of one step."""
POOL = 120
"""Videos that are being visited; a whole number of steps."""
VISITS = 6
"""To each, after which another takes its place."""


class Visited(Protocol):
    """A lesson, as far as its place in the pool goes."""

    seed: int
    visits: int
    seen: npt.NDArray[np.int64]


LessonT = TypeVar("LessonT", bound=Visited)


class Pool(Generic[LessonT]):
    """Lessons in turn; see `benchmarks.training.lessons` for why each is visited more than once.

    Args:
        make: the lesson of a seed.
        first_seed: of the lessons.
    """

    def __init__(self, make: Callable[[int], LessonT], first_seed: int) -> None:
        self._make, self._next_seed, self._turn = make, first_seed, 0
        self._lessons: list[LessonT | None] = [None] * POOL

    def next(self) -> list[LessonT]:
        """The lessons of a step."""
        numbers = range(self._turn, self._turn + VIDEOS)
        self._turn = (self._turn + VIDEOS) % POOL
        return [self._lesson(number) for number in numbers]

    def state(self) -> dict[str, Any]:
        """What `resume` needs: of each lesson its seed and what is seen of it."""
        lessons = [
            lesson and {"seed": lesson.seed, "visits": lesson.visits, "seen": torch.from_numpy(lesson.seen)}
            for lesson in self._lessons
        ]
        return {"next_seed": self._next_seed, "turn": self._turn, "lessons": lessons}

    def resume(self, state: dict[str, Any]) -> None:
        """Go on where `state` was asked for."""
        self._next_seed, self._turn = state["next_seed"], state["turn"]
        for number, kept in enumerate(state["lessons"]):
            if kept:
                lesson = self._make(kept["seed"])
                lesson.visits, lesson.seen = kept["visits"], kept["seen"].numpy()
                self._lessons[number] = lesson

    def _lesson(self, number: int) -> LessonT:
        lesson = self._lessons[number]
        if lesson is None or lesson.visits == VISITS:
            lesson = self._make(self._next_seed)
            self._next_seed += SEEDS_PER_VIDEO
            self._lessons[number] = lesson
        return lesson
