"""What the demo models' trainers share: the schedule, which follows the clock, and the loop that can be stopped."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

FIRST_TRAINING_SEED = 1_000_000
"""Worlds with smaller seeds are never trained on; evaluation uses those."""

SEEDS_PER_VIDEO = 2
"""A video is that of one of so many worlds, as its trainer chooses."""

PHOTO_SHARE = 0.12
CHANGED_WEIGHT = 8.0
"""Loss weight of a token that differs from the last frame; most tokens only have to be copied."""
EMERGING_WEIGHT = 24.0
"""Loss weight of a part of an object that comes out from behind the pillar; rare, and what memory is for."""
CORRUPT_SHARE, CORRUPT_RATE = 0.3, 0.003
PEAK_LEARNING_RATE = 3e-3
SECONDS_BETWEEN_SAVES = 60
SECONDS_BETWEEN_LINES = 10


@dataclass(frozen=True)
class Clips:
    """What one step trains on: ``batch`` videos of ``frames`` frames."""

    frames: int
    batch: int


@dataclass(frozen=True)
class Stage:
    """A part of the schedule: until this fraction of the time, steps take turns through these clips."""

    until: float
    turns: tuple[Clips, ...]


@dataclass(frozen=True)
class Run:
    """What the command line says.

    Args:
        out: folder of the model to write, or to go on with.
        minutes: length of the whole schedule.
        seed: of the weights and of the videos.
        threads: to compute with.
    """

    out: Path
    minutes: float
    seed: int = 0
    threads: int = 1


def longest(stages: Sequence[Stage]) -> int:
    """Frames of the longest videos of a schedule."""
    return max(clips.frames for stage in stages for clips in stage.turns)


def train_by_the_clock(
    model: nn.Module,
    matrices: Callable[[str], bool],
    stages: Sequence[Stage],
    compute: Callable[[int, Clips, float], str],
    publish: Callable[[Path], None],
    run: Run,
) -> None:
    """Train for ``run.minutes`` of wall clock; go on from ``run.out``/checkpoint.pt if there is one.

    Args:
        model: initialised.
        matrices: whether Muon trains the parameter of this name; AdamW trains the others.
        stages: of the schedule.
        compute: from the first seed of a batch, its clips and the fraction of the time that has passed: leaves
            gradients in the model and returns what to say about the step.
        publish: writes the model to a folder.
        run: of `from_command_line`.
    """
    run.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(run.threads)
    by_muon = [parameter for name, parameter in model.named_parameters() if matrices(name)]
    by_adam = [parameter for name, parameter in model.named_parameters() if not matrices(name)]
    optimizers = (
        torch.optim.Muon(by_muon, lr=0.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(by_adam, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0),
    )
    elapsed, step, next_seed = 0.0, 0, FIRST_TRAINING_SEED * (1 + run.seed)
    checkpoint = run.out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        elapsed, step, next_seed = state["elapsed"], state["step"], state["next_seed"]

    def save() -> None:
        state = {
            "model": model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "elapsed": elapsed,
            "step": step,
            "next_seed": next_seed,
        }
        # A crash never leaves half of a checkpoint.
        torch.save(state, checkpoint.with_suffix(".tmp"))
        os.replace(checkpoint.with_suffix(".tmp"), checkpoint)
        publish(run.out)

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    last_save = last_print = elapsed
    seconds = run.minutes * 60
    with Progress(*columns, refresh_per_second=1) as progress:
        bar = progress.add_task("starting", total=seconds)
        while elapsed < seconds:
            begin = time.monotonic()
            fraction = elapsed / seconds
            turns = next(stage for stage in stages if fraction < stage.until or stage is stages[-1]).turns
            clips = turns[step % len(turns)]
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = _learning_rate(fraction)
            model.zero_grad()
            said = compute(next_seed, clips, fraction)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()

            step += 1
            next_seed += SEEDS_PER_VIDEO * clips.batch
            elapsed += time.monotonic() - begin
            progress.update(bar, completed=elapsed, description=f"step {step} frames {clips.frames} {said}")
            if elapsed - last_print > SECONDS_BETWEEN_LINES and not progress.console.is_terminal:
                progress.console.print(progress.tasks[0].description)
                last_print = elapsed
            if elapsed - last_save > SECONDS_BETWEEN_SAVES:
                save()
                last_save = elapsed
    save()


def from_command_line(description: str, minutes: float) -> Run:
    """The command line of a trainer.

    Args:
        description: what is trained.
        minutes: of the whole schedule, by default.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, help="model directory to write, or to go on with")
    parser.add_argument("--minutes", type=float, default=minutes, help="length of the whole schedule")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    return Run(**vars(parser.parse_args()))


def _learning_rate(fraction: float) -> float:
    return PEAK_LEARNING_RATE * min(1.0, fraction / 0.01) * min(1.0, max(0.02, (1 - fraction) / 0.6))
