"""What clients send for a video, in every shape, and whatever is wrong with it."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.strategies import quick
from tests.videos.dialect import MODEL, FakeJobs, make_app
from tests.videos.pictures import COLOUR, DATA_URL, PNG
from vllm_packcache.config.videos import VideosConfig
from vllm_packcache.videos import request as requests
from vllm_packcache.videos.request import VideoBody

FORM = "application/x-www-form-urlencoded"
MP4 = b"\x00\x00\x00\x18ftypisom" + bytes(40)


@pytest.fixture
def jobs(tmp_path: Path) -> FakeJobs:
    return FakeJobs(tmp_path)


@pytest.fixture
def client(jobs: FakeJobs) -> TestClient:
    return TestClient(make_app(jobs))


def multipart(fields: list[tuple[str, str]], files: list[tuple[str, bytes]] = ()) -> dict[str, Any]:  # type: ignore[assignment]
    """Fields as the official client sends them, each in a part of its own, and files."""
    sent: list[Any] = [(name, (None, value)) for name, value in fields]
    return {"files": sent + [(name, ("file", data)) for name, data in files]}


def read(client: TestClient, jobs: FakeJobs, **sent: Any) -> VideoBody:
    answer = client.post("/v1/videos", **sent)
    assert answer.status_code == 200, answer.text
    return jobs.bodies[-1]


def refused(client: TestClient, status: int = 400, path: str = "/v1/videos", **sent: Any) -> dict[str, Any]:
    answer = client.post(path, **sent)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    assert len(error["message"]) < 600
    return error


SAID: dict[str, Any] = {
    "prompt": "7", "model": MODEL, "size": "64x48", "seconds": "2.5", "num_frames": 8, "fps": 4, "seed": 3,
    "guidance_scale": 2.5, "negative_prompt": "true", "num_inference_steps": 6, "temperature": 0.5, "top_p": 1,
    "top_k": 0, "width": 64, "height": 48, "n": 1, "user": "me", "prompt_ids": [1, 2],
    "packcache_window": 4, "packcache_policy": "full", "packcache_grid": [2, 3], "packcache_exact": True,
    "packcache_none": None, "packcache_deep": {"a": {"b": [1.5, "x"]}},
}  # fmt: skip
READ = VideoBody(
    prompt="7",
    model=MODEL,
    size=(64, 48),
    seconds=2.5,
    num_frames=8,
    fps=4,
    seed=3,
    guidance_scale=2.5,
    negative_prompt="true",
    num_inference_steps=6,
    temperature=0.5,
    top_p=1,
    top_k=0,
    prompt_ids=(1, 2),
    options={
        "window": 4,
        "policy": "full",
        "grid": [2, 3],
        "exact": True,
        "none": None,
        "deep": {"a": {"b": [1.5, "x"]}},
    },
)


def flat(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """A value as the official client flattens it into fields."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from flat(part, f"{name}[{key}]")
    elif isinstance(value, list):
        for part in value:
            yield from flat(part, f"{name}[]")
    else:
        yield name, value if isinstance(value, str) else json.dumps(value)


def test_json_and_forms_say_the_same(client: TestClient, jobs: FakeJobs) -> None:
    fields = [field for name, value in SAID.items() for field in flat(value, name)]
    assert read(client, jobs, json=SAID) == READ
    assert read(client, jobs, content=json.dumps(SAID)) == READ
    assert read(client, jobs, **multipart(fields)) == READ
    body = "&".join(f"{name}={value}" for name, value in fields)
    assert read(client, jobs, content=body, headers={"content-type": FORM}) == READ
    # And lists and objects as JSON in one field.
    whole = [(name, value if isinstance(value, str) else json.dumps(value)) for name, value in SAID.items()]
    assert read(client, jobs, **multipart(whole)) == READ


