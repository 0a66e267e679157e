"""``selection: changed`` in the engine: tokens equal the reference's, whose rule looks at ids block by block."""

from __future__ import annotations

from typing import Any

import pytest

from tests.runner import V2, shorter
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


@pytest.mark.parametrize("chunk", shorter([61, 256], [256]))
def test_tokens_equal_the_reference(engine: Any, reference: Any, chunk: int) -> None:
    """Given frames come in chunks that hold a part of one, or several."""
    llm = engine("packcache", CONFIG, max_num_batched_tokens=chunk)
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
        max_num_seqs=shorter(12, 8),
        num_gpu_blocks_override=shorter(60, 18),
        max_model_len=shorter(1856, 512),
        variant=f"crowded {asynchronous}",
    )
    batch = [own for seed in shorter((0, 20, 40, 60), (0,)) for own in requests(seed)[:3]]
    check(llm, reference, CONFIG, batch)
    assert preemptions


FRAME = shorter(40, 33)
CONDITION = 70


def test_a_condition_that_is_cached_is_no_other(engine: Any, reference: Any) -> None:
    """Videos of one condition share its blocks, and each is kept by its own frames."""
    llm = engine("packcache", CONFIG, max_num_batched_tokens=256)
    condition = prompt(CONDITION, seed=60)
    params = sampling(shorter(2 * FRAME + 3, 8), tokens_per_frame=FRAME, condition_tokens=CONDITION)
    plan = ServerConfig.parse("packcache", CONFIG).plan(params.extra_args, CONDITION)
    # The first is not done when the second comes, and both are when the third does.
    batches = [[61, 62], [63]]
    cached = []
    for seeds in batches:
        prompts = [condition + video(0, FRAME, 8, seed) for seed in seeds]
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        cached += [output.num_cached_tokens for output in outputs]
        for ids, output in zip(prompts, outputs, strict=True):
            reference.check(ids, list(output.outputs[0].token_ids), params.max_tokens, plan)
    assert cached[1:] == [64, 64]


@pytest.mark.skipif(V2, reason="its kernel for random numbers cannot be interpreted")
def test_each_sample_is_kept_by_its_own_frames(engine: Any) -> None:
    llm = engine("packcache", CONFIG, max_num_batched_tokens=256)
    ids = video(CONDITION, FRAME, 6, seed=70)

    def samples(number: int, seed: int) -> list[list[int]]:
        params = sampling(3 * FRAME + 5, tokens_per_frame=FRAME, condition_tokens=CONDITION)
        params.temperature, params.n, params.seed = 1.0, number, seed
        (output,) = llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
        return [list(sample.token_ids) for sample in output.outputs]

    together = samples(2, seed=5)
    assert together[0] != together[1]
    # vLLM draws each sample by a seed of its own, one after the other.
    assert together == samples(1, seed=5) + samples(1, seed=6)


def test_an_aborted_video_leaves_others_as_they_are(engine: Any, reference: Any) -> None:
    llm = engine("packcache", CONFIG, max_num_batched_tokens=256)
    core = llm.llm_engine.engine_core.engine_core
    batch = requests(80)[:3]
    names = [llm.llm_engine.add_request(f"a{i}", {"prompt_token_ids": ids}, own) for i, (ids, own) in enumerate(batch)]
    done: dict[str, list[int]] = {}
    # The first is aborted while its given frames are computed, and comes again; the second while it makes a frame.
    for step in range(2000):
        if not llm.llm_engine.has_unfinished_requests():
            break
        if step == 2:
            llm.llm_engine.abort_request(names[:1], internal=True)
            llm.llm_engine.add_request("again", {"prompt_token_ids": batch[0][0]}, batch[0][1])
        if step == shorter(30, 10):
            llm.llm_engine.abort_request(names[1:2], internal=True)
        for output in llm.llm_engine.step():
            if output.finished:
                done[output.request_id] = list(output.outputs[0].token_ids)
    server = ServerConfig.parse("packcache", CONFIG)
    for name, (ids, params) in (("again", batch[0]), ("a2", batch[2])):
        reference.check(ids, done[name], params.max_tokens, server.plan(params.extra_args, len(ids)))
    (manager,) = core.scheduler.kv_cache_manager.coordinator.single_type_managers
    assert not manager.decisions
    assert not manager.videos()
    pool = core.scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
