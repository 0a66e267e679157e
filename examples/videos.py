"""Make a video with the `openai` client, and watch it: ``python examples/videos.py http://127.0.0.1:8000 video.mp4``.

Start a server with ``make playground``, or your own with ``--video-store`` and ``--video-tokenizer``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI

PICTURE = Path(__file__).parents[1] / "vllm_packcache" / "demo" / "assets" / "example.png"  # yours
PROMPT = "a red circle moves right"
KEY = os.environ.get("VLLM_API_KEY", "none")


def follow(url: str, video: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """What happens to a video, to its end: frames as they are made, each once, even if the connection is cut."""
    seen = 0
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=url, headers=headers, timeout=60) as client:
        while True:
            try:
                with client.stream("GET", f"/v1/videos/{video}/events", headers={"Last-Event-ID": str(seen)}) as answer:
                    answer.raise_for_status()
                    kind = ""
                    for line in answer.iter_lines():
                        name, _, value = line.partition(": ")
                        if name == "id":
                            seen = int(value)
                        elif name == "event":
                            kind = value
                        elif name == "data":
                            yield kind, json.loads(value)
                            if kind in ("completed", "failed", "error"):
                                return
            except (httpx.ReadError, httpx.RemoteProtocolError) as error:
                print(f"cut off, asking again: {error}", file=sys.stderr)


def main(url: str = "http://127.0.0.1:8000", out: str = "video.mp4") -> None:
    """Ask for a video, say of every frame that it is there, and keep the file."""
    client = OpenAI(base_url=f"{url}/v1", api_key=KEY)
    video = client.videos.create(
        prompt=PROMPT,
        input_reference=PICTURE,
        extra_body={"num_frames": 8, "packcache_history_frames": 2},  # any option of a request
    )
    for kind, data in follow(url, video.id):
        if kind == "frame":
            # data["picture"] is the frame as a data URL, data["blocks"] which blocks of the cache it was made from.
            held = "given" if data["given"] else f"{data['resident_tokens']} of {data['full_tokens']} tokens held"
            print(f"frame {data['frame'] + 1} of {data['frames']}: {held}", flush=True)
        elif kind in ("failed", "error"):
            raise SystemExit(data["error"]["message"])
    client.videos.download_content(video.id).write_to_file(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
