"""Stream a video from a server with the `openai` client: ``python examples/client.py http://127.0.0.1:8000``.

Start one with the bundled model as README.md shows, or your own with ``--kv-cache-policy packcache``.
"""

from __future__ import annotations

import os
import sys

from openai import OpenAI

FRAMES = 6


def main(url: str) -> None:
    """Ask for a video and say of every frame that it has arrived."""
    client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("VLLM_API_KEY", "none"))
    model = client.models.list().data[0].id
    stream = client.completions.create(
        model=model,
        prompt="a red circle moves right",  # or token ids: text, then the conditioning image
        temperature=0,
        stream=True,
        max_tokens=None,  # packcache_frames says how long the video gets
        extra_body={
            # Options of videos, and that they are there says that this is one.
            "vllm_xargs": {"packcache_frames": FRAMES, "packcache_grid": [16, 16]},
            "return_token_ids": True,
        },
    )
    length = 257  # tokens of a frame: one that begins it, and 16 x 16 visual ones
    tokens: list[int] = []
    done = 0
    for chunk in stream:
        for choice in chunk.choices:
            tokens += getattr(choice, "token_ids", None) or []
        while len(tokens) >= (done + 1) * length:
            print(f"frame {done}: {length} tokens, {tokens[done * length :][:8]} ...", flush=True)
            done += 1


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000")
