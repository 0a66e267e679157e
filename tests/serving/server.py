"""A real server for the soak and the faults: one for both, started with the first test that uses it.

A pytest plugin: a test module that names it in ``pytest_plugins`` has its fixtures.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from openai import AsyncOpenAI
from prometheus_client.parser import text_string_to_metric_families

from tests.serving.test_schedules import Case
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.serving.server import serving

BLOCK = 32
POOL_BLOCKS = 40
MAX_MODEL_LEN = 20_000
CONFIG = {"window": 2, "history_frames": 1.5, "layout": {"tokens_per_frame": 45}}
ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "INFO",
    # torch keeps a kernel for every size of a batch, 1,024 at most: some minutes of load, and 100 MiB, until memory is
    # flat without any leak. With few of them it is after seconds.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16",
}

_CATALOGUE = [
    Case(130, 1, 60, ()),
    Case(200, 2, 200, ()),
    Case(75, 3, 400, (("condition_tokens", 75),)),
    Case(75, 3, 200, (("grid", (5, 9)), ("policy", "packcache"))),
    Case(40, 4, 300, (("tokens_per_frame", 19),)),
    Case(130, 1, 300, (("tokens_per_frame", 67), ("window", 1), ("history_frames", 1))),
    Case(300, 5, 200, (("condition_tokens", 33), ("tokens_per_frame", 96))),
    Case(75, 7, 200, (("policy", "full"),)),
]


class Server:
    """``vllm serve --kv-cache-policy packcache`` with a pool that is too small for many requests at a time.

    Args:
        checkpoint: the model.
        folder: for its files.
    """

    def __init__(self, checkpoint: Path, folder: Path) -> None:
        self.log = folder / "server.log"
        self.config_file = folder / "config.yaml"
        self._checkpoint = checkpoint
        self._running = ExitStack()
        self._process: psutil.Process | None = None

    def start(self) -> None:
        """Start it, or another one in its place. The configuration's file is gone as soon as it serves."""
        self.stop()
        self.config_file.write_text(json.dumps(CONFIG), encoding="utf-8")
        arguments = [
            "--kv-cache-policy", "packcache", "--kv-cache-policy-config", str(self.config_file),
            "--num-gpu-blocks-override", str(POOL_BLOCKS), "--block-size", str(BLOCK),
            "--max-model-len", str(MAX_MODEL_LEN), "--max-num-batched-tokens", "128", "--max-num-seqs", "16",
            "--skip-tokenizer-init", "--served-model-name", "m", "--dtype", "float32", "--enforce-eager",
            "--enable-scale-out",
        ]  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            for name, value in ENVIRONMENT.items():
                patch.setenv(name, value)
            url = self._running.enter_context(serving(self._checkpoint, arguments, self.log, lambda line: None))
        self.client = self._running.enter_context(httpx.Client(base_url=url, timeout=120))
        (self._process,) = (
            child for child in psutil.Process().children() if url.rpartition(":")[2] in _command_of(child)
        )
        self.config_file.unlink()

    def stop(self) -> None:
        """Stop it and all its processes."""
        self._running.close()
        self._process = None

    def stop_for(self, error: Exception) -> None:
        """The same with what a client of it has met.

        Raises:
            ServerError: what the server died of.
        """
        running, self._running, self._process = self._running, ExitStack(), None
        running.__exit__(type(error), error, None)

    def healthy(self) -> bool:
        """Whether it says so; a server that does not answer does not."""
        try:
            return self._process is not None and self.client.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    def openai(self) -> AsyncOpenAI:
        """A client. It asks once: what goes wrong is not tried again."""
        return AsyncOpenAI(base_url=f"{self.client.base_url}/v1", api_key="none", max_retries=0, timeout=120)

    @staticmethod
    def body(case: Case) -> dict[str, Any]:
        """What is sent to ask for a completion of a case."""
        return {
            "model": "m",
            "prompt": case.ids,
            "max_tokens": case.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            "vllm_xargs": {f"packcache_{name}": value for name, value in case.options} or None,
        }

    @classmethod
    def asking(cls, case: Case) -> dict[str, Any]:
        """The same for a client of `openai`, which takes by name what OpenAI knows."""
        return {"model": "m", "prompt": case.ids, "extra_body": cls.body(case)}

    def tokens(self, case: Case) -> list[int]:
        """What a case generates."""
        answer = self.client.post("/v1/completions", json=self.body(case))
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["token_ids"]

    def processes(self) -> list[psutil.Process]:
        """The server's process first, then those it has started."""
        assert self._process is not None
        return [self._process, *self._process.children(recursive=True)]

    def metrics(self) -> dict[str, float]:
        """What ``/metrics`` shows, by name: the sum over labels."""
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(self.client.get("/metrics").text):
            for sample in family.samples:
                found[sample.name] = found.get(sample.name, 0) + sample.value
        return found


def _command_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.fixture(scope="session")
def _server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(checkpoint, tmp_path_factory.mktemp("server"))
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture
def server(_server: Server) -> Server:
    """The server, started again if a test has left it broken."""
    if not _server.healthy():
        _server.start()
    return _server


@pytest.fixture(scope="session")
def catalogue() -> list[Case]:
    """Text and videos: few, so that what each generates alone is soon known; some have common prefixes."""
    return _CATALOGUE


@pytest.fixture(scope="session")
def alone(_server: Server, reference: Any) -> Callable[[Case], list[int]]:
    """What the server generates for a case when it does nothing else.

    It is what the reference generates, and not by a hair: company changes the order in which numbers are added up, and
    where two tokens are all but equal that decides.
    """

    server = ServerConfig.parse("packcache", CONFIG)

    @cache
    def answer(case: Case, ids: tuple[int, ...]) -> list[int]:
        tokens = _server.tokens(case)
        reference.check(ids, tokens, case.max_tokens, server.plan(_server.body(case)["vllm_xargs"], len(ids)))
        return tokens

    return lambda case: answer(case, tuple(case.ids))
