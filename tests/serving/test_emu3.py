"""Checkpoints as BAAI publishes them: vLLM's tokens equal a plain loop's that allows what the public loops allow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from vllm.exceptions import VLLMValidationError

from tests.margins import CarefulReference, numbers
from tests.runner import shorter
from tests.serving.conftest import run, sampling
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.families import EMU3
from vllm_packcache.reference import Emu3Reference, make_random_emu3
from vllm_packcache.reference.emu3 import (
    IMAGE,
    IMAGE_BEGIN,
    STAR,
    emu3_5_picture,
    emu3_picture,
    size_ids,
    univla_frames,
)

BEGIN = 151849

Grid = tuple[int, int]


class Careful(CarefulReference, Emu3Reference):
    """The oracle, for data without ties."""


class Model(NamedTuple):
    """How one of the published models makes pictures.

    Args:
        preset: its name.
        grid: of a small picture.
        frames: so many of them make a video of which something is dropped.
        head: what ends the prompt.
        follows: from all tokens so far and the grid to what may follow.
        checkpoint: options of the random checkpoint.
    """

    preset: str
    grid: Grid
    frames: int
    head: Callable[[Grid], list[int]]
    follows: Callable[[Sequence[int], Grid], range]
    checkpoint: dict[str, Any]


def head(grid: Grid, *before: int) -> list[int]:
    return [IMAGE_BEGIN, *before, *size_ids(grid[0]), STAR, *size_ids(grid[1]), IMAGE]


def emu3_video(tokens: Sequence[int], grid: Grid) -> range:
    """Pictures of Emu3 one after another, each without what follows its end of frame."""
    begun = tokens.index(IMAGE) + 1
    frame = grid[0] * (grid[1] + 1) + 1
    return emu3_picture([*tokens[:begun], *tokens[begun + (len(tokens) - begun) // frame * frame :]], grid)


MODELS = {
    "Emu3": Model("emu3", (7, 9), shorter(6, 3), head, emu3_video, {}),
    "Emu3.5": Model("emu3_5", (10, 11), shorter(5, 3), lambda grid: [151746], emu3_5_picture, {"head_norms": True}),
    "UniVLA": Model(
        "univla",
        (8, 10),
        shorter(5, 4),
        # The given picture, and the head of the first frame, which states how many there will be.
        lambda grid: [
            *head(grid, 16, STAR),
            *numbers(3).integers(151854, 184622, grid[0] * grid[1]).tolist(),
            151847,
            151853,
            *head(grid, 20, STAR),
        ],
        univla_frames,
        {"architecture": "Emu3MoE"},
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Model:
    return MODELS[request.param]


@pytest.fixture(scope="module")
def folder(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_emu3(tmp_path_factory.mktemp(model.preset), **model.checkpoint)


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Careful:
    return Careful.load(folder)


def text(model: Model, tokens: int, grid: Grid, seed: int) -> list[int]:
    return [BEGIN, *numbers(seed).integers(0, 151643, tokens).tolist(), *model.head(grid)]


def test_pictures_and_videos_equal_the_loop(engine: Any, folder: Path, oracle: Careful, model: Model) -> None:
    """In one batch: a picture, a video under the policy, one that keeps all, and one of another size."""
    llm = engine("packcache", {"layout": model.preset, "window": 2, "history_frames": 1}, model=folder)
    server = ServerConfig.parse("packcache", {"layout": model.preset, "window": 2, "history_frames": 1}, family=EMU3)
    other = (model.grid[0] + 3, model.grid[1])
    wanted: list[tuple[list[int], Grid, int, dict[str, Any]]] = [
        (text(model, 20, model.grid, 1), model.grid, 1, {}),
        (text(model, 33, model.grid, 2), model.grid, model.frames, {}),
        (text(model, 33, model.grid, 2), model.grid, shorter(3, 1), {"policy": "full"}),
        (text(model, 5, other, 3), other, shorter(2, 1), {}),
    ]
    frame = {grid: tokens_of(server, grid) for grid in (model.grid, other)}
    params = [
        sampling(frames * frame[grid], grid=list(grid), frames=frames, **options) for _, grid, frames, options in wanted
    ]
    answers = run(llm, [ids for ids, *_ in wanted], params)
    for (ids, grid, frames, _), own, made in zip(wanted, params, answers, strict=True):
        plan = server.plan(own.extra_args, len(ids))
        count = frames * frame[grid]
        expected = oracle.generate(ids, count, plan, allowed=partial(model.follows, grid=grid))
        assert made == expected.token_ids
    # What is dropped matters: the same video differs when all is kept.
    ids, grid, frames, _ = wanted[1]
    full = oracle.generate(ids, frames * frame[grid], allowed=partial(model.follows, grid=grid))
    assert full.token_ids != answers[1], "the policy changed nothing: the comparison shows nothing"


def tokens_of(server: ServerConfig, grid: Grid) -> int:
    made = server.video({"packcache_grid": list(grid)}, 3000)
    assert made is not None
    return made.streams[0].plan.layout.tokens_per_frame
