"""vLLM's tokens under a policy equal the plain PyTorch reference's, all of them (float32, greedy)."""

from __future__ import annotations

from typing import Any

import pytest

from tests.runner import V2, shorter
from tests.serving.conftest import PAPERS, check_together, check_video, generate, prompt, sampling
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.core.plan import Plan


def plan_of(policy: str, config: dict[str, Any], condition: int, frame: int) -> Plan:
    plan = ServerConfig.parse(policy, config).plan({"packcache_tokens_per_frame": frame}, condition)
    assert plan is not None
    return plan


LAYOUTS = [
    # condition, tokens per frame, block size, frames
    pytest.param(70, 67, 32, 13, id="no multiple of the block"),
    pytest.param(64, 128, 32, 8, id="whole blocks"),
    pytest.param(41, 97, 64, 9, id="large blocks"),
    pytest.param(5, 40, 32, 20, id="frame and condition share a block"),
    pytest.param(33, 20, 32, 24, id="frames shorter than a block"),
    pytest.param(280, 257, 32, 6, id="the demo's frames"),
]


@pytest.mark.parametrize(("condition", "frame", "block_size", "frames"), LAYOUTS)
def test_packcache_equals_reference(
    engine: Any, reference: Any, condition: int, frame: int, block_size: int, frames: int
) -> None:
    llm = engine("packcache", PAPERS, block_size=block_size)
    ids = prompt(condition, seed=frame)
    plan = plan_of("packcache", PAPERS, condition, frame)
    video = check_video(llm, reference, ids, frames * frame + 3, plan, block_size, tokens_per_frame=frame)
    assert reference.differs(*video), "the policy changed nothing: the comparison shows nothing"


POLICIES = [
    pytest.param("packcache", {"window": 2, "history_frames": 1}, id="small window"),
    pytest.param("packcache", {"decay": 0.8, "window": 6, "history_frames": 2.5}, id="slow decay"),
    pytest.param("packcache", {"window": 1, "history_frames": 0.4, "selection": "spatial"}, id="part of one frame"),
    pytest.param(
        "packcache",
        {
            "gamma_text": 0.5,
            "gamma_condition": 0.3,
            "layout": {"tokens_per_frame": 67, "condition_image_tokens": 90},
        },
        id="quotas",
    ),
    pytest.param("sliding_window", {"window": 1}, id="one-frame window"),
    pytest.param("sliding_window", {"window": 3}, id="three-frame window"),
    pytest.param("attention_sink", {"sink_tokens": 4, "recent_tokens": 150}, id="sink"),
]


@pytest.mark.parametrize(("policy", "config"), POLICIES)
def test_policies_equal_reference(engine: Any, reference: Any, policy: str, config: dict[str, Any]) -> None:
    ids = prompt(200, seed=7)
    plan = plan_of(policy, config, len(ids), 67)
    video = check_video(engine(policy, config), reference, ids, 12 * 67 + 5, plan, tokens_per_frame=67)
    assert reference.differs(*video), "the policy changed nothing: the comparison shows nothing"


def test_budget_that_holds_everything_equals_stock(engine: Any, reference: Any) -> None:
    ids = prompt(70, seed=1)
    length = shorter(900, 40)
    frame = shorter(67, 9)
    stock = generate(engine(), ids, length)
    reference.check(ids, stock, length)
    assert generate(engine("packcache"), ids, length, tokens_per_frame=frame, window=20, history_frames=20) == stock
    assert generate(engine("sliding_window"), ids, length, tokens_per_frame=frame, window=20) == stock
    assert generate(engine("full"), ids, length, tokens_per_frame=frame) == stock


def test_text_and_opted_out_requests_equal_stock(engine: Any, reference: Any) -> None:
    ids = prompt(70, seed=2)
    length = shorter(700, 40)
    stock = generate(engine(), ids, length)
    reference.check(ids, stock, length)
    llm = engine("packcache")
    assert generate(llm, ids, length) == stock
    assert generate(llm, ids, length, tokens_per_frame=shorter(67, 9), policy="full") == stock


