"""The page that plays a world: what a server says of it, and a game in a real browser."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from tests.serving.pages import running
from vllm_packcache.config.errors import ConfigError
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.demo.play.world import MODEL_DIR, VOCABULARY
from vllm_packcache.families.actions import find
from vllm_packcache.reference.models import make_random_llama
from vllm_packcache.serving.server import free_port
from vllm_packcache.sessions.house import House
from vllm_packcache.sessions.playing import play_of
from vllm_packcache.sessions.routes import PAGE, add_routes

KEY = "secret"
LINE = re.compile(r"frame ([\d,]+) · ([\d,]+) tokens resident of ([\d,]+) in all · [\d.]+ s a frame")


# Without a browser


@pytest.fixture(scope="module")
def client() -> TestClient:
    """Of a server whose engine is not there yet."""
    app = FastAPI()
    add_routes(app)
    return TestClient(app)


def test_the_page_has_nothing_from_elsewhere(client: TestClient) -> None:
    for path, kind in PAGE.values():
        answer = client.get(path)
        assert answer.status_code == 200
        assert answer.headers["content-type"].partition(";")[0] == kind
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; ")
        assert "unsafe" not in policy
        # The name of a namespace is no address.
        text = answer.text.replace("http://www.w3.org/2000/svg", "")
        assert "//" not in re.sub(r"^\s*// .*|; // .*", "", text, flags=re.MULTILINE)
    page = client.get("/play").text
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", page)
    # Relative, so that a proxy may put a path before all of them.
    linked = {f"/{name}" for name in re.findall(r'(?:href|src)="([^"]+)"', page)}
    assert linked == {path for path, _ in PAGE.values()} - {"/play"}


def test_only_files_of_the_page_are_served(client: TestClient) -> None:
    for name in ("play.html", "../routes.py", "%2e%2e/routes.py", "nothing"):
        assert client.get(f"/play/{name}").status_code == 404


def test_a_server_without_sessions_says_so(client: TestClient) -> None:
    answer = client.get("/v1/play")
    assert answer.status_code == 501
    assert "start it with --kv-cache-policy" in answer.json()["error"]["message"]


# What an operator names


def world(**more: Any) -> dict[str, Any]:
    return {"title": "a world", "openings": [{"name": "one", "session": {"ids": [1, 2]}}], **more}


jump = {"label": "Jump", "action": {"jump": 1}}
jumping = world(controls=[jump])
flying = world(controls=[{"label": "Fly", "action": {"fly": 1}}])
sampled = world(openings=[{"name": "hot", "session": {"ids": [1], "sampling": {"temperature": 9}}}])
closed = world(openings=[])
unknown = world(openings=[{"name": "far", "session": {"ids": [500]}}])


def failing() -> None:
    raise RuntimeError("nothing\nhere")


@pytest.mark.parametrize(
    ("name", "coding", "words"),
    [
        ("no.such:module", None, "sessions: play must be module:object of something that can be imported, and"),
        (f"{__name__}:nobody", None, "'tests.serving.test_play_page:nobody' cannot: AttributeError"),
        (f"{__name__}:failing", None, "cannot: RuntimeError: nothing here"),
        (f"{__name__}:KEY", None, "is none: it: "),
        (f"{__name__}:closed", None, "is none: openings: "),
        (f"{__name__}:sampled", None, "is none: openings.0.session.sampling.temperature: "),
        (f"{__name__}:jumping", None, "sessions: play has actions, and the layout none"),
        (f"{__name__}:flying", "play", "sessions: play: the action of 'Fly': an action must be made of move, jump"),
    ],
)
def test_what_is_nothing_to_play_is_refused(name: str, coding: str | None, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        play_of(name, None if coding is None else find(coding))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_mapping_may_be_named() -> None:
    play = play_of(f"{__name__}:jumping", find("play"))
    assert play is not None
    assert play.controls[0].action == {"jump": 1}
    assert play_of(None, None) is None


def test_an_opening_that_no_session_can_begin_with_is_refused() -> None:
    vllm = SimpleNamespace(
        model_config=SimpleNamespace(get_vocab_size=lambda: 100, max_model_len=900),
        cache_config=SimpleNamespace(block_size=16),
    )
    pictures = "vllm_packcache.demo.play.playing:Pictures"
    sessions = {"pictures": pictures, "play": f"{__name__}:unknown"}
    config = ServerConfig.parse("packcache", {"layout": {"grid": [7, 9]}, "sessions": sessions})
    with pytest.raises(ConfigError, match="opening 'far': ids must be below 100, the ids of the model, not 500"):
        House(SimpleNamespace(vllm_config=vllm), config)  # type: ignore[arg-type]


# In a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
in_a_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="NO BROWSER: the page is not tested; install chromium, such as with apt"
)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """``vllm-packcache play`` with a key, ended by Ctrl-C; an untrained model where the bundled one is missing."""
    folder, port = tmp_path_factory.mktemp("play"), free_port()
    arguments = ["--host", "127.0.0.1", "--port", str(port), "--out", str(folder)]
    if not (MODEL_DIR / "model.safetensors").exists():
        from vllm_packcache.demo.play.run import BUNDLED

        model = make_random_llama(folder / "model", vocab=VOCABULARY, hidden=64, layers=1)
        arguments += ["--config", "play", str(model), "--", *BUNDLED]
    with running("play", arguments, folder / "said", {"PACKCACHE_PLAY_KEY": KEY}, f"http://127.0.0.1:{port}/play"):
        assert KEY not in (folder / "said").read_text()
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="NO BROWSER: the page is not tested; playwright is in the dev extra"
    )
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Any]:
    """The page after its key was given; what goes wrong in it is a failure."""
    from playwright.sync_api import expect

    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.goto(f"{url}/play")
    # The page is there without the key, and plays with it alone.
    expect(page.locator("#game")).to_be_hidden()
    page.get_by_label("This server asks for its API key").fill("another")
    page.get_by_role("button", name="Go on").click()
    expect(page.locator("#message")).to_have_text("That is not the key.")
    page.get_by_label("This server asks for its API key").fill(KEY)
    page.get_by_role("button", name="Go on").click()
    expect(page.locator("#line")).to_have_text(LINE, timeout=60_000)
    yield page
    context.close()
    # An answer that refuses something is an error to the browser.
    assert [text for text in wrong if not text.startswith("Failed to load resource")] == []


def number(page: Any) -> int:
    """Of the newest frame; -1: there is none."""
    found = LINE.fullmatch(page.locator("#line").text_content())
    return -1 if found is None else int(found[1].replace(",", ""))


def until(page: Any, frame: int) -> int:
    """The number of the newest frame, when it is at least that one."""
    deadline = time.monotonic() + 60
    while (newest := number(page)) < frame:
        assert time.monotonic() < deadline, page.locator("#message").text_content()
        time.sleep(0.05)
    return newest


def drawn(page: Any) -> str:
    return page.locator("#picture").evaluate("canvas => canvas.toDataURL()")


def sessions(url: str) -> list[dict[str, Any]]:
    return httpx.get(f"{url}/v1/sessions", headers={"Authorization": f"Bearer {KEY}"}).json()["data"]


def actions(page: Any) -> list[Any]:
    """What is asked for from now on, as it is asked."""
    asked: list[Any] = []
    page.on("request", lambda request: asked.append(request.post_data_json) if "/steps" in request.url else None)
    return asked


@in_a_browser
def test_a_game_is_played(page: Any, url: str, tmp_path: Path) -> None:
    asked = actions(page)
    seen = {drawn(page)}
    for _ in range(4):
        page.keyboard.press("ArrowRight")
        until(page, number(page) + 2)
        seen.add(drawn(page))
    assert len(seen) > 1
    # A tap is one frame's; a key that is held is every frame's, until it is let go.
    assert sum(own["action"] == {"move": "right"} for own in asked) == 4
    assert {"action": {}} in asked
    page.keyboard.down("ArrowLeft")
    page.keyboard.press("ArrowUp")
    until(page, number(page) + 4)
    page.keyboard.up("ArrowLeft")
    assert {"action": {"move": "left", "jump": 1}} in asked
    assert asked.count({"action": {"move": "left"}}) >= 2
    page.get_by_role("button", name="Right").hover()
    page.mouse.down()
    before = asked.count({"action": {"move": "right"}})
    until(page, number(page) + 4)
    page.mouse.up()
    assert asked.count({"action": {"move": "right"}}) >= before + 2
    # However long, a thing is left once.
    page.keyboard.down("Digit1")
    until(page, number(page) + 4)
    page.keyboard.up("Digit1")
    assert asked.count({"action": {"drop": "gem"}}) == 1
    (session,) = sessions(url)
    assert session["resident_tokens"] < session["logical_tokens"]
    picture = tmp_path / "play.png"
    page.screenshot(path=picture)
    assert picture.stat().st_size > 10_000


def settled(page: Any) -> int:
    """Number of the frame that is shown when none has come for two seconds: one may have been on its way.

    A world that goes on makes one more often than that.
    """
    end = time.monotonic() + 30
    shown, since = number(page), time.monotonic()
    while time.monotonic() - since < 2:
        assert time.monotonic() < end, f"frames go on being made: {shown}"
        time.sleep(0.1)
        if number(page) != shown:
            shown, since = number(page), time.monotonic()
    return shown


@in_a_browser
def test_nobody_plays_in_a_tab_that_is_not_seen(page: Any) -> None:
    hide = "hidden => Object.defineProperty(document, 'hidden', { value: hidden, configurable: true })"
    page.evaluate(hide, True)
    page.locator("body").dispatch_event("visibilitychange", {"bubbles": True})
    stopped = settled(page)
    page.evaluate(hide, False)
    page.locator("body").dispatch_event("visibilitychange", {"bubbles": True})
    until(page, stopped + 2)


@in_a_browser
def test_buttons_of_the_page(page: Any, url: str) -> None:
    from playwright.sync_api import expect

    before = until(page, 14)
    page.get_by_role("button", name="Pause").click()
    expect(page.get_by_role("button", name="Go on")).to_have_attribute("aria-pressed", "true")
    stopped = settled(page)
    assert stopped >= before
    # Paused, a key makes a frame, and so does a button that is touched.
    page.keyboard.press("ArrowRight")
    until(page, stopped + 1)
    page.get_by_role("button", name="Gem").dispatch_event("click")
    until(page, stopped + 2)
    page.get_by_role("button", name="Back 10 frames").click()
    expect(page.locator("#line")).to_contain_text(f"frame {stopped + 2 - 10 + 1} ")
    page.get_by_role("button", name="Go on").click()
    until(page, stopped)
    (session,) = sessions(url)
    page.get_by_label("Begins with").select_option("Night")
    page.get_by_role("button", name="New game").click()
    expect(page.locator("#line")).to_contain_text(re.compile("^frame [0-3] "))
    (other,) = sessions(url)
    assert other["id"] != session["id"]


@in_a_browser
def test_a_game_that_has_ended_says_so_and_one_that_is_left_is_ended(page: Any, url: str) -> None:
    from playwright.sync_api import expect

    (session,) = sessions(url)
    httpx.delete(f"{url}/v1/sessions/{session['id']}", headers={"Authorization": f"Bearer {KEY}"})
    expect(page.locator("#message")).to_have_text("This game has ended: begin a new one.")
    expect(page.get_by_role("button", name="Pause")).to_be_disabled()
    expect(page.get_by_role("button", name="Back 10 frames")).to_be_disabled()
    page.get_by_role("button", name="New game").click()
    until(page, 1)
    assert len(sessions(url)) == 1
    page.goto("about:blank")
    deadline = time.monotonic() + 20
    while sessions(url):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@in_a_browser
def test_a_server_that_is_full_or_gone_is_named_in_a_line(page: Any, url: str) -> None:
    from playwright.sync_api import expect

    message = page.locator("#message")
    page.route("**/v1/sessions", lambda route: route.fulfill(status=503, headers={"Retry-After": "7"}, json={}))
    page.get_by_role("button", name="New game").click()
    expect(message).to_have_text("The server is full: try again in 7 s.")
    page.unroute("**/v1/sessions")
    page.get_by_role("button", name="New game").click()
    until(page, 2)
    page.route("**/steps", lambda route: route.abort())
    expect(message).to_have_text("The server does not answer: see whether it still runs.")
    page.unroute("**/steps")
    page.get_by_role("button", name="Go on").click()
    until(page, number(page) + 2)
    expect(message).to_have_text("")


@in_a_browser
@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844), (320, 700)])
def test_the_page_fits_into_its_window(page: Any, width: int, height: int) -> None:
    page.set_viewport_size({"width": width, "height": height})
    root = page.locator("html")
    assert root.evaluate("root => root.scrollWidth") <= width
    assert root.evaluate("root => root.scrollHeight") <= height
