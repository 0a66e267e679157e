"""A ``vllm serve`` of our own: started, waited for, and always stopped."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import httpx
import psutil

from vllm_packcache.serving.log import cause, last_line, read


class ServerError(ChildProcessError):
    """The server did not come up or died, and the message says why; or it failed a request."""


def client_of(url: str, timeout: httpx.Timeout | float | None = 600) -> httpx.Client:
    """A client of a server. One on this machine is asked directly, whatever proxy the environment names.

    Raises:
        httpx.InvalidURL: the address is none.
    """
    return httpx.Client(base_url=url, timeout=timeout, trust_env=not on_this_machine(url))


def on_this_machine(url: str) -> bool:
    """Whether an address is of the loopback interface."""
    host = httpx.URL(url).host
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def error_message(answer: Any) -> str:
    """What an answer says that is an error.

    Raises:
        LookupError, TypeError: it is none.
    """
    error = answer["error"]
    return str(error["message"] if isinstance(error, dict) else error)


def tokens_in(line: str) -> list[int]:
    """Token ids in a line of a streamed completion, which was asked for with ``return_token_ids``; often none.

    Raises:
        ServerError: the server refused the request, which with a stream it says in the stream, or gave up on it.
    """
    data = line.removeprefix("data: ")
    if not data or data == "[DONE]":
        return []
    event = json.loads(data)
    if "error" in event:
        refused = isinstance(event["error"], dict) and event["error"].get("code") == 400
        raise ServerError(f"the server {'refused' if refused else 'gave up on'} the request: {error_message(event)}")
    return [token for choice in event["choices"] for token in choice.get("token_ids") or ()]


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def url_of(host: str, port: int) -> str:
    """By which this machine reaches a server that listens on an address, or on all of them."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextmanager
def serving(
    model: Path,
    arguments: list[str],
    log: Path,
    waiting: Callable[[str], None],
    timeout: float = 600,
    interpreted: bool = False,
    environment: Mapping[str, str] | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
) -> Iterator[str]:
    """Run ``vllm serve MODEL ARGUMENTS`` for as long as the context lasts.

    The server and all its processes are stopped when the context is left: normally, by an error, by Ctrl-C or by
    SIGTERM. A client inside that loses the server leaves with what the server died of.

    Args:
        model: folder of the model.
        arguments: flags besides model, host and port.
        log: file for the server's output; its folder must exist.
        waiting: called about twice a second with the newest line of the log until the server is healthy.
        timeout: seconds to wait for that.
        interpreted: run vLLM's Model Runner V2 by Triton's interpreter; see `vllm_packcache.tools.interpreted`.
        environment: variables to set besides those of this process.
        host: address that it listens on.
        port: that it listens on; None: any that is free.

    Yields:
        The base URL by which this machine reaches it, such as ``http://127.0.0.1:8000``.

    Raises:
        ServerError: the server stopped, was not healthy in time, or died.
    """
    port = free_port() if port is None else port
    command = [
        *(sys.executable, "-m", "vllm_packcache.tools.interpreted" if interpreted else "vllm.entrypoints.cli.main"),
        *("serve", str(model)),
        *("--host", host, "--port", str(port), *arguments),
    ]
    variables = {
        **os.environ,
        # Left alone, vLLM computes on one thread. The API server needs a core of its own to keep up.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) - 1))),
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }
    # It is of the user's other servers: who wants one of this server gives it.
    variables.pop("VLLM_API_KEY", None)
    variables.update(environment or {})
    with log.open("w", encoding="utf-8") as output, terminating_on_sigterm():
        # A session of its own: Ctrl-C reaches us alone, and we stop the whole group.
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=variables, start_new_session=True
        )
        try:
            url = url_of(host, port)
            _wait_for_health(process, url, log, waiting, timeout)
            try:
                yield url
            except (httpx.HTTPError, ServerError) as error:
                if _dead(process, url):
                    raise ServerError(f"the server died while it was used: {_reason(process, log)}") from error
                if isinstance(error, ServerError):
                    raise
                raise ServerError(f"a request failed: {error!r} (the server's log: {log})") from error
        finally:
            _stop(process)


def _wait_for_health(
    process: subprocess.Popen[bytes], url: str, log: Path, waiting: Callable[[str], None], timeout: float
) -> None:
    deadline = time.monotonic() + timeout
    with client_of(url, timeout=5) as client:
        while not _healthy(client):
            if process.poll() is not None:
                raise ServerError(f"the server did not start: {_reason(process, log)}")
            if time.monotonic() > deadline:
                raise ServerError(f"the server was not ready after {timeout:.0f} s: {_reason(process, log)}")
            waiting(last_line(read(log)))
            time.sleep(0.5)


def _healthy(client: httpx.Client) -> bool:
    try:
        return client.get("/health").status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def _dead(process: subprocess.Popen[bytes], url: str) -> bool:
    """Whether a server that failed a client is gone, or about to be: its engine may die some time before it does."""
    with client_of(url, timeout=5) as client:
        return process.poll() is not None or not _healthy(client)


def _reason(process: subprocess.Popen[bytes], log: Path) -> str:
    """What a server died of, or last said, and where the rest is."""
    text, status = read(log), process.poll()
    why = cause(text)
    if why is None and status is not None and status < 0:
        why = f"it was ended by signal {-status} ({signal.Signals(-status).name})"
    if why is None:
        why = f"its log ends with {last_line(text)!r}" if last_line(text) else f"it ended with status {status}"
    return f"{why} (all of its log: {log})"


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the process group to stop, and see to it that it does."""
    for sign, patience in ((signal.SIGTERM, 20), (signal.SIGKILL, 20)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            break
    # The engine core and its workers are in the group; none may outlive the server.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    # Memory of gigabytes takes a while to be given back, and so do folders and locks.
    deadline = time.monotonic() + 20
    while _runs(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)


def _runs(group: int) -> bool:
    """Whether any process of a group has not ended; one that nobody has asked for its status has."""
    for process in psutil.process_iter(["status"]):
        with suppress(ProcessLookupError, PermissionError):
            if process.info["status"] != psutil.STATUS_ZOMBIE and os.getpgid(process.pid) == group:
                return True
    return False


@contextmanager
def terminating_on_sigterm() -> Iterator[None]:
    """Let SIGTERM unwind the stack as Ctrl-C does, instead of ending the process on the spot."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
