"""Helpers to run requests through an engine."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from tests.margins import numbers
from tests.runner import shorter
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.core.plan import Plan

PAPERS = {"window": 4, "selection": "spatial"}
"""The rule of the paper: what it keeps is known beforehand, and frames fill up the window."""


def prompt(length: int, seed: int = 0) -> list[int]:
    """``length`` random token ids."""
    return numbers(seed).integers(0, 256, length).tolist()


def video(condition: int, frame: int, frames: int, seed: int, share: float = 0.08) -> list[int]:
    """A condition, and given frames in which some places change from one to the next."""
    random = numbers(seed)
    picture = random.integers(0, 256, frame)
    ids = [*prompt(condition, seed=seed)]
    for _ in range(frames):
        picture = np.where(random.random(frame) < share, random.integers(0, 256, frame), picture)
        ids += picture.tolist()
    return ids


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
    from vllm.platforms import current_platform

    platform = type(current_platform)
    check = platform.check_and_update_config.__func__  # type: ignore[attr-defined]

    def deciding(cls: Any, vllm_config: Any) -> None:
        check(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = wanted

    patch.setattr(platform, "check_and_update_config", classmethod(deciding))


@pytest.fixture
def preemptions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of every request that is preempted, how many tokens it had made by then."""
    from vllm.plugins import load_general_plugins
    from vllm.v1.core.sched.scheduler import Scheduler

    # A hook that is put in place later would be taken back with what is put in place here.
    load_general_plugins()
    seen: list[int] = []
    preempt = Scheduler._preempt_request

    def counting(scheduler: Any, request: Any, *args: Any, **kwargs: Any) -> None:
        seen.append(request.num_output_tokens)
        preempt(scheduler, request, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", counting)
    return seen


def check_video(
    llm: Any, reference: Any, ids: list[int], length: int, plan: Plan, block_size: int = 32, **options: Any
) -> tuple[list[int], list[int]]:
    """A video whose condition is ``ids`` must be the reference's; on V2 most of it is given and the end generated.

    Returns:
        What was given, and what was generated.
    """
    given = shorter([], prompt(max(0, length - 20), seed=length))
    options["condition_tokens"] = len(ids)
    made = generate(llm, ids + given, length - len(given), **options)
    reference.check(ids + given, made, length - len(given), plan, block_size)
    return ids + given, made


def check_together(
    llm: Any, reference: Any, policy: str, config: dict[str, Any], requests: Sequence[tuple[list[int], Any]]
) -> None:
    """Whatever the company, each request must generate what the reference does."""
    server = ServerConfig.parse(policy, config)
    answers = run(llm, [ids for ids, _ in requests], [params for _, params in requests])
    for (ids, params), tokens in zip(requests, answers, strict=True):
        reference.check(ids, tokens, params.max_tokens, server.plan(params.extra_args, len(ids)))


@pytest.fixture
def vllm_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[Any, str]]:
    """``vllm_command(*arguments)``: status of the command ``vllm`` and what it printed; it ends before it serves.

    In this process: one of its own takes as long as all that is imported.
    """
    from vllm.entrypoints.cli.main import main

    # Set by the command for its children.
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")

    def call(*arguments: str) -> tuple[Any, str]:
        monkeypatch.setattr(sys, "argv", ["vllm", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, "".join(capsys.readouterr())

    return call


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
