"""A request that cannot go on is ended with an error, by the scheduler, and no other request notices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from tests.core.test_policy_contract import Wide
from tests.runner import shorter
from tests.serving.conftest import prompt, sampling, schedule_asynchronously
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.core import policies
from vllm_packcache.core.blocks import BlockMap
from vllm_packcache.core.policies import SlidingWindow
from vllm_packcache.hooks import causal
from vllm_packcache.hooks import requests as plugin_requests

BLOCK, FRAME = 32, 40
CONFIG = {"window": 2, "layout": {"tokens_per_frame": FRAME}}


@dataclass(frozen=True, kw_only=True)
class Breaking(SlidingWindow):
    """Does what it must not while frame ``breaks_at`` is made."""

    breaks_at: int = -1
    raises: int = 0

    def past_blocks(self, blocks: BlockMap, frame: int) -> Any:
        if frame != self.breaks_at:
            return super().past_blocks(blocks, frame)
        if self.raises:
            raise KeyError(frame)
        return np.arange(blocks.tail_start(frame) + 1)


@pytest.fixture(autouse=True)
def _packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a package had entry points ``breaking`` and ``wide``."""
    find, own = policies.find, {"breaking": Breaking, "wide": Wide}
    monkeypatch.setattr(policies, "find", lambda name: own.get(name) or find(name))


@pytest.fixture
def errors(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Why the scheduler has ended requests."""
    reasons: list[str] = []
    monkeypatch.setattr("vllm_packcache.engine.manager.logger.error", lambda text, name, why: reasons.append(why))
    return reasons


def scheduler_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


def serve(llm: Any, requests: list[tuple[list[int], Any]]) -> list[tuple[str | None, list[int]]]:
    """How each request ended, and what it generated."""
    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids, _ in requests], [params for _, params in requests], use_tqdm=False
    )
    return [(output.outputs[0].finish_reason, list(output.outputs[0].token_ids)) for output in outputs]


def check_others(
    llm: Any, reference: Any, name: str, bad: list[tuple[list[int], Any]]
) -> list[tuple[str | None, list[int]]]:
    """Serve ``bad`` requests among good ones, which must have all their tokens; how the bad ones ended."""
    length = shorter(4 * FRAME, 12)
    good = [
        (prompt(30, seed=60), sampling(length, condition_tokens=20)),
        (prompt(50, seed=61), sampling(length // 2)),
        (prompt(100, seed=62), sampling(length, condition_tokens=45)),
    ]
    server = ServerConfig.parse(name, CONFIG)
    expected = [
        reference.generate(ids, params.max_tokens, server.plan(params.extra_args, len(ids)), BLOCK).token_ids
        for ids, params in good
    ]
    # The first comes before any other, the others between them.
    mixed = [*bad[:1], good[0], *bad[1:], *good[1:]]
    ended = serve(llm, mixed)
    assert [tokens for _, tokens in (ended[1], *ended[len(bad) + 1 :])] == expected
    scheduler = scheduler_of(llm)
    pool = scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    assert not scheduler.requests
    (manager,) = scheduler.kv_cache_manager.coordinator.single_type_managers
    assert not manager._videos
    assert not manager.failures
    return [ended[0], *ended[2 : len(bad) + 1]]


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_policy_that_breaks_its_contract_ends_that_request(
    engine: Any, reference: Any, monkeypatch: pytest.MonkeyPatch, errors: list[str], asynchronous: bool
) -> None:
    schedule_asynchronously(monkeypatch, asynchronous)
    llm = engine("breaking", CONFIG, variant=asynchronous)
    bad = [
        # While it decodes, in the middle of its prompt, and before its first token is drawn.
        (prompt(40, seed=63), sampling(3 * FRAME, condition_tokens=40, breaks_at=1)),
        (prompt(300, seed=64), sampling(20, condition_tokens=20, breaks_at=4)),
        (prompt(60, seed=65), sampling(20, condition_tokens=20, breaks_at=0, raises=1)),
    ]
    ended = check_others(llm, reference, "breaking", bad)
    assert [reason for reason, _ in ended] == ["error"] * 3
    assert [len(tokens) for _, tokens in ended] == [FRAME + 1, 0, 0]
    assert sorted(errors) == [
        "policy Breaking, frame 0: past_blocks raised KeyError: 0",
        "policy Breaking, frame 1: block 2 is none of the past, which has blocks 0 to 1",
        "policy Breaking, frame 4: block 5 is none of the past, which has blocks 0 to 4",
    ]


def test_what_no_front_end_has_checked_ends_that_request(
    engine: Any, reference: Any, monkeypatch: pytest.MonkeyPatch, errors: list[str]
) -> None:
    llm = engine("breaking", CONFIG, variant=False, num_gpu_blocks_override=40)
    monkeypatch.setattr(causal, "_check_request", lambda *args, **kwargs: None)
    bad = [
        (prompt(30, seed=66), sampling(5, nonsense=1)),
        (prompt(30, seed=67), sampling(5, tokens_per_frame=0)),
        (prompt(1390, seed=68), sampling(5, tokens_per_frame=1400, condition_tokens=10)),
        (prompt(2000, seed=69), sampling(5)),
        (prompt(2000, seed=70), sampling(5, policy="full")),
    ]
    ended = check_others(llm, reference, "breaking", bad)
    assert ended == [("error", [])] * 5
    assert len(errors) == 5
    assert "packcache_nonsense is no known option" in " ".join(errors)
    assert "it holds 44 blocks, and the KV cache has 39" in errors


def test_a_video_that_comes_to_an_engine_without_a_policy_is_ended(
    engine: Any, reference: Any, monkeypatch: pytest.MonkeyPatch, errors: list[str]
) -> None:
    """As on a second node that was started without the flags of the first."""
    llm = engine()
    monkeypatch.setattr(plugin_requests, "_refuse_options", lambda params: None)
    ids = prompt(50, seed=74)
    ended = serve(llm, [(ids, sampling(20, window=2)), (ids, sampling(20)), (ids, sampling(5, window=2))])
    assert ended == [("error", []), ("length", reference.generate(ids, 20, None, BLOCK).token_ids), ("error", [])]
    why = "it is a video, and this engine was started without --kv-cache-policy: start every node with the same flags"
    assert errors == [why] * 2
    assert not scheduler_of(llm).requests


def test_a_policy_that_has_its_parents_name_is_itself_in_every_process(engine: Any, reference: Any) -> None:
    config = {"window": 3, "history_frames": 1, "layout": {"tokens_per_frame": FRAME}}
    llm = engine("wide", config)
    (manager,) = scheduler_of(llm).kv_cache_manager.coordinator.single_type_managers
    assert type(manager._config.policy) is Wide
    assert manager._config.name == "wide"
    length = shorter(6 * FRAME, 3 * FRAME)
    plan = ServerConfig.parse("wide", config).plan({"packcache_policy": "wide"}, 20)
    # Several, so that blocks which are freed too early have other tokens in them.
    requests = [(prompt(20, seed=71 + number), sampling(length, policy="wide")) for number in range(3)]
    expected = [reference.generate(ids, length, plan, BLOCK).token_ids for ids, _ in requests]
    assert [tokens for _, tokens in serve(llm, requests)] == expected
