"""Videos over HTTP for a while: jobs, events, broken connections, deletes, extensions; nothing is left behind."""

from __future__ import annotations

import random
import re
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest

from tests.serving.video_clients import (
    CASES,
    Case,
    client_of,
    create,
    following,
    made,
)
from vllm_packcache.videos.store import Store

if TYPE_CHECKING:
    from tests.serving.videos_server import VideoServer

pytest_plugins = ["tests.serving.videos_server"]

CLIENTS = 6
"""More than the server makes videos at once."""

ADDED = 3
"""Frames that are added to a video at most."""

GROWTH = 8
"""MiB by which a process may grow, as in `tests.serving.test_soak`; the long form has a thousand videos and more."""


class Client:
    """Somebody who makes videos, one after the other.

    Args:
        url: of the server.
        seed: of all that is chosen.
        expected: ids of a case.
    """

    def __init__(self, url: str, seed: str, expected: Callable[[Case], list[int]]) -> None:
        self._client, self._choose, self._expected = client_of(url), random.Random(seed), expected
        self.ends: Counter[str] = Counter()
        self.kept: list[str] = []

    def come_and_go(self, jobs: int, until: float) -> None:
        """Make so many videos, and go on for so long."""
        with self._client:
            while jobs > 0 or time.monotonic() < until:
                self._one()
                jobs -= 1

    def _one(self) -> None:
        choose, case = self._choose, self._choose.choice(CASES)
        name = create(self._client, case.ids, case.frames, dict(case.options))
        if choose.random() < 0.2:
            self._delete(name, "deleted while it waits or is made", choose.randrange(4))
            return
        self._check(name, case, 0, case.frames)
        self.ends["made"] += 1
        how = choose.random()
        if how < 0.3:
            frames = choose.randint(1, ADDED)
            asked = {"video": name, "prompt": "ids", "num_frames": frames}
            longer = self._posted("/v1/videos/extensions", asked)
            self._check(longer, case, case.frames, frames)
            self._leave(longer, "extended")
        elif how < 0.4:
            again = self._posted(f"/v1/videos/{name}/remix", {"prompt": "ids again"})
            self._check(again, case, 0, case.frames)
            self._leave(again, "made again")
        self._leave(name)

    def _posted(self, path: str, asked: dict[str, Any]) -> str:
        answer = self._client.post(path, json=asked)
        assert answer.status_code == 200, answer.text
        return answer.json()["id"]

    def _check(self, name: str, case: Case, before: int, frames: int) -> None:
        """A video has the ids of those frames; its events are seen over connections that break."""
        numbers: list[int] = []
        kind = ""
        while kind != "completed":
            events = following(self._client, name, numbers[-1] if numbers else None)
            patience = self._choose.choice([2, 4, 100])
            with closing(events):  # type: ignore[type-var]
                for number, kind, data in events:
                    numbers.append(number)
                    assert kind != "failed", data
                    patience -= 1
                    if not patience:
                        self.ends["came back"] += kind != "completed"
                        break
        assert numbers == [*range(1, frames + 4)]
        ids = self._expected(case._replace(frames=case.frames + ADDED))
        assert made(self._client, name) == ids[before * case.frame : (before + frames) * case.frame], case

    def _leave(self, name: str, how: str | None = None) -> None:
        """Keep a video that is there, or not."""
        if how is not None:
            self.ends[how] += 1
        if self._choose.random() < 0.8:
            self._delete(name, "deleted", None)
        else:
            self.kept.append(name)

    def _delete(self, name: str, how: str, events: int | None) -> None:
        """Delete a video, after so many of its events."""
        if events:
            with closing(following(self._client, name)) as said:  # type: ignore[type-var]
                for _ in zip(range(events), said, strict=False):
                    pass
        assert self._client.delete(f"/v1/videos/{name}").status_code == 200
        assert self._client.get(f"/v1/videos/{name}").status_code == 404
        self.ends[how] += 1


def load(
    videos: VideoServer, expected: Callable[[Case], list[int]], jobs: int, seconds: float, seed: str
) -> tuple[Counter[str], list[str]]:
    """Keep the server busy; returns how many ended how, and which videos are left."""
    clients = [Client(videos.url, f"{seed} {number}", expected) for number in range(CLIENTS)]
    last = time.monotonic() + seconds
    with ThreadPoolExecutor(CLIENTS) as threads:
        for done in [threads.submit(client.come_and_go, jobs, last) for client in clients]:
            done.result()
    return sum((client.ends for client in clients), Counter()), [name for client in clients for name in client.kept]


def memory(videos: VideoServer) -> dict[str, int]:
    """MiB that each of the server's processes holds."""
    return {f"{one.name()} {one.pid}": round(one.memory_info().rss / 2**20) for one in videos.processes()}


@pytest.mark.parametrize(
    ("warm_up", "jobs", "seconds", "seed"),
    [
        pytest.param(0, 20, 0, "short", marks=pytest.mark.timeout(900), id="short"),
        pytest.param(60, 20, 600, "long", marks=[pytest.mark.long, pytest.mark.timeout(3600)], id="long"),
    ],
)
def test_soak(
    videos: VideoServer,
    expected: Callable[[Case], list[int]],
    warm_up: float,
    jobs: int,
    seconds: float,
    seed: str,
) -> None:
    for case in CASES:
        expected(case._replace(frames=case.frames + ADDED))
    _, early = load(videos, expected, 0, warm_up, f"{seed} warm-up")
    before, log_before = memory(videos), videos.log.stat().st_size
    ends, left = load(videos, expected, jobs, seconds, seed)
    videos.wait_until_empty()
    after = memory(videos)
    summary = f"seed {seed!r}: {dict(ends)}, {len(left)} kept, MiB {before} -> {after}"
    print(summary)
    assert min(ends[how] for how in ("made", "extended", "made again", "came back", "deleted")) > 0, summary
    if warm_up:
        for process, held in before.items():
            assert after[process] - held < GROWTH, summary
    kept = videos.kept()
    assert {job.status for job in kept} == {"completed"}
    assert videos.folders() == {job.id for job in kept} == {*early, *left}, summary
    with closing(Store(videos.folder, expire_seconds=None, quota_bytes=None)) as store:
        swept = store.sweep()
    assert (swept.stopped, swept.lost, swept.folders) == ([], [], 0)
    assert not list((videos.folder / "trash").iterdir())
    with videos.log.open(encoding="utf-8") as log:
        log.seek(log_before)
        errors = [line for line in log if re.search(r"\b(ERROR|CRITICAL)\b|Traceback", line)]
    assert not errors, "".join(errors)
