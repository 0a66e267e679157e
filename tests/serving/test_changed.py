"""``selection: changed`` in the engine: tokens equal the reference's, whose rule looks at ids block by block."""

from __future__ import annotations

from typing import Any

import pytest

from tests.runner import shorter
from tests.serving.conftest import prompt, run, sampling, schedule_asynchronously, video
from vllm_packcache.config.server import ServerConfig

CONFIG = {"selection": "changed", "history_frames": 1.5, "window": 5}


def requests(first_seed: int = 0) -> list[tuple[list[int], Any]]:
    """Different conditions, frames that are no multiple of the block, at least three windows of given slides."""
    given = shorter(16, 9)
    made = []
    for seed, (condition, frame, options) in enumerate(
        [
            (70, shorter(67, 41), {}),
            (5, shorter(40, 33), {"window": 3, "history_frames": 1}),
            (41, shorter(97, 50), {"changed_tokens": 3}),
            (64, 32, {"changed_tokens": 33}),
        ],
        first_seed,
    ):
        ids = video(condition, frame, given, seed)
        tokens = shorter(2 * frame + 3, 12)
        made.append((ids, sampling(tokens, tokens_per_frame=frame, condition_tokens=condition, **options)))
    text = prompt(50, seed=9), sampling(shorter(60, 20))
    return [*made, text]


def check(llm: Any, reference: Any, config: dict[str, Any], batch: list[tuple[list[int], Any]]) -> list[list[int]]:
    server = ServerConfig.parse("packcache", config)
    answers = run(llm, [ids for ids, _ in batch], [params for _, params in batch])
    for (ids, params), tokens in zip(batch, answers, strict=True):
        reference.check(ids, tokens, params.max_tokens, server.plan(params.extra_args, len(ids)))
    return answers


def test_tokens_equal_the_reference(engine: Any, reference: Any) -> None:
    llm = engine("packcache", CONFIG, max_num_batched_tokens=256)
    batch = requests()
    answers = check(llm, reference, CONFIG, batch)
    evenly = [
        run(llm, [ids], [sampling(params.max_tokens, **options)])[0]
        for ids, params in batch[:1]
        for options in [{**plain(params.extra_args), "selection": "spatial"}]
    ]
    assert evenly[0] != answers[0] or shorter(False, True), "looking at changes changed nothing"


def plain(options: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("packcache_"): value for name, value in options.items()}


@pytest.mark.parametrize("asynchronous", [False, True], ids=["in turn", "ahead"])
def test_preempted_requests_choose_the_same_again(
    engine: Any, reference: Any, monkeypatch: pytest.MonkeyPatch, preemptions: list[int], asynchronous: bool
) -> None:
    schedule_asynchronously(monkeypatch, asynchronous)
    llm = engine(
        "packcache",
        CONFIG,
        max_num_batched_tokens=128,
        num_gpu_blocks_override=shorter(60, 22),
        max_model_len=shorter(1856, 640),
        variant=f"crowded {asynchronous}",
    )
    check(llm, reference, CONFIG, [*requests(0)[:3], *shorter(requests(20)[:3], []), *shorter(requests(40)[:2], [])])
    assert preemptions
