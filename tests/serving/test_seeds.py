"""A seeded request draws the same tokens whether its prompt is computed at once, in parts, or again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm import SamplingParams

from tests.margins import steady
from tests.runner import V2
from tests.serving.conftest import PAPERS, prompt, run
from vllm_packcache.config.server import ServerConfig

pytestmark = pytest.mark.skipif(V2, reason="its random numbers are of a seed and a position: nothing is turned back")


def seeded(max_tokens: int, seed: int, **options: Any) -> Any:
    extra = {f"packcache_{name}": value for name, value in options.items()}
    return SamplingParams(
        temperature=1.0, seed=seed, max_tokens=max_tokens, ignore_eos=True, detokenize=False, extra_args=extra or None
    )


def drawn(reference: Any, ids: list[int], tokens: list[int], params: Any) -> list[int]:
    """What the request's own generator draws from the reference's logits, given the tokens before."""
    plan = ServerConfig.parse("packcache", PAPERS).plan(params.extra_args, len(ids))
    logits = reference.logits([*ids, *tokens[:-1]], plan, 32)[len(ids) - 1 :]
    generator = torch.Generator().manual_seed(params.seed)
    # As vLLM does on a CPU: a number of the generator's seeds the noise of a token's logits.
    seeds = torch.cat([torch.randint(0, 2**31, (1,), generator=generator, dtype=torch.long) for _ in tokens])
    return steady(lambda each: torch.ops._C.fused_gumbel_argmax(each.contiguous(), seeds).tolist(), logits)


def test_prompts_in_parts(engine: Any, reference: Any) -> None:
    """A batch of a video whose frames are given, one with a long condition, and text."""
    llm = engine("packcache", PAPERS, max_num_batched_tokens=61, max_num_seqs=4)
    requests = [
        (prompt(70 + 8 * 40 + 13, seed=1), seeded(60, 1, tokens_per_frame=40, condition_tokens=70)),
        (prompt(170, seed=2), seeded(60, 2, tokens_per_frame=10)),
        (prompt(230, seed=3), seeded(60, 3)),
    ]
    outputs = run(llm, [ids for ids, _ in requests], [params for _, params in requests])
    for (ids, params), tokens in zip(requests, outputs, strict=True):
        assert tokens == drawn(reference, ids, tokens, params)


def test_preempted_videos(engine: Any, reference: Any, preemptions: list[int]) -> None:
    llm = engine("packcache", PAPERS, num_gpu_blocks_override=40, max_model_len=1024, max_num_batched_tokens=256)
    requests = [(prompt(70 + i, seed=20 + i), seeded(400, i, tokens_per_frame=67 - 7 * i)) for i in range(4)]
    outputs = run(llm, [ids for ids, _ in requests], [params for _, params in requests])
    assert max(preemptions) > 10
    for (ids, params), tokens in zip(requests, outputs, strict=True):
        assert tokens == drawn(reference, ids, tokens, params)
