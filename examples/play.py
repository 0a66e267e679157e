"""Play a world model: ``python examples/play.py http://127.0.0.1:8000 1 2 3 ...`` with the ids of a first picture."""

from __future__ import annotations

import os
import sys
from typing import Any

import httpx


class Session:
    """A session of a server: an action in, a frame out.

    Args:
        url: of the server.
        ids: the sequence so far, up to the first action.
        more: what else a session begins with: ``condition_tokens``, ``options``, ``sampling``.
    """

    def __init__(self, url: str, ids: list[int], **more: Any) -> None:
        key = {"Authorization": f"Bearer {os.environ.get('VLLM_API_KEY', 'none')}"}
        self._http = httpx.Client(base_url=url, headers=key, timeout=600)
        self.state = self._ask("POST", "", {"ids": ids, **more})
        self.id = self.state["id"]

    def step(self, action: dict[str, Any] | None = None, given_ids: list[int] | None = None) -> dict[str, Any]:
        """The next frame: its number, its ids row by row, and what is held."""
        wanted = {"action": action, "given_ids": given_ids}
        return self._ask("POST", f"/{self.id}/steps", {name: own for name, own in wanted.items() if own is not None})

    def reset(self, frame: int = -1) -> None:
        """Go back to where a frame was finished."""
        self.state = self._ask("POST", f"/{self.id}/reset", {"frame": frame})

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        answer = self._http.request(method, f"/v1/sessions{path}", json=body)
        if answer.is_error:
            raise RuntimeError(answer.json()["error"]["message"])
        return answer.json() if answer.content else None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        self._ask("DELETE", f"/{self.id}")


if __name__ == "__main__":
    with Session(sys.argv[1], [int(word) for word in sys.argv[2:]]) as world:
        for _ in range(6):
            needed = world._ask("GET", f"/{world.id}")["given_ids"]
            made = world.step(action={} if needed else None)
            print(f"frame {made['frame']}: {made['resident_tokens']} tokens held, {made['ids'][:8]} ...", flush=True)
