"""``python -m vllm_packcache.tools.interpreted``, as far as it goes before it loads a model."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest
import torch

from vllm_packcache.demo.tokenizer import MODEL_DIR


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU it sends the user to vllm serve")
def test_a_port_in_use_is_said_in_a_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        command = [sys.executable, "-m", "vllm_packcache.tools.interpreted", "serve", str(MODEL_DIR)]
        result = subprocess.run(
            [*command, "--host", "127.0.0.1", "--port", str(port)], capture_output=True, text=True, timeout=300
        )
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    said = "error: another program listens at this --host and --port: give another --port"
    assert result.stderr.rstrip().splitlines()[-1] == said
