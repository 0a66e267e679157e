"""A real server over HTTP: the flag, a video request, bad requests, and a server that goes on."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serving.conftest import PAPERS, prompt
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.serving.server import serving

# With the rule of the paper 500 tokens of these frames slide the window.
CONFIG = {"layout": {"grid": [6, 11], "frame_start_tokens": 1}, **PAPERS}
SERVER = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "WARNING"}


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of ``vllm serve CHECKPOINT --kv-cache-policy packcache``."""
    arguments = [
        "--kv-cache-policy", "packcache", "--kv-cache-policy-config", json.dumps(CONFIG), "--skip-tokenizer-init",
        "--served-model-name", "m", "--dtype", "float32", "--enforce-eager", "--max-model-len", "20000",
        "--block-size", "32",
    ]  # fmt: skip
    log = tmp_path_factory.mktemp("server") / "log"
    with (
        serving(checkpoint, arguments, log, lambda line: None, environment=SERVER) as url,
        httpx.Client(base_url=url, timeout=120) as client,
    ):
        yield client


def complete(client: httpx.Client, ids: list[int], max_tokens: int | None, **options: Any) -> httpx.Response:
    xargs = {f"packcache_{name}": value for name, value in options.items()}
    body = {
        "model": "m", "prompt": ids, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True,
        "return_token_ids": True, "vllm_xargs": xargs or None,
    }  # fmt: skip
    return client.post("/v1/completions", json=body)


def tokens(response: httpx.Response) -> list[int]:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["token_ids"]


def test_video_over_http_equals_reference(server: httpx.Client, reference: Any) -> None:
    ids = prompt(70, seed=11)
    config = ServerConfig.parse("packcache", CONFIG)
    requests: list[dict[str, Any]] = [
        {"grid": [6, 11]},
        {"grid": [5, 9]},
        {"tokens_per_frame": 40, "window": 2, "history_frames": 1.5},
        {"policy": "packcache", "condition_tokens": 50},
    ]
    for options in requests:
        extra = {f"packcache_{name}": value for name, value in options.items()}
        reference.check(ids, tokens(complete(server, ids, 500, **options)), 500, config.plan(extra, len(ids)))


def test_frames_say_how_long_a_video_is(server: httpx.Client) -> None:
    ids = prompt(70, seed=11)
    by_tokens = tokens(complete(server, ids, 3 * 46, grid=[5, 9]))
    assert tokens(complete(server, ids, None, grid=[5, 9], frames=3)) == by_tokens
    # Nobody says: it is one frame of the server's.
    assert len(tokens(complete(server, ids, None, policy="packcache"))) == 67
    # 20 tokens of it are given.
    assert len(tokens(complete(server, ids, None, condition_tokens=50, frames=2))) == 2 * 67 - 20


def test_300_frames_over_http_equal_the_reference(server: httpx.Client, reference: Any) -> None:
    frame, frames = 8, 300
    ids = prompt(30, seed=15)
    made = tokens(complete(server, ids, frames * frame, tokens_per_frame=frame))
    plan = ServerConfig.parse("packcache", CONFIG).plan({"packcache_tokens_per_frame": frame}, len(ids))
    reference.check(ids, made, frames * frame, plan)
    assert reference.differs(ids, made)


def test_text_over_http_equals_reference(server: httpx.Client, reference: Any) -> None:
    ids = prompt(70, seed=12)
    expected = tokens(complete(server, ids, 300))
    reference.check(ids, expected, 300)
    assert tokens(complete(server, ids, 300, grid=[6, 11], policy="full")) == expected


def test_only_a_video_may_be_longer_than_the_model_has_positions(server: httpx.Client) -> None:
    positions = 8192
    ids = prompt(positions - 92, seed=13)
    video = complete(server, ids, 300, grid=[6, 11], condition_tokens=70)
    assert len(tokens(video)) == 300
    text = complete(server, ids, 300)
    assert len(tokens(text)) == 92
    assert text.json()["choices"][0]["finish_reason"] == "length"
    refused = complete(server, prompt(positions), 5)
    assert refused.status_code == 400
    assert "the model has 8192 positions" in refused.json()["error"]["message"]
    window = complete(server, prompt(70), 12_000, grid=[40, 50])
    assert window.status_code == 400
    assert "this video needs 10075 positions" in window.json()["error"]["message"]


def test_metrics_reach_the_process_that_serves_them(server: httpx.Client) -> None:
    def shown() -> dict[str, float]:
        # Names, labels and values of ours.
        found = re.findall(r"^vllm:packcache_(\w+)\{(.*)\} (\S+)$", server.get("/metrics").text, re.MULTILINE)
        assert all('model_name="m"' in labels and 'engine="0"' in labels for _, labels, _ in found)
        return {name: float(value) for name, _, value in found}

    before = shown()
    assert len(tokens(complete(server, prompt(70, seed=14), 500, grid=[6, 11]))) == 500
    deadline = time.monotonic() + 60
    # Statistics follow the answer.
    while (after := shown())["slides_total"] == before["slides_total"]:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert after["freed_blocks_total"] > before["freed_blocks_total"]
    assert after["rotated_blocks_total"] > before["rotated_blocks_total"]


BAD_REQUESTS = [
    ({"grid": [6]}, "packcache_grid"),
    ({"grid": [6, 0]}, "grid must have at least one row"),
    ({"grid": [6, 11], "tokens_per_frame": 3}, "tokens_per_frame is 3"),
    ({"window": 0}, "packcache_window must be 1 or more"),
    ({"window": "four"}, "packcache_window"),
    ({"history_frames": -1}, "packcache_history_frames must be above 0"),
    ({"condition_tokens": 71}, "packcache_condition_tokens is 71, but the prompt has 70 tokens"),
    ({"policy": "sliding_window"}, "packcache_policy must be 'packcache'"),
    ({"gird": [6, 11]}, "packcache_gird is no known option"),
]


@pytest.mark.parametrize(("options", "sentence"), BAD_REQUESTS)
def test_bad_request_is_refused_and_hurts_nobody(server: httpx.Client, options: dict[str, Any], sentence: str) -> None:
    response = complete(server, prompt(70), 10, **options)
    assert response.status_code == 400, response.text
    assert sentence in response.json()["error"]["message"]
    assert len(tokens(complete(server, prompt(70), 5, grid=[6, 11]))) == 5


@pytest.mark.parametrize("flag", ["--help", "--help=kv-cache-policy"])
def test_flag_is_shown_in_help(flag: str, vllm_command: Callable[..., tuple[Any, str]]) -> None:
    status, shown = vllm_command("serve", flag)
    assert status in (0, None)
    assert "--kv-cache-policy" in shown
    assert "--kv-cache-policy-config" in shown


def test_unknown_policy_stops_the_command_early(checkpoint: Path, vllm_command: Callable[..., tuple[Any, str]]) -> None:
    status, said = vllm_command("serve", str(checkpoint), "--kv-cache-policy", "nope")
    assert status == 2
    assert "--kv-cache-policy: invalid choice: 'nope'" in said
