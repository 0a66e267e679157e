"""Train the model of the world to play on a CPU.

``python -m benchmarks.training.play_train --out DIR --seed 0``

A run that was stopped goes on from ``DIR/checkpoint.pt``.
"""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.training import play_sparse
from benchmarks.training.llama import Llama, save_pretrained
from benchmarks.training.loop import Course, Run, from_command_line, learn, train
from benchmarks.training.play_lessons import Steps
from vllm_packcache.demo.play.tokenizer import save_tokenizer


class PlayCourse(Course):
    """Next tiles of single steps, asked for where something happens.

    Args:
        model: to train.
        first_seed: of the steps.
    """

    pool: Steps

    def __init__(self, model: Llama, first_seed: int) -> None:
        self._model = model
        self.pool = Steps(first_seed)

    def study(self) -> str:
        """Gradients of a step, as `loop.Course`."""
        own, seen, targets, changed = map(torch.from_numpy, self.pool.next())
        logits = self._model.logits(play_sparse.hidden(self._model, own, seen))
        return learn(logits, targets, torch.ones(len(targets)), changed)[1]

    def settle(self) -> None:
        """Constants are what they were."""
        play_sparse.pin(self._model)

    def publish(self, out: Path) -> None:
        """Write the model as transformers reads it."""
        save_tokenizer(out)
        nothing = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        save_pretrained(self._model, out, nothing)


def main(run: Run) -> None:
    """Train, and write the model to ``run.out``."""
    model = Llama(play_sparse.SIZE)
    play_sparse.initialise(model, torch.Generator().manual_seed(run.seed))
    train(model, PlayCourse(model, run.first_seed), run)


if __name__ == "__main__":
    main(from_command_line("Train the model of the world to play.", steps=6000))
