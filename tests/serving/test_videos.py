"""Videos over HTTP on real servers: the ids are those of completions, and whatever dies, nothing hangs or is lost."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import httpx
import psutil
import pytest
from PIL import Image

from tests.serving.conftest import prompt
from tests.serving.video_clients import (
    CASES,
    ENDLESS,
    FRAME,
    KEY,
    ROOT,
    SLOTS,
    Case,
    begun,
    body,
    client_of,
    completion,
    create,
    ended,
    following,
    made,
    whole,
)
from vllm_packcache.demo.playground import BUNDLED, SERVED
from vllm_packcache.demo.tokenizer import FRAME_TOKENS, MODEL_DIR
from vllm_packcache.serving.server import serving
from vllm_packcache.videos.store import Store

if TYPE_CHECKING:
    from tests.serving.videos_server import VideoServer

pytest_plugins = ["tests.serving.videos_server"]

Expected = Callable[[Case], list[int]]


# --------------------------------------------------------------------------- one server


@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_ids_are_those_of_a_completion(videos: VideoServer, expected: Expected, case: Case) -> None:
    options = dict(case.options)
    assert whole(videos.client, case.ids, case.frames, options) == expected(case)
    own = {**options, "condition_tokens": case.condition}
    assert completion(videos.client, case.ids, case.frames * case.frame, own) == expected(case)


def test_what_is_drawn_is_drawn_as_for_a_completion(videos: VideoServer) -> None:
    ids, sampling = prompt(30, seed=7), {"temperature": 1.0, "top_p": 0.9, "top_k": 50, "seed": 5}
    drawn = whole(videos.client, ids, 4, **sampling)
    assert drawn == completion(videos.client, ids, 4 * FRAME, {"condition_tokens": 30}, **sampling)
    assert drawn != whole(videos.client, ids, 4, **{**sampling, "seed": 6})


def test_a_video_that_is_extended_equals_a_longer_one(videos: VideoServer, expected: Expected) -> None:
    case = Case(8, 30, 7, FRAME, (("window", 1),))
    name = create(videos.client, case.ids, 2, dict(case.options))
    assert ended(videos.client, name)["status"] == "completed"
    ids = made(videos.client, name)
    for frames in (1, 4):
        asked = {"video": name, "prompt": "more", "num_frames": frames}
        answer = videos.client.post("/v1/videos/extensions", json=asked)
        assert answer.status_code == 200, answer.text
        assert answer.json()["extended_from_video_id"] == name
        name = answer.json()["id"]
        assert ended(videos.client, name)["status"] == "completed"
        ids += made(videos.client, name)
    assert ids == expected(case)


def test_events_tell_of_every_frame_also_who_comes_late_or_again(videos: VideoServer) -> None:
    name = create(videos.client, prompt(30, seed=9), 5)
    events = list(following(videos.client, name))
    assert [number for number, _, _ in events] == [*range(1, 9)]
    assert [kind for _, kind, _ in events] == ["status", "status", *["frame"] * 5, "completed"]
    assert [data["status"] for _, kind, data in events if kind == "status"] == ["queued", "in_progress"]
    frames = [data for _, kind, data in events if kind == "frame"]
    assert [(data["frame"], data["frames"], data["tokens"]) for data in frames] == [
        (frame, 5, (frame + 1) * FRAME) for frame in range(5)
    ]
    # Of the first two nothing has to be dropped yet.
    assert frames[0]["resident_tokens"] == frames[0]["full_tokens"]
    assert frames[-1]["resident_tokens"] < frames[-1]["full_tokens"] == 30 + 5 * FRAME
    assert events[-1][2]["progress"] == 100
    assert list(following(videos.client, name)) == events
    assert list(following(videos.client, name, after=4)) == events[4:]
    end = videos.client.get(f"/v1/videos/{name}/events", headers={"Last-Event-ID": "8"})
    assert end.status_code == 204


def test_videos_are_listed_and_the_key_is_asked_for(videos: VideoServer) -> None:
    names = [create(videos.client, prompt(20, seed=number), 1) for number in range(5)]
    found: list[str] = []
    page = {"has_more": True, "last_id": None}
    while page["has_more"]:
        query = {"limit": 2, "order": "asc"} | ({"after": page["last_id"]} if found else {})
        page = videos.client.get("/v1/videos", params=query).json()
        found += [video["id"] for video in page["data"]]
    assert found == names
    for path, without in (("/v1/videos", 401), (f"/v1/videos/{names[0]}", 401), ("/v1/playground", 401),
                          (f"/v1/videos/{names[0]}/events", 401), ("/playground", 200)):  # fmt: skip
        assert httpx.get(f"{videos.url}{path}").status_code == without, path
        assert httpx.get(f"{videos.url}{path}", headers=KEY).status_code == 200, path
    assert httpx.post(f"{videos.url}/v1/videos", json=body([1], 1)).status_code == 401
    assert httpx.delete(f"{videos.url}/v1/videos/{names[0]}").status_code == 401


def test_the_page_is_found_where_a_proxy_puts_it(videos: VideoServer) -> None:
    """Behind a proxy that takes the root path away, and one that leaves it."""
    for root in ("", ROOT):
        page = httpx.get(f"{videos.url}{root}/playground")
        assert page.status_code == 200
        links = set(re.findall(r'(?:src|href)="([^"#:]+)"', page.text))
        assert any(link.endswith(".js") for link in links)
        for link in links:
            assert not link.startswith("/"), link
            assert httpx.get(f"{videos.url}{root}/{link}").status_code == 200, link
        assert videos.client.get(f"{root}/v1/videos").status_code == 200


def test_what_can_never_be_made_is_refused_at_once(videos: VideoServer) -> None:
    for options, frames, sentence in (
        ({"grid": [60, 60]}, 1, "blocks of 32 tokens, and the KV cache has 19: let the policy"),
        ({}, 2000, "tokens, and this server makes sequences of at most 20000: ask for fewer frames"),
        ({"gird": [3, 6]}, 1, "packcache_gird is no known option"),
    ):
        answer = videos.client.post("/v1/videos", json=body(prompt(30), frames, options))
        assert answer.status_code == 400, answer.text
        assert sentence in answer.json()["error"]["message"]
    assert videos.client.get("/v1/videos").json()["data"] == []
    assert videos.folders() == set()


def test_who_is_deleted_leaves_the_engine_whether_it_runs_or_waits(videos: VideoServer) -> None:
    running = [create(videos.client, prompt(20, seed=number), ENDLESS) for number in range(SLOTS)]
    for name in running:
        begun(videos.client, name)
    waiting = create(videos.client, prompt(20, seed=50), ENDLESS)
    # The engine admits no more than it has slots, and none of these ends.
    assert videos.client.get(f"/v1/videos/{waiting}").json()["status"] == "queued"
    for name in (waiting, *running):
        assert videos.client.delete(f"/v1/videos/{name}").status_code == 200
        assert videos.client.get(f"/v1/videos/{name}").status_code == 404
    videos.wait_until_empty()
    assert (videos.kept(), videos.folders()) == ([], set())


@pytest.mark.timeout(900)
def test_two_hundred_videos_at_once_on_a_small_pool_are_all_made(videos: VideoServer, expected: Expected) -> None:
    few = [case._replace(frames=2) for case in CASES]
    # Of the last four do not fit at once, and they come together.
    various, alike = [few[number % len(few)] for number in range(180)], [CASES[-1]._replace(frames=4)] * 20
    asked = [*various, *alike]
    preempted = videos.metrics()["vllm:num_preemptions_total"]
    # As long as these are made, all others wait.
    first = [create(videos.client, prompt(20, seed=number), ENDLESS) for number in range(SLOTS)]
    for name in first:
        begun(videos.client, name)

    async def post_all() -> list[str]:
        limits = httpx.Limits(max_connections=50)
        found = []
        async with httpx.AsyncClient(base_url=videos.url, headers=KEY, timeout=600, limits=limits) as client:
            for cases in (various, alike):
                answers = [client.post("/v1/videos", json=body(c.ids, c.frames, dict(c.options))) for c in cases]
                for answer in await asyncio.gather(*answers):
                    assert answer.status_code == 200, answer.text
                    found.append(answer.json()["id"])
        return found

    names = asyncio.run(post_all())
    kept = videos.kept()
    assert {job.status for job in kept if job.id in names} == {"queued"}
    for name in first:
        assert videos.client.delete(f"/v1/videos/{name}").status_code == 200
    assert len(set(names)) == len(asked)
    for name, case in zip(names, asked, strict=True):
        assert ended(videos.client, name)["status"] == "completed"
        assert made(videos.client, name) == expected(case), case
    assert videos.folders() == {job.id for job in videos.kept()} == set(names)
    assert videos.metrics()["vllm:num_preemptions_total"] > preempted


# --------------------------------------------------------------------------- servers that die


@pytest.mark.timeout(900)
def test_an_engine_that_is_killed_fails_its_videos_and_the_next_server_makes_others(
    videos: VideoServer, expected: Expected
) -> None:
    done = create(videos.client, CASES[0].ids, CASES[0].frames)
    assert ended(videos.client, done)["status"] == "completed"
    names = [create(videos.client, prompt(20, seed=number), ENDLESS) for number in range(SLOTS)]
    for name in names:
        begun(videos.client, name)
    names.append(create(videos.client, prompt(20, seed=50), ENDLESS))

    def follow(name: str) -> dict[str, Any] | None:
        """What is last said of it; none: the server was gone before."""
        with client_of(videos.url) as client:
            try:
                return ended(client, name)
            except httpx.TransportError:
                return None

    processes = videos.processes()
    with ThreadPoolExecutor(len(names)) as threads:
        last = [threads.submit(follow, name) for name in names]
        videos.engine().kill()
        said = [each.result() for each in last]
    _, orphans = psutil.wait_procs(processes, timeout=120)
    assert not orphans
    for each in said:
        assert each is None or each.get("error") is None or each["error"]["code"] == "engine_dead"
    videos.start(api_servers=2)
    check_failed(videos, names, {"engine_dead", "server_stopped"})
    # What was there is there.
    assert made(videos.client, done) == expected(CASES[0])
    assert whole(videos.client, CASES[1].ids, CASES[1].frames, dict(CASES[1].options)) == expected(CASES[1])


def check_failed(videos: VideoServer, names: list[str], codes: set[str]) -> None:
    """Every one has failed, says why, and has no files."""
    for name in names:
        last = ended(videos.client, name)
        assert last["status"] == "failed"
        assert last["error"]["code"] in codes, last["error"]
        assert videos.client.get(f"/v1/videos/{name}/content").status_code == 422
        assert not list((videos.folder / "videos" / name).iterdir())


@pytest.mark.timeout(900)
def test_two_api_servers_share_their_videos_until_one_is_killed(videos: VideoServer, expected: Expected) -> None:
    """What one was asked for is seen, followed and stopped by the other; the next server ends what was left."""
    if videos.api_servers != 2:
        videos.start(api_servers=2)
    case = CASES[0]
    for turn in (1, -1):
        # Anew: a connection that nobody has used for some seconds is closed, and the next one goes to either server.
        clients = videos.client_of_each(2)
        maker, other = sorted(clients)[::turn]
        one, two = clients[maker], clients[other]
        name = create(one, case.ids, case.frames)
        assert _owner(videos, name) == maker
        assert [kind for _, kind, _ in following(two, name)][-1] == "completed"
        assert made(two, name) == expected(case)
        assert name in [video["id"] for video in two.get("/v1/videos").json()["data"]]
        stopped = create(one, prompt(20, seed=51), ENDLESS)
        begun(two, stopped)
        assert two.delete(f"/v1/videos/{stopped}").status_code == 200
        assert one.get(f"/v1/videos/{stopped}").status_code == 404
        videos.wait_until_empty()
    (maker, one), (_, two) = videos.client_of_each(2).items()
    left = create(one, prompt(20, seed=52), ENDLESS)
    begun(two, left)
    process, *_ = videos.processes()
    psutil.Process(maker).kill()
    process.wait(120)
    videos.start()
    check_failed(videos, [left], {"server_stopped"})
    assert whole(videos.client, case.ids, case.frames) == expected(case)


def _owner(videos: VideoServer, name: str) -> int:
    """Process of the API server that makes a video."""
    (job,) = (job for job in videos.kept() if job.id == name)
    return int(job.owner.partition(":")[0])


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_only_api_server_is_killed(videos: VideoServer, expected: Expected) -> None:
    left = create(videos.client, prompt(20, seed=53), ENDLESS)
    begun(videos.client, left)
    process, *_ = videos.processes()
    process.kill()
    videos.start()
    check_failed(videos, [left], {"server_stopped"})
    assert whole(videos.client, CASES[0].ids, CASES[0].frames) == expected(CASES[0])


@pytest.mark.timeout(600)
def test_a_server_that_is_stopped_leaves_no_video_unfinished(videos: VideoServer) -> None:
    name = create(videos.client, prompt(20, seed=54), ENDLESS)
    begun(videos.client, name)
    videos.stop()
    with closing(Store(videos.folder, expire_seconds=None, quota_bytes=None)) as store:
        # If it was ended before it could write so, the next one does.
        store.sweep()
        job = store.get(name)
        assert job is not None
        assert job.error is not None
        assert job.error["code"] in {"server_stopped", "engine_dead", "engine_error"}
        store.delete(name)


# --------------------------------------------------------------------------- pictures


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, Path]]:
    """A client of a server of the bundled model with its tokenizer, and its store."""
    folder = tmp_path_factory.mktemp("demo")
    arguments = [
        "--kv-cache-policy", "packcache", "--kv-cache-policy-config", "demo", "--video-store", str(folder / "store"),
        "--video-tokenizer", "demo", "--served-model-name", "m", "--api-key", "secret", *SERVED, *BUNDLED["demo"].flags,
        # What is computed is computed in one way, whatever was before.
        "--no-enable-prefix-caching",
    ]  # fmt: skip
    with (
        serving(
            MODEL_DIR, arguments, folder / "log", lambda line: None, environment={"OMP_WAIT_POLICY": "PASSIVE"}
        ) as url,
        client_of(url) as client,
    ):
        yield client, folder / "store"


@pytest.mark.timeout(900)
def test_pictures_become_a_video_that_can_be_extended(demo: tuple[httpx.Client, Path]) -> None:
    client, store = demo
    example = client.get("/v1/playground").json()["tokenizer"]["examples"][0]
    picture = base64.b64decode(example["picture"].partition(",")[2])
    form = {"prompt": example["prompt"], "num_frames": "3", "packcache_window": "2"}
    answer = client.post("/v1/videos", data=form, files={"input_reference": ("a.png", picture, "image/png")})
    assert answer.status_code == 200, answer.text
    name = answer.json()["id"]
    events = list(following(client, name))
    frames = [data for _, kind, data in events if kind == "frame"]
    assert [(data["frame"], data["given"]) for data in frames] == [(0, True), (1, False), (2, False)]
    assert all(data["picture"].startswith("data:image/webp;base64,") for data in frames)
    last = events[-1][2]
    assert (last["status"], last["size"], last["seconds"], last["pictures"]) == ("completed", "64x64", "0.75", 3)
    assert last["decode_s"] > 0
    assert last["storage_s"] > 0
    assert _pictures(client, name) == 3
    for variant, kind in (("thumbnail", "WEBP"), ("spritesheet", "JPEG")):
        content = client.get(f"/v1/videos/{name}/content", params={"variant": variant}).content
        assert Image.open(io.BytesIO(content)).format == kind
    ids = made(client, name)
    assert len(ids) == 2 * FRAME_TOKENS
    said = json.loads((store / "videos" / name / "prepared.json").read_text(encoding="utf-8"))
    assert ids == completion(client, said["prompt_ids"], len(ids), {**said["options"], "window": 2})
    answer = client.post("/v1/videos/extensions", json={"video": name, "prompt": "", "num_frames": 1})
    assert answer.status_code == 200, answer.text
    longer = answer.json()["id"]
    more = [data for _, kind, data in following(client, longer) if kind == "frame"]
    assert [data["given"] for data in more] == [True, True, True, False]
    # What is known is shown as it was.
    assert [data["picture"] for data in more[:3]] == [data["picture"] for data in frames]
    assert _pictures(client, longer) == 4
    assert len(made(client, longer)) == FRAME_TOKENS


def _pictures(client: httpx.Client, name: str) -> int:
    """How many a finished video has."""
    content = client.get(f"/v1/videos/{name}/content")
    assert content.headers["content-type"] == "video/mp4"
    with av.open(io.BytesIO(content.content)) as video:
        return sum(1 for _ in video.decode(video=0))


# --------------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            ["--video-store", "/proc/videos"],
            r"--video-store: .?/proc/videos.? cannot keep videos \(.*\): name a folder",
        ),
        (["--video-store", ""], "--video-store"),
        (["--video-store", "{folder}", "--video-tokenizer", "nobody"], "--video-tokenizer"),
        (["--video-store", "{folder}", "--video-tokenizer", "demo_masked"], "--video-tokenizer"),
        (["--video-store", "{folder}", "--video-tokenizer", "{folder}"], "--video-tokenizer"),
        (["--video-store", "{folder}", "--video-tokenizer", "no_module:none"], "--video-tokenizer"),
        (["--video-tokenizer", "demo"], "--video-tokenizer needs --video-store"),
    ],
)
def test_bad_flags_are_refused_before_the_model_loads(
    tmp_path: Path, checkpoint: Path, vllm_command: Callable[..., tuple[Any, str]], flags: list[str], sentence: str
) -> None:
    own = [flag.format(folder=tmp_path) for flag in flags]
    arguments = ["--kv-cache-policy", "packcache", "--kv-cache-policy-config", json.dumps({"layout": {"grid": [3, 6]}})]
    status, output = vllm_command("serve", str(checkpoint), "--skip-tokenizer-init", *arguments, *own)
    assert status not in (0, None), output
    said = output.strip().splitlines()[-1] if isinstance(status, int) else str(status)
    assert re.search(sentence, said), output
    assert "Traceback" not in output
