"""What goes wrong around a server: a process dies, requests or files are no good, a thousand clients come at once."""

from __future__ import annotations

import asyncio
import json
import re
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import openai
import psutil
import pytest

from tests.serving.test_schedules import Case
from vllm_packcache.config.errors import shown_path
from vllm_packcache.serving.server import ServerError

if TYPE_CHECKING:
    from tests.serving.server import Server

pytest_plugins = ["tests.serving.server"]

VIDEO = Case(75, 3, 1500, (("policy", "packcache"),))
"""It runs for a few seconds."""


# --------------------------------------------------------------------------- a process dies


@pytest.mark.timeout(900)
def test_clients_of_a_killed_engine_get_an_error_and_a_restart_serves_the_same(
    server: Server, alone: Callable[[Case], list[int]], catalogue: list[Case]
) -> None:
    for case in catalogue:
        alone(case)
    processes = server.processes()
    (engine,) = (process for process in processes if "EngineCore" in process.name())
    asking = server.asking(replace(VIDEO, max_tokens=15_000))

    async def whole(client: openai.AsyncOpenAI) -> None:
        await client.completions.create(**asking)

    async def streamed(client: openai.AsyncOpenAI, begun: asyncio.Event) -> None:
        async with await client.completions.create(**asking, stream=True) as stream:
            async for _ in stream:
                begun.set()

    async def kill() -> list[BaseException | None]:
        async with server.openai() as client:
            begun = [asyncio.Event() for _ in range(3)]
            clients = [*(streamed(client, event) for event in begun), *(whole(client) for _ in range(3))]
            answers = asyncio.gather(*clients, return_exceptions=True)
            async with asyncio.timeout(120):
                for event in begun:
                    await event.wait()
            engine.kill()
            async with asyncio.timeout(120):
                return await answers

    for error in asyncio.run(kill()):
        assert isinstance(error, openai.APIError), error
    assert not server.healthy()
    _, orphans = psutil.wait_procs(processes, timeout=60)
    assert not orphans
    with pytest.raises(ServerError, match=r"^the server died while it was used: a process of it ended[^\n]*$"):
        server.stop_for(httpx.ReadError("nobody answers"))
    server.start()
    for case in catalogue:
        assert server.tokens(case) == alone(case)


# --------------------------------------------------------------------------- requests that are no good

MALFORMED: list[tuple[dict[str, Any], str]] = [
    ({"grid": "abc"}, "packcache_grid: input should be a valid array, not 'abc'"),
    ({"grid": [0, 0]}, "packcache_grid must have at least one row"),
    ({"grid": [5, -9]}, "packcache_grid must have at least one row"),
    ({"grid": [5]}, "packcache_grid"),
    ({"grid": [[5, 9], 2]}, "packcache_grid"),
    ({"grid": {"rows": {"rows": [5]}}}, "packcache_grid"),
    ({"grid": ["5", "9"]}, "packcache_grid: item 1"),
    ({"grid": [10**30, 10**30]}, "extra_args integers must be between"),
    ({"tokens_per_frame": 1.5}, "packcache_tokens_per_frame: input should be a valid integer"),
    ({"tokens_per_frame": 2**63}, "packcache_tokens_per_frame must be at most"),
    ({"window": 10**9}, "packcache_window must be 1 or more and at most"),
    ({"history_frames": float("nan")}, "packcache_history_frames must be above 0 and at most 1048576, not nan"),
    ({"history_frames": float("inf")}, "packcache_history_frames must be above 0 and at most 1048576, not inf"),
    ({"decay": None}, "packcache_decay"),
    ({"condition_tokens": -1}, "packcache_condition_tokens"),
    ({"policy": 5}, "packcache_policy"),
    ({"gird": [5, 9]}, "packcache_gird is no known option"),
    ({"": 1}, "packcache_ is no known option"),
]

BROKEN = [
    (b"{", "JSON decode error"),
    (b"\xff\xfe\x00", "error parsing the body"),
    (b"[1, 2]", "body"),
    (b'{"model": "m", "prompt": [1], "vllm_xargs": [1]}', "vllm_xargs"),
    (b'{"model": "m", "prompt": [1], "vllm_xargs": "packcache_grid"}', "vllm_xargs"),
    (b'{"model": "m", "prompt": [], "vllm_xargs": {"packcache_grid": [5, 9]}}', "at least one prompt"),
    (b'{"model": "m", "prompt": "", "vllm_xargs": {"packcache_grid": [5, 9]}}', "(parameter=prompt)"),
    (b'{"model": "m", "prompt": [[]], "vllm_xargs": {"packcache_grid": [5, 9]}}', "prompt"),
]
"""Bodies that are no request."""


