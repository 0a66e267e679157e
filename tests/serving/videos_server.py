"""A real server for videos over HTTP, which makes token ids: one for all tests of it, on one store whatever dies.

A pytest plugin: a test module that names it in ``pytest_plugins`` has its fixtures.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.serving.video_clients import GRID, ROOT, SLOTS, Case, client_of, completion
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.serving.server import serving
from vllm_packcache.videos.store import Job, Store

CONFIG = {"window": 2, "history_frames": 1.5, "layout": {"grid": GRID}}
POOL_BLOCKS = 20
"""Too few for some of `CASES` at once."""
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
    # A client of one of several servers stays with it.
    "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "3600",
    # As in `tests.serving.server`: memory is flat after some seconds, not minutes.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16",
}


class VideoServer:
    """``vllm serve`` with ``--video-store``, and with no tokenizer: prompts and videos are token ids.

    Args:
        checkpoint: the model.
        folder: for its files.
    """

    def __init__(self, checkpoint: Path, folder: Path) -> None:
        self.log, self.folder = folder / "server.log", folder / "store"
        self.api_servers = 0
        self._checkpoint = checkpoint
        self._running = ExitStack()
        self._process: psutil.Process | None = None

    def start(self, api_servers: int = 1) -> None:
        """Start it, or another one in its place, on the same store."""
        self.stop()
        self.api_servers = api_servers
        arguments = [
            "--kv-cache-policy", "packcache", "--kv-cache-policy-config", json.dumps(CONFIG),
            "--video-store", str(self.folder), "--api-key", "secret", "--root-path", ROOT,
            "--api-server-count", str(api_servers), "--num-gpu-blocks-override", str(POOL_BLOCKS),
            "--block-size", "32", "--max-model-len", "20000", "--max-num-batched-tokens", "128",
            "--max-num-seqs", str(SLOTS), "--skip-tokenizer-init", "--served-model-name", "m", "--dtype", "float32",
            "--enforce-eager",
        ]  # fmt: skip
        others = set(psutil.Process().children())
        self.url = self._running.enter_context(
            serving(self._checkpoint, arguments, self.log, lambda line: None, environment=ENVIRONMENT)
        )
        (self._process,) = set(psutil.Process().children()) - others
        self.client = self._running.enter_context(client_of(self.url))

    def stop(self) -> None:
        """Stop it and all its processes, as far as they live."""
        self._running.close()
        self._process = None

    def healthy(self) -> bool:
        """Whether it says so; a server that does not answer does not."""
        try:
            return self._process is not None and self.client.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    def processes(self) -> list[psutil.Process]:
        """The server's process first, then those it has started."""
        assert self._process is not None
        return [self._process, *self._process.children(recursive=True)]

    def engine(self) -> psutil.Process:
        """The process of its engine core."""
        (engine,) = (process for process in self.processes() if "EngineCore" in process.name())
        return engine

    def client_of_each(self, count: int) -> dict[int, httpx.Client]:
        """A client of each of its API servers, by process; whoever of them has time takes a connection."""
        found: dict[int, httpx.Client] = {}
        port = int(self.url.rpartition(":")[2])
        for _ in range(100):
            clients = [self._running.enter_context(client_of(self.url)) for _ in range(4 * count)]
            with ThreadPoolExecutor(len(clients)) as threads:
                ports = list(threads.map(_port_of, clients))
            for process in self.processes():
                mine = {
                    own.raddr.port for own in process.net_connections("tcp") if own.raddr and own.laddr.port == port
                }
                for client, own in zip(clients, ports, strict=True):
                    if own in mine:
                        found.setdefault(process.pid, client)
            for client in set(clients) - set(found.values()):
                client.close()
            if len(found) == count:
                return found
        raise AssertionError(f"of {count} API servers only {list(found)} answer")

    def metrics(self) -> dict[str, float]:
        """What ``/metrics`` shows, by name: the sum over labels."""
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(self.client.get("/metrics").text):
            for sample in family.samples:
                found[sample.name] = found.get(sample.name, 0) + sample.value
        return found

    def wait_until_empty(self) -> None:
        """Nothing runs or waits in the engine."""
        names = ["vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:packcache_videos"]
        while True:
            # Statistics come with a step, and there is none after the last request has gone.
            completion(self.client, [1, 2, 3], 2)
            shown = self.metrics()
            if not any(shown[name] for name in names):
                return

    def kept(self) -> list[Job]:
        """All rows of the store, the oldest first."""
        with closing(Store(self.folder, expire_seconds=None, quota_bytes=None)) as store:
            jobs, more = store.list(after=None, limit=10**6, order="asc")
        assert not more
        return jobs

    def folders(self) -> set[str]:
        """Names of all folders that videos have."""
        return set(os.listdir(self.folder / "videos"))


def _port_of(client: httpx.Client) -> int:
    answer = client.get("/version")
    connection: socket.socket = answer.extensions["network_stream"].get_extra_info("socket")
    return connection.getsockname()[1]


# Fixtures.


@pytest.fixture(scope="session")
def _videos(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VideoServer]:
    server = VideoServer(checkpoint, tmp_path_factory.mktemp("videos"))
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture
def videos(_videos: VideoServer) -> Iterator[VideoServer]:
    """The server, started again if a test has left it broken; what a test leaves behind is deleted."""
    if not _videos.healthy():
        _videos.start()
    yield _videos
    if _videos.healthy():
        for job in _videos.kept():
            _videos.client.delete(f"/v1/videos/{job.id}")


@pytest.fixture(scope="session")
def expected(reference: Any) -> Callable[[Case], list[int]]:
    """Ids of a case as the reference makes them, and not by a hair: see `tests.margins`."""
    config = ServerConfig.parse("packcache", json.loads(json.dumps(CONFIG)))

    @cache
    def answer(ids: tuple[int, ...], tokens: int, options: str) -> list[int]:
        own = {f"packcache_{name}": value for name, value in json.loads(options).items()}
        plan = config.plan({"packcache_condition_tokens": len(ids), **own}, len(ids))
        return reference.generate(list(ids), tokens, plan, 32).token_ids

    return lambda case: answer(tuple(case.ids), case.frames * case.frame, json.dumps(dict(case.options)))
