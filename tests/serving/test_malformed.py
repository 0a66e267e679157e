"""Requests at random, most of them wrong: each is refused or served as it says, and videos beside them are whole."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.serving import malformed
from tests.serving.conftest import prompt
from tests.serving.malformed import GENERATE, Requests, send
from tests.serving.test_masked_tokens import BLOCK, CANVAS, CONTINUED, IMAGE_TO_VIDEO, TEXT_TO_VIDEO
from tests.serving.test_masked_tokens import CONFIG as MASKED_CONFIG
from tests.serving.test_masked_tokens import lumos_model as lumos_model
from tests.serving.test_schedules import Case
from vllm_packcache.serving import server as demo_server
from vllm_packcache.serving.server import serving

if TYPE_CHECKING:
    from tests.serving.server import Server

pytest_plugins = ["tests.serving.server"]

FRAME = 45
TOKENS = ("/v1/completions", "/v1/completions", "/v1/completions", GENERATE)
TEXTS = ("/v1/chat/completions", "/v1/chat/completions/batch", "/v1/responses", "/v1/messages")
VIDEO = Case(75, 3, 400, (("condition_tokens", 75),))
LONG = 400
"""Requests to each server of the long form."""


@asynccontextmanager
async def video_beside(client: httpx.AsyncClient, body: dict[str, Any], tokens: list[int]) -> AsyncIterator[None]:
    """Ask for a video again and again; every one must have these tokens."""
    asked = 0

    async def ask() -> None:
        nonlocal asked
        while True:
            answer = await client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"][0]["token_ids"] == tokens
            asked += 1

    task = asyncio.create_task(ask())
    try:
        yield
        while not asked and not task.done():
            await asyncio.sleep(0.1)
    finally:
        task.cancel()
        ended = (await asyncio.gather(task, return_exceptions=True))[0]
    assert isinstance(ended, asyncio.CancelledError), ended


def run(url: httpx.URL | str, requests: Requests, count: int, body: dict[str, Any], tokens: list[int]) -> Counter[str]:
    async def all_of_them() -> Counter[str]:
        async with httpx.AsyncClient(base_url=url, timeout=120) as client, video_beside(client, body, tokens):
            return await send(client, requests, count)

    return asyncio.run(all_of_them())


@pytest.mark.timeout(600)
def test_requests_at_random(server: Server, alone: Callable[[Case], list[int]]) -> None:
    requests = Requests(1, [prompt(FRAME), prompt(70)], FRAME, is_masked=False, endpoints=TOKENS)
    ended = run(server.client.base_url, requests, 100, server.body(VIDEO), alone(VIDEO))
    assert ended["served"] > 10
    assert ended["refused"] > 40
    assert server.healthy()


@pytest.mark.long
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("api_servers", [1, 2])
def test_many_requests_at_random(api_servers: int, tmp_path: Path) -> None:
    """On the bundled model, which has a tokenizer: on every endpoint that takes options."""
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0]['content'] }}")
    config = {"window": 2, "history_frames": 1.5, "layout": {"tokens_per_frame": FRAME}}
    arguments = [
        *("--kv-cache-policy", "packcache", "--kv-cache-policy-config", json.dumps(config), "--dtype", "float32"),
        *("--served-model-name", "m", "--enforce-eager", "--max-model-len", "4000", "--block-size", "32"),
        *("--num-gpu-blocks-override", "200", "--api-server-count", str(api_servers), "--chat-template", str(template)),
        "--enable-scale-out",
    ]
    model = Path(demo_server.__file__).parent / "model"
    body = {
        "model": "m", "prompt": prompt(75, seed=3), "temperature": 0, "return_token_ids": True,
        "vllm_xargs": {"packcache_frames": 10},
    }  # fmt: skip
    with serving(model, arguments, tmp_path / "log", lambda line: None) as url:
        tokens = httpx.post(f"{url}/v1/completions", json=body, timeout=120).json()["choices"][0]["token_ids"]
        assert len(tokens) == 10 * FRAME
        requests = Requests(
            api_servers, [prompt(FRAME), prompt(70)], FRAME, is_masked=False, endpoints=(*TOKENS, *TEXTS)
        )
        ended = run(url, requests, LONG, body, tokens)
        print(f"{api_servers} API servers: {dict(ended)}")
        assert httpx.get(f"{url}/health", timeout=60).status_code == 200


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_many_requests_at_random_to_a_masked_model(lumos_model: Path, tmp_path: Path) -> None:
    arguments = [
        *("--kv-cache-policy", "packcache", "--kv-cache-policy-config", json.dumps(MASKED_CONFIG)),
        *("--block-size", str(BLOCK), "--dtype", "float32", "--skip-tokenizer-init", "--served-model-name", "m"),
        "--enable-scale-out",
    ]
    body = {
        "model": "m", "prompt": IMAGE_TO_VIDEO.ids, "return_token_ids": True, "vllm_xargs": IMAGE_TO_VIDEO.extra_args
    }  # fmt: skip
    with serving(lumos_model, arguments, tmp_path / "log", lambda line: None, interpreted=True) as url:
        tokens = httpx.post(f"{url}/v1/completions", json=body, timeout=300).json()["choices"][0]["token_ids"]
        assert len(tokens) == 5 * CANVAS
        cases = [case for case in (TEXT_TO_VIDEO, IMAGE_TO_VIDEO, CONTINUED) if case.grid == (4, 6)]
        requests = Requests(3, [case.ids for case in cases], CANVAS, is_masked=True, endpoints=TOKENS)
        ended = run(url, requests, LONG, body, tokens)
        print(f"masked: {dict(ended)}")
        assert httpx.get(f"{url}/health", timeout=60).status_code == 200


def test_the_requests_are_of_every_kind() -> None:
    requests = Requests(1, [[1]], FRAME, is_masked=False, endpoints=(*TOKENS, *TEXTS))
    made = [next(requests) for _ in range(1000)]
    assert {request.path for request in made} == {*TOKENS, *TEXTS}
    assert 200 < sum(not request.must_refuse for request in made) < 700
    assert any(request.tokens is not None for request in made)
    assert len({request.body for request in made}) > 800
    assert malformed.CAUSAL.keys() ^ malformed.MASKED.keys()
