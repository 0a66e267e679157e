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