def test_what_is_asked_of_a_processor(client: TestClient, jobs: FakeJobs) -> None:
    read(client, jobs, json=SAID)
    asked = jobs.asked[-1]
    assert (asked.prompt, asked.size, asked.frames, asked.seconds, asked.fps) == ("7", (64, 48), 8, 2.5, 4)
    assert (asked.seed, asked.guidance, asked.steps, asked.negative_prompt) == (3, 2.5, 6, "true")
    assert (asked.temperature, asked.top_p, asked.top_k, asked.ids) == (0.5, 1, 0, (1, 2))
    assert asked.options == READ.options
    assert (asked.picture, asked.clip) == (None, None)


def test_the_least_that_is_asked(client: TestClient, jobs: FakeJobs) -> None:
    assert read(client, jobs, json={"prompt": "a cat"}) == VideoBody(prompt="a cat")
    assert read(client, jobs, json={"prompt_ids": [5]}) == VideoBody(prompt_ids=(5,))
    # What a browser sends of a form whose fields are left empty.
    empty = multipart([("prompt", "a cat"), ("seed", ""), ("size", ""), ("negative_prompt", "")])
    empty["files"].append(("input_reference", ("", b"", "application/octet-stream")))
    assert read(client, jobs, **empty) == VideoBody(prompt="a cat")
    assert read(client, jobs, json={"prompt": "a cat", "seed": None, "input_reference": None}).seed is None


@pytest.mark.parametrize(
    "sent",
    [
        multipart([("prompt", "p")], [("input_reference", PNG)]),
        multipart([("prompt", "p"), ("input_reference", DATA_URL)]),
        multipart([("prompt", "p"), ("input_reference[image_url]", DATA_URL)]),
        multipart([("prompt", "p"), ("input_reference[image_url][url]", DATA_URL)]),
        {"json": {"prompt": "p", "input_reference": {"image_url": DATA_URL}}},
        {"json": {"prompt": "p", "input_reference": {"image_url": {"url": DATA_URL}}}},
        {"json": {"prompt": "p", "input_reference": DATA_URL}},
        {"json": {"prompt": "p", "input_reference": base64.b64encode(PNG).decode()}},
    ],
)
def test_a_picture_in_every_shape(client: TestClient, jobs: FakeJobs, sent: dict[str, Any]) -> None:
    assert read(client, jobs, **sent).picture == PNG
    np.testing.assert_array_equal(jobs.asked[-1].picture, np.full((3, 4, 3), COLOUR))


