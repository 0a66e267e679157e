"""Random schedules over the real engine: whatever the company and however small the pool, the tokens are the same.

A seed chooses pool, chunk size, prefix caching, asynchronous scheduling, the requests, when each arrives and which are
aborted. What a request generates is compared with the reference.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest

from tests.margins import Tie
from tests.runner import shorter
from tests.serving.conftest import prompt, sampling, schedule_asynchronously
from vllm_packcache.config.server import ServerConfig

BLOCK = 32
CONFIG = {"window": 3, "history_frames": 1.5, "layout": {"tokens_per_frame": 45}}
MAX_MODEL_LEN = shorter(900, 384)
QUICK_SEEDS = shorter(range(5), range(2))
SEEDS = range(1000, 1200)


@dataclass(frozen=True)
class Case:
    """A request."""

    prompt_tokens: int
    seed: int
    max_tokens: int
    options: tuple[tuple[str, Any], ...]

    @property
    def ids(self) -> list[int]:
        return prompt(self.prompt_tokens, seed=self.seed)

    @property
    def params(self) -> Any:
        return sampling(self.max_tokens, **dict(self.options))


def make_catalogue() -> list[Case]:
    """Few enough to run each alone once, and with common prefixes."""
    choose = random.Random(7)
    cases = []
    for number in range(32):
        options: dict[str, Any] = {}
        tokens = choose.choice([40, 75, 130, 300])
        if number % 4:
            options = {"condition_tokens": choose.choice([20, 33, tokens])}
            options |= choose.choice(
                [
                    {},
                    {"tokens_per_frame": 19},
                    {"tokens_per_frame": 67, "window": 1, "history_frames": 1},
                    {"tokens_per_frame": 96, "window": 2},
                    {"policy": "full"},
                ]
            )
        cases.append(
            Case(
                tokens,
                choose.randrange(5),
                choose.choice(shorter([30, 200, 500], [20, 40, 80])),
                tuple(options.items()),
            )
        )
    return cases


CATALOGUE = make_catalogue()


def serve(llm: Any, manager: Any, choose: random.Random) -> dict[Case, list[int]]:
    """Run a random schedule; answers of those that were not aborted."""
    cases = choose.sample(CATALOGUE, choose.randint(*shorter((5, 14), (5, 6))))
    arrivals = {case: choose.choice([0, 0, 0, choose.randrange(60), choose.randrange(300)]) for case in cases}
    aborts = {case: arrivals[case] + choose.randrange(250) for case in cases if choose.random() < 0.2}
    names = {f"{number}": case for number, case in enumerate(cases)}
    engine = llm.llm_engine
    waiting, answers, internal = dict(names), {}, {}
    step = 0
    while waiting or engine.has_unfinished_requests():
        for name in [name for name, case in waiting.items() if arrivals[case] <= step]:
            case = waiting.pop(name)
            internal[case] = engine.add_request(name, {"prompt_token_ids": case.ids}, case.params)
        engine.abort_request([internal[case] for case, when in aborts.items() if when == step], internal=True)
        for output in engine.step() if engine.has_unfinished_requests() else []:
            if output.finished:
                answers[names[output.request_id]] = list(output.outputs[0].token_ids)
        for video in manager.videos():
            assert video.most_blocks is None or video.resident_blocks <= video.most_blocks
        step += 1
    assert set(cases) - set(aborts) <= set(answers), "a request never ended"
    return {case: answers[case] for case in cases if case not in aborts}


def check_schedule(
    seed: int,
    engine: Callable[..., Any],
    reference: Any,
    patch: pytest.MonkeyPatch,
) -> None:
    """Run a schedule. A token that rounding may turn may be either."""
    choose = random.Random(seed)
    asynchronous = choose.random() < 0.5
    schedule_asynchronously(patch, asynchronous)
    llm = engine(
        "packcache",
        CONFIG,
        max_model_len=MAX_MODEL_LEN,
        # From hardly more than the longest request needs on.
        num_gpu_blocks_override=choose.choice(shorter([30, 33, 40, 60], [13, 14, 15, 20])),
        max_num_batched_tokens=choose.choice([16, 50, 128, 512]),
        max_num_seqs=choose.choice([4, 12]),
        enable_prefix_caching=choose.random() < 0.5,
        variant=asynchronous,
    )
    kv = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager
    pool, manager = kv.block_pool, kv.coordinator.single_type_managers[0]
    server, checked = ServerConfig.parse("packcache", CONFIG), 0
    answers = serve(llm, manager, choose)
    for case, tokens in answers.items():
        with suppress(Tie):
            reference.check(case.ids, tokens, case.max_tokens, server.plan(case.params.extra_args, len(case.ids)))
            checked += 1
    assert checked > len(answers) / 2
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1, "blocks are still held when all have ended"


def test_schedules(engine: Any, reference: Any, preemptions: list[int]) -> None:
    for seed in QUICK_SEEDS:
        with pytest.MonkeyPatch.context() as patch:
            check_schedule(seed, engine, reference, patch)
    assert len(preemptions) > shorter(5, 0), "schedules without pressure show little"


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", SEEDS)
def test_many_schedules(seed: int, engine: Any, reference: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure names its seed: ``pytest -m long "tests/serving/test_schedules.py::test_many_schedules[1017]"``."""
    check_schedule(seed, engine, reference, monkeypatch)
