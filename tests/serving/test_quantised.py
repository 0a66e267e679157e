"""Keys and values of 8 bits with re-based positions: exact tokens against a loop that rounds as the cache does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.margins import Tie
from tests.runner import needs_v2
from tests.serving.conftest import prompt, run, sampling
from tests.serving.rounding import as_the_cpu_writes, int8, to_nearest
from tests.serving.test_positions import plan_of
from vllm_packcache.config.formats import FORMATS
from vllm_packcache.engine.metrics import PREFIX
from vllm_packcache.reference import QuantisedReference

CONFIG = {"window": 2, "history_frames": 1.5, "selection": "spatial"}
CONDITION, FRAME = 20, 25
ENGINE: dict[str, Any] = {
    "max_model_len": 512, "max_num_batched_tokens": 64, "max_num_seqs": 2, "num_gpu_blocks_override": 60,
    "enable_prefix_caching": False,
}  # fmt: skip

TIE = 0.01
"""As `tests.margins.TIE`: a number beside an edge of the format may be rounded to the other side."""


CPU_FORMATS = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


@pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="vLLM stores 8 bits on processors with AVX-512 only")
@pytest.mark.parametrize("name", CPU_FORMATS)
def test_floats_on_a_cpu(engine: Any, reference: Any, name: str) -> None:
    dtype = CPU_FORMATS[name]
    oracle = QuantisedReference(reference.config, reference._weights, as_the_cpu_writes(dtype, name), to_nearest(dtype))
    check(engine, reference, oracle, 32, kv_cache_dtype=name)


@pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="vLLM stores 8 bits on processors with AVX-512 only")
def test_what_is_computed_anew_after_a_preemption_is_rounded_alike(
    engine: Any, reference: Any, preemptions: list[int]
) -> None:
    """A video that loses its blocks in the middle of a frame, and begins anew."""
    dtype, made = torch.float8_e4m3fn, 12
    oracle = QuantisedReference(
        reference.config, reference._weights, as_the_cpu_writes(dtype, "fp8_e4m3"), to_nearest(dtype)
    )
    video = prompt(CONDITION + 7 * FRAME - 3, seed=8)
    wanted = oracle.generate(video, made, plan_of(CONFIG, CONDITION, tokens_per_frame=FRAME), 32)
    if wanted.gaps.min() < TIE:
        raise Tie("a token that one number may turn")
    llm = engine("packcache", CONFIG, **ENGINE, block_size=32, kv_cache_dtype="fp8_e4m3")
    said = sampling(made, tokens_per_frame=FRAME, condition_tokens=CONDITION)
    core, answer = llm.llm_engine, []
    core.add_request("video", {"prompt_token_ids": video}, said)
    while core.has_unfinished_requests():
        for output in core.step():
            answer = list(output.outputs[0].token_ids)
        if len(answer) == 6 and not preemptions:
            assert core.reset_prefix_cache(reset_running_requests=True)
    assert preemptions == [6]
    assert answer == wanted.token_ids


@needs_v2
@pytest.mark.parametrize("backend", ["TRITON_ATTN"], indirect=True)
def test_integers_with_a_scale_for_every_token_and_head(engine: Any, reference: Any, backend: str) -> None:
    """Of a card that has no 8-bit floats, such as an A40."""
    oracle = QuantisedReference(reference.config, reference._weights, int8, int8)
    check(engine, reference, oracle, 16, variant=backend, kv_cache_dtype="int8_per_token_head")


@pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="vLLM stores 8 bits on processors with AVX-512 only")
@pytest.mark.parametrize("skipped", [[], ["0"]], ids=["every layer", "but the first"])
def test_bytes_of_floats_are_those_that_are_allocated(engine: Any, skipped: list[str]) -> None:
    options = {"block_size": 32, "kv_cache_dtype": "fp8_e4m3", "kv_cache_dtype_skip_layers": skipped}
    llm = engine("packcache", CONFIG, **ENGINE, **options, disable_log_stats=False)
    check_bytes(llm, ["auto" if skipped else "fp8_e4m3", "fp8_e4m3"])


@needs_v2
@pytest.mark.parametrize("backend", ["TRITON_ATTN"], indirect=True)
def test_bytes_of_integers_are_those_that_are_allocated(engine: Any, backend: str) -> None:
    """Scales count."""
    options = {"block_size": 16, "kv_cache_dtype": "int8_per_token_head", "variant": backend}
    check_bytes(engine("packcache", CONFIG, **ENGINE, **options, disable_log_stats=False), ["int8_per_token_head"] * 2)


def check_bytes(llm: Any, names: list[str]) -> None:
    """What is reserved at start, and what `/metrics` has of a running video, is what the layers' caches take.

    Args:
        llm: an engine.
        names: of the format of each layer.
    """
    core, config = llm.llm_engine, llm.llm_engine.vllm_config
    video = prompt(CONDITION + 4 * FRAME, seed=4)
    core.add_request("video", {"prompt_token_ids": video}, sampling(9, tokens_per_frame=FRAME, condition_tokens=20))
    for _ in range(9):
        core.step()
    scheduler = core.engine_core.engine_core.scheduler
    pool, (group,) = scheduler.kv_cache_manager.block_pool, scheduler.kv_cache_config.kv_cache_groups
    pages = [
        layer.kv_cache.nbytes // pool.num_gpu_blocks
        for layer in config.compilation_config.static_forward_context.values()
    ]
    heads, channels = config.model_config.get_total_num_kv_heads(), config.model_config.get_head_size()
    block_size = config.cache_config.block_size
    assert pages == [block_size * FORMATS[name].token_bytes(1, heads, channels, 4) for name in names]
    # One of them is the null block.
    held = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
    assert held >= 3
    found = next(own.value for own in llm.get_metrics() if own.name == f"{PREFIX}resident_bytes")
    assert found == held * sum(pages)
    spec = group.kv_cache_spec
    assert spec.max_memory_usage_bytes(config) == spec.most_blocks(config.model_config.max_model_len) * pages[0]
    core.abort_request(["video"])


def check(engine: Any, reference: Any, oracle: QuantisedReference, block_size: int, **options: Any) -> None:
    """Tokens of a video beside a text, after seven slides; and the keys that the cache has then, number by number."""
    frames, made = 9, 6
    llm = engine("packcache", CONFIG, **ENGINE, block_size=block_size, **options)
    plan = plan_of(CONFIG, CONDITION, tokens_per_frame=FRAME)
    video, text = prompt(CONDITION + frames * FRAME - 3, seed=6), prompt(30, seed=2)
    wanted, beside = oracle.generate(video, made, plan, block_size), oracle.generate(text, made)
    if min(wanted.gaps.min(), beside.gaps.min()) < TIE:
        raise Tie("a token that one number may turn")
    said = sampling(made, tokens_per_frame=FRAME, condition_tokens=CONDITION)
    assert run(llm, [video, text], [said, sampling(made)]) == [wanted.token_ids, beside.token_ids]
