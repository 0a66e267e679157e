"""What clients of videos over HTTP do, and what they ask for: prompts and videos are token ids."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import httpx
import numpy as np

from tests.serving.conftest import prompt

GRID = (3, 6)
FRAME = GRID[0] * GRID[1]
SLOTS = 4
"""Requests that a server runs at once; any more wait."""
ROOT = "/behind"
KEY = {"Authorization": "Bearer secret"}
ENDLESS = 1000
"""Frames of a video that is not made within any test: it is stopped."""
Event = tuple[int, str, dict[str, Any]]
"""Number, kind, and data of a server-sent event; the number is 0 where it has none."""


class Case(NamedTuple):
    """A video.

    Args:
        seed: of the prompt.
        condition: tokens of the prompt.
        frames: to be made.
        frame: tokens of each.
        options: of the request, without prefix.
    """

    seed: int
    condition: int
    frames: int
    frame: int = FRAME
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def ids(self) -> list[int]:
        """The prompt."""
        return prompt(self.condition, seed=self.seed)


CASES = [
    Case(1, 30, 5),
    Case(2, 61, 4, 45, (("grid", [5, 9]), ("history_frames", 1.0))),
    Case(3, 40, 6, 19, (("tokens_per_frame", 19), ("window", 1))),
    Case(4, 45, 3, FRAME, (("policy", "full"),)),
    Case(5, 20, 7, FRAME, (("selection", "spatial"), ("window", 3))),
    Case(6, 33, 2, 67, (("tokens_per_frame", 67),)),
]
"""Few, so that what each generates alone is soon known."""


def client_of(url: str) -> httpx.Client:
    """With the key. It has one connection, and asks one API server by it."""
    return httpx.Client(base_url=url, timeout=300, headers=KEY, limits=httpx.Limits(max_connections=1))


def body(ids: Sequence[int], frames: int, options: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """JSON that asks for a video; options are those of a request, without prefix."""
    own = {f"packcache_{name}": value for name, value in (options or {}).items()}
    return {"prompt": "ids", "prompt_ids": list(ids), "num_frames": frames, **own, **more}


def create(client: httpx.Client, *args: Any, **more: Any) -> str:
    """Ask for a video as `body` says; its id."""
    answer = client.post("/v1/videos", json=body(*args, **more))
    assert answer.status_code == 200, answer.text
    assert answer.json()["status"] == "queued"
    return answer.json()["id"]


def following(client: httpx.Client, name: str, after: int | None = None) -> Iterator[Event]:
    """Events of a video as they come."""
    headers = {} if after is None else {"Last-Event-ID": str(after)}
    with client.stream("GET", f"/v1/videos/{name}/events", headers=headers) as events:
        assert events.status_code == 200, events.read()
        said: dict[str, str] = {}
        for line in events.iter_lines():
            if line:
                field, _, value = line.partition(": ")
                said[field] = value
            elif "data" in said:
                yield int(said.get("id", 0)), said["event"], json.loads(said["data"])
                said = {}


def until(client: httpx.Client, name: str, kind: str) -> dict[str, Any]:
    """Data of the first event of a kind; the client leaves then."""
    events = following(client, name)
    with closing(events):  # type: ignore[type-var]
        for _, own, data in events:
            if own == kind:
                return data
    raise AssertionError(f"no event {kind} of {name}")


def begun(client: httpx.Client, name: str) -> None:
    """Wait until a video has its first frame."""
    until(client, name, "frame")


def ended(client: httpx.Client, name: str) -> dict[str, Any]:
    """A video, at its end."""
    *_, (_, _, last) = following(client, name)
    return last


def made(client: httpx.Client, name: str) -> list[int]:
    """Ids of a video that is there."""
    answer = client.get(f"/v1/videos/{name}/content", params={"variant": "ids"})
    assert answer.status_code == 200, answer.text
    return np.frombuffer(answer.content, dtype="<i4").tolist()


def whole(client: httpx.Client, *args: Any, **more: Any) -> list[int]:
    """Ids of a video that is asked for and waited for."""
    name = create(client, *args, **more)
    last = ended(client, name)
    assert last["status"] == "completed", last
    return made(client, name)


def completion(
    client: httpx.Client, ids: Sequence[int], tokens: int, options: dict[str, Any] | None = None, **sampling: Any
) -> list[int]:
    """What ``/v1/completions`` makes of the same."""
    asked = {
        "model": "m", "prompt": list(ids), "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
        "return_token_ids": True,
        "vllm_xargs": {f"packcache_{name}": value for name, value in (options or {}).items()} or None, **sampling,
    }  # fmt: skip
    answer = client.post("/v1/completions", json=asked)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["token_ids"]
