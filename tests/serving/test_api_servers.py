"""Several API servers and engines: processes that read the command line before they have a plugin."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serving.conftest import prompt
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.serving.server import free_port, serving

CONFIG = {"layout": {"grid": [6, 11], "frame_start_tokens": 1}, "window": 2, "history_frames": 1.5}
BLOCK, POOL_BLOCKS = 32, 40
TOKENS = 4 * 67
"""Of a video: it drops what is old."""
ASKED = 5
"""Requests of each kind, every one over a connection of its own: enough for each API server to get one."""


TWO_NODES = ("--data-parallel-size", "2", "--data-parallel-size-local", "1", "--data-parallel-address", "127.0.0.1")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("--data-parallel-size", "2"), id="two engines with an API server each"),
        pytest.param(("--api-server-count", "2"), id="two API servers", marks=pytest.mark.long),
        pytest.param(TWO_NODES, id="an engine on a node of its own", marks=pytest.mark.long),
    ],
)
def url(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a server whose policy is given with flags."""
    arguments = [
        "--kv-cache-policy", "packcache", "--kv-cache-policy-config", json.dumps(CONFIG), *request.param,
        "--num-gpu-blocks-override", str(POOL_BLOCKS), "--block-size", str(BLOCK), "--max-model-len", "20000",
        "--skip-tokenizer-init", "--served-model-name", "m", "--dtype", "float32", "--enforce-eager",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch, ExitStack() as running:
        # Two engines, a core each.
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        folder = tmp_path_factory.mktemp("servers")
        if request.param == TWO_NODES:
            arguments += ["--data-parallel-rpc-port", str(free_port())]
            running.enter_context(second_node(checkpoint, arguments, folder / "second node"))
        yield running.enter_context(serving(checkpoint, arguments, folder / "log", lambda line: None))


@contextmanager
def second_node(checkpoint: Path, arguments: list[str], log: Path) -> Iterator[None]:
    """One that has an engine and no API server; it waits for the first."""
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(checkpoint), *arguments),
        *("--headless", "--data-parallel-start-rank", "1"),
    ]
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            yield
        finally:
            process.terminate()


def ask(url: str, ids: list[int], max_tokens: int, **options: Any) -> list[httpx.Response]:
    """The same request several times at once."""
    xargs = {f"packcache_{name}": value for name, value in options.items()}
    body = {
        "model": "m", "prompt": ids, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True,
        "return_token_ids": True, "vllm_xargs": xargs,
    }  # fmt: skip
    with ThreadPoolExecutor(ASKED) as pool:
        return list(pool.map(lambda _: httpx.post(f"{url}/v1/completions", json=body, timeout=300), range(ASKED)))


@pytest.mark.timeout(900)
def test_a_flag_is_known_to_all_of_them(url: str, reference: Any) -> None:
    ids = prompt(70, seed=11)
    plan = ServerConfig.parse("packcache", CONFIG).plan({"packcache_policy": "packcache"}, len(ids))
    expected = reference.generate(ids, TOKENS, plan, BLOCK).token_ids

    def check_video() -> None:
        for answer in ask(url, ids, TOKENS, policy="packcache"):
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"][0]["token_ids"] == expected

    check_video()
    for refused, sentence in (
        (ask(url, ids, 5, nonsense=1), "packcache_nonsense is no known option"),
        # Frames of 1,400 tokens are 44 blocks of 32.
        (ask(url, ids, 5000, tokens_per_frame=1400), "and the KV cache has 39: let the policy keep less"),
    ):
        for answer in refused:
            assert answer.status_code == 400, answer.text
            assert sentence in answer.json()["error"]["message"]
    check_video()
    for _ in range(ASKED):
        metrics = httpx.get(f"{url}/metrics", timeout=60).text
        assert "vllm:packcache_slides_total{" in metrics
