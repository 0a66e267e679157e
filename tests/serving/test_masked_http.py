"""A masked model over HTTP: ``vllm serve PATH --kv-cache-policy packcache``, and requests beside each other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serving.test_masked_tokens import BLOCK, CANVAS, CONFIG, CONTINUED, IMAGE_TO_VIDEO, TEXT_TO_VIDEO, Case
from tests.serving.test_masked_tokens import lumos_model as lumos_model
from tests.serving.test_masked_tokens import oracle as oracle
from vllm_packcache.families import lumos
from vllm_packcache.serving.server import serving, tokens_in


@pytest.fixture(scope="module")
def client(lumos_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    arguments = [
        *("--kv-cache-policy", "packcache", "--kv-cache-policy-config", json.dumps(CONFIG)),
        *("--block-size", str(BLOCK), "--dtype", "float32", "--skip-tokenizer-init", "--served-model-name", "m"),
    ]
    log = tmp_path_factory.mktemp("server") / "server.log"
    with (
        pytest.MonkeyPatch.context() as patch,
        serving(lumos_model, arguments, log, lambda line: None, interpreted=True) as url,
        httpx.Client(base_url=url, timeout=300) as client,
    ):
        patch.setenv("VLLM_LOGGING_LEVEL", "INFO")
        yield client


def body(case: Case, **changed: Any) -> dict[str, Any]:
    return {
        "model": "m",
        "prompt": case.ids,
        "stream": True,
        "return_token_ids": True,
        "vllm_xargs": case.extra_args,
        **changed,
    }


def frames(client: httpx.Client, case: Case) -> list[list[int]]:
    """What arrives at a time."""
    with client.stream("POST", "/v1/completions", json=body(case)) as response:
        assert response.status_code == 200, response.read()
        return [tokens for line in response.iter_lines() if (tokens := tokens_in(line))]


@pytest.mark.timeout(600)
def test_frames_arrive_one_by_one_and_are_those_of_the_published_loop(client: httpx.Client, oracle: Any) -> None:
    cases = [TEXT_TO_VIDEO, IMAGE_TO_VIDEO, CONTINUED]
    with ThreadPoolExecutor(len(cases)) as pool:
        arrived = list(pool.map(lambda case: frames(client, case), cases))
    for case, own in zip(cases, arrived, strict=True):
        assert list(chain.from_iterable(own)) == oracle(case)
        frame = lumos.frame_layout(case.grid).tokens_per_frame
        # What a busy client has not fetched yet comes together, but never part of a frame.
        assert len(own) > 1
        assert all(len(tokens) % frame == 0 for tokens in own)
    # The window holds two frames before the one that is made; the video that is continued has two that are given.
    slides = sum(max(0, frames - 3) for frames in (6, 5, 2 + 5))
    assert f'vllm:packcache_slides_total{{engine="0",model_name="m"}} {slides:.1f}' in client.get("/metrics").text


@pytest.mark.parametrize(
    ("options", "changed", "sentence"),
    [
        ({"steps": 0}, {}, "packcache_steps must be 1 or more"),
        ({"frames": 10_000}, {}, "fewer frames"),
        ({"seed": 2**64 - 1}, {"n": 2}, "count up from packcache_seed"),
        ({}, {"prompt": [5, 6, 7]}, "has no video begin"),
        ({}, {"logprobs": 1}, "logprobs is not for videos"),
        ({}, {"stop": "end"}, "stop is not for videos"),
        ({}, {"temperature": 0.5}, "temperature"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_with_400(
    client: httpx.Client, options: dict[str, Any], changed: dict[str, Any], sentence: str
) -> None:
    answer = client.post("/v1/completions", json=body(IMAGE_TO_VIDEO.having(**options), stream=False, **changed))
    assert answer.status_code == 400, answer.text
    assert sentence in answer.json()["error"]["message"]


def test_several_videos_of_one_request(client: httpx.Client, oracle: Any) -> None:
    answer = client.post("/v1/completions", json=body(IMAGE_TO_VIDEO, stream=False, n=2))
    seed = dict(IMAGE_TO_VIDEO.options)["seed"]
    expected = [oracle(IMAGE_TO_VIDEO.having(seed=seed + index)) for index in range(2)]
    assert [choice["token_ids"] for choice in answer.json()["choices"]] == expected


def test_max_tokens_will_do_for_frames(client: httpx.Client, oracle: Any) -> None:
    case = IMAGE_TO_VIDEO
    options = {name: value for name, value in case.extra_args.items() if name != "packcache_frames"}
    answer = client.post("/v1/completions", json=body(case, stream=False, vllm_xargs=options, max_tokens=2 * CANVAS))
    assert answer.json()["choices"][0]["token_ids"] == oracle(case)[: 2 * CANVAS]
