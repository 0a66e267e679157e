"""Clients of servers: who is asked, and what the environment of a company's laptop does not change."""

from __future__ import annotations

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import httpx
import pytest

from vllm_packcache.serving.server import client_of, on_this_machine

PROXIES = ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


class _Answer(BaseHTTPRequestHandler):
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Not a word."""


@pytest.fixture
def listening() -> Iterator[tuple[str, list[str]]]:
    """The address of somebody who answers everything, and what they were asked."""
    handler = type("Handler", (_Answer,), {"asked": []})
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", handler.asked  # type: ignore[attr-defined]
        server.shutdown()


def test_a_server_on_this_machine_is_asked_directly(
    listening: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, asked = listening
    for name in PROXIES:
        # The one is not there, the other of a kind that needs a package.
        monkeypatch.setenv(name, "socks5://127.0.0.1:9" if "all" in name.lower() else "http://127.0.0.1:9")
    for host in ("127.0.0.1", "localhost"):
        with client_of(url.replace("127.0.0.1", host)) as client:
            assert client.get("/health").status_code == 200
    assert asked == ["/health"] * 2


def test_a_server_elsewhere_is_asked_by_way_of_the_proxy(
    listening: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, asked = listening
    for name in (*PROXIES, "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", url)
    with client_of("http://videos.invalid:8000") as client:
        assert client.get("/health").status_code == 200
    assert asked == ["http://videos.invalid:8000/health"]


@pytest.mark.parametrize(
    ("url", "here"),
    [
        ("http://127.0.0.1:8000", True),
        ("http://127.8.0.1", True),
        ("http://[::1]:8000/v1", True),
        ("http://LOCALHOST:8000", True),
        ("http://my.localhost", True),
        ("http://localhost.example.com", False),
        ("http://192.168.1.4:8000", False),
        ("http://127.0.0.1.example.com", False),
        ("nothing", False),
    ],
)
def test_what_is_on_this_machine(url: str, here: bool) -> None:
    assert on_this_machine(url) is here


def test_what_is_no_address_is_said() -> None:
    with pytest.raises(httpx.InvalidURL):
        client_of("http://a:b:c")