@pytest.mark.parametrize("chunk", shorter([32, 61, 512, 2048], [32, 512]))
def test_given_frames_in_any_chunk_size(engine: Any, reference: Any, chunk: int) -> None:
    condition, frame, frames = 70, 67, 12
    video = prompt(condition + frames * frame, seed=4)
    plan = plan_of("packcache", {}, condition, frame)
    llm = engine("packcache", max_num_batched_tokens=chunk, max_num_seqs=4)
    for given in (3 * frame + 13, 6 * frame, 9 * frame + 66):
        ids = video[: condition + given]
        count = shorter(100, 15)
        made = generate(llm, ids, count, tokens_per_frame=frame, condition_tokens=condition)
        reference.check(ids, made, count, plan)


@pytest.mark.parametrize("prefix_caching", shorter([True, False], [True]))
def test_company_changes_nothing(engine: Any, reference: Any, prefix_caching: bool) -> None:
    llm = engine("packcache", enable_prefix_caching=prefix_caching)
    requests = [
        (prompt(70, seed=5), sampling(shorter(800, 60), tokens_per_frame=shorter(67, 9))),
        (prompt(130, seed=6), sampling(shorter(500, 30))),
        (prompt(20, seed=7), sampling(shorter(700, 60), tokens_per_frame=shorter(33, 15), window=2, history_frames=1)),
        (prompt(70, seed=5), sampling(shorter(600, 20), tokens_per_frame=67, policy="full")),
        (prompt(250, seed=8), sampling(shorter(600, 55), tokens_per_frame=50, condition_tokens=100)),
    ]
    check_together(llm, reference, "packcache", {}, requests)


def test_samples_share_the_condition_and_nothing_else(engine: Any, reference: Any) -> None:
    llm = engine("packcache", max_num_seqs=5)
    ids = prompt(100, seed=9)
    frame, given, total = shorter((67, 300, 400), (21, 70, 90))
    first = generate(llm, ids, total, tokens_per_frame=frame)
    reference.check(ids, first, total, plan_of("packcache", {}, len(ids), frame))
    continuation = ids + first[:given]
    # A text request caches the blocks of the same tokens as if they were no frames.
    generate(llm, continuation, 4)
    params = sampling(total - given, tokens_per_frame=frame, condition_tokens=100)
    requests = 1
    if V2:
        # Its kernel for random numbers cannot be interpreted.
        requests = 3
    else:
        # Greedy by another name: vLLM refuses several samples of a request with temperature 0.
        params.n, params.temperature, params.top_k = 3, 1.0, 1
    outputs = llm.generate([{"prompt_token_ids": continuation}] * requests, params, use_tqdm=False)
    cached = {output.num_cached_tokens for output in outputs}
    assert cached == {96}, "the condition's full blocks, and no block of a frame"
    assert [list(sample.token_ids) for output in outputs for sample in output.outputs] == [first[given:]] * 3


def test_preempted_videos_come_out_the_same(engine: Any, reference: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    preempted = []
    preempt = Scheduler._preempt_request

    def counting(scheduler: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        preempted.append(request.request_id)
        return preempt(scheduler, request, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", counting)
    length, frame, blocks = shorter((700, 67, 40), (80, 30, 15))
    requests = [(prompt(70 + i, seed=20 + i), sampling(length, tokens_per_frame=frame - 7 * i)) for i in range(4)]
    # A pool that holds the four at first, and not once they have grown.
    crowded = engine(
        "packcache",
        PAPERS,
        num_gpu_blocks_override=blocks,
        max_model_len=shorter(1024, 192),
        max_num_batched_tokens=256,
    )
    check_together(crowded, reference, "packcache", PAPERS, requests)
    assert preempted
