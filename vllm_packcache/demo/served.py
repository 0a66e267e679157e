"""A server of a model with a page: started, the page named, and stopped when nobody wants it any more."""

from __future__ import annotations

import shlex
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from vllm_packcache.config.errors import ConfigError
from vllm_packcache.demo.run import LOGGING, claimed, one_line
from vllm_packcache.serving.server import client_of, free_port, serving, url_of

_LOOKS = 2.0
"""Seconds between two looks at whether the server lives."""


def serve_page(
    model: Path,
    arguments: Sequence[str],
    out: Path,
    page: str,
    does: str,
    *,
    host: str,
    port: int | None,
    key: str | None,
    interpreted: bool = False,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Serve a model with a page, until Ctrl-C or SIGTERM.

    Args:
        model: folder of the checkpoint.
        arguments: flags of vLLM.
        out: folder for the server's log; it is created.
        page: path of the page.
        does: what one does there, for people.
        host: address that it listens on.
        port: that it listens on; None: any that is free.
        key: that the page asks for; None: none.
        interpreted: see `vllm_packcache.serving.server.serving`.
        environment: variables to set besides.

    Raises:
        ConfigError: somebody listens there.
        OSError: the folder cannot be written.
        ServerError: the server did not come up, or died.
    """
    if port is None:
        port = free_port()
    else:
        _check_free(host, port)
    console = Console()
    with claimed(out) as log:
        command = escape(shlex.join([str(model), *arguments]))
        console.print(f"[bold]vllm serve[/] {command}", soft_wrap=True, highlight=False)
        variables = {**LOGGING, **({} if key is None else {"VLLM_API_KEY": key}), **(environment or {})}
        try:
            with (
                console.status("starting the server") as status,
                serving(
                    model, list(arguments), log, lambda line: status.update(one_line(line)), environment=variables,
                    host=host, port=port, interpreted=interpreted,
                ) as url,
            ):  # fmt: skip
                status.stop()
                console.print(f"{does} at [bold]{url_of(host, port)}{page}[/] (Ctrl-C stops it)", soft_wrap=True)
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
