"""Train the demo model on a CPU.

``python -m benchmarks.training.train --out DIR --seed 0``

A run that was stopped goes on from ``DIR/checkpoint.pt``.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.training import sparse
from benchmarks.training.lessons import Lesson, make_lesson
from benchmarks.training.llama import Llama, LlamaSize, save_pretrained
from benchmarks.training.loop import Course, Run, from_command_line, learn, train
from benchmarks.training.pool import Pool
from vllm_packcache.demo.tokenizer import CONDITION_TOKENS, TRAINED_FRAMES, VideoTokenizer, save_tokenizer


class VideoCourse(Course):
    """Next tokens of videos of the world, asked for where something moves.

    Args:
        model: to train.
        tokenizer: of the videos.
        first_seed: of the videos.
        frames: of each.
    """

    pool: Pool[Lesson]

    def __init__(self, model: Llama, tokenizer: VideoTokenizer, first_seed: int, frames: int) -> None:
        self._model, self._tokenizer = model, tokenizer
        self.pool = Pool(partial(make_lesson, tokenizer, frames=frames), first_seed)

    def study(self) -> str:
        """Gradients of a step, as `loop.Course`."""
        lessons = self.pool.next()
        places = [lesson.asked() for lesson in lessons]
        counts = [len(own) for own in places]
        asked = sparse.Asked(
            torch.arange(len(lessons)).repeat_interleave(torch.tensor(counts)),
            torch.from_numpy(np.concatenate(places)),
        )
        past = sparse.Windows(
            torch.tensor([lesson.window for lesson in lessons]),
            torch.from_numpy(np.stack([lesson.dropped for lesson in lessons])),
        )
        seen = torch.from_numpy(np.stack([lesson.seen for lesson in lessons]))
        logits = self._model.logits(sparse.hidden(self._model, self._tokenizer, seen, past, asked))
        targets, weights, changed = (
            torch.from_numpy(
                np.concatenate([values.flat[own - first] for values, own in zip(of_all, places, strict=True)])
            )
            for of_all, first in (
                ([lesson.true for lesson in lessons], 0),
                ([lesson.weights for lesson in lessons], CONDITION_TOKENS),
                ([lesson.changed for lesson in lessons], CONDITION_TOKENS),
            )
        )
        said, remark = learn(logits, targets, weights, changed)
        for lesson, own, ids in zip(lessons, places, said.split(counts), strict=True):
            lesson.visited(own, ids.numpy())
        return remark

    def settle(self) -> None:
        """Heads look where they looked."""
        sparse.pin(self._model, self._tokenizer)

    def publish(self, out: Path) -> None:
        """Write the model as transformers reads it."""
        tokenizer = self._tokenizer
        special_ids = {
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.eos_id,
            "pad_token_id": tokenizer.pad_id,
        }
        save_pretrained(self._model, out, special_ids)


def main(run: Run) -> None:
    """Train, and write the model to ``run.out``."""
    run.out.mkdir(parents=True, exist_ok=True)
    save_tokenizer(run.out)
    tokenizer = VideoTokenizer(run.out)
    model = Llama(LlamaSize(vocab_size=tokenizer.vocab_size))
    sparse.initialise(model, tokenizer, torch.Generator().manual_seed(run.seed))
    train(model, VideoCourse(model, tokenizer, run.first_seed, TRAINED_FRAMES), run)


if __name__ == "__main__":
    main(from_command_line("Train the demo video model on the toy world.", steps=6400))
