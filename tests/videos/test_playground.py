"""The page of videos, in a real browser and with a server that has no model."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.videos.fake import PAGE_HEADERS, Fake, serving

KEY = "secret"
FILES = {entry.name: entry.read_text() for entry in files("vllm_packcache.videos").joinpath("page").iterdir()}

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
in_a_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="NO BROWSER: the page is not tested; install chromium, such as with apt"
)


# Without a browser


def test_the_page_has_nothing_from_elsewhere() -> None:
    for name, content in FILES.items():
        # The name of a namespace is no address.
        text = content.replace("http://www.w3.org/2000/svg", "")
        assert "//" not in re.sub(r"^\s*// .*|; // .*|[,{}] // .*", "", text, flags=re.MULTILINE), name
    page = FILES["playground.html"]
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", page)
    assert "unsafe" not in PAGE_HEADERS["Content-Security-Policy"]


def test_every_file_of_the_page_is_linked_and_there() -> None:
    linked = set(re.findall(r'(?:href|src)="playground/([^"]+)"', FILES["playground.html"]))
    for name in [name for name in FILES if name.endswith(".js")]:
        linked |= set(re.findall(r'from "\./([^"]+)"', FILES[name]))
    assert linked | {"playground.html"} == set(FILES)


def test_nothing_of_a_client_becomes_part_of_the_page() -> None:
    for name, text in FILES.items():
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|localStorage|sessionStorage", text
        ), name


# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="NO BROWSER: the page is not tested; playwright is in the dev extra"
    )
    camera = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--no-first-run", *camera]
        )
        yield chromium
        chromium.close()


@contextmanager
def opened(browser: Any, address: str, **options: Any) -> Iterator[Any]:
    """The page; what goes wrong in it, or against its policy, is a failure."""
    options = {"viewport": {"width": 1440, "height": 900}, "reduced_motion": "reduce", **options}
    context = browser.new_context(**options)
    page = context.new_page()
    page.set_default_timeout(60_000)
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.goto(address)
    yield page
    context.close()
    # An answer that refuses something is an error to the browser.
    assert [text for text in wrong if not text.startswith("Failed to load resource")] == []


@pytest.fixture
def fake() -> Fake:
    return Fake()


@pytest.fixture
def page(browser: Any, fake: Fake) -> Iterator[Any]:
    with serving(fake) as address, opened(browser, address) as page:
        expect(page.locator("#form")).to_be_visible()
        yield page


def expect(*of: Any) -> Any:
    from playwright.sync_api import expect as own

    own.set_options(timeout=60_000)
    return own(*of)


def click(page: Any, name: str, within: str = "body", exact: bool = True) -> None:
    page.locator(within).get_by_role("button", name=name, exact=exact).click()


def state(page: Any, card: int = 0) -> Any:
    return expect(page.locator(".card .state p").nth(card))


def colours(page: Any, selector: str) -> set[tuple[int, ...]]:
    """That are seen there."""
    pixels = np.asarray(Image.open(io.BytesIO(page.locator(selector).screenshot())).convert("RGB")).reshape(-1, 3)
    return set(map(tuple, np.unique(pixels, axis=0).tolist()))


@in_a_browser
def test_a_video_is_made_before_ones_eyes(page: Any, fake: Fake) -> None:
    fake.allowed = 0
    click(page, "Make", "#form")
    state(page).to_have_text("Waiting for its turn")
    fake.allowed = 3
    state(page).to_contain_text("3 of 20 frames made")
    expect(page.locator(".card .tokens dd")).to_have_text("1,059 of 1,059")
    expect(page.locator("#where")).to_have_text("frame 2 · 0.5 s")
    expect(page.locator("#spoken")).not_to_be_empty()
    # As explain draws them: the condition, the frame being made, the previous one, the one before that.
    expect(page.locator(".card .map")).to_have_attribute(
        "aria-label", re.compile("Memory while frame 2 is made: 34 blocks of 32")
    )
    rgb = {"condition": (230, 159, 0), "made": (200, 16, 46), "back1": (8, 48, 107), "back2": (33, 113, 181)}
    assert set(rgb.values()) <= colours(page, ".card .map")
    assert (91, 184, 165) not in colours(page, ".card .map")
    early = page.locator(".card .picture").evaluate("canvas => canvas.toDataURL()")
    fake.allowed = float("inf")
    state(page).to_contain_text("20 frames in")
    expect(page.locator(".card .share dd")).to_have_text("20 %")
    expect(page.locator(".card .picture")).to_have_attribute("aria-label", re.compile("^Frame 19: a yellow square"))
    assert page.locator(".card .picture").evaluate("canvas => canvas.toDataURL()") != early
    assert (91, 184, 165) in colours(page, ".card .map")
    (asked,) = fake.asked
    assert asked["num_frames"] == "20"
    assert asked["input_reference"] == "image/png"
    assert asked["prompt"].startswith("a yellow square")
    # What was left as the server has it is not sent.
    assert not [name for name in asked if name.startswith("packcache_") or name in ("seed", "temperature")]
    # The list knows it, with its picture.
    expect(page.locator("#list .open")).to_have_attribute("aria-current", "true")
    expect(page.locator("#list img")).to_be_visible()
    expect(page.locator("#list .hint")).to_have_text("packcache · 20 frames")


@in_a_browser
def test_any_frame_can_be_looked_at(page: Any, fake: Fake) -> None:
    # So slow that it is stopped before its end.
    fake.about["tokenizer"]["fps"] = 0.5
    click(page, "Make", "#form")
    state(page).to_contain_text("20 frames in")
    slider = page.get_by_role("slider", name="Frame")
    slider.focus()
    slider.press("Home")
    expect(page.locator("#where")).to_have_text("frame 0 · 0 s")
    expect(page.locator(".card .share dd")).to_have_text("100 %")
    slider.press("ArrowRight")
    expect(slider).to_have_attribute("aria-valuetext", "frame 1")
    # A row of the map is a frame, and under the pointer it says of what a block is.
    place = page.locator(".card .map").bounding_box()
    page.mouse.move(place["x"] + 40, place["y"] + 20 + 16 * 7 + 5)
    expect(page.locator(".card figcaption span")).to_have_text(re.compile(r"^Frame 7, block \d: condition$"))
    page.mouse.down()
    page.mouse.up()
    expect(page.locator("#where")).to_have_text("frame 7 · 14 s")
    click(page, "Newest")
    expect(page.locator("#where")).to_contain_text("frame 19")
    click(page, "Play", "#transport")
    expect(page.locator("#where")).to_contain_text(re.compile(r"frame [12] "))
    click(page, "Pause")
    expect(page.locator("#play")).to_have_text("Play")
    assert int(page.locator("#at").input_value()) < 19


@in_a_browser
def test_one_click_compares(page: Any, fake: Fake) -> None:
    fake.allowed = 12
    click(page, "Compare with full")
    expect(page.locator(".card h3")).to_have_text(["packcache", "full"])
    expect(page.locator("#compared")).to_have_text(
        "At frame 11 packcache holds 33 % of the tokens that full holds; the pictures are the same."
    )
    assert [asked.get("packcache_policy") for asked in fake.asked] == [None, "full"]
    assert len({asked["prompt"] for asked in fake.asked}) == 1
    # One scale for both, and one slider.
    assert len({canvas.bounding_box()["height"] for canvas in page.locator(".card .map").all()}) == 1
    slider = page.get_by_role("slider", name="Frame")
    slider.focus()
    slider.press("Home")
    expect(page.locator("#compared")).to_contain_text("At frame 0 both hold 545 tokens")
    expect(page.locator(".card .share dd")).to_have_text(["100 %", "100 %"])
    fake.allowed = float("inf")
    expect(page.locator(".card[data-status=completed]")).to_have_count(2)
    # Of the full cache what the server has is the other one.
    page.get_by_role("combobox", name="Memory").select_option("full")
    expect(page.locator("#policy-words")).to_have_text("Keeps every token of every frame.")
    expect(page.locator("#policy-more")).to_be_hidden()
    expect(page.locator("#compare")).to_have_text("Compare with packcache")
    # What is shown is in the address, and a page that is loaded again shows it.
    page.reload()
    expect(page.locator(".card h3")).to_have_text(["packcache", "full"])
    page.locator(".card").nth(1).get_by_role("button", name="Close").click()
    expect(page.locator(".card h3")).to_have_text(["packcache"])
    expect(page.locator("#compared")).to_be_hidden()
    # Any two can be put side by side.
    page.locator("#list .open").filter(has_text="full").click()
    expect(page.locator(".card h3")).to_have_text(["full"])
    page.locator("#list li").filter(has_text="packcache").get_by_role("button", name="Beside").click()
    expect(page.locator("#compared")).to_contain_text("packcache holds 20 % of the tokens that full holds")


@in_a_browser
def test_options_that_were_changed_are_sent(page: Any, fake: Fake) -> None:
    page.get_by_text("Options of the memory").click()
    expect(page.get_by_label("Window")).to_have_value("12")
    page.get_by_label("Window").fill("4")
    page.get_by_label("Selection").select_option("spatial")
    page.get_by_text("More", exact=True).click()
    page.get_by_label("Seed").fill("7")
    page.get_by_role("spinbutton", name="Frames", exact=True).fill("6")
    expect(page.locator("#length")).to_have_text("1.5 s at 4 a second · at most 64 frames")
    click(page, "Make", "#form")
    state(page).to_contain_text("6 frames in")
    (asked,) = fake.asked
    changed = {"packcache_window": "4", "packcache_selection": "spatial", "seed": "7", "num_frames": "6"}
    assert asked.items() >= changed.items()
    assert "packcache_decay" not in asked
    expect(page.locator(".card .settings")).to_have_text("window 4, selection spatial")


@in_a_browser
@pytest.mark.parametrize(
    ("field", "label", "text"),
    [
        ("negative_prompt", "Negative prompt", "night"),
        ("packcache_negative_prompt_ids", "Negative prompt ids", "[1, 2, 3]"),
    ],
)
def test_guidance_is_offered_where_there_is_any(browser: Any, field: str, label: str, text: str) -> None:
    """As `vllm_packcache.media.processors.base.ranges` tells a page of it."""
    options = {"guidance_scale": {"default": 2.25, "least": 1, "most": 30}, field: {"default": ""}}
    fake = Fake(tokenizer={"options": options})
    with serving(fake) as address, opened(browser, address) as page:
        page.get_by_text("More", exact=True).click()
        expect(page.get_by_label("Guidance scale")).to_have_value("2.25")
        click(page, "Make", "#form")
        state(page).to_contain_text("20 frames in")
        page.get_by_label("Guidance scale").fill("3.5")
        page.get_by_label(label, exact=True).fill(text)
        click(page, "Make", "#form")
        expect(page.locator("#list li")).to_have_count(2)
    first, second = fake.asked
    assert not {"guidance_scale", field} & set(first)
    assert second.items() >= {"guidance_scale": "3.5", field: text}.items()


@in_a_browser
def test_what_cannot_be_asked_for_is_said_beside_the_form(page: Any, fake: Fake) -> None:
    message = page.locator("#form-message")
    page.get_by_role("textbox", name="Prompt").fill(" ")
    click(page, "Make", "#form")
    expect(message).to_have_text("Say in a few words what is to be seen.")
    expect(page.get_by_role("textbox", name="Prompt")).to_be_focused()
    page.get_by_role("textbox", name="Prompt").fill("a circle")
    page.get_by_role("spinbutton", name="Frames", exact=True).fill("65")
    click(page, "Make", "#form")
    expect(message).to_contain_text("Frames: ")
    page.get_by_role("spinbutton", name="Frames", exact=True).fill("20")
    click(page, "Remove", "#form")
    click(page, "Make", "#form")
    expect(message).to_have_text("This model continues a picture: choose one, or take an example.")
    assert fake.asked == []
    page.locator("#examples button").first.click()
    expect(message).to_be_empty()
    fake.refusal = 400, {"message": "seed must be <i>small</i>", "param": "seed"}, {}
    click(page, "Make", "#form")
    expect(message).to_have_text("seed must be <i>small</i>")
    expect(page.get_by_label("Seed")).to_be_focused()
    expect(page.get_by_label("Seed")).to_have_attribute("aria-invalid", "true")
    fake.refusal = 503, {"message": "too many"}, {"Retry-After": "7"}
    click(page, "Make", "#form")
    expect(message).to_have_text("The server is full: try again in 7 s.")
    click(page, "Make", "#form")
    state(page).to_contain_text("20 frames in")
    expect(message).to_be_empty()


@in_a_browser
def test_what_clients_send_is_text(page: Any, fake: Fake) -> None:
    page.get_by_role("textbox", name="Prompt").fill("<img src=x onerror=alert(1)> & co")
    fake.allowed, fake.failing = 2, True
    click(page, "Make", "#form")
    state(page).to_have_text("the GPU is <b>full</b>")
    expect(page.locator(".card .prompt")).to_have_text("<img src=x onerror=alert(1)> & co")
    expect(page.locator("#list .prompt")).to_have_text("<img src=x onerror=alert(1)> & co")
    expect(page.locator(".card .map")).to_have_attribute("aria-label", re.compile("frame 1 is made"))


@in_a_browser
def test_a_video_is_stopped_and_its_frames_stay_to_be_seen(page: Any, fake: Fake) -> None:
    fake.allowed = 4
    click(page, "Make", "#form")
    state(page).to_contain_text("4 of 20")
    click(page, "Stop", ".card")
    state(page).to_have_text("Stopped after 4 frames")
    expect(page.locator("#list li")).to_have_count(0)
    expect(page.locator("#none")).to_be_visible()
    assert fake.videos == {}
    slider = page.get_by_role("slider", name="Frame")
    slider.focus()
    slider.press("Home")
    expect(page.locator("#where")).to_contain_text("frame 0")


@in_a_browser
def test_a_finished_video_is_deleted_by_who_is_sure(page: Any, fake: Fake) -> None:
    click(page, "Make", "#form")
    state(page).to_contain_text("20 frames in")
    click(page, "Delete", "#list")
    click(page, "Keep", "#sure")
    expect(page.locator("#list li")).to_have_count(1)
    click(page, "Delete", ".card")
    click(page, "Delete", "#sure")
    expect(page.locator(".card")).to_have_count(0)
    expect(page.locator("#empty")).to_be_visible()
    assert fake.videos == {}


@in_a_browser
def test_all_videos_are_listed_a_page_at_a_time(page: Any, fake: Fake) -> None:
    for frames in range(1, 30):
        video = fake.create({"prompt": f"number {frames}", "num_frames": frames})
        video.shown.update(status="failed", error={"code": "x", "message": "no"})
        video.tell("failed", video.shown)
    page.reload()
    expect(page.locator("#list li")).to_have_count(12)
    click(page, "Older ones")
    expect(page.locator("#list li")).to_have_count(24)
    # Who cannot see it goes on where the new ones begin.
    expect(page.locator("#list .open").nth(12)).to_be_focused()
    click(page, "Older ones")
    expect(page.locator("#list li")).to_have_count(29)
    expect(page.get_by_role("button", name="Older ones")).to_be_hidden()
    expected = [f"number {frames}" for frames in range(29, 0, -1)]
    expect(page.locator("#list .prompt")).to_have_text(expected)
    page.locator("#list .open").nth(3).click()
    expect(page.locator(".card .prompt")).to_have_text(["number 26"])
    page.locator("#list .beside").nth(4).click()
    expect(page.locator(".card .prompt")).to_have_text(["number 26", "number 25"])
    # What another client deleted goes, what it made comes, and the order stays.
    for name in list(fake.videos)[-2:]:
        fake.videos.pop(name)
    page.get_by_role("spinbutton", name="Frames", exact=True).fill("2")
    click(page, "Make", "#form")
    state(page).to_contain_text("2 frames in")
    expect(page.locator("#list .prompt")).to_have_text([re.compile("^a yellow"), *expected[2:]])


@in_a_browser
def test_a_connection_that_breaks_is_made_again_from_where_it_was(page: Any, fake: Fake) -> None:
    fake.connections = 9
    click(page, "Make", "#form")
    state(page).to_contain_text("20 frames in")
    # 1 status each when it waits and begins, 20 frames, 1 end.
    assert fake.resumed == ["", "9", "18"]
    expect(page.locator("#at")).to_have_attribute("max", "19")
    fake.connections = float("inf")
    fake.allowed = 2
    click(page, "Make", "#form")
    state(page).to_contain_text("2 of 20")
    page.route("**/events", lambda route: route.abort())
    fake.connections = 0
    fake.allowed = 3
    state(page).to_have_text("The connection is lost: trying again.")
    page.unroute("**/events")
    fake.connections = fake.allowed = float("inf")
    state(page).to_contain_text("20 frames in")


@in_a_browser
def test_a_video_that_another_client_deletes_is_gone(page: Any, fake: Fake) -> None:
    fake.allowed = 2
    click(page, "Make", "#form")
    state(page).to_contain_text("2 of 20")
    for video in fake.videos.values():
        video.deleted = True
    fake.videos.clear()
    state(page).to_have_text("This video was deleted.")


@in_a_browser
def test_a_server_that_is_gone_is_named_in_a_line(page: Any) -> None:
    page.route("**/v1/videos", lambda route: route.abort())
    click(page, "Make", "#form")
    expect(page.locator("#form-message")).to_have_text("The server does not answer: see whether it still runs.")


@in_a_browser
def test_the_key_is_asked_for_and_kept_nowhere(browser: Any) -> None:
    with serving(Fake(KEY)) as address, opened(browser, address) as page:
        expect(page.locator("#work")).to_be_hidden()
        secret = page.get_by_label("This server asks for its API key")
        expect(secret).to_be_focused()
        secret.fill("another")
        click(page, "Go on")
        expect(page.locator("#message")).to_have_text("That is not the key.")
        secret.fill(KEY)
        secret.press("Enter")
        page.get_by_role("spinbutton", name="Frames", exact=True).fill("3")
        click(page, "Make", "#form")
        state(page).to_contain_text("3 frames in")
        # Pictures of the list and files need it as well.
        expect(page.locator("#list img")).to_be_visible()
        click(page, "Watch")
        expect(page.locator("#film")).to_have_js_property("videoWidth", 64)
        click(page, "Close", "#player")
        assert KEY not in page.url
        page.reload()
        expect(secret).to_be_visible()


@in_a_browser
def test_all_of_it_works_below_a_path(browser: Any) -> None:
    with serving(Fake(KEY), "/some/where") as address, opened(browser, address) as page:
        page.get_by_label("This server asks for its API key").fill(KEY)
        click(page, "Go on")
        page.get_by_role("spinbutton", name="Frames", exact=True).fill("3")
        click(page, "Make", "#form")
        state(page).to_contain_text("3 frames in")
        assert page.url.startswith(f"{address}#video_")


@in_a_browser
def test_a_newcomer_needs_one_click(page: Any, fake: Fake) -> None:
    assert len(colours(page, "#sample")) > 10
    click(page, "Make an example")
    expect(page.locator(".card[data-status=completed]")).to_have_count(2)
    expect(page.locator("#empty")).to_be_hidden()


@in_a_browser
def test_the_keyboard_is_enough(page: Any, fake: Fake) -> None:
    def to(name: str) -> None:
        """Go on until the focus is on what is called so."""
        for _ in range(60):
            page.keyboard.press("Tab")
            label = "element => element.ariaLabel || element.labels?.[0]?.textContent || element.textContent"
            if page.locator(":focus").count() and page.locator(":focus").evaluate(label).strip().startswith(name):
                return
        raise AssertionError(f"no way to {name}")

    fake.about["tokenizer"]["fps"] = 0.1
    to("To the video")
    to("Prompt")
    page.keyboard.type(" and a circle")
    to("Frames")
    page.keyboard.press("Control+a")
    page.keyboard.type("5")
    page.keyboard.press("Enter")
    state(page).to_contain_text("5 frames in")
    assert fake.asked[0]["prompt"].endswith(" and a circle")
    to("Download")
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Token ids")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Token ids")).to_be_hidden()
    to("Extend")
    page.keyboard.press("Enter")
    expect(page.get_by_label("Frames to add")).to_be_focused()
    page.keyboard.press("Escape")
    to("Frame")
    page.keyboard.press("Home")
    expect(page.locator("#where")).to_contain_text("frame 0")
    to("Play")
    page.keyboard.press("Space")
    expect(page.locator("#play")).to_have_text("Pause")


@in_a_browser
def test_a_video_is_extended(page: Any, fake: Fake) -> None:
    page.get_by_role("spinbutton", name="Frames", exact=True).fill("6")
    click(page, "Make", "#form")
    state(page).to_contain_text("6 frames in")
    click(page, "Extend", ".card")
    expect(page.get_by_label("Frames to add")).to_have_value("10")
    page.get_by_label("Frames to add").fill("3")
    click(page, "Extend", "#extension")
    state(page).to_contain_text("3 frames in")
    expect(page.locator("#at")).to_have_attribute("max", "8")
    (first, _) = fake.videos
    assert fake.asked[1] == {"video": {"id": first}, "prompt": fake.asked[0]["prompt"], "num_frames": 3}
    slider = page.get_by_role("slider", name="Frame")
    slider.focus()
    slider.press("Home")
    expect(slider).to_have_attribute("aria-valuetext", "given frame 0")


@in_a_browser
def test_files_are_downloaded(page: Any, tmp_path: Path) -> None:
    page.get_by_role("spinbutton", name="Frames", exact=True).fill("4")
    click(page, "Make", "#form")
    state(page).to_contain_text("4 frames in")

    def download(name: str) -> bytes:
        page.locator(".card summary").click()
        with page.expect_download() as found:
            click(page, name, ".card")
        found.value.save_as(tmp_path / found.value.suggested_filename)
        assert re.fullmatch(r"video_[0-9a-f]{32}\.\w+", found.value.suggested_filename)
        return (tmp_path / found.value.suggested_filename).read_bytes()

    assert download("Video (MP4)")[4:8] == b"ftyp"
    assert download("All frames (JPEG)").startswith(b"\xff\xd8")
    assert len(download("Token ids")) == 36
    memory = json.loads(download("Memory (JSON)"))
    assert [own["frame"] for own in memory["events"]] == [0, 1, 2, 3]
    assert "picture" not in memory["events"][0]
    assert memory["events"][3]["blocks"][0] == [-1, 9]


@in_a_browser
def test_a_picture_is_chosen_dropped_or_taken(page: Any, fake: Fake, tmp_path: Path) -> None:
    shown = page.locator("#shown")
    click(page, "Remove", "#form")
    expect(shown).to_be_hidden()
    Image.new("RGB", (30, 20), "red").save(tmp_path / "red.png")
    page.locator("#file").set_input_files(tmp_path / "red.png")
    expect(shown).to_have_js_property("naturalWidth", 30)
    # One of more pixels than a server reads is made smaller.
    Image.new("L", (6000, 4000)).save(tmp_path / "large.jpg")
    page.locator("#file").set_input_files(tmp_path / "large.jpg")
    expect(shown).to_have_js_property("naturalWidth", 2508)
    (tmp_path / "no.png").write_text("no picture")
    page.locator("#file").set_input_files(tmp_path / "no.png")
    expect(page.locator("#form-message")).to_contain_text("no picture that can be read")
    expect(shown).to_have_js_property("naturalWidth", 2508)
    drop = """async area => {
        const data = new DataTransfer();
        const canvas = Object.assign(document.createElement("canvas"), { width: 12, height: 8 });
        canvas.getContext("2d").fillRect(0, 0, 9, 9);
        data.items.add(new File([await new Promise(done => canvas.toBlob(done))], "a.png", { type: "image/png" }));
        area.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
    }"""
    page.locator("#drop").evaluate(drop)
    expect(shown).to_have_js_property("naturalWidth", 12)
    click(page, "Camera", "#form")
    expect(page.locator("#finder")).to_have_js_property("readyState", 4)
    click(page, "Take picture")
    expect(shown).not_to_have_js_property("naturalWidth", 12)
    assert page.locator("#finder").evaluate("finder => finder.srcObject") is None
    click(page, "Make", "#form")
    state(page).to_contain_text("20 frames in")
    assert fake.asked[0]["input_reference"] == "image/png"


@in_a_browser
def test_a_server_without_pictures_takes_and_gives_ids(browser: Any) -> None:
    bare = {"text": False, "sizes": [], "size": None, "picture": "none", "fps": None, "options": {}, "examples": []}
    fake = Fake(tokenizer=bare)
    with serving(fake) as address, opened(browser, address) as page:
        expect(page.locator("#picture-field")).to_be_hidden()
        expect(page.get_by_role("button", name="Make an example")).to_be_hidden()
        click(page, "Make", "#form")
        expect(page.locator("#form-message")).to_contain_text("token ids")
        page.get_by_label("Token ids of the prompt").fill("[1, 2, 3]")
        click(page, "Make", "#form")
        state(page).to_contain_text("20 frames in")
        expect(page.locator(".card .blank")).to_be_visible()
        expect(page.get_by_role("button", name="Watch")).to_be_hidden()
        assert fake.asked == [{"prompt_ids": "[1, 2, 3]", "num_frames": "20"}]


@in_a_browser
def test_streams_of_a_guided_video_can_be_told_apart(page: Any, fake: Fake) -> None:
    runs = {
        "conditional": [[-1, 3], [0, 2]],
        "unconditional": {"blocks": [[-1, 1], [0, 2]], "resident_tokens": 40, "full_tokens": 80},
    }
    video = fake.create({"prompt": "guided", "num_frames": 1})
    frame = {"frame": 0, "frames": 1, "given": False, "pictures": 1, "seconds": 1, "progress": 99, "block_size": 16}
    whole = {
        "resident_blocks": 5,
        "resident_tokens": 70,
        "full_tokens": 80,
        "blocks": runs["conditional"],
        "streams": runs,
    }
    video.tell("frame", {**frame, **whole})
    video.shown["status"] = "completed"
    video.tell("completed", video.shown)
    page.reload()
    expect(page.locator(".card .tokens dd")).to_have_text("70 of 80")
    page.get_by_label("Stream").select_option("unconditional")
    expect(page.locator(".card .tokens dd")).to_have_text("40 of 80")


@in_a_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1440, 900), (1024, 768), (390, 844), (320, 700)])
def test_the_page_fits_into_its_window(browser: Any, tmp_path: Path, width: int, height: int, scheme: str) -> None:
    fake = Fake()
    with (
        serving(fake) as address,
        opened(browser, address, viewport={"width": width, "height": height}, color_scheme=scheme) as page,
    ):
        root = page.locator("html")
        expect(page.locator("#form")).to_be_visible()
        assert root.evaluate("root => root.scrollWidth") <= width
        click(page, "Compare with full")
        expect(page.locator(".card[data-status=completed]")).to_have_count(2)
        assert root.evaluate("root => root.scrollWidth") <= width
        # It is seen without a search.
        expect(page.locator(".card .picture").first).to_be_in_viewport()
        page.screenshot(path=tmp_path / "page.png")
        assert len(np.unique(np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).reshape(-1, 3), axis=0)) > 50


@in_a_browser
def test_what_was_watched_is_played_in_the_end_where_motion_is_welcome(browser: Any) -> None:
    fake = Fake()
    fake.allowed = 3
    with serving(fake) as address, opened(browser, address, reduced_motion="no-preference") as page:
        page.get_by_role("spinbutton", name="Frames", exact=True).fill("4")
        click(page, "Make", "#form")
        state(page).to_contain_text("3 of 4")
        watch = """button => {
            let before = button.textContent;
            new MutationObserver(() => {
                if (button.textContent === before) return;
                before = button.textContent;
                button.dataset.changes = `${button.dataset.changes ?? ""} ${before}`;
            }).observe(button, { childList: true });
        }"""
        page.locator("#play").evaluate(watch)
        fake.allowed = 4
        state(page).to_contain_text("4 frames in")
        # Once, and not for ever.
        expect(page.locator("#play")).to_have_attribute("data-changes", " Pause Play")
        expect(page.locator("#where")).to_contain_text("frame 3")
