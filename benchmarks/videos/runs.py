"""What `benchmarks.videos` does: a server, and who asks it for videos and completions."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from rich.progress import Progress

from benchmarks.decode.samples import summary
from benchmarks.engine_process import child_environment, engine_environment
from benchmarks.videos.plan import THREADS, VideosPlan
from vllm_packcache.demo.playground import BUNDLED, SERVED
from vllm_packcache.demo.tokenizer import MODEL_DIR
from vllm_packcache.serving.server import serving, tokens_in
from vllm_packcache.videos.files import PREPARED

MODEL = "demo"
VIDEO, COMPLETION = "video", "completion"
ENGINE, API = "engine_cpu", "api_server_cpu"
"""Seconds of processor time of the two processes."""
WALL = "wall"
POLLS = 0.1
"""Seconds between two looks at a video that nobody follows."""


class Server:
    """A server of the bundled model that makes videos.

    Args:
        client: of it.
        process: its API server.
        store: where its videos are kept.
    """

    def __init__(self, client: httpx.Client, process: psutil.Process, store: Path) -> None:
        self.client, self._process, self._store = client, process, store
        example = self._answer("GET", "/v1/playground")["tokenizer"]["examples"][0]
        self._asked = {"prompt": example["prompt"], "input_reference": example["picture"]}

    def seconds(self) -> dict[str, float]:
        """What its processes have used of the processor so far, and the clock."""
        (engine,) = (child for child in self._process.children(recursive=True) if "EngineCore" in child.name())
        times = {name: process.cpu_times() for name, process in ((ENGINE, engine), (API, self._process))}
        used = {name: own.user + own.system for name, own in times.items()}
        return {**used, WALL: time.perf_counter()}

    def create(self, frames: int) -> str:
        """Ask for a video of so many frames besides the given picture; its id."""
        name: str = self._answer("POST", "/v1/videos", json={**self._asked, "num_frames": 1 + frames})["id"]
        return name

    def video(self, name: str, followers: int) -> dict[str, Any]:
        """Wait for a video while so many clients follow it; the video then.

        Raises:
            RuntimeError: it failed, or a client has missed some of it.
        """
        with ThreadPoolExecutor(max(1, followers)) as threads:
            followed = [threads.submit(self._follow, name) for _ in range(followers)]
            while (video := self._answer("GET", f"/v1/videos/{name}"))["status"] in ("queued", "in_progress"):
                # Who follows knows when it ends.
                if followed:
                    followed[0].result()
                else:
                    time.sleep(POLLS)
        if video["status"] != "completed" or any(own.result() != video["frames"] for own in followed):
            raise RuntimeError(f"video {name} is not what was asked for: {video}")
        return video

    def _follow(self, name: str) -> int:
        """Frames that a client is told of."""
        with self.client.stream("GET", f"/v1/videos/{name}/events") as events:
            return sum(line == "event: frame" for line in events.iter_lines())

    def ids(self, name: str) -> list[int]:
        """Of a video that is there."""
        answer = self.client.get(f"/v1/videos/{name}/content", params={"variant": "ids"})
        answer.raise_for_status()
        return np.frombuffer(answer.content, dtype="<i4").tolist()

    def prepared(self, name: str) -> dict[str, Any]:
        """What the engine was asked for."""
        said: dict[str, Any] = json.loads((self._store / "videos" / name / PREPARED).read_text(encoding="utf-8"))
        return said

    def completion(self, prepared: dict[str, Any], frames: int) -> list[int]:
        """Ids of a streamed completion of the same."""
        body = {
            "prompt": prepared["prompt_ids"], "max_tokens": frames * prepared["tokens_per_frame"], "temperature": 0,
            "ignore_eos": True, "stream": True, "return_token_ids": True,
            "vllm_xargs": {f"packcache_{name}": value for name, value in prepared["options"].items()},
        }  # fmt: skip
        with self.client.stream("POST", "/v1/completions", json=body) as answer:
            answer.raise_for_status()
            return [token for line in answer.iter_lines() for token in tokens_in(line)]

    def delete(self, name: str) -> None:
        """Forget a video."""
        self._answer("DELETE", f"/v1/videos/{name}")

    def _answer(self, method: str, path: str, **more: Any) -> dict[str, Any]:
        answer = self.client.request(method, path, **more)
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
        return found


@contextmanager
def served() -> Iterator[Server]:
    """The server, up."""
    others = psutil.Process().children()
    with tempfile.TemporaryDirectory(prefix="packcache-bench-") as folder:
        store = Path(folder) / "store"
        arguments = [
            *("--kv-cache-policy", "packcache", "--kv-cache-policy-config", MODEL),
            *("--video-store", str(store), "--video-tokenizer", MODEL, "--served-model-name", MODEL),
            *(*SERVED, *BUNDLED[MODEL].flags),
            # Both compute their prompt, whoever was before.
            "--no-enable-prefix-caching",
        ]
        with (
            child_environment(engine_environment(THREADS, plugin=True)),
            serving(MODEL_DIR, arguments, Path(folder) / "log", lambda line: None) as url,
            httpx.Client(base_url=url, timeout=600) as client,
        ):
            (process,) = set(psutil.Process().children()) - set(others)
            yield Server(client, process, store)


class Bench:
    """The runs, in order.

    Args:
        plan: sizes.
        server: that is asked.
        progress: counts videos.
    """

    def __init__(self, plan: VideosPlan, server: Server, progress: Progress) -> None:
        self.plan, self._server, self._progress = plan, server, progress

    def overhead(self) -> dict[str, Any]:
        """A video and a completion of the same ids, in turn; which of them is first alternates.

        Raises:
            RuntimeError: they are not the same ids.
        """
        server, plan = self._server, self.plan
        task = self._progress.add_task("overhead", total=2 * (plan.rounds + 1))
        prepared: dict[str, Any] = {}
        ids: dict[str, list[int]] = {}
        video: dict[str, Any] = {}

        def of_video() -> None:
            name = server.create(plan.frames)
            video.update(server.video(name, 0))
            prepared.update(server.prepared(name))
            ids[VIDEO] = server.ids(name)
            server.delete(name)

        def of_completion() -> None:
            ids[COMPLETION] = server.completion(prepared, plan.frames)

        works: list[tuple[str, Callable[[], None]]] = [(VIDEO, of_video), (COMPLETION, of_completion)]
        rounds = []
        # The first round warms up, and is not counted.
        for number in range(plan.rounds + 1):
            own: dict[str, Any] = {}
            for name, work in works if number % 2 == 0 else works[::-1]:
                before = server.seconds()
                work()
                after = server.seconds()
                own[name] = {clock: (after[clock] - before[clock]) / plan.frames for clock in after}
                self._progress.advance(task)
            if ids[VIDEO] != ids[COMPLETION]:
                raise RuntimeError("a video has other ids than a completion of the same prompt and options")
            own[VIDEO] |= {part: video[f"{part}_s"] / plan.frames for part in ("decode", "storage")}
            rounds.append(own)
        rounds = rounds[1:]
        ratios = {
            clock: summary([own[VIDEO][clock] / own[COMPLETION][clock] for own in rounds])
            for clock in (ENGINE, API, WALL)
        }
        return {"tokens_per_frame": prepared["tokens_per_frame"], "rounds": rounds, "ratios": ratios}

    def followers(self) -> dict[str, Any]:
        """Seconds a frame of a video while so many clients follow its events, in turn."""
        plan, server = self.plan, self._server
        task = self._progress.add_task("followers", total=len(plan.followers) * plan.followed_rounds)
        rounds = []
        for number in range(plan.followed_rounds):
            turn = number % len(plan.followers)
            own = {}
            for count in (*plan.followers[turn:], *plan.followers[:turn]):
                name = server.create(plan.frames)
                before = server.seconds()
                video = server.video(name, count)
                after = server.seconds()
                own[str(count)] = {
                    "frame": video["seconds_per_frame"], API: (after[API] - before[API]) / plan.frames
                }  # fmt: skip
                server.delete(name)
                self._progress.advance(task)
            rounds.append(own)
        return {"rounds": rounds}
