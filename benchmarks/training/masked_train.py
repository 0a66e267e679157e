"""Train the masked demo model on a CPU.

``python -m benchmarks.training.masked_train --out DIR --seed 0``

A run that was stopped goes on from ``DIR/checkpoint.pt``.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.training import masked_sparse as sparse
from benchmarks.training.loop import Course, Run, from_command_line, learn, train
from benchmarks.training.masked_bundle import save_bundle
from benchmarks.training.masked_lessons import MaskedLesson, make_lesson
from benchmarks.training.masked_model import Lumos, LumosSize
from benchmarks.training.pool import Pool
from vllm_packcache.demo.masked.bundle import TRAINED_FRAMES
from vllm_packcache.demo.masked.tokenizer import used_ids
from vllm_packcache.demo.world import palette
from vllm_packcache.families import lumos


class MaskedCourse(Course):
    """Masked tokens of videos of the world, asked for where something moves.

    Args:
        model: to train.
        first_seed: of the videos.
        frames: of each.
    """

    pool: Pool[MaskedLesson]

    def __init__(self, model: Lumos, first_seed: int, frames: int) -> None:
        self._model = model
        self.pool = Pool(partial(make_lesson, frames=frames), first_seed)

    def study(self) -> str:
        """Gradients of a step, as `loop.Course`."""
        lessons = self.pool.next()
        masked = np.stack([lesson.masked() for lesson in lessons])
        asked = np.stack([lesson.asked(own) for lesson, own in zip(lessons, masked, strict=True)])
        videos = videos_of(self._model, lessons, masked)
        logits = self._model.logits(sparse.hidden(self._model, videos, sparse.Asked(*map(_tensor, asked.nonzero()))))
        targets, weights, changed = (
            _tensor(np.stack(values)[asked])
            for values in (
                [lesson.true[1:] for lesson in lessons],
                [lesson.weights for lesson in lessons],
                [lesson.changed for lesson in lessons],
            )
        )
        said, remark = learn(logits, targets, weights, changed)
        for lesson, own, codes in zip(lessons, asked, said.split(asked.sum((1, 2, 3)).tolist()), strict=True):
            lesson.visited(own, codes.numpy())
        return remark

    def settle(self) -> None:
        """Heads look where they looked."""
        sparse.pin(self._model)

    def publish(self, out: Path) -> None:
        """Write the bundle."""
        save_bundle(self._model, out)


def videos_of(model: Lumos, lessons: list[MaskedLesson], masked: np.ndarray) -> sparse.Videos:
    """What the model sees of lessons of which the tokens ``masked``, bool [V, T, 16, 16], are masked."""
    mask, first = model.row(lumos.MASK), len(model.ids) - model.codes
    seen = np.stack([lesson.seen for lesson in lessons]) + first
    remasked = np.stack([lesson.remasked for lesson in lessons])[:, None]
    history = np.where(remasked, mask, seen)
    # A conditioning image is whole.
    history[:, 0] = seen[:, 0]
    length = max(len(lesson.text) for lesson in lessons)
    text = np.zeros((len(lessons), length), np.int64)
    for row, lesson in zip(text, lessons, strict=True):
        row[: len(lesson.text)] = np.searchsorted(model.ids, lesson.text)
    return sparse.Videos(
        text=_tensor(text),
        text_length=torch.tensor([len(lesson.text) for lesson in lessons]),
        image=torch.tensor([lesson.image for lesson in lessons]),
        history=_tensor(history),
        canvas=_tensor(np.where(masked, mask, seen[:, 1:])),
        past=sparse.Windows(
            torch.tensor([lesson.window for lesson in lessons]),
            _tensor(np.stack([lesson.dropped for lesson in lessons])),
        ),
    )


def _tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))


def new_model() -> Lumos:
    """The model, untrained."""
    return Lumos(LumosSize(), used_ids(), len(palette().patches))


def main(run: Run) -> None:
    """Train, and write the bundle to ``run.out``."""
    model = new_model()
    sparse.initialise(model, torch.Generator().manual_seed(run.seed))
    train(model, MaskedCourse(model, run.first_seed, TRAINED_FRAMES), run)


if __name__ == "__main__":
    main(from_command_line("Train the masked demo model on the toy world.", steps=4000))
