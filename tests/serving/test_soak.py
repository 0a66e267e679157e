"""A full server for a while: video and text over HTTP, streamed or not, clients that leave, and preemption."""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from tests.serving.test_schedules import Case

if TYPE_CHECKING:
    from openai import AsyncOpenAI

    from tests.serving.server import Server

pytest_plugins = ["tests.serving.server"]

CLIENTS = 12
LEAVING = 0.2
"""Share of the requests whose clients leave before the answer is complete."""

GROWTH = 8
"""MiB by which a process may grow: three times what they were seen to, within a hundred requests or a thousand. A
request that is never let go of takes 10 KiB, and the thousands of the long form several times this. In the short form
it would not show: that every block and every video is let go of does."""


async def whole(client: AsyncOpenAI, asking: dict[str, Any], seconds: float | None) -> list[int] | None:
    """Tokens of an answer; None: it took longer than ``seconds``, and the client has left."""
    try:
        async with asyncio.timeout(seconds):
            answer = await client.completions.create(**asking)
    except TimeoutError:
        return None
    return answer.choices[0].token_ids


async def streamed(client: AsyncOpenAI, asking: dict[str, Any], most: int | None) -> list[int] | None:
    """Tokens of a streamed answer; None: the client has left after ``most`` of them."""
    tokens: list[int] = []
    async with await client.completions.create(**asking, stream=True) as stream:
        if most == 0:
            return None
        async for chunk in stream:
            tokens += chunk.choices[0].token_ids
            if most is not None and len(tokens) >= most:
                return None
    return tokens


async def load(
    server: Server, alone: Callable[[Case], list[int]], catalogue: list[Case], requests: int, seed: str
) -> Counter[str]:
    """Keep the server full, so many requests a client; returns how many ended how."""
    ends: Counter[str] = Counter()

    async def come_and_go(client: AsyncOpenAI, number: int) -> None:
        choose = random.Random(f"{seed} {number}")
        for _ in range(requests):
            case, leaves = choose.choice(catalogue), choose.random() < LEAVING
            asking, how = server.asking(case), choose.choice(["streamed", "whole"])
            if how == "streamed":
                # One in three of those who leave does so before the first token.
                most = choose.choice([0, *choose.sample(range(1, case.max_tokens), 2)]) if leaves else None
                tokens = await streamed(client, asking, most)
            else:
                tokens = await whole(client, asking, choose.uniform(0, 2) if leaves else None)
            ends[f"{how}, left" if tokens is None else how] += 1
            assert tokens in (None, alone(case)), f"seed {seed!r}, client {number}: {case} is not what it is alone"

    async with server.openai() as client, asyncio.TaskGroup() as clients:
        for number in range(CLIENTS):
            clients.create_task(come_and_go(client, number))
    return ends


def wait_until_empty(server: Server, case: Case) -> None:
    """Nothing runs, waits or holds blocks: every block of the pool is free."""
    # Statistics come with a step, and there is none after the last client has left.
    server.tokens(case)
    deadline = time.monotonic() + 60
    names = [
        "vllm:kv_cache_usage_perc",
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:packcache_resident_tokens",
        "vllm:packcache_logical_tokens",
        "vllm:packcache_videos",
    ]
    while any((shown := server.metrics())[name] for name in names):
        assert time.monotonic() < deadline, {name: shown[name] for name in names}
        time.sleep(0.2)


def memory(server: Server) -> dict[str, int]:
    """MiB that each of the server's processes holds."""
    return {f"{one.name()} {one.pid}": round(one.memory_info().rss / 2**20) for one in server.processes()}


@pytest.mark.parametrize(
    ("warm_up", "requests", "seed"),
    [
        pytest.param(0, 5, "short", marks=pytest.mark.timeout(900), id="short"),
        pytest.param(25, 250, "long", marks=[pytest.mark.long, pytest.mark.timeout(3600)], id="long"),
    ],
)
def test_soak(
    server: Server, alone: Callable[[Case], list[int]], catalogue: list[Case], warm_up: int, requests: int, seed: str
) -> None:
    for case in catalogue:
        alone(case)
    asyncio.run(load(server, alone, catalogue, warm_up, f"{seed} warm-up"))
    wait_until_empty(server, catalogue[0])
    before, memory_before, log_before = server.metrics(), memory(server), server.log.stat().st_size
    ends = asyncio.run(load(server, alone, catalogue, requests, seed))
    wait_until_empty(server, catalogue[0])
    after, memory_after = server.metrics(), memory(server)
    preemptions = after["vllm:packcache_preemptions_total"] - before["vllm:packcache_preemptions_total"]
    summary = f"seed {seed!r}: {dict(ends)}, {preemptions:.0f} preemptions, MiB {memory_before} -> {memory_after}"
    print(summary)
    assert preemptions > 0, summary
    # How many leave a stream is in the seed.
    assert ends["streamed, left"] >= CLIENTS * requests * LEAVING / 4, summary
    if warm_up:
        for process, held in memory_before.items():
            assert memory_after[process] - held < GROWTH, summary
    with server.log.open(encoding="utf-8") as log:
        log.seek(log_before)
        errors = [line for line in log if re.search(r"\b(ERROR|CRITICAL)\b|Traceback", line)]
    assert not errors, "".join(errors)
