"""Where the attention of a Lumos-1 checkpoint goes while it makes frames masked, measured in the reference.

The frames are true ones: each is shown to both streams with some of its tokens masked, as it is in the middle of its
schedule and when it is nearly finished, and committed then. What is measured is the full cache: nothing is dropped.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vllm_packcache.calibrate.mass import Mass, Tally, Video
from vllm_packcache.config.errors import ConfigError
from vllm_packcache.core.plan import Plan
from vllm_packcache.core.policies import Full
from vllm_packcache.core.positions import Positions
from vllm_packcache.families import lumos
from vllm_packcache.families.checkpoint import read_config
from vllm_packcache.families.lumos import MM_ROPE_SCALE, MaskedOptions
from vllm_packcache.reference.lumos import LumosReference
from vllm_packcache.reference.masked_video import MaskedVideo

STREAMS = ("conditional", "unconditional")

SCHEDULE = 10
STEPS = {"half-way": 4, "nearly finished": 8}
"""Steps of a schedule of `SCHEDULE` after which a frame is looked at: 70 and 15 % of its tokens are still masked."""

NOTES = (
    "true videos; every frame is shown to both streams half-way through its schedule (70 % of its tokens masked, drawn "
    "by lot) and nearly finished (15 %), then committed as published; the four passes count alike",
)


def recognises(folder: Path) -> bool:
    """Whether a folder has a checkpoint that makes videos masked."""
    try:
        architectures = read_config(folder).get("architectures") or [None]
    except (OSError, ValueError):
        return False
    return architectures[0] in lumos.ARCHITECTURES


def load(folder: Path) -> LumosReference:
    """The checkpoint of a folder, in float32.

    Raises:
        ConfigError: it cannot be loaded.
    """
    try:
        return LumosReference.load(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"MODEL: {str(folder)!r} cannot be loaded as a Lumos-1: {error}") from None


def measure(model: LumosReference, video: Video, distances: int, block_size: int) -> dict[str, Mass]:
    """The attention mass of one video, in every stream and at every one of `STEPS`, by their names.

    Args:
        model: from `load`.
        video: of more than ``distances`` frames, all of them finished.
        distances: D, the largest temporal distance that is told apart.
        block_size: tokens of a KV-cache block.

    Raises:
        ConfigError: the video is none of this model, or the checkpoint lacks a weight.
    """
    layout = video.layout
    _check(model, video)
    plan = Plan(layout, Full(), Positions(layout, scale=MM_ROPE_SCALE))
    options = MaskedOptions()
    assert options.guided
    layouts = (layout, lumos.unconditional_layout(layout))
    tallies = {
        f"{stream}, {step}": Tally(own, distances, block_size)
        for step in STEPS
        for stream, own in zip(STREAMS, layouts, strict=True)
    }
    try:
        made = MaskedVideo(model, video.token_ids[: layout.condition_tokens], video.frames, plan, options, block_size)
        for frame in range(video.frames):
            ids = torch.tensor(video.token_ids[layout.frame_start(frame) : layout.frame_start(frame + 1)])
            if frame >= distances:
                counting = iter(tallies.values())
                for step in STEPS.values():
                    for of_layers in _watched(model, made, frame, _as_after(ids, layout.frame.grid, frame, step)):
                        tally = next(counting)
                        for layer, mass in enumerate(of_layers):
                            tally.add(layer, frame, mass)
            made.commit(frame, ids)
    except KeyError as error:
        raise ConfigError(f"MODEL: it lacks the weight {error}") from None
    return {name: tally.mass() for name, tally in tallies.items()}


def _check(model: LumosReference, video: Video) -> None:
    """Refuse what is no video of the model: the reference takes any ids."""
    layout, ids = video.layout, video.token_ids
    assert layout.frame.grid is not None
    try:
        lumos.given_frames(ids, layout)
        pictures = np.array(ids[layout.condition_tokens - layout.condition_image_tokens :])
        for picture in pictures.reshape(-1, layout.tokens_per_frame):
            lumos.codes_of_frame(picture, layout.frame.grid)
    except ValueError as error:
        raise ConfigError(f"--sequences: {error}") from None
    last = lumos.VISUAL_BEGIN + model.config.visual_codes - 1
    if min(ids) < 0 or max(ids) > last:
        raise ConfigError(f"--sequences: token_ids must lie between 0 and {last}, the model's last one")


def _as_after(ids: Tensor, grid: lumos.Grid | None, frame: int, step: int) -> Tensor:
    """A finished frame as it may be after ``step`` of `SCHEDULE`: which of its tokens are known is drawn by lot."""
    assert grid is not None
    offsets = lumos.visual_offsets(grid)
    order = lumos.step_noise(0, frame, step, len(offsets)).uniform.argsort()
    unknown = offsets[order[: lumos.still_masked(step, SCHEDULE, len(offsets), len(offsets))]]
    ids = ids.clone()
    ids[torch.from_numpy(unknown)] = lumos.MASK
    return ids


def _watched(model: LumosReference, made: MaskedVideo, frame: int, ids: Tensor) -> list[list[Tensor]]:
    """What every token got of the queries of a pass on average, [heads, tokens] in float64: by stream, by layer."""
    masses: list[Tensor] = []
    uncounted = 0

    def count(weights: Tensor) -> None:
        nonlocal uncounted
        if uncounted == 0:
            masses.append(torch.zeros(weights.shape[0], weights.shape[2], dtype=torch.float64))
            uncounted = len(ids)
        masses[-1] += weights.sum(1, dtype=torch.float64)
        uncounted -= weights.shape[1]

    model.watch = count
    try:
        made.states(frame, ids)
    finally:
        model.watch = None
    layers = model.config.layers
    return [[mass / len(ids) for mass in masses[first : first + layers]] for first in range(0, len(masses), layers)]
