"""The dialect's routes: objects, pages of the list, files, events, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from tests.videos.dialect import CONTENT, MODEL, TOKENS, FakeJobs, make_app, piece, served
from vllm_packcache.videos.routes import POLL, VARIANTS, Routes
from vllm_packcache.videos.store import Full, NoSpace, StoreBusy, StoreFull

FIELDS = (
    "id", "object", "model", "status", "progress", "created_at", "completed_at", "expires_at", "prompt", "size",
    "seconds", "remixed_from_video_id", "error",
)  # fmt: skip
"""Of a video object, all of which the dialect requires."""


@pytest.fixture
def jobs(tmp_path: Path) -> FakeJobs:
    return FakeJobs(tmp_path)


@pytest.fixture
def client(jobs: FakeJobs) -> TestClient:
    return TestClient(make_app(jobs))


@pytest.fixture
def live(jobs: FakeJobs) -> Iterator[httpx.Client]:
    """Over a socket: answers come piece by piece."""
    with served(make_app(jobs)) as url, httpx.Client(base_url=url, timeout=20) as client:
        yield client


def begin(client: Any, frames: int = 4, **more: Any) -> str:
    answer = client.post("/v1/videos", json={"prompt": "a cat", "num_frames": frames, **more})
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


def refused(answer: httpx.Response, status: int, words: str, **more: Any) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert words in error["message"]
    assert {name: error[name] for name in more} == more


# Objects


def test_a_video_from_its_beginning_to_its_end(client: TestClient, jobs: FakeJobs) -> None:
    answer = client.post("/v1/videos", json={"prompt": "a cat", "num_frames": 4, "packcache_window": 3})
    assert answer.headers["openai-poll-after-ms"] == str(POLL)
    video = answer.json()
    assert set(FIELDS) <= set(video)
    name = video["id"]
    shown = {"object": "video", "status": "queued", "progress": 0, "model": MODEL, "prompt": "a cat", "size": "64x64"}
    shown |= {"seconds": "1", "fps": 4, "frames": 4, "error": None, "completed_at": None, "options": {"window": 3}}
    assert {field: video[field] for field in shown} == shown
    jobs.make(name, 3)
    answer = client.get(f"/v1/videos/{name}")
    assert "openai-poll-after-ms" in answer.headers
    assert (answer.json()["status"], answer.json()["progress"]) == ("in_progress", 75)
    assert answer.json()["started_at"] >= video["created_at"]
    jobs.make(name, 1)
    assert client.get(f"/v1/videos/{name}").json()["progress"] == 99
    jobs.complete(name)
    answer = client.get(f"/v1/videos/{name}")
    assert "openai-poll-after-ms" not in answer.headers
    video = answer.json()
    assert (video["status"], video["progress"], video["tokens"]) == ("completed", 100, 4 * TOKENS)
    assert (video["pictures"], video["resident_tokens"], video["inference_time_s"]) == (4, 544, 1.5)
    assert video["completed_at"] >= video["created_at"]


def test_a_result_does_not_hide_what_the_dialect_says(client: TestClient, jobs: FakeJobs) -> None:
    name = begin(client)
    jobs.store.complete(name, {"status": "odd", "id": 5, "own": 1})
    video = client.get(f"/v1/videos/{name}").json()
    assert (video["status"], video["id"], video["own"]) == ("completed", name, 1)


def test_a_failed_video_says_why(client: TestClient, jobs: FakeJobs) -> None:
    name = begin(client)
    jobs.store.fail(name, "out_of_memory", "the GPU is full")
    video = client.get(f"/v1/videos/{name}").json()
    assert (video["status"], video["error"]) == ("failed", {"code": "out_of_memory", "message": "the GPU is full"})
    for variant in (*VARIANTS, "live"):
        answer = client.get(f"/v1/videos/{name}/content?variant={variant}")
        refused(answer, 422, "this video could not be made: the GPU is full", code="out_of_memory")
    refused(client.post("/v1/videos/extensions", json={"video": name}), 422, "could not be made")


def test_a_deleted_video_is_gone(client: TestClient, jobs: FakeJobs) -> None:
    name = begin(client)
    answer = client.delete(f"/v1/videos/{name}")
    assert answer.json() == {"id": name, "object": "video.deleted", "deleted": True}
    for method, path in (
        ("GET", ""), ("DELETE", ""), ("GET", "/content"), ("GET", "/content?variant=live"), ("GET", "/events"),
        ("POST", "/remix"),
    ):  # fmt: skip
        body = {"json": {"prompt": "q"}} if method == "POST" else {}
        answer = client.request(method, f"/v1/videos/{name}{path}", **body)
        refused(answer, 404, "there is no video of this id", code="video_not_found")


NAMES = (
    "x",
    "video_",
    "..",
    "%2e%2e",
    "a/b",
    "a%2Fb",
    "..%2F..%2Fvideos.sqlite3",
    "video_" + "0" * 32,
    "%00",
    "é" * 99,
)


@pytest.mark.parametrize("name", NAMES)
def test_names_that_are_none(client: TestClient, jobs: FakeJobs, name: str) -> None:
    begin(client)
    for method, path in (("GET", ""), ("GET", "/content"), ("GET", "/events"), ("DELETE", ""), ("POST", "/remix")):
        body = {"json": {"prompt": "q"}} if method == "POST" else {}
        answer = client.request(method, f"/v1/videos/{name}{path}", **body)
        # Clients take dots out of a path before they send it.
        assert answer.status_code in ((404, 405) if name == ".." else (404,)), (method, path)
        assert name == ".." or answer.json()["error"]["message"]
    assert len(jobs.store.list(after=None, limit=5, order="asc")[0]) == 1


def test_only_the_model_that_is_served(client: TestClient, jobs: FakeJobs) -> None:
    begin(client, model=MODEL)
    answer = client.post("/v1/videos", json={"prompt": "p", "model": "/etc/passwd"})
    refused(answer, 404, "model must be demo, which is served here", param="model", code="model_not_found")
    assert len(jobs.bodies) == 1


def test_what_is_not_to_be_had(client: TestClient) -> None:
    refused(client.post("/v1/videos/edits", json={"video": "x"}), 400, "no model that is served here changes a video")
    refused(client.post("/v1/videos/characters"), 404, "there is nothing at this path")
    refused(client.get("/v1/videos/"), 404, "there is nothing at this path")


@pytest.mark.parametrize(
    ("error", "status", "wait"),
    [(Full("f"), 429, "5"), (NoSpace("n"), 507, None), (StoreFull("s"), 507, None), (StoreBusy("b"), 503, "1")],
)
def test_a_store_that_cannot(
    client: TestClient, jobs: FakeJobs, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int, wait: str | None
) -> None:
    def failing(*args: Any, **more: Any) -> Any:
        raise error

    monkeypatch.setattr(jobs.store, "create", failing)
    answer = client.post("/v1/videos", json={"prompt": "p"})
    refused(answer, status, str(error))
    assert answer.headers.get("retry-after") == wait
    # Clients ask again by themselves but where it is of no use.
    assert answer.headers.get("x-should-retry") == ("false" if wait is None else None)


def test_a_full_disk_that_an_upload_meets(client: TestClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*args: Any, **more: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vllm_packcache.videos.request._written", full)
    answer = client.post("/v1/videos", data={"prompt": "p"}, files={"input_reference": b"GIF89a" + bytes(9)})
    refused(answer, 507, "the disk is full", code="disk_full")


# The list


def test_pages_of_the_list(client: TestClient) -> None:
    assert client.get("/v1/videos").json() == {
        "object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False,
    }  # fmt: skip
    names = [begin(client) for _ in range(5)]

    def listed(**query: Any) -> tuple[list[str], bool]:
        page = client.get("/v1/videos", params=query).json()
        found = [video["id"] for video in page["data"]]
        assert (page["first_id"], page["last_id"]) == ((found[0], found[-1]) if found else (None, None))
        return found, page["has_more"]

    assert listed() == (names[::-1], False)
    assert listed(order="asc", limit=2) == (names[:2], True)
    assert listed(order="asc", limit=2, after=names[1]) == (names[2:4], True)
    assert listed(order="asc", limit=2, after=names[3]) == (names[4:], False)
    assert listed(limit=3, after=names[3]) == (names[2::-1], False)
    assert listed(limit=0) == ([], True)
    assert listed(limit=0, after=names[0]) == ([], False)


@pytest.mark.parametrize(
    ("query", "param"),
    [("limit=101", "limit"), ("limit=-1", "limit"), ("limit=x", "limit"), ("limit=²", "limit"), ("order=up", "order"),
     ("after=nobody", "after"), ("limit=" + "9" * 5000, "limit")],
)  # fmt: skip
def test_pages_that_are_none(client: TestClient, query: str, param: str) -> None:
    refused(client.get(f"/v1/videos?{query}"), 400, f"{param} must be", param=param)


# Files


@pytest.fixture
def made(client: TestClient, jobs: FakeJobs) -> str:
    name = begin(client)
    jobs.make(name, 4)
    jobs.complete(name)
    return name


def test_files_of_a_video(client: TestClient, made: str) -> None:
    for variant, (file, kind) in VARIANTS.items():
        answer = client.get(f"/v1/videos/{made}/content?variant={variant}")
        assert answer.content == CONTENT[variant]
        assert answer.headers["content-type"] == kind
        suffix = file.rpartition(".")[2]
        assert answer.headers["content-disposition"] == f'inline; filename="{made}.{suffix}"'
    assert client.get(f"/v1/videos/{made}/content").content == CONTENT["video"]
    assert client.get(f"/v1/videos/{made}/content?variant=live").content == CONTENT["video"]
    for variant in ("x", "", "../ids", "VIDEO"):
        answer = client.get(f"/v1/videos/{made}/content", params={"variant": variant})
        refused(answer, 400, "variant must be video, thumbnail, spritesheet, ids or live", param="variant")


def test_files_that_are_not_there_yet(client: TestClient, jobs: FakeJobs) -> None:
    name = begin(client)
    jobs.make(name, 1)
    answer = client.get(f"/v1/videos/{name}/content")
    refused(answer, 409, "this video is 25 percent made: wait until it is completed", code="not_ready")
    assert answer.headers["x-should-retry"] == "false"
    refused(client.post("/v1/videos/extensions", json={"video": name}), 409, "is 25 percent made", param="video")


def test_a_video_of_ids_only(client: TestClient, jobs: FakeJobs) -> None:
    name = begin(client)
    jobs.store.path(name, "ids.i4").write_bytes(b"\x01\0\0\0")
    jobs.store.complete(name, {})
    assert client.get(f"/v1/videos/{name}/content?variant=ids").content == b"\x01\0\0\0"
    answer = client.get(f"/v1/videos/{name}/content")
    refused(answer, 404, "this video has no video: its server makes no pictures", code="no_pictures")


def test_a_range_of_a_file(client: TestClient, made: str) -> None:
    data, size = CONTENT["video"], len(CONTENT["video"])
    path = f"/v1/videos/{made}/content"
    for wanted, start, stop in (
        ("bytes=0-9", 0, 10), ("bytes=10-", 10, size), ("bytes=-7", size - 7, size), ("bytes=-99999", 0, size),
        ("bytes=5-99999", 5, size), ("bytes = 0 - 0", 0, 1),
    ):  # fmt: skip
        answer = client.get(path, headers={"range": wanted})
        assert (answer.status_code, answer.content) == (206, data[start:stop]), wanted
        assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/{size}"
        assert answer.headers["content-length"] == str(stop - start)
    whole = ("bytes=0-1,4-5", "bytes=9-2", "bytes=-", "lines=0-1", "bytes=x-", "bytes=" + "9" * 5000 + "-")
    for wanted in whole:
        answer = client.get(path, headers={"range": wanted})
        assert (answer.status_code, answer.content) == (200, data), wanted
    for wanted in (f"bytes={size}-", "bytes=-0", "bytes=999999999999999999-"):
        refused(client.get(path, headers={"range": wanted}), 416, f"before byte {size}")
    tag = client.get(path).headers["etag"]
    for own, status in ((tag, 206), ('"other"', 200)):
        assert client.get(path, headers={"range": "bytes=1-2", "if-range": own}).status_code == status


def test_a_file_that_is_deleted_while_it_is_sent(live: httpx.Client, jobs: FakeJobs) -> None:
    name = begin(live)
    large = bytes(range(256)) * 2**16
    jobs.store.path(name, "video.mp4").write_bytes(large)
    jobs.store.complete(name, {})
    with live.stream("GET", f"/v1/videos/{name}/content") as answer:
        pieces = answer.iter_raw(2**16)
        first = next(pieces)
        assert live.delete(f"/v1/videos/{name}").status_code == 200
        assert not jobs.store.path(name, "video.mp4").exists()
        assert first + b"".join(pieces) == large


def test_a_video_that_grows(live: httpx.Client, jobs: FakeJobs) -> None:
    name = begin(live)
    with live.stream("GET", f"/v1/videos/{name}/content?variant=live") as answer:
        assert answer.headers["content-type"] == "video/mp4"
        pieces = answer.iter_raw()
        for number in range(4):
            jobs.make(name, 1)
            assert next(pieces) == piece(number)
        jobs.store.path(name, "growing.mp4").unlink()
        jobs.complete(name)
        assert list(pieces) == []


def test_a_growing_video_that_is_not_seen_to_grow(live: httpx.Client, jobs: FakeJobs) -> None:
    name = begin(live)
    with live.stream("GET", f"/v1/videos/{name}/content?variant=live") as answer:
        jobs.complete(name)
        assert answer.read() == CONTENT["video"]


def test_a_growing_video_that_ends_early(live: httpx.Client, jobs: FakeJobs) -> None:
    for end in (jobs.store.delete, lambda name: jobs.store.fail(name, "x", "y")):
        name = begin(live)
        jobs.make(name, 2)
        with live.stream("GET", f"/v1/videos/{name}/content?variant=live") as answer:
            pieces = answer.iter_raw()
            assert next(pieces) == piece(0) + piece(1)
            end(name)
            assert list(pieces) == []


# Events


def events_of(lines: Iterator[str]) -> Iterator[tuple[int | None, str, dict[str, Any]]]:
    """Events as clients read them; comments are left out."""
    number, kind, data = None, "", ""
    for line in lines:
        field, _, value = line.partition(": ")
        match field:
            case "id":
                number = int(value)
            case "event":
                kind = value
            case "data":
                data = value
            case "" if data:
                yield number, kind, json.loads(data)
                number, kind, data = None, "", ""


def followed(client: Any, name: str, headers: dict[str, str] | None = None, query: str = "") -> list[Any]:
    """All events up to the last one."""
    answer = client.get(f"/v1/videos/{name}/events{query}", headers=headers or {})
    assert answer.status_code == 200, answer.text
    return list(events_of(iter(answer.text.split("\n"))))


def test_frames_as_they_are_made(live: httpx.Client, jobs: FakeJobs) -> None:
    name = begin(live, 2)
    with live.stream("GET", f"/v1/videos/{name}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-accel-buffering"] == "no"
        lines = answer.iter_lines()
        events = events_of(lines)
        number, kind, video = next(events)
        assert (number, kind, video["id"], video["status"]) == (1, "status", name, "queued")
        # Nothing happens, and the connection is alive.
        assert any(line == ": heartbeat" for line in lines)
        jobs.make(name, 1)
        number, kind, video = next(events)
        assert (number, kind, video["status"]) == (2, "status", "in_progress")
        number, kind, frame = next(events)
        assert (number, kind, frame["object"], frame["frame"]) == (3, "frame", "video.frame", 0)
        assert frame["picture"] == "data:image/webp;base64,d2VicCBvZiAw"
        jobs.make(name, 1)
        assert next(events)[2]["frame"] == 1
        jobs.complete(name)
        number, kind, video = next(events)
        assert (number, kind, video["progress"], video["pictures"]) == (5, "completed", 100, 4)
        assert list(events) == []


def test_who_comes_late_catches_up(client: TestClient, made: str) -> None:
    events = followed(client, made)
    assert [event[:2] for event in events] == [
        (1, "status"), (2, "status"), (3, "frame"), (4, "frame"), (5, "frame"), (6, "frame"), (7, "completed"),
    ]  # fmt: skip
    # As they were: a client that stops at a video that is there would miss its frames.
    assert [event[2]["status"] for event in events[:2]] == ["queued", "in_progress"]
    assert [event[2]["progress"] for event in events[:2]] == [0, 0]
    assert [event[2]["completed_at"] for event in events[:2]] == [None, None]
    assert followed(client, made, {"last-event-id": "4"}) == events[4:]
    assert followed(client, made, query="?after=4") == events[4:]
    # What has been seen counts, not what was first asked for.
    assert followed(client, made, {"last-event-id": "6"}, "?after=1") == events[6:]
    # Nothing more will come, which ends an EventSource.
    assert client.get(f"/v1/videos/{made}/events", headers={"last-event-id": "7"}).status_code == 204
    for seen in ("x", "-1", "1e3", "9" * 30):
        answer = client.get(f"/v1/videos/{made}/events", headers={"last-event-id": seen})
        refused(answer, 400, "after must be a number", param="after")


def test_events_of_a_video_that_fails(client: TestClient, jobs: FakeJobs) -> None:
    name = begin(client)
    jobs.make(name, 2)
    jobs.store.fail(name, "out_of_memory", "the GPU is full")
    events = followed(client, name)
    assert events[-1][1] == "failed"
    assert events[-1][2]["error"]["code"] == "out_of_memory"
    # Its pictures went with its files.
    assert [("picture" in data) for _, kind, data in events if kind == "frame"] == [False, False]


def test_events_of_a_video_that_is_deleted(live: httpx.Client, jobs: FakeJobs) -> None:
    name = begin(live)
    with live.stream("GET", f"/v1/videos/{name}/events") as answer:
        events = events_of(answer.iter_lines())
        next(events)
        live.delete(f"/v1/videos/{name}")
        ((number, kind, data),) = list(events)
    assert (number, kind, data["error"]["code"]) == (None, "error", "video_not_found")


def test_events_while_the_store_is_locked(client: TestClient, jobs: FakeJobs, monkeypatch: pytest.MonkeyPatch) -> None:
    name = begin(client)

    async def failing(id: str, after: int) -> Any:
        yield None
        raise StoreBusy("the store is locked")

    monkeypatch.setattr(jobs, "follow", failing)
    ((_, kind, data),) = followed(client, name)
    assert (kind, data["error"]["code"]) == ("error", "store_busy")


def test_a_client_that_goes_leaves_nobody_following(
    live: httpx.Client, jobs: FakeJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow, left = jobs.follow, []

    async def followed_by(id: str, after: int) -> Any:
        try:
            async for event in follow(id, after):
                yield event
        finally:
            left.append(id)

    monkeypatch.setattr(jobs, "follow", followed_by)
    name = begin(live)
    for path in ("events", "content?variant=live"):
        with live.stream("GET", f"/v1/videos/{name}/{path}") as answer:
            assert answer.status_code == 200
    # The server sees that it has gone when it next has something to send: at a heartbeat, or with the next frame.
    jobs.make(name, 1)
    jobs.complete(name)
    while left != [name, name]:
        assert live.get(f"/v1/videos/{name}").status_code == 200


# The page, and the plugin


def test_the_page_is_served_with_strict_headers(client: TestClient) -> None:
    answer = client.get("/playground")
    assert answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; ")
    assert {"img-src 'self' data: blob:", "media-src blob:", "script-src 'self'"} <= set(policy.split("; "))
    assert "unsafe" not in policy
    assert client.get("/playground/playground.js").headers["content-type"].startswith("text/javascript")
    for name in ("playground.html", "../routes.py", "%2e%2e/routes.py", "nothing.js"):
        assert client.get(f"/playground/{name}").status_code == 404
    assert client.get("/v1/playground").json() == {"object": "playground", "model": MODEL}


def test_the_plugin_opens_jobs_and_stops_them(tmp_path: Path) -> None:
    import asyncio
    from argparse import Namespace

    from fastapi import FastAPI

    jobs = FakeJobs(tmp_path)

    async def opened(engine: Any, args: Namespace) -> FakeJobs:
        assert (engine, args.video_store) == ("engine", "here")
        return jobs

    routes, app = Routes(opened), FastAPI()
    routes.attach_router(app)
    # As `vllm launch render` does.
    asyncio.run(routes.init_state(None, app.state, Namespace()))
    with TestClient(app) as client:
        for path in ("/v1/videos", "/v1/playground", "/playground"):
            assert client.get(path).status_code == 404
    asyncio.run(routes.init_state("engine", app.state, Namespace(video_store="here")))
    with TestClient(app) as client:
        assert client.get("/v1/videos").json()["data"] == []
        assert not jobs.stopped
    assert jobs.stopped
