"""A server for a world to play: started, its page named, and stopped when nobody wants it any more."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from vllm_packcache.config.errors import ConfigError, shown
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.core.policies import PackCache
from vllm_packcache.demo.play.world import MODEL_DIR
from vllm_packcache.demo.run import LOGGING, claimed, one_line
from vllm_packcache.serving.server import client_of, free_port, serving, url_of

PRESET = "play"
BUNDLED = (
    *("--dtype", "float32", "--enforce-eager", "--skip-tokenizer-init", "--max-model-len", "8192"),
    *("--block-size", "32", "--max-num-seqs", "8"),
    # A worker process that spins beside the engine would take the engine's time on a small machine.
    *("--distributed-executor-backend", "uni"),
)
"""Flags of the bundled model's server."""
_LOOKS = 2.0
"""Seconds between two looks at whether the server lives."""


def run_play(
    model: Path | None,
    config: str | None,
    out: Path,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    key: str | None = None,
    flags: Sequence[str] = (),
) -> None:
    """Serve a world to play, until Ctrl-C or SIGTERM.

    Args:
        model: folder of a checkpoint; None: the bundled one.
        config: of packcache, with ``sessions: pictures`` and ``play``; None: the bundled world's preset.
        out: folder for the server's log; it is created.
        host: address that it listens on.
        port: that it listens on; None: any that is free.
        key: that the page asks for; None: none.
        flags: of vLLM, besides.

    Raises:
        ConfigError: the configuration is wrong, or has nothing to play.
        OSError: the folder cannot be written.
        ServerError: the server did not come up, or died.
    """
    if model is not None and config is None:
        raise ConfigError("--config must be given with a checkpoint: a configuration with sessions: pictures and play")
    config = config or PRESET
    if ServerConfig.parse(PackCache.name, config).sessions.play is None:
        raise ConfigError(
            f"--config: {shown(config)} has nothing to play: give sessions: {{pictures: module:object, play: "
            "module:object} in it, as the preset play has"
        )
    if port is None:
        port = free_port()
    else:
        _check_free(host, port)
    console = Console()
    arguments = [
        *("--kv-cache-policy", PackCache.name, "--kv-cache-policy-config", config),
        *(BUNDLED if model is None else ()),
        *flags,
    ]
    model = MODEL_DIR if model is None else model
    with claimed(out) as log:
        console.print(f"[bold]vllm serve[/] {model} {' '.join(arguments)}", soft_wrap=True, highlight=False)
        environment = {**LOGGING, **({} if key is None else {"VLLM_API_KEY": key})}
        try:
            with (
                console.status("starting the server") as status,
                serving(
                    model, arguments, log, lambda line: status.update(one_line(line)), environment=environment,
                    host=host, port=port,
                ) as url,
            ):  # fmt: skip
                status.stop()
                console.print(f"play at [bold]{url_of(host, port)}/play[/] (Ctrl-C stops it)", soft_wrap=True)
                _wait(url)
        except KeyboardInterrupt:
            console.print("stopped")


def _check_free(host: str, port: int) -> None:
    """Check that nobody listens there: another server's answer would be taken for ours.

    Raises:
        ConfigError: somebody does, or the address is not of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ConfigError(f"--host {host} --port {port} cannot be listened on: {error.strerror}") from None


def _wait(url: str) -> None:
    """As long as the server lives.

    Raises:
        httpx.HTTPError: it does not.
    """
    with client_of(url, timeout=60) as client:
        while True:
            time.sleep(_LOOKS)
            client.get("/health").raise_for_status()
