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
    "Emu3": Model("emu3", (7, 9), 5, head, emu3_video, {}),
    "Emu3.5": Model("emu3_5", (10, 11), 4, lambda grid: [151746], emu3_5_picture, {"head_norms": True}),
    "UniVLA": Model(
        "univla",
        (8, 10),
        4,
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


class Request(NamedTuple):
    """What is asked for.

    Args:
        seed: of the text and of what is given.
        grid: of its frames.
        given: so many frames and tokens stand in the prompt behind the condition.
        made: so many are made.
        options: of the request besides.
    """

    seed: int
    grid: Grid
    given: tuple[int, int]
    made: tuple[int, int]
    options: dict[str, Any]


def test_pictures_and_videos_equal_the_loop(engine: Any, folder: Path, oracle: Careful, model: Model) -> None:
    """In one batch: a picture, videos from the start and from given frames, one that keeps all, and another size."""
    config = {"layout": model.preset, "window": 2, "history_frames": 1}
    llm, server = engine("packcache", config, model=folder), ServerConfig.parse("packcache", config, family=EMU3)
    frames, other = model.frames, (model.grid[0] + 3, model.grid[1])
    # A step on V2 takes a second: the sampler's kernels are interpreted, for every id of the vocabulary.
    asked = shorter(
        [
            Request(1, model.grid, (0, 0), (1, 0), {"frames": 1}),
            Request(2, model.grid, (0, 0), (frames, 0), {}),
            Request(3, model.grid, (frames - 1, 13), (2, 0), {}),
            Request(4, model.grid, (1, 0), (2, 0), {"policy": "full"}),
            Request(5, other, (0, 0), (2, 0), {}),
        ],
        [
            Request(1, (2, 3), (0, 0), (1, 0), {"frames": 1}),
            Request(2, model.grid, (frames - 1, 13), (0, 12), {}),
            Request(3, model.grid, (2, model.grid[1] + 2), (0, 12), {"policy": "full"}),
        ],
    )
    prompts, params = [], []
    for request in asked:
        condition = text(model, 20 + request.seed, request.grid, request.seed)
        frame = tokens_of(server, request.grid)
        given, made = (whole * frame + rest for whole, rest in (request.given, request.made))
        said = {"grid": list(request.grid), "condition_tokens": len(condition), **request.options}
        prompts.append(drawn(model, condition, given, request))
        params.append(sampling(made, **said))
    answers = run(llm, prompts, params)
    for request, ids, own, made in zip(asked, prompts, params, answers, strict=True):
        follows = partial(model.follows, grid=request.grid)
        plan = server.plan(own.extra_args, len(ids))
        assert made == oracle.generate(ids, own.max_tokens, plan, allowed=follows).token_ids
        if request.seed == 2:
            full = oracle.generate(ids, own.max_tokens, allowed=follows)
            assert full.token_ids != made, "the policy changed nothing: the comparison shows nothing"


def drawn(model: Model, condition: list[int], count: int, request: Request) -> list[int]:
    """A condition, and so many random tokens that may follow."""
    random, tokens = numbers(request.seed, 7), list(condition)
    for _ in range(count):
        may = model.follows(tokens, request.grid)
        tokens.append(int(random.integers(may.start, may.stop)))
    return tokens


def test_a_prompt_of_another_size_is_refused(engine: Any, folder: Path, model: Model) -> None:
    llm = engine("packcache", {"layout": model.preset, "window": 2, "history_frames": 1}, model=folder)
    ids = [BEGIN, 5, 6, *head((model.grid[0] + 1, model.grid[1]))]
    with pytest.raises(VLLMValidationError, match="the prompt states a picture of"):
        run(llm, [ids], [sampling(1, grid=list(model.grid), frames=1)])


def test_without_a_policy_text_is_as_ever(engine: Any, folder: Path, oracle: Careful) -> None:
    ids = [BEGIN, *numbers(4).integers(0, 151643, 40).tolist()]
    (made,) = run(engine(model=folder), [ids], [sampling(shorter(40, 8))])
    oracle.check(ids, made, len(made))


def tokens_of(server: ServerConfig, grid: Grid) -> int:
    made = server.video({"packcache_grid": list(grid)}, 3000)
    assert made is not None
    return made.streams[0].plan.layout.tokens_per_frame
