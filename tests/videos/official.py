"""What a version of the official client makes of the dialect.

``python -m tests.videos.official URL`` prints it as JSON. It runs in a process of its own, so that other versions than
the installed one can be put before it on the path.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from typing import Any

import openai

from tests.videos.pictures import DATA_URL, PNG

ROWS: dict[str, Callable[[openai.OpenAI], Any]] = {}
"""A row of the table of `docs/videos.md`, and what shows it: what it returns is true."""


def row(name: str) -> Callable[[Callable[[openai.OpenAI], Any]], Callable[[openai.OpenAI], Any]]:
    def added(shows: Callable[[openai.OpenAI], Any]) -> Callable[[openai.OpenAI], Any]:
        ROWS[name] = shows
        return shows

    return added


@row("POST /v1/videos")
def create(client: openai.OpenAI) -> Any:
    options = {
        "num_frames": 5, "seed": 3, "guidance_scale": 2.5, "negative_prompt": "rain",
        "packcache_grid": [2, 3], "packcache_window": 4, "packcache_exact": True,
        "packcache_deep": {"a": {"b": 1.5}}, "packcache_policy": "full",
    }  # fmt: skip
    video = client.videos.create(
        prompt="a cat",
        model="demo",
        seconds="8",
        size="720x1280",
        input_reference=("picture.png", PNG, "image/png"),
        extra_body=options,
    )
    said = {"grid": [2, 3], "window": 4, "exact": True, "deep": {"a": {"b": 1.5}}, "policy": "full"}
    assert (video.object, video.status, video.model, video.prompt) == ("video", "queued", "demo", "a cat")
    assert (video.frames, video.options, video.seconds) == (5, said, "1.25")  # type: ignore[attr-defined]
    url = client.videos.create(prompt="a cat", extra_body={"input_reference": {"image_url": DATA_URL}, "num_frames": 5})
    return url.id


@row("GET /v1/videos")
def listed(client: openai.OpenAI) -> Any:
    made = [client.videos.create(prompt=f"number {number}").id for number in range(5)]
    found = [video.id for video in client.videos.list(limit=2)]
    assert found[:5] == made[::-1]
    assert len(found) == len(set(found)) > 5
    return [video.id for video in client.videos.list(limit=2, order="asc")] == found[::-1]


@row("GET /v1/videos/{id}")
def retrieved(client: openai.OpenAI) -> Any:
    video = client.videos.create_and_poll(prompt="a cat", extra_body={"num_frames": 8})
    assert (video.status, video.progress, video.error) == ("completed", 100, None)
    assert video.completed_at is not None
    assert video.resident_tokens == 544  # type: ignore[attr-defined]
    return client.videos.retrieve(video.id) == video


@row("DELETE /v1/videos/{id}")
def deleted(client: openai.OpenAI) -> Any:
    video = client.videos.create(prompt="a cat")
    answer = client.videos.delete(video.id)
    assert (answer.id, answer.deleted, answer.object) == (video.id, True, "video.deleted")
    try:
        client.videos.retrieve(video.id)
    except openai.NotFoundError as error:
        return (error.code, error.type) == ("video_not_found", "invalid_request_error")


@row("GET /v1/videos/{id}/content")
def content(client: openai.OpenAI) -> Any:
    video = client.videos.create(prompt="a cat")
    for variant in ("video", "thumbnail", "spritesheet"):
        assert client.videos.download_content(video.id, variant=variant).read().startswith(f"the {variant}".encode())
    ids = client.videos.download_content(video.id, variant="ids").read()  # type: ignore[arg-type]
    return ids.startswith(b"the ids")


@row("GET /v1/videos/{id}/events")
def events(client: openai.OpenAI) -> Any:
    video = client.videos.create(prompt="a cat", extra_body={"num_frames": 2})
    text = client.get(f"/videos/{video.id}/events", cast_to=str)
    kinds = [line.partition(": ")[2] for line in text.splitlines() if line.startswith("event: ")]
    return kinds == ["status", "status", "frame", "frame", "completed"]


@row("POST /v1/videos/extensions")
def extended(client: openai.OpenAI) -> Any:
    video = client.videos.create(prompt="a cat", extra_body={"num_frames": 8})
    body = {"video": {"id": video.id}, "prompt": "a cat", "seconds": "1"}
    more = client.post("/videos/extensions", body=body, cast_to=type(video))
    assert (more.seconds, more.extended_from_video_id) == ("3", video.id)  # type: ignore[attr-defined]
    if hasattr(client.videos, "extend"):
        try:
            client.videos.extend(video=b"a file", prompt="a cat", seconds="4")
        except openai.BadRequestError as error:
            return error.param == "video"
    return more.id


@row("POST /v1/videos/{id}/remix")
def remixed(client: openai.OpenAI) -> Any:
    video = client.videos.create(prompt="a cat")
    again = client.videos.remix(video.id, prompt="a dog")
    return (again.prompt, again.remixed_from_video_id) == ("a dog", video.id)


@row("POST /v1/videos/edits")
def edited(client: openai.OpenAI) -> Any:
    try:
        client.post("/videos/edits", body={"video": {"id": "x"}, "prompt": "a dog"}, cast_to=object)
    except openai.BadRequestError as error:
        return error.code == "not_supported"


@row("POST /v1/videos/characters")
def characters(client: openai.OpenAI) -> Any:
    try:
        client.post("/videos/characters", body={}, cast_to=object)
    except openai.NotFoundError as error:
        return error.code == "not_found"


@row("errors")
def errors(client: openai.OpenAI) -> Any:
    try:
        client.videos.create(prompt="a cat", size="large")  # type: ignore[arg-type]
    except openai.BadRequestError as error:
        return error.param == "size"


def main() -> None:
    """Show every row that it is not stopped at."""
    # The client warns at every call that its maker gives the dialect up.
    warnings.simplefilter("ignore")
    client = openai.OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="secret", max_retries=0, timeout=20)
    shown = {}
    for name, shows in ROWS.items():
        try:
            shown[name] = "shown" if shows(client) else "it is not as it should be"
        except Exception as error:
            shown[name] = f"{type(error).__name__}: {error}"
    print(json.dumps({"version": openai.__version__, "rows": shown}))


if __name__ == "__main__":
    main()
