"""What processes of tests do with a store: ``python -m tests.videos.life WHAT FOLDER ...``."""

from __future__ import annotations

import functools
import os
import signal
import sqlite3
import sys
import threading
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import IO, Any

from vllm_packcache.videos import store as module
from vllm_packcache.videos.store import Full, Job, Store, StoreFull

FILE_STEPS = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "fcntl.flock")


def store_of(folder: Path, **options) -> Store:
    return Store(folder, **{"expire_seconds": 1000.0, "quota_bytes": None, **options})


def life(store: Store) -> None:
    """One video that is made, one that fails, one that is deleted while it is made, one that is deleted afterwards."""
    store.tell({"https://told": ("video.completed", "video.failed")})
    for end in ("complete", "fail", "delete", "forget"):
        job = store.create({"end": end}, 4, most_waiting=9)
        store.path(job.id, "growing.mp4").write_bytes(b"frames")
        store.start(job.id)
        store.advance(job.id, 2, {"frame": 0}, bytes=6)
        if end == "fail":
            assert store.fail(job.id, "wrong", "it went wrong")
        elif end == "delete":
            assert store.delete(job.id)
        else:
            store.path(job.id, "growing.mp4").rename(store.path(job.id, "video.mp4"))
            assert store.complete(job.id, {"pictures": 1})
            if end == "forget":
                assert store.delete(job.id)


def check_events(store: Store, job: Job) -> None:
    """What is read of a job at any moment agrees with its events."""
    events = store.events(job.id, limit=1000)
    if events is None:
        return
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    kinds = [event.kind for event in events]
    assert kinds[0] == "status"
    for end in ("completed", "failed"):
        assert end not in kinds[:-1]
    now = store.get(job.id)
    if job.ended and now is not None:
        assert kinds[-1] == job.status == now.status
    if job.status == "completed":
        assert job.progress == 100


def check_whole(store: Store) -> None:
    """Rows and folders belong together, and nothing else is there."""
    jobs, more = store.list(after=None, limit=1000, order="asc")
    assert not more
    assert {job.id for job in jobs} == set(os.listdir(store.folder / "videos"))
    assert os.listdir(store.folder / "trash") == []
    for job in jobs:
        assert job.ended
        check_events(store, job)
        files = os.listdir(store.folder / "videos" / job.id)
        assert files == ([] if job.status == "failed" else ["video.mp4"])
        assert job.bytes == sum((store.folder / "videos" / job.id / name).stat().st_size for name in files)
    with closing(sqlite3.connect(store.folder / "videos.sqlite3")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        for table in ("events", "deliveries"):
            (strays,) = connection.execute(
                f"SELECT count(*) FROM {table} WHERE job NOT IN (SELECT row FROM jobs)"
            ).fetchone()
            assert strays == 0


class Mortal(Store):
    """A store whose process is killed before a step, of the database or of files."""

    def _connect(self) -> sqlite3.Connection:
        connection = super()._connect()
        connection.set_trace_callback(lambda statement: step())
        return connection


class Unsynced(sqlite3.Connection):
    """A connection that waits for no disk: what a killed process has written is there."""

    def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
        return super().execute(
            "PRAGMA synchronous = OFF" if statement.startswith("PRAGMA synchronous") else statement, *values
        )


_left = 0


def step() -> None:
    global _left
    _left -= 1
    if _left == 0:
        os.kill(os.getpid(), signal.SIGKILL)


def killed(folder: Path, first: int) -> None:
    """Live again and again, killed one step later each time, until one life comes to its end. Prints how often."""
    global _left
    sqlite3.connect = functools.partial(sqlite3.connect, factory=Unsynced)
    module._RESERVE = 1000
    for steps in range(first, 10_000):
        home = folder / str(steps)
        child = os.fork()
        if not child:
            sys.addaudithook(lambda event, args: step() if event in FILE_STEPS else None)
            _left = steps
            life(Mortal(home, expire_seconds=1000.0, quota_bytes=None))
            # Unfinished business of Python's end is no step.
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        store = store_of(home, clock=lambda: time.time() + 100)
        for job in store.list(after=None, limit=100, order="asc")[0]:
            check_events(store, job)
            if job.status == "completed":
                assert store.path(job.id, "video.mp4").read_bytes() == b"frames"
        store.sweep()
        check_whole(store)
        assert os.listdir(home / "owners") == [store.owner]
        store.close()
        if status == 0:
            print(steps - first)
            return
        assert os.WTERMSIG(status) == signal.SIGKILL


def crowd(folder: Path, jobs: int, most: int) -> None:
    """Four threads make and delete jobs, as many as there is room for."""
    store = store_of(folder)
    problems: list[BaseException] = []

    def work() -> None:
        try:
            for number in range(jobs):
                while True:
                    with suppress(Full):
                        job = store.create({"number": number}, 3, most_waiting=most)
                        break
                    time.sleep(0.001)
                assert store.start(job.id)
                for frame in range(3):
                    assert store.advance(job.id, frame + 1, {"frame": frame})
                store.path(job.id, "video.mp4").write_bytes(b"x" * 10)
                assert store.complete(job.id, {}) if number % 3 else store.delete(job.id)
        except BaseException as error:
            problems.append(error)
            raise

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems


def waits(folder: Path) -> None:
    """Make a job, say so, and be there until the input ends."""
    store = store_of(folder)
    job = store.create({}, 3, most_waiting=9)
    store.start(job.id)
    print(job.id, flush=True)
    sys.stdin.read()


def fill(file: IO[bytes], size: int) -> None:
    with suppress(OSError):
        while True:
            file.write(b"\0" * size)


def full(folder: Path) -> None:
    """A disk that is full: the job that filled it fails, others can be deleted, and then there is room again."""
    store = store_of(folder)
    other = store.create({}, 3, most_waiting=9)
    job = store.create({}, 3, most_waiting=9)
    store.start(job.id)
    with store.path(job.id, "growing.mp4").open("wb", buffering=0) as file:
        fill(file, 4096)
        refused = 0
        for number in range(20_000):
            try:
                store.advance(job.id, 1, {"frame": number, "blocks": "x" * 1000})
            except StoreFull:
                refused += 1
                break
        assert refused
        # What was freed by the failed write is taken again.
        fill(file, 512)
        try:
            store.create({"prompt": "x" * 30_000}, 3, most_waiting=9)
        except StoreFull:
            refused += 1
        assert refused == 2
        assert store.fail(job.id, "disk_full", "no room")
    assert store.get(job.id).error["code"] == "disk_full"
    assert store.events(job.id, limit=20_000)[-1].kind == "failed"
    assert store.delete(other.id)
    store.sweep()
    assert (folder / "reserve").stat().st_size == 2**20
    store.path(store.create({}, 3, most_waiting=9).id, "video.mp4").write_bytes(b"x" * 100_000)


if __name__ == "__main__":
    what, where, *rest = sys.argv[1:]
    {"killed": killed, "crowd": crowd, "waits": waits, "full": full}[what](Path(where), *map(int, rest))
