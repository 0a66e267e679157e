"""Commands that serve a page until Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import httpx
import pytest


@contextmanager
def running(
    command: str, arguments: Sequence[str], said: Path, environment: Mapping[str, str], page: str
) -> Iterator[None]:
    """``vllm-packcache COMMAND``, which names its page and is ended by Ctrl-C.

    Args:
        command: its name.
        arguments: of it.
        said: file for what it prints.
        environment: variables to set.
        page: address that it names.
    """
    variables = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", **environment}
    line = [sys.executable, "-c", "from vllm_packcache.cli import main; main()", command, *arguments]
    with said.open("w") as output:
        # What a shell runs in the background ignores Ctrl-C, and so would all that it starts.
        heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        process = subprocess.Popen(line, env=variables, stdout=output, stderr=subprocess.STDOUT, preexec_fn=heard)
        try:
            deadline = time.monotonic() + 300
            while f" at {page} " not in said.read_text():
                assert process.poll() is None, said.read_text()
                assert time.monotonic() < deadline, said.read_text()
                time.sleep(0.2)
            yield
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
            assert said.read_text().endswith("stopped\n")
            with pytest.raises(httpx.ConnectError):
                httpx.get(page)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(60)
