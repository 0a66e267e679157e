"""Helpers to run requests through an engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from tests.runner import V2, shorter
from vllm_packcache.config import ServerConfig


def prompt(length: int, seed: int = 0) -> list[int]:
    """``length`` random token ids."""
    return np.random.default_rng(seed).integers(0, 256, length).tolist()


def sampling(max_tokens: int, **options: Any) -> Any:
    """Greedy sampling; ``options`` are request options without their prefix."""
    from vllm import SamplingParams

    extra = {f"packcache_{name}": value for name, value in options.items()}
    return SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, extra_args=extra or None
    )


def run(llm: Any, prompts: Sequence[list[int]], params: Sequence[Any]) -> list[list[int]]:
    """Generated tokens of a batch of requests."""
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], list(params), use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def generate(llm: Any, ids: list[int], max_tokens: int, **options: Any) -> list[int]:
    """Generated tokens of one request alone."""
    return run(llm, [ids], [sampling(max_tokens, **options)])[0]


def schedule_asynchronously(patch: pytest.MonkeyPatch, wanted: bool) -> None:
    """Engines that are made from now on schedule steps ahead, which vLLM's CPU platform would switch off, or do not."""
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config.__func__  # type: ignore[attr-defined]

    def deciding(cls: Any, vllm_config: Any) -> None:
        check(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = wanted

    patch.setattr(CpuPlatform, "check_and_update_config", classmethod(deciding))


def check_video(llm: Any, ids: list[int], expected: list[int], **options: Any) -> None:
    """A video whose condition is ``ids`` must be ``expected``; on V2 most of it is given and the end generated."""
    given = shorter(0, max(0, len(expected) - 20))
    options["condition_tokens"] = len(ids)
    assert generate(llm, ids + expected[:given], len(expected) - given, **options) == expected[given:]


def alone(
    llm: Any, reference: Any, config: dict[str, Any], requests: Sequence[tuple[list[int], Any]]
) -> list[list[int]]:
    """What each request generates without company: the engine says, or on V2 the reference, which is faster there."""
    if not V2:
        return [run(llm, [ids], [params])[0] for ids, params in requests]
    server = ServerConfig.parse("packcache", config)
    return [
        reference.generate(ids, params.max_tokens, server.plan(params.extra_args, len(ids)), 32).token_ids
        for ids, params in requests
    ]


@pytest.fixture(params=["TRITON_ATTN", "FLEX_ATTENTION"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A GPU's backend that can be interpreted; engines that are made meanwhile have it."""
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention import selector
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.ops.triton_reshape_and_cache_flash import triton_reshape_and_cache_flash

    path = AttentionBackendEnum[request.param].get_path()
    monkeypatch.setattr(CpuPlatform, "get_attn_backend_cls", classmethod(lambda cls, *args, **kwargs: path))
    # The kernel that writes to the cache asks, to choose how many numbers a program writes.
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    # The same in C++ is not in CPU builds.
    monkeypatch.setattr(
        torch.ops._C_cache_ops, "reshape_and_cache_flash", triton_reshape_and_cache_flash, raising=False
    )
    selector._cached_get_attn_backend.cache_clear()
    yield request.param
    selector._cached_get_attn_backend.cache_clear()
