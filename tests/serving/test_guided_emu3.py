"""Guided Emu3 on vLLM's V2 runner, in its vocabulary of 184,622 ids: pictures and videos equal the loop, to the token.

What leads away is Emu3's own, and the scale is the preset's, except where a request gives them. No token is drawn by
vLLM's kernel, which is interpreted for every id of the vocabulary: see `tests.serving.drawing`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.margins import TIE, Tie
from tests.runner import needs_v2
from tests.serving.conftest import sampling
from tests.serving.drawing import draw
from tests.serving.test_emu3 import MODELS, Careful, Request, drawn, text
from tests.serving.two_ranks import run_on_two_ranks
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.families import EMU3
from vllm_packcache.reference import make_random_emu3
from vllm_packcache.reference.guided import GuidedVideo

pytestmark = needs_v2

MODEL = MODELS["Emu3"]
CONFIG: dict[str, Any] = {"layout": MODEL.preset, "window": 2, "history_frames": 1, "guidance": {"scale": 3.0}}
FRAME = 7 * 10 + 1
PICTURE = Request(11, (2, 3), (0, 0), (1, 0), {"frames": 1})
VIDEO = Request(12, (2, 3), (0, 0), (2, 3), {"guidance": 1.5, "negative_prompt_ids": text(MODEL, 40, (2, 3), 112)})
CONTINUED = Request(13, MODEL.grid, (4, 13), (0, 14), {})
PLAIN = Request(14, MODEL.grid, (3, 30), (0, 10), {"guidance": 1})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_emu3(tmp_path_factory.mktemp("guided"))


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Careful:
    return Careful.load(folder)


class Asked(NamedTuple):
    """A request as it is sent, and the grid of its frames."""

    ids: list[int]
    params: Any
    grid: tuple[int, int]


def asked(request: Request) -> Asked:
    condition = text(MODEL, 20 + request.seed, request.grid, request.seed)
    frame = request.grid[0] * (request.grid[1] + 1) + 1
    given, made = (whole * frame + rest for whole, rest in (request.given, request.made))
    said = {"grid": list(request.grid), "condition_tokens": len(condition), **request.options}
    return Asked(drawn(MODEL, condition, given, request), sampling(made, **said), request.grid)


def check(oracle: Careful, own: Asked, tokens: list[int]) -> list[str]:
    """Assert that ``tokens`` are the loop's; which loops that are similar and wrong make the same."""
    made = ServerConfig.parse("packcache", CONFIG, family=EMU3).request(own.params.extra_args, own.ids)
    assert made is not None
    first = made.streams[0].plan
    negative = made.streams[1:]
    video = GuidedVideo(
        first.layout.condition_tokens, negative[0].condition if negative else own.ids[:5], made.guidance, first,
        negative[0].plan if negative else None,
    )  # fmt: skip
    assert len(tokens) == own.params.max_tokens
    seen = [*own.ids, *tokens]
    places = range(len(own.ids), len(seen))
    allowed = [MODEL.follows(seen[:place], own.grid) for place in places]

    def loop(video: GuidedVideo, ties: bool = False) -> list[int]:
        best = []
        for row, may in zip(video.logits(oracle, seen[:-1])[-len(tokens) :], allowed, strict=True):
            top = row[may.start : may.stop].topk(min(2, len(may)))
            if not ties and len(may) > 1 and top.values[0] - top.values[1] < 6 * TIE:
                raise Tie("a token of a picture")
            best.append(may.start + int(top.indices[0]))
        return best

    assert tokens == loop(video)
    others = {"scale": video._replace(scale=1.0), "swapped": video._replace(scale=1 - video.scale)}
    if first.layout.frame_of(len(seen)) > 2:
        others |= {"kept": video._replace(negative_plan=None)}
    return [name for name, other in others.items() if loop(other, ties=True) == tokens]


def test_pictures_and_videos_equal_the_loop(
    engine: Any, folder: Path, oracle: Careful, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one batch: a picture, a video from text, one that goes on from given frames and is preempted, one unguided."""
    draw(monkeypatch)
    llm = engine("packcache", CONFIG, model=folder, variant="guided", max_model_len=1024, num_gpu_blocks_override=96)
    core, requests = llm.llm_engine, [asked(own) for own in (PICTURE, VIDEO, CONTINUED, PLAIN)]
    scheduler = core.engine_core.engine_core.scheduler
    for number, own in enumerate(requests):
        core.add_request(str(number), {"prompt_token_ids": own.ids}, own.params)
    done: dict[int, list[int]] = {}
    victim = None
    while core.has_unfinished_requests():
        for output in core.step():
            if output.finished:
                done[int(output.request_id)] = list(output.outputs[0].token_ids)
        third = next((own for own in scheduler.running if own.request_id.startswith("2")), None)
        if victim is None and third is not None and third.num_output_tokens > 4:
            victim = third
            scheduler.running.remove(victim)
            scheduler._preempt_request(victim, 0.0)
    assert victim is not None, "no video was preempted that had made anything"
    alike = [check(oracle, own, done[number]) for number, own in enumerate(requests)]
    assert alike[:3] == [[], [], []]
    assert torch.tensor(done[2]).max() > 151853


def test_two_ranks(folder: Path, oracle: Careful, tmp_path: Path) -> None:
    """Each rank has half of the vocabulary, whose logits are combined when they are all there."""
    longer = {"guidance": 1.5, "negative_prompt_ids": text(MODEL, 90, (2, 3), 116)}
    requests = [
        asked(Request(15, MODEL.grid, (2, 13), (0, 3), {})),
        asked(Request(16, (2, 3), (0, 0), (0, 3), longer)),
    ]
    params = {"temperature": 0, "max_tokens": 3, "ignore_eos": True}
    answers = run_on_two_ranks(
        tmp_path,
        [(own.ids, {**params, "extra_args": own.params.extra_args}) for own in requests],
        model=str(folder),
        max_model_len=512,
        max_num_seqs=2,
        max_num_batched_tokens=256,
        additional_config={"kv_cache_policy": "packcache", "kv_cache_policy_config": CONFIG},
    )
    for own, tokens in zip(requests, answers, strict=True):
        check(oracle, own, tokens)