@pytest.mark.timeout(600)
def test_malformed_requests_are_refused_while_a_video_is_streamed(
    server: Server, alone: Callable[[Case], list[int]]
) -> None:
    video = alone(VIDEO)
    bodies = [
        (json.dumps(server.body(Case(75, 3, 50, tuple(options.items())))).encode(), sentence)
        for options, sentence in MALFORMED
    ]

    async def refuse(begun: asyncio.Event) -> None:
        async with httpx.AsyncClient(base_url=server.client.base_url, timeout=120) as client:
            await begun.wait()
            for body, sentence in bodies + BROKEN:
                headers = {"Content-Type": "application/json"}
                answer = await client.post("/v1/completions", content=body, headers=headers)
                assert answer.status_code == 400, (body, answer.text)
                assert sentence in answer.text, body

    async def stream(client: openai.AsyncOpenAI, begun: asyncio.Event) -> list[int]:
        tokens: list[int] = []
        async with await client.completions.create(**server.asking(VIDEO), stream=True) as chunks:
            async for chunk in chunks:
                begun.set()
                tokens += chunk.choices[0].token_ids
        return tokens

    async def both() -> None:
        begun = asyncio.Event()
        async with server.openai() as client, asyncio.TaskGroup() as tasks:
            refusing = tasks.create_task(refuse(begun))
            while not refusing.done():
                assert await stream(client, begun) == video

    asyncio.run(both())


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        (Case(75, 3, 50, (("grid", (100_000, 100_000)),)), "packcache_grid of 100000 x 100000 makes frames of"),
        # Of a window of 2 frames and the one being made the model would need three times 3,600 positions.
        (Case(75, 3, 15_000, (("grid", (60, 60)),)), "positions, and the model has 8192: lower packcache_window"),
        # They would take 85 blocks, of which the server has 39.
        (Case(75, 3, 5_000, (("grid", (30, 30)),)), "blocks of 32 tokens, and the KV cache has 39: let the policy"),
        (Case(1500, 3, 50, (("policy", "packcache"),)), "blocks of 32 tokens, and the KV cache has 39: let the policy"),
        (Case(1300, 3, 50, ()), "the prompt has 1300 tokens, and the KV cache has room for 1248"),
    ],
    ids=["numbers", "positions", "frames", "condition", "text"],
)
def test_what_is_too_large_is_refused(
    server: Server, alone: Callable[[Case], list[int]], catalogue: list[Case], case: Case, sentence: str
) -> None:
    answer = server.client.post("/v1/completions", json=server.body(case))
    assert answer.status_code == 400, answer.text
    assert sentence in answer.json()["error"]["message"]
    assert server.tokens(catalogue[2]) == alone(catalogue[2])


# --------------------------------------------------------------------------- a thousand clients

CONNECTIONS = 1000
FEW = 4


@pytest.mark.timeout(600)
def test_a_thousand_connections_are_all_answered(
    server: Server, alone: Callable[[Case], list[int]], catalogue: list[Case]
) -> None:
    few = [(replace(case, max_tokens=FEW), alone(case)[:FEW]) for case in catalogue]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 2 * CONNECTIONS:
        resource.setrlimit(resource.RLIMIT_NOFILE, (2 * CONNECTIONS, hard))

    async def come() -> list[httpx.Response]:
        all_connected = asyncio.Barrier(CONNECTIONS)

        async def wait_for_the_others(event: str, info: dict[str, Any]) -> None:
            if event == "connection.connect_tcp.complete":
                await all_connected.wait()

        async def ask(client: httpx.AsyncClient, case: Case) -> httpx.Response:
            return await client.post(
                "/v1/completions", json=server.body(case), extensions={"trace": wait_for_the_others}
            )

        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.client.base_url, timeout=120, limits=limits) as client:
            return await asyncio.gather(*(ask(client, few[i % len(few)][0]) for i in range(CONNECTIONS)))

    for i, answer in enumerate(asyncio.run(come())):
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["token_ids"] == few[i % len(few)][1], few[i % len(few)][0]
    assert server.healthy()


# --------------------------------------------------------------------------- files that are no good


def test_a_file_that_cannot_be_read_stops_the_command_before_the_model_loads(
    tmp_path: Path, vllm_command: Callable[..., tuple[Any, str]]
) -> None:
    (tmp_path / "binary").write_bytes(b"window: \xff\xfe\n")
    files = {
        tmp_path / "deleted": "is neither a file nor a preset",
        tmp_path: "is neither a file nor a preset",
        tmp_path / "binary": "cannot be read: byte 8 is no UTF-8: save it as text in UTF-8",
        # Nobody can read it here, not even root.
        Path("/proc/self/mem"): "cannot be read: Input/output error",
    }
    # If it came to the model, it would complain of that.
    arguments = ["serve", str(tmp_path / "no model"), "--kv-cache-policy", "packcache", "--kv-cache-policy-config"]
    for file, says in files.items():
        status, output = vllm_command(*arguments, str(file))
        assert status == 2, output
        sentence = output.splitlines()[-1]
        assert "argument --kv-cache-policy-config: " in sentence
        assert shown_path(file) in sentence
        assert says in sentence
        assert "Traceback" not in output


@pytest.mark.timeout(600)
def test_a_file_that_is_deleted_later_is_not_missed(
    server: Server, alone: Callable[[Case], list[int]], catalogue: list[Case]
) -> None:
    assert not server.config_file.exists()
    # What they leave out, the file said.
    for case in catalogue:
        assert server.tokens(case) == alone(case)


# --------------------------------------------------------------------------- what nobody asked for


def test_without_a_store_there_are_no_videos(server: Server) -> None:
    """Not a route, and not a word in the log."""
    for path in ("/v1/videos", "/v1/playground", "/playground"):
        assert server.client.get(path).status_code == 404, path
    lines = server.log.read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if "WARNING" in line and re.search("packcache|endpoint.plugin", line, re.I)]