def test_a_large_data_url_is_a_field_like_any_other(client: TestClient, jobs: FakeJobs) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (900, 900, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    assert len(url) > 3 * 2**20
    read(client, jobs, **multipart([("prompt", "p"), ("input_reference", url)]))
    np.testing.assert_array_equal(jobs.asked[-1].picture, noise)


@pytest.mark.parametrize(
    ("data", "suffix"), [(MP4, ".mp4"), (b"\x1aE\xdf\xa3" + bytes(9), ".webm"), (b"GIF89a" + bytes(9), ".gif")]
)
def test_a_clip_is_written_and_removed(
    client: TestClient, jobs: FakeJobs, data: bytes, suffix: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    seen: list[bytes] = []
    begun = jobs._begun

    def looking(body: VideoBody, **more: Any) -> Any:
        assert body.clip is not None
        seen.append(body.clip.read_bytes())
        return begun(body, **more)

    monkeypatch.setattr(jobs, "_begun", looking)
    body = read(client, jobs, **multipart([("prompt", "p")], [("input_reference", data)]))
    assert body.clip is not None
    assert (body.clip.suffix, seen, body.picture) == (suffix, [data], None)
    assert body.clip.parent == folder
    assert not body.clip.exists()
    # Whatever becomes of the request.
    refused(client, 404, **multipart([("prompt", "p"), ("model", "x")], [("input_reference", data)]))
    assert not list(folder.iterdir())


WRONG: list[tuple[dict[str, Any], str | None, str]] = [
    ({}, "prompt", "prompt must say what is to be seen"),
    ({"prompt": ""}, "prompt", "prompt must say what is to be seen"),
    ({"prompt": 5}, "prompt", "prompt: input should be a valid string, not 5"),
    ({"prompt": "x" * 32_001}, "prompt", "at most 32000 characters"),
    ({"prompt": "p", "promt": 1}, "promt", "promt is no known field: known are prompt, model, size"),
    ({"prompt": "p", "picture": "x"}, "picture", "picture is no known field"),
    ({"prompt": "p", "options": {}}, "options", "options is no known field"),
    ({"prompt": "p", "a\nb" + "c" * 900: 1}, "'a\\nb" + "c" * 74 + "…", "is no known field"),
    ({"prompt": "p", "size": "64"}, "size", "size must be width x height in pixels, such as 256x256, not '64'"),
    ({"prompt": "p", "size": "0x64"}, "size", "size must be"),
    ({"prompt": "p", "size": "64x64x"}, "size", "size must be"),
    ({"prompt": "p", "size": "64x1000000"}, "size", "size must be"),
    ({"prompt": "p", "width": 64}, "height", "height is missing"),
    ({"prompt": "p", "width": 64, "height": True}, "height", "height must be a number of pixels"),
    ({"prompt": "p", "size": "64x64", "width": 64, "height": 32}, "size", "size is 64x64, and width and height are 64"),
    ({"prompt": "p", "seconds": "soon"}, "seconds", "seconds: input should be a valid number, not 'soon'"),
    ({"prompt": "p", "seconds": 0}, "seconds", "greater than 0"),
    ({"prompt": "p", "seconds": "1e999"}, "seconds", "seconds: input should be"),
    ({"prompt": "p", "seconds": "NaN"}, "seconds", "valid number"),
    ({"prompt": "p", "num_frames": 2.5}, "num_frames", "num_frames: input should be a valid integer, not 2.5"),
    ({"prompt": "p", "num_frames": True}, "num_frames", "valid integer"),
    ({"prompt": "p", "num_frames": -1}, "num_frames", "greater than or equal to 1"),
    ({"prompt": "p", "seed": [1]}, "seed", "valid integer"),
    ({"prompt": "p", "temperature": "warm"}, "temperature", "valid number"),
    ({"prompt": "p", "temperature": True}, "temperature", "valid number"),
    ({"prompt": "p", "n": 2}, "n", "n must be 1, not 2"),
    ({"prompt": "p", "user": {}}, "user", "user must be text"),
    ({"prompt_ids": 5}, "prompt_ids", "prompt_ids must be a list of token ids, not 5"),
    ({"prompt_ids": [1, -1]}, "prompt_ids", "prompt_ids.1: input should be greater than or equal to 0, not -1"),
    ({"prompt_ids": ["a"]}, "prompt_ids", "prompt_ids.0: input should be a valid integer, not 'a'"),
    ({"prompt": "p", "packcache_a": [[[[[1]]]]]}, "packcache_a", "packcache_a is nested too deep"),
    ({"prompt": "p", "input_reference": 5}, "input_reference", "input_reference must be a picture or a video"),
    ({"prompt": "p", "input_reference": {"file_id": "x"}}, "input_reference", "this has file_id"),
    ({"prompt": "p", "input_reference": {"image_url": None}}, "input_reference", "this is None"),
    ({"prompt": "p", "input_reference": "%%%"}, "input_reference", "this is '%%%'"),
    ({"prompt": "p", "input_reference": "ü"}, "input_reference", "this is 'ü'"),
    ({"prompt": "p", "input_reference": "data:image/png,abc"}, "input_reference", "this is 'data:image/png,abc'"),
    ({"prompt": "p", "input_reference": "data:image/png;base64,"}, "input_reference", "this is empty"),
    ({"prompt": "p", "input_reference": "file:///etc/passwd"}, "input_reference", "this is 'file:///etc/passwd'"),
    ({"prompt": "p", "input_reference": "bm8gcGljdHVyZQ=="}, "input_reference", "input_reference: "),
    ({"prompt": "p", "input_reference": "http://127.0.0.1:9/x"}, "input_reference", "fetches nothing from '127.0.0.1'"),
    ({"prompt": "p", "input_reference": "http://[::1"}, "input_reference", "input_reference must be"),
]


@pytest.mark.parametrize(("said", "param", "words"), WRONG)
def test_what_is_wrong_is_named(client: TestClient, said: dict[str, Any], param: str | None, words: str) -> None:
    error = refused(client, json=said)
    assert error["param"] == param
    assert words in error["message"]


def raw(content: bytes, kind: str) -> dict[str, Any]:
    return {"content": content, "headers": {"content-type": kind}}


PART = b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\np\r\n'
BROKEN: list[tuple[int, dict[str, Any], str]] = [
    (400, {"content": b"{"}, "the body must be a JSON object"),
    (400, {"content": b"[]"}, "the body must be a JSON object, not []"),
    (400, {"content": b"\xff\xfe"}, "the body must be a JSON object"),
    (400, {"content": b'{"prompt": "p", "seed": NaN}'}, "NaN is no number of JSON"),
    (400, {"content": b'{"prompt": "p", "seed": ' + b"9" * 5000 + b"}"}, "the body must be a JSON object"),
    (400, {"content": b"[" * 100_000}, "the body must be a JSON object"),
    (400, {"content": b'{"prompt": "\\ud800"}'}, "the body must be text, and has half of a character"),
    (415, raw(b"prompt=p", "text/plain"), "Content-Type must be multipart/form-data or application/json"),
    (400, raw(PART + b"--b--", "multipart/form-data"), "the body must be a form that can be read: Missing boundary"),
    (400, raw(b"no form", "multipart/form-data; boundary=b"), "the body must be a form that can be read"),
    (400, raw(PART[:-6], "multipart/form-data; boundary=b"), "prompt must say"),
    (400, raw(b"--b\r\nX: y\r\n\r\np\r\n--b--", "multipart/form-data; boundary=b"), "the body must be a form"),
    (400, raw(PART + PART + b"--b--", "multipart/form-data; boundary=b"), "prompt is given twice, or in two ways"),
    (400, raw(b"prompt=p&prompt=q", FORM), "prompt is given twice"),
    (400, raw(b"prompt=p&packcache_a=1&packcache_a[]=2", FORM), "packcache_a[] is given twice, or in two ways"),
    (400, raw(b"prompt=p&packcache_a[x]=1&packcache_a[]=2", FORM), "packcache_a[] is given twice, or in two ways"),
    (400, raw(b"prompt=p&packcache_a[]=1&packcache_a[x]=2", FORM), "packcache_a[x] is given twice, or in two ways"),
    (400, raw(b"prompt=p&packcache_a[=1", FORM), "packcache_a[ is no name of a field"),
    (400, raw(b"prompt=p&packcache_a[][x]=1", FORM), "packcache_a[][x] is no name of a field"),
    (400, raw(b"prompt=p&packcache_a[1][2][3][4][5]=1", FORM), "is no name of a field"),
    (400, raw(b"prompt=p&packcache_a[1][2]=[[[1]]]", FORM), "packcache_a[1][2] is nested too deep"),
    (400, raw(b"prompt[x]=p", FORM), "prompt: input should be a valid string"),
    (400, raw(b'{"prompt": "p"}', FORM), "is no known field"),
    (400, multipart([("prompt", "p")], [("input_reference", b"")]), "this is an empty file"),
    (400, multipart([("prompt", "p")], [("prompt_ids", PNG)]), "prompt_ids must be a list"),
    (400, multipart([("prompt", "p")], [("input_reference", PNG)] * 2), "input_reference is given twice"),
    (400, multipart([("prompt", "p")], [("x", PNG)] * 5), "Too many files"),
    (400, multipart([("prompt", "p")], [("input_reference", PNG[:40])]), "input_reference: "),
]


@pytest.mark.parametrize(("status", "sent", "words"), BROKEN)
def test_what_cannot_be_read_is_refused(client: TestClient, status: int, sent: dict[str, Any], words: str) -> None:
    assert words in refused(client, status, **sent)["message"]


def test_no_more_is_read_than_is_taken(client: TestClient, monkeypatch: pytest.MonkeyPatch, jobs: FakeJobs) -> None:
    monkeypatch.setattr(requests, "LARGEST_BODY", 5000)
    monkeypatch.setattr(requests, "LARGEST_FIELD", 500)
    for sent in (
        {"json": {"prompt": "p" * 5000}},
        multipart([("prompt", "p")], [("input_reference", bytes(5000))]),
        raw(b"prompt=" + b"p" * 5000, FORM),
    ):
        assert "the body must have at most 5000 bytes" in refused(client, 413, **sent)["message"]
    for sent in (
        {"json": {"prompt": "p" * 501}},
        multipart([("prompt", "p" * 501)]),
        raw(b"prompt=" + b"p" * 501, FORM),
    ):
        assert "a field must have at most 500 " in refused(client, 413, **sent)["message"]
    assert not jobs.bodies


def test_a_picture_of_too_many_pixels_is_not_decoded(client: TestClient, jobs: FakeJobs) -> None:
    file = io.BytesIO()
    # 100 megapixels in some 12 kB.
    Image.new("1", (10_000, 10_000)).save(file, "PNG")
    error = refused(client, **multipart([("prompt", "p")], [("input_reference", file.getvalue())]))
    assert error["param"] == "input_reference"
    assert "10000 x 10000 pixels" in error["message"]
    assert not jobs.asked


def test_an_extension_names_a_video(client: TestClient, jobs: FakeJobs) -> None:
    first = client.post("/v1/videos", json={"prompt": "p", "num_frames": 4}).json()["id"]
    jobs.make(first, 4)
    jobs.complete(first)
    path = "/v1/videos/extensions"
    for sent in (
        {"json": {"video": {"id": first}, "prompt": "q", "seconds": "1"}},
        {"json": {"video": first, "prompt": "q", "seconds": 1}},
        multipart([("video[id]", first), ("prompt", "q"), ("seconds", "1")]),
        multipart([("video", first), ("prompt", "q"), ("seconds", "1")]),
    ):
        answer = client.post(path, **sent)
        assert answer.status_code == 200, answer.text
        assert (answer.json()["frames"], answer.json()["extended_from_video_id"]) == (8, first)
        assert jobs.bodies[-1] == VideoBody(prompt="q", seconds=1)
    # Without a prompt it goes on with its own.
    assert client.post(path, json={"video": first}).status_code == 200
    for sent, words in (
        ({"json": {"prompt": "q"}}, "video must be the id of a video, or an object with it, not None"),
        ({"json": {"video": {"id": 5}}}, "video must be the id"),
        ({"json": {"video": {"url": "x"}}}, "video must be the id"),
        (multipart([("prompt", "q")], [("video", MP4)]), "to continue a file, give it as input_reference"),
    ):
        error = refused(client, path=path, **sent)
        assert error["param"] == "video"
        assert words in error["message"]
    assert refused(client, 404, path, json={"video": "video_x/../y"})["code"] == "video_not_found"


def test_a_remix_has_a_prompt_only(client: TestClient, jobs: FakeJobs) -> None:
    first = client.post("/v1/videos", json={"prompt": "p", "num_frames": 4}).json()["id"]
    path = f"/v1/videos/{first}/remix"
    answer = client.post(path, json={"prompt": "q"})
    assert (answer.json()["prompt"], answer.json()["remixed_from_video_id"]) == ("q", first)
    assert client.post(path, **multipart([("prompt", "q")])).status_code == 200
    assert refused(client, path=path, json={})["param"] == "prompt"
    error = refused(client, path=path, json={"prompt": "q", "seed": 3})
    assert error["message"] == "seed is no known field: known are prompt"
    assert (
        "packcache_a is no known field" in refused(client, path=path, json={"prompt": "q", "packcache_a": 1})["message"]
    )


# Fetched pictures


class Host(BaseHTTPRequestHandler):
    """A host that has a picture, and everything that is wrong."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        status = {"/moved": 302, "/none": 404}.get(self.path, 200)
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "/picture")
        self.end_headers()
        if self.path == "/large":
            self.wfile.write(bytes(5000))
        elif self.path != "/empty":
            self.wfile.write(PNG)

    def log_message(self, *args: Any) -> None:
        """Nothing is said."""


@pytest.fixture
def host() -> Iterator[str]:
    Host.asked = []
    with HTTPServer(("127.0.0.1", 0), Host) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_a_picture_is_fetched_from_hosts_that_are_allowed(
    host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "LARGEST_FIELD", 4000)
    jobs = FakeJobs(tmp_path, VideosConfig(allowed_hosts=(host,)))
    client = TestClient(make_app(jobs))
    assert read(client, jobs, json={"prompt": "p", "input_reference": f"http://{host}/picture"}).picture == PNG
    assert Host.asked == ["/picture"]
    for path, words in (
        ("/moved", "its host answers 302"),
        ("/none", "its host answers 404"),
        ("/large", "it has more than 4000 bytes"),
        ("/empty", "it is empty"),
    ):
        error = refused(client, json={"prompt": "p", "input_reference": {"image_url": f"http://{host}{path}"}})
        assert words in error["message"]
    asked = len(Host.asked)
    other = f"localhost:{host.partition(':')[2]}"
    for url in (f"http://{other}/x", f"http://{host}@{other}/x", "http://127.0.0.1/x", "https://127.0.0.1:1/x"):
        assert "fetches nothing" in refused(client, json={"prompt": "p", "input_reference": url})["message"]
    assert len(Host.asked) == asked
    # What else is wrong is found before anything is fetched.
    refused(client, json={"prompt": "p", "seed": "x", "input_reference": f"http://{host}/picture"})
    assert len(Host.asked) == asked


def test_a_host_that_is_not_there(tmp_path: Path) -> None:
    client = TestClient(make_app(FakeJobs(tmp_path, VideosConfig(allowed_hosts=("127.0.0.1:1",)))))
    error = refused(client, json={"prompt": "p", "input_reference": "http://127.0.0.1:1/x"})
    assert "its host does not answer (ConnectError)" in error["message"]


# Anything at all

_names = st.text(alphabet="ab[]_\x00é", max_size=8) | st.sampled_from([*SAID, "packcache_a[]", "packcache_a[x]"])
_texts = st.text(alphabet='1e-[]{}:",tru\x00é', max_size=9)
_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | _texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_texts, inner, max_size=3),
    max_leaves=6,
)
_slowly = settings(quick, suppress_health_check=[HealthCheck.too_slow])


@_slowly
@given(said=st.dictionaries(_names, _values, max_size=5))
def test_json_of_any_kind_is_read_or_refused(said: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    client = _client_of_any(tmp_path_factory)
    assert client.post("/v1/videos", content=json.dumps(said)).status_code in (200, 400, 404)


@_slowly
@given(fields=st.lists(st.tuples(_names, _texts), max_size=5))
def test_forms_of_any_kind_are_read_or_refused(
    fields: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    client = _client_of_any(tmp_path_factory)
    answer = client.post("/v1/videos", **multipart([("prompt", "p"), *fields]))
    assert answer.status_code in (200, 400, 404)


@_slowly
@given(content=st.binary(max_size=60))
def test_bytes_of_any_kind_are_refused(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    client = _client_of_any(tmp_path_factory)
    for kind in ("multipart/form-data; boundary=b", "application/json", FORM):
        answer = client.post("/v1/videos", content=PART[:30] + content, headers={"content-type": kind})
        assert 400 <= answer.status_code < 500
        assert answer.json()["error"]["message"]


_ANY: list[TestClient] = []


def _client_of_any(tmp_path_factory: pytest.TempPathFactory) -> TestClient:
    if not _ANY:
        _ANY.append(TestClient(make_app(FakeJobs(tmp_path_factory.mktemp("any"), VideosConfig(most_unfinished=10**6)))))
    return _ANY[0]
