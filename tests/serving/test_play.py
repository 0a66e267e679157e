"""Sessions over HTTP on a real server: an action in, a frame out, and whatever clients do wrong."""

from __future__ import annotations

import asyncio
import json
import runpy
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import websockets

from tests.serving.conftest import prompt
from tests.serving.test_frame_ids import CONFIG, GRID, check, literally, played, video
from vllm_packcache.serving.server import serving

SERVER = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
IDLE = 12.0
LARGE = [9, 14]
"""A grid of frames that take their time."""


class Squares:
    """A picture of a frame: a pixel for each id."""

    size = (GRID[1], GRID[0])

    def decode(self, ids: np.ndarray) -> np.ndarray:
        return np.repeat(ids[..., None], 3, axis=2).astype(np.uint8)

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        return np.clip(pixels[..., 0], 20, 119).astype(np.int64)


PLAYED = {**CONFIG, "sessions": {"idle_seconds": IDLE, "heartbeat_seconds": 0.5, "pictures": f"{__name__}:Squares"}}


@pytest.fixture(scope="module")
def url(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """``vllm serve`` with a key, and a KV cache of 60 blocks."""
    arguments = [
        "--kv-cache-policy", "packcache", "--kv-cache-policy-config", json.dumps(PLAYED), "--skip-tokenizer-init",
        "--served-model-name", "m", "--dtype", "float32", "--enforce-eager", "--max-model-len", "1600",
        "--block-size", "32", "--num-gpu-blocks-override", "60", "--max-num-seqs", "20",
        "--max-num-batched-tokens", "128", "--api-key", "secret",
    ]  # fmt: skip
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(checkpoint, arguments, log, lambda line: None, environment=SERVER) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    """With the key; its sessions are ended."""
    with httpx.Client(base_url=url, timeout=60, headers={"Authorization": "Bearer secret"}) as client:
        yield client
        for session in client.get("/v1/sessions").json()["data"]:
            client.delete(f"/v1/sessions/{session['id']}")


def create(client: httpx.Client, ids: list[int], **more: Any) -> str:
    answer = client.post("/v1/sessions", json={"ids": ids, "sampling": {"temperature": 0}, **more})
    assert answer.status_code == 201, answer.text
    return answer.json()["id"]


def step(client: httpx.Client, name: str, given: Any = (), status: int = 200, **more: Any) -> Any:
    answer = client.post(f"/v1/sessions/{name}/steps", json={"given_ids": list(given), **more})
    assert answer.status_code == status, answer.text
    return answer.json()


def follow(client: httpx.Client, name: str, seed: int, frames: range) -> list[list[int]]:
    return [step(client, name, played(seed, n)[-1] if n else ())["ids"] for n in frames]


def visual(seed: int, frames: int, made: list[list[int]]) -> list[int]:
    """The whole sequence behind the condition, up to the last picture."""
    ids: list[int] = []
    for own, actions in zip(made, played(seed, frames), strict=True):
        places = iter(own)
        ids += [next(places) if len(may) > 1 else may.start for may in literally(*GRID, actions)]
    return ids[: len(ids) - 4]


def test_forty_frames_over_http_equal_the_loop(client: httpx.Client, reference: Any) -> None:
    ids, params, allowed = video(61, 33, 40)
    made = follow(client, create(client, ids), 61, range(40))
    tokens = visual(61, 40, made)
    check(reference, CONFIG, ids, params, allowed[: len(tokens)], tokens)


def test_forked_equals_straight_and_so_does_what_is_played_again(client: httpx.Client) -> None:
    name = create(client, prompt(40, seed=62), sampling={"temperature": 1.0, "top_p": 0.9, "seed": 5})
    made = follow(client, name, 62, range(8))
    other = client.post(f"/v1/sessions/{name}/fork").json()["id"]
    assert follow(client, name, 62, range(8, 10)) == follow(client, other, 62, range(8, 10))
    shown = client.post(f"/v1/sessions/{other}/reset", json={"frame": 4}).json()
    assert (shown["next_frame"], shown["exact"]) == (5, True)
    assert follow(client, other, 62, range(5, 8)) == made[5:]
    client.post(f"/v1/sessions/{other}/reset", json={})
    assert follow(client, other, 62, range(3)) == made[:3]
    assert client.get(f"/v1/sessions/{name}").json()["next_frame"] == 10


def test_a_session_is_not_ended_by_its_length(client: httpx.Client) -> None:
    """What the server takes of one request is 1,600 tokens; this is three times as much."""
    name = create(client, prompt(20, seed=63))
    for number in range(160):
        last = step(client, name, played(63, number)[-1] if number else ())
        assert last["began_anew"] is False
    shown = client.get(f"/v1/sessions/{name}").json()
    assert shown["logical_tokens"] > 4800
    assert shown["oldest_frame"] >= 96
    assert shown["resident_tokens"] <= 5 * 32
    refused = client.post(f"/v1/sessions/{name}/reset", json={"frame": 3})
    assert refused.status_code == 400
    assert "frame must be -1 (the opening) or from " in refused.json()["error"]["message"]
    shown = client.post(f"/v1/sessions/{name}/reset", json={"frame": 150}).json()
    assert (shown["next_frame"], shown["exact"]) == (151, False)
    assert step(client, name, played(63, 151)[-1])["frame"] == 151


def test_frames_come_in_every_form(client: httpx.Client) -> None:
    name = create(client, prompt(25, seed=64))
    first = step(client, name)
    assert (first["frame"], first["object"], len(first["ids"])) == (0, "session.frame", GRID[0] * GRID[1])
    assert first["resident_tokens"] > 0
    action = struct.pack("<2i", 210, 221)
    path = f"/v1/sessions/{name}/steps"
    raw = {"content-type": "application/octet-stream", "accept": "application/octet-stream"}
    answer = client.post(path, content=action, headers=raw)
    assert answer.headers["x-frame"] == "1"
    own = np.frombuffer(answer.content, dtype="<i4")
    assert own.shape == (GRID[0] * GRID[1],)
    picture = client.post(path, json={"given_ids": [211, 222]}, headers={"accept": "image/png"})
    assert picture.content.startswith(b"\x89PNG")
    with client.stream("POST", path, json={"given_ids": [212, 223], "stream": True}) as events:
        lines = [line for line in events.iter_lines() if line]
    names, data = lines[::2], [json.loads(line.removeprefix("data: ")) for line in lines[1::2]]
    assert names == ["event: tokens"] * (len(names) - 1) + ["event: frame"]
    assert len(names) > GRID[0]
    made = [token for part in data[:-1] for token in part["ids"]]
    assert [token for token in made if token != 202] == data[-1]["ids"]
    assert data[-1]["frame"] == 3
    assert data[-1]["picture"].startswith("iVBOR")


def test_a_session_begins_with_a_picture(client: httpx.Client) -> None:
    import base64
    import io

    from PIL import Image

    def sent(size: tuple[int, int]) -> str:
        file = io.BytesIO()
        Image.new("RGB", size, (50, 50, 50)).save(file, "PNG")
        return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()

    answer = client.post("/v1/sessions", json={"picture": sent((GRID[1], GRID[0]))})
    assert answer.status_code == 201, answer.text
    assert answer.json()["logical_tokens"] == GRID[0] * GRID[1]
    for picture, words in (
        (sent((9, 9)), f"picture must be {GRID[1]} x {GRID[0]} pixels, not 9 x 9"),
        ("%%%", "picture must be base64 of a file"),
        (base64.b64encode(b"no picture").decode(), "picture must be a PNG, JPEG or WebP file"),
    ):
        refused = client.post("/v1/sessions", json={"picture": picture})
        assert refused.status_code == 400
        assert words in refused.json()["error"]["message"]


BAD_STEPS = [
    ('{"given_ids": [210]}', "given_ids must have 2 ids, which the client gives before this frame, not 1"),
    ('{"given_ids": [210, 230]}', "must have ids from 220 to 229 as number 2, not 230"),
    ('{"action": {"forward": 1}}', "this server's layout has no actions"),
    ('{"given_ids": [1, 2], "action": {}}', "give one of them"),
    ("no json", "this must be a JSON object"),
    ("[1, 2]", "this must be a JSON object"),
    ('{"actions": 1}', "actions is no known option: known are type, action, given_ids"),
    ('{"given_ids": "' + "x" * 900 + '"}', "given_ids: input should be a valid array"),
    ('{"given_ids": [-1, 2]}', "given_ids.0: input should be greater than or equal to 0"),
]


def test_bad_steps_leave_the_session_as_it_was(client: httpx.Client) -> None:
    name = create(client, prompt(28, seed=65))
    made = follow(client, name, 65, range(2))
    other = client.post(f"/v1/sessions/{name}/fork").json()["id"]
    for body, words in BAD_STEPS:
        answer = client.post(f"/v1/sessions/{name}/steps", content=body)
        assert answer.status_code == 400, body
        message = answer.json()["error"]["message"]
        assert words in message
        assert "\n" not in message
        assert len(message) < 400
    raw = {"content-type": "application/octet-stream"}
    assert client.post(f"/v1/sessions/{name}/steps", content=b"abc", headers=raw).status_code == 400
    assert client.post(f"/v1/sessions/{name}/steps", content=b" " * (17 * 2**20)).status_code == 413
    assert follow(client, name, 65, range(2, 4)) == follow(client, other, 65, range(2, 4))
    assert len(made) == 2


BAD_OPENINGS = [
    ("{}", "a session begins with ids or with a picture: give one of the two"),
    ('{"ids": []}', "ids must have at least one id"),
    ('{"ids": [256]}', "ids must be below 256, the ids of the model, not 256"),
    ('{"ids": [1], "condition_tokens": 500}', "condition_tokens is 500, and the opening has 1 ids"),
    ('{"ids": [1], "options": {"grid": [4]}}', "options.grid"),
    ('{"ids": [1], "options": {"frames": 4}}', "options.frames is not for a session"),
    ('{"ids": [1], "options": {"gird": [4, 5]}}', "options.gird is no known option"),
    ('{"ids": [1], "options": {"grid": [40, 40]}}', "a session of this opening needs"),
    ('{"ids": [1], "sampling": {"temp": 1}}', "sampling.temp is no known option: known are temperature"),
    (
        '{"ids": [1, 2, 3], "condition_tokens": 1}',
        "id 1 of the opening is in a frame, where it must be from 200 to",
    ),
]


@pytest.mark.parametrize(("body", "words"), BAD_OPENINGS)
def test_bad_openings_are_refused(client: httpx.Client, body: str, words: str) -> None:
    answer = client.post("/v1/sessions", content=body)
    assert answer.status_code == 400, answer.text
    assert words in answer.json()["error"]["message"]
    assert client.get("/v1/sessions").json()["data"] == []


def test_nobody_plays_without_the_key(url: str) -> None:
    assert httpx.get(f"{url}/v1/sessions").status_code == 401
    assert httpx.post(f"{url}/v1/sessions", json={"ids": [1]}).status_code == 401


def test_unknown_sessions_and_one_frame_at_a_time(client: httpx.Client) -> None:
    assert client.post("/v1/sessions/nobody/steps", json={}).status_code == 404
    assert client.delete("/v1/sessions/nobody").status_code == 404
    assert client.post("/v1/sessions", json={"ids": [1], "model": "x"}).status_code == 404
    name = create(client, prompt(28, seed=66), options={"grid": [20, 20]})
    with client.stream("POST", f"/v1/sessions/{name}/steps", json={"stream": True}) as events:
        lines = events.iter_lines()
        next(lines)
        # Some four hundred tokens of it are still to be made.
        assert client.post(f"/v1/sessions/{name}/steps", json={}).status_code == 409
        assert any(line == "event: frame" for line in lines)
    follow(client, name, 66, range(1, 2))


def test_as_many_are_let_in_as_fit_and_each_goes_on(client: httpx.Client) -> None:
    """The pool has 59 blocks; what a session holds at most follows from its window."""
    names: list[str] = []
    while (answer := client.post("/v1/sessions", json={"ids": prompt(20, seed=len(names))})).status_code == 201:
        names.append(answer.json()["id"])
    assert answer.status_code == 503
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert 6 <= len(names) < 20
    with ThreadPoolExecutor(len(names)) as threads:
        for number in range(6):
            given = played(1, number)[-1] if number else ()
            list(threads.map(lambda name, given=given: step(client, name, given), names))
    # Beside them a text is served from what is left, and one that is ended makes room.
    client.delete(f"/v1/sessions/{names[0]}")
    create(client, prompt(20, seed=99))
    body = {"model": "m", "prompt": prompt(10), "max_tokens": 5, "temperature": 0, "return_token_ids": True}
    assert client.post("/v1/completions", json=body).status_code == 200


def test_who_waits_too_long_has_to_go(client: httpx.Client) -> None:
    name = create(client, prompt(20, seed=67))
    step(client, name)
    deadline = time.monotonic() + IDLE + 20
    while client.get(f"/v1/sessions/{name}").status_code == 200:
        assert time.monotonic() < deadline
        time.sleep(0.3)
    assert client.post(f"/v1/sessions/{name}/steps", json={}).status_code == 404


def test_a_client_that_vanishes_leaves_a_whole_frame(client: httpx.Client) -> None:
    ids = prompt(30, seed=68)
    large = {"options": {"grid": LARGE}}
    name, other = create(client, ids, **large), create(client, ids, **large)
    follow(client, other, 68, range(2))
    with client.stream("POST", f"/v1/sessions/{name}/steps", json={"stream": True}) as events:
        next(events.iter_lines())
    while (shown := client.get(f"/v1/sessions/{name}").json())["busy"] or not shown["resident_tokens"]:
        time.sleep(0.05)
    assert shown["next_frame"] == 1
    follow(client, name, 68, range(1, 2))
    assert follow(client, name, 68, range(2, 4)) == follow(client, other, 68, range(2, 4))


def play(url: str, name: str, form: str = "json") -> Any:
    address = f"{url.replace('http', 'ws')}/v1/sessions/{name}/play?format={form}"
    return websockets.connect(address, additional_headers={"Authorization": "Bearer secret"})


def test_a_websocket_plays_and_the_newest_action_wins(url: str, client: httpx.Client) -> None:
    ids = prompt(30, seed=69)
    large = {"options": {"grid": LARGE}}
    name, straight = create(client, ids, **large), create(client, ids, **large)

    async def played_by_messages() -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        async with play(url, name) as socket:

            async def until(kind: str) -> dict[str, Any]:
                while True:
                    event = json.loads(await asyncio.wait_for(socket.recv(), 30))
                    if event["type"] == "heartbeat" and kind != "heartbeat":
                        continue
                    events.append(event)
                    if event["type"] == kind:
                        return event

            await until("session")
            await socket.send('{"type": "step"}')
            await until("frame")
            # While one is made, others come: of those that wait the last one is taken.
            await socket.send(json.dumps({"given_ids": [210, 220], "stream": True}))
            await until("tokens")
            for action in (211, 212, 213):
                await socket.send(json.dumps({"given_ids": [action, 220]}))
            count = 0
            while count < 4:
                frame = await until("frame")
                count += 1 + frame["left_out"]
            assert frame["given_ids"] == [213, 220]
            for message in ("no json", "[]", '{"type": "jump"}', '{"given_ids": [1, 2]}', b"abc"):
                await socket.send(message)
                assert (await until("error"))["error"]["code"] == 400
            await socket.send('{"type": "reset", "frame": 0}')
            assert (await until("session"))["next_frame"] == 1
            await socket.send(json.dumps({"given_ids": [213, 220]}))
            await until("frame")
            await until("heartbeat")
        return [event for event in events if event["type"] == "frame"]

    made = asyncio.run(played_by_messages())
    assert [event["frame"] for event in made] == [*range(len(made) - 1), 1]
    assert [step(client, straight, event["given_ids"])["ids"] for event in made[:-1]] == [
        event["ids"] for event in made[:-1]
    ]


def test_a_websocket_takes_and_gives_bytes_and_ends_with_its_session(url: str, client: httpx.Client) -> None:
    name = create(client, prompt(30, seed=70))

    async def by_bytes() -> None:
        async with play(url, name, "raw") as socket:
            await socket.recv()
            await socket.send(b"")
            while isinstance(data := await asyncio.wait_for(socket.recv(), 30), str):
                assert json.loads(data)["type"] == "heartbeat"
            assert struct.unpack("<i", data[:4]) == (0,)
            assert len(data) == 4 + 4 * GRID[0] * GRID[1]
            client.delete(f"/v1/sessions/{name}")
            while (event := json.loads(await asyncio.wait_for(socket.recv(), 30)))["type"] == "heartbeat":
                pass
            assert event["type"] == "ended"

    asyncio.run(by_bytes())

    async def of_nobody() -> dict[str, Any]:
        async with play(url, "nobody") as socket:
            return json.loads(await socket.recv())

    assert asyncio.run(of_nobody())["error"]["code"] == 404


def test_the_client_of_the_examples_plays(url: str, client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "play.py"))
    with example["Session"](url, prompt(30, seed=71), sampling={"temperature": 0}) as world:
        assert world.state["next_frame"] == 0
        first = world.step()
        second = world.step(given_ids=[210, 220])
        assert (first["frame"], second["frame"]) == (0, 1)
        world.reset(0)
        assert world.step(given_ids=[210, 220])["ids"] == second["ids"]
        with pytest.raises(RuntimeError, match="must have 2 ids"):
            world.step()
    assert client.get("/v1/sessions").json()["data"] == []
