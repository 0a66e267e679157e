"""What the demo models' trainers share: the schedule, and the loop that can be stopped and goes on."""

from __future__ import annotations

import argparse
import os
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

FIRST_TRAINING_SEED = 1_000_000
"""Worlds with smaller seeds are never trained on; evaluation uses those."""

PEAK_LEARNING_RATE = 3e-3
SECONDS_BETWEEN_SAVES = 60
SECONDS_BETWEEN_LINES = 10


@dataclass(frozen=True)
class Run:
    """What the command line says.

    Args:
        out: folder of the model to write, or to go on with.
        steps: length of the whole schedule.
        seed: of the weights and of the videos.
        threads: to compute with.
    """

    out: Path
    steps: int
    seed: int = 0
    threads: int = 2

    @property
    def first_seed(self) -> int:
        """Of the videos."""
        return FIRST_TRAINING_SEED * (1 + self.seed)


class Lessons(Protocol):
    """What is learnt, one step's after another's."""

    def state(self) -> dict[str, Any]:
        """What `resume` needs."""

    def resume(self, state: dict[str, Any]) -> None:
        """Go on where `state` was asked for."""


class Course(ABC):
    """What a model learns, step by step."""

    pool: Lessons
    """Of what is learnt."""

    @abstractmethod
    def study(self) -> str:
        """Leave the gradients of a step in the model; what to say of it."""

    @abstractmethod
    def settle(self) -> None:
        """Called when the weights have changed."""

    @abstractmethod
    def publish(self, out: Path) -> None:
        """Write the model to a folder."""


def learn(logits: Tensor, targets: Tensor, weights: Tensor, changed: Tensor) -> tuple[Tensor, str]:
    """Gradients of the weighted mean cross entropy.

    Args:
        logits: [A, vocabulary].
        targets: what is right, [A].
        weights: of each, [A].
        changed: which of them differ from the frame before, bool [A].

    Returns:
        The likeliest of each, [A]; and what to say.
    """
    weights = weights.float()
    loss = (F.cross_entropy(logits, targets, reduction="none") * weights).sum() / weights.sum()
    loss.backward()
    said = logits.detach().argmax(-1)
    wrong = (said != targets).float()
    return said, f"loss {loss.item():.4f}, wrong {wrong.mean():.2%}, of what changes {wrong[changed].mean():.2%}"


def train(model: nn.Module, course: Course, run: Run) -> None:
    """Train for ``run.steps`` steps; go on from ``run.out``/checkpoint.pt if there is one.

    Muon trains the matrices inside the layers, AdamW all else. The same seed gives the same weights on one machine with
    as many threads, whether the run was stopped or not.

    Args:
        model: initialised.
        course: what it learns.
        run: of `from_command_line`.
    """
    run.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(run.threads)
    torch.use_deterministic_algorithms(True)
    inner = {name: parameter for name, parameter in model.named_parameters() if name.endswith("_proj.weight")}
    others = [parameter for name, parameter in model.named_parameters() if name not in inner]
    optimizers = (
        torch.optim.Muon(inner.values(), lr=0.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0),
    )
    step, seconds = 0, 0.0
    checkpoint = run.out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        course.pool.resume(state["pool"])
        step, seconds = state["step"], state["seconds"]

    def save() -> None:
        state = {
            "model": model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "pool": course.pool.state(),
            "step": step,
            "seconds": seconds,
        }
        # A crash never leaves half of a checkpoint.
        torch.save(state, checkpoint.with_suffix(".tmp"))
        os.replace(checkpoint.with_suffix(".tmp"), checkpoint)
        course.publish(run.out)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    last_save = last_print = time.monotonic()
    with Progress(*columns, refresh_per_second=1) as progress:
        bar = progress.add_task("starting", total=run.steps, completed=step)
        while step < run.steps:
            begin = time.monotonic()
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = _learning_rate(step / run.steps)
            model.zero_grad()
            said = course.study()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            course.settle()

            step += 1
            now = time.monotonic()
            seconds += now - begin
            progress.update(bar, completed=step, description=said)
            if now - last_print > SECONDS_BETWEEN_LINES and not progress.console.is_terminal:
                progress.console.print(f"step {step}, {seconds / 60:.1f} minutes: {said}")
                last_print = now
            if now - last_save > SECONDS_BETWEEN_SAVES:
                save()
                last_save = now
    save()


def from_command_line(description: str, steps: int) -> Run:
    """The command line of a trainer.

    Args:
        description: what is trained.
        steps: of the whole schedule, by default.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, help="model directory to write, or to go on with")
    parser.add_argument("--steps", type=int, default=steps, help="length of the whole schedule")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    return Run(**vars(parser.parse_args()))


def _learning_rate(fraction: float) -> float:
    return PEAK_LEARNING_RATE * min(1.0, (fraction + 1e-3) / 0.01) * min(1.0, max(0.01, (1 - fraction) / 0.7))
