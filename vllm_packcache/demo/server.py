"""A ``vllm serve`` of our own: started, waited for, and always stopped."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from vllm_packcache import masked
from vllm_packcache.config import REQUEST_PREFIX


class ServerError(ChildProcessError):
    """The server did not come up, and the message ends with the last lines of its log; or it failed a request."""


def stream_frames(
    client: httpx.Client,
    prompt_ids: Sequence[int],
    grid: masked.Grid,
    options: Mapping[str, Any],
    on_frame: Callable[[masked.Int64], None],
) -> masked.Int64:
    """Let the server of a masked model make the frames that follow a prompt.

    Args:
        client: of the server. Between two frames nothing arrives, for minutes on a CPU.
        prompt_ids: of `masked.text_prompt`, and any frames that are given.
        grid: of all frames.
        options: of the request, without prefix; ``frames`` says how many to make.
        on_frame: called with the codes of each as soon as it is made, [rows, columns].

    Returns:
        int64, [frames, rows, columns].

    Raises:
        ServerError: the server refused the request, or failed it.
    """
    length = masked.frame_layout(grid).tokens_per_frame
    body = {
        "prompt": list(prompt_ids),
        "stream": True,
        "return_token_ids": True,
        "vllm_xargs": {f"{REQUEST_PREFIX}{name}": value for name, value in {"grid": list(grid), **options}.items()},
    }
    frames: list[masked.Int64] = []
    ids: list[int] = []
    try:
        with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                text = response.read().decode(errors="replace").strip()
                raise ServerError(f"the server refused the request: {_sentence(text) or response.status_code}")
            for line in response.iter_lines():
                ids += tokens_in(line)
                while len(ids) >= length:
                    frames.append(masked.codes_of_frame(ids[:length], grid))
                    del ids[:length]
                    on_frame(frames[-1])
    except httpx.HTTPError as error:
        raise ServerError(f"the server at {client.base_url} does not answer: {error}") from None
    except ValueError as error:
        raise ServerError(f"the server at {client.base_url} makes no frames of this grid: {error}") from None
    if len(frames) != options["frames"]:
        raise ServerError(f"the server ended the video after {len(frames)} of {options['frames']} frames")
    return np.stack(frames)


def _sentence(text: str) -> str:
    """What an answer says that refuses a request: the message of an error, or all of it."""
    try:
        return _message(json.loads(text))
    except (ValueError, LookupError, TypeError):
        return text


def _message(answer: Any) -> str:
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
        raise ServerError(f"the server {'refused' if refused else 'gave up on'} the request: {_message(event)}")
    return [token for choice in event["choices"] for token in choice.get("token_ids") or ()]


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def last_lines(log: Path, count: int) -> str:
    """The last ``count`` lines of a log file."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(lines[-count:])


@contextmanager
def serving(
    model: Path,
    arguments: list[str],
    log: Path,
    waiting: Callable[[str], None],
    timeout: float = 600,
    interpreted: bool = False,
) -> Iterator[str]:
    """Run ``vllm serve MODEL ARGUMENTS`` for as long as the context lasts.

    The server and all its processes are stopped when the context is left: normally, by an error, by Ctrl-C or by
    SIGTERM.

    Args:
        model: folder of the model.
        arguments: flags besides model, host and port.
        log: file for the server's output; its folder must exist.
        waiting: called about twice a second with the newest line of the log until the server is healthy.
        timeout: seconds to wait for that.
        interpreted: run vLLM's Model Runner V2 by Triton's interpreter; see `vllm_packcache.interpreted`.

    Yields:
        The base URL, such as ``http://127.0.0.1:8000``.

    Raises:
        ServerError: the server stopped, or was not healthy in time.
    """
    port = free_port()
    command = [
        *(sys.executable, "-m", "vllm_packcache.interpreted" if interpreted else "vllm.entrypoints.cli.main"),
        *("serve", str(model)),
        *("--host", "127.0.0.1", "--port", str(port), *arguments),
    ]
    environment = {
        **os.environ,
        # Left alone, vLLM computes on one thread. The API server needs a core of its own to keep up.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) - 1))),
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }
    with log.open("w", encoding="utf-8") as output, _terminating_on_sigterm():
        # A session of its own: Ctrl-C reaches us alone, and we stop the whole group.
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_for_health(process, url, log, waiting, timeout)
            yield url
        finally:
            _stop(process)


def _wait_for_health(
    process: subprocess.Popen[bytes], url: str, log: Path, waiting: Callable[[str], None], timeout: float
) -> None:
    deadline = time.monotonic() + timeout
    while True:
        with suppress(httpx.TransportError):
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        if process.poll() is not None:
            raise ServerError(
                f"the server stopped with status {process.returncode}; {log} ends:\n{last_lines(log, 15)}"
            )
        if time.monotonic() > deadline:
            raise ServerError(f"the server was not ready after {timeout:.0f} s; {log} ends:\n{last_lines(log, 15)}")
        waiting(last_lines(log, 1))
        time.sleep(0.5)


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


@contextmanager
def _terminating_on_sigterm() -> Iterator[None]:
    """Let SIGTERM unwind the stack as Ctrl-C does, instead of ending the process on the spot."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
