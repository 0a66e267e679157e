"""The command that serves videos and their page: a video of the bundled model, made in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serving.pages import running
from tests.videos.test_playground import browser as browser
from tests.videos.test_playground import click, expect, in_a_browser, opened, state
from vllm_packcache.config.errors import ConfigError
from vllm_packcache.demo.playground import run_playground
from vllm_packcache.serving.server import free_port

KEY = "secret"
FRAMES = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("playground")


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    """``vllm-packcache playground`` with a key, ended by Ctrl-C; before that, with all that it was asked for made."""
    port = free_port()
    arguments = ["--port", str(port), "--out", str(folder / "out"), "--store", str(folder / "videos")]
    address, key = f"http://127.0.0.1:{port}", {"PACKCACHE_PLAYGROUND_KEY": KEY}
    with running("playground", arguments, folder / "said", key, f"{address}/playground"):
        assert KEY not in (folder / "said").read_text()
        yield address


@in_a_browser
def test_a_video_is_made_by_a_real_server(browser: Any, url: str, folder: Path) -> None:
    with opened(browser, f"{url}/playground") as page:
        page.locator("#secret").fill(KEY)
        page.keyboard.press("Enter")
        expect(page.locator("#form")).to_be_visible()
        page.locator("#frames").fill(str(FRAMES))
        click(page, "Make", "#form")
        state(page).to_contain_text(f"{FRAMES - 1} frames in")
        expect(page.locator(".card .map")).to_have_count(1)
        page.screenshot(path=str(folder / "page.png"))
    client = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)
    (video,) = client.get("/v1/videos").json()["data"]
    assert (video["status"], video["frames"], video["options"]["policy"]) == ("completed", FRAMES, "packcache")
    # The same ids as the engine makes for anybody.
    ids = client.get(f"/v1/videos/{video['id']}/content?variant=ids").content
    assert len(ids) == 4 * (FRAMES - 1) * 257
    assert client.delete(f"/v1/videos/{video['id']}").json()["deleted"] is True
    assert list((folder / "videos" / "videos").iterdir()) == []


def test_a_model_of_ones_own_needs_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="MODEL must be demo or demo_masked, or a folder with a --config of its own"):
        run_playground(str(tmp_path), None, None, tmp_path / "store", tmp_path / "out")
