"""The store of videos: what it keeps, what races in it, and what breaks while it works."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.videos.life import check_events, check_whole, store_of
from vllm_packcache.videos import store as module
from vllm_packcache.videos.store import ID, Event, Full, Job, NoSpace, Store, StoreBusy, StoreError, StoreFull

ROOT = Path(__file__).parents[2]


class Clock:
    now = 1_000_000.5

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[Store]:
    with closing(store_of(tmp_path / "store", clock=clock)) as store:
        yield store


def process(what: str, folder: Path, *rest: int, inside: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.videos.life", what, str(folder), *map(str, rest)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if inside:
        command = ["unshare", "-Urm", "sh", "-c", f'{inside} && exec "$@"', "sh", *command]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def made(store: Store, size: int = 0, total: int = 10) -> Job:
    """A video that is there."""
    job = store.create({}, total, most_waiting=10_000)
    store.path(job.id, "video.mp4").write_bytes(b"x" * size)
    assert store.complete(job.id, {})
    found = store.get(job.id)
    assert found is not None
    return found


# What is kept.


def test_a_job_is_read_as_it_was_written(store: Store, clock: Clock) -> None:
    request = {"prompt": 'é \ud800 "', "list": [1, None, 2.5]}
    job = store.create(request, 8, most_waiting=1)
    assert ID.fullmatch(job.id)
    assert store.get(job.id) == job
    assert job == Job(
        id=job.id, status="queued", created_at=1_000_000, total_tokens=8, request=request, owner=store.owner
    )
    clock.now += 1
    assert store.start(job.id)
    clock.now += 1
    assert store.start(job.id)
    assert store.advance(job.id, 4, {"frame": 0}, bytes=77)
    assert store.advance(job.id, 3, None)
    running = store.get(job.id)
    assert (running.status, running.started_at, running.tokens, running.bytes) == ("in_progress", 1_000_001.5, 4, 77)
    assert (running.progress, running.ended) == (50, False)
    store.path(job.id, "video.mp4").write_bytes(b"x" * 100)
    assert store.complete(job.id, {"pictures": 2})
    done = store.get(job.id)
    assert (done.status, done.completed_at, done.expires_at) == ("completed", 1_000_002, 1_001_002)
    assert (done.result, done.bytes, done.progress, done.ended) == ({"pictures": 2}, 100, 100, True)
    assert store.events(job.id) == [
        Event(1, "status", {"status": "queued"}),
        Event(2, "status", {"status": "in_progress"}),
        Event(3, "frame", {"frame": 0}),
        Event(4, "completed", {"status": "completed"}),
    ]
    assert store.events(job.id, after=2, limit=1) == [Event(3, "frame", {"frame": 0})]
    assert store.events(job.id, after=4) == store.events(job.id, after=10**30) == []


def test_a_job_that_fails_says_why_and_keeps_no_files(store: Store) -> None:
    job = store.create({}, 8, most_waiting=1)
    store.path(job.id, "growing.mp4").write_bytes(b"x")
    store.advance(job.id, 1, None, bytes=1)
    assert store.fail(job.id, "engine_dead", "the engine is gone")
    failed = store.get(job.id)
    assert failed.error == {"code": "engine_dead", "message": "the engine is gone"}
    assert (failed.status, failed.bytes, failed.progress) == ("failed", 0, 12)
    assert store.events(job.id)[-1] == Event(3, "failed", {"status": "failed", "error": failed.error})
    assert not store.path(job.id, "growing.mp4").exists()


@pytest.mark.parametrize(
    ("tokens", "total", "progress"), [(0, 10, 0), (5, 10, 50), (10, 10, 99), (11, 10, 99), (0, 0, 0), (999, 1000, 99)]
)
def test_progress_is_a_hundred_only_of_a_video_that_is_there(
    store: Store, tokens: int, total: int, progress: int
) -> None:
    job = store.create({}, total, most_waiting=1)
    store.advance(job.id, tokens, None)
    assert store.get(job.id).progress == progress
    store.complete(job.id, {})
    assert store.get(job.id).progress == 100


STEPS: dict[str, Callable[[Store, str], bool]] = {
    "start": lambda store, id: store.start(id),
    "advance": lambda store, id: store.advance(id, 1, {"frame": 0}),
    "complete": lambda store, id: store.complete(id, {}),
    "fail": lambda store, id: store.fail(id, "code", "message"),
    "delete": lambda store, id: store.delete(id),
}


@given(steps=st.lists(st.sampled_from(sorted(STEPS)), max_size=8))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_end_is_for_ever(store: Store, steps: list[str]) -> None:
    job = store.create({}, 4, most_waiting=10_000)
    state: str | None = "queued"
    for step in steps:
        there = STEPS[step](store, job.id)
        if step == "delete":
            assert there == (state is not None)
            state = None
        else:
            assert there == (state in ("queued", "in_progress"))
            if there:
                state = {"complete": "completed", "fail": "failed"}.get(step, "in_progress")
        found = store.get(job.id)
        assert (None if found is None else found.status) == state
        assert store.exists(job.id) == store.path(job.id, "x").parent.is_dir() == (state is not None)
        if found is None:
            assert store.events(job.id) is None
        else:
            check_events(store, found)
    store.delete(job.id)


def test_what_is_not_there_is_no_error(store: Store) -> None:
    for id in ("video_" + "0" * 32, "", "../..", "video_" + "0" * 32 + "\n", "x" * 10_000, "\ud800"):
        assert store.get(id) is None
        assert store.events(id) is None
        assert not store.exists(id)
        assert not any(step(store, id) for step in STEPS.values())


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "/etc/passwd", ".hidden", "Video.mp4", "a\\b", "x\n", "x\0", "é", "a b", "~"]
)
def test_no_name_leads_out_of_a_folder(store: Store, name: str) -> None:
    job = store.create({}, 1, most_waiting=1)
    with pytest.raises(ValueError, match="the name of a file must be"):
        store.path(job.id, name)


@pytest.mark.parametrize("id", ["", "..", "../" + "0" * 32, "video_" + "0" * 31, "video_" + "A" * 32, "x" * 10_000])
def test_no_id_leads_out_of_the_store(store: Store, id: str) -> None:
    with pytest.raises(ValueError, match="the id of a video must be") as caught:
        store.path(id, "video.mp4")
    assert len(str(caught.value)) < 200


def test_a_file_is_in_its_videos_folder(store: Store) -> None:
    id = "video_" + "0" * 32
    for name in ("video.mp4", "frame_00012.webp", "ids.i4"):
        assert store.path(id, name).parent == store.folder / "videos" / id


def test_counts_are_by_state(store: Store) -> None:
    assert store.counts() == {"queued": 0, "in_progress": 0, "completed": 0, "failed": 0, "bytes": 0}
    made(store, size=100)
    store.advance(store.create({}, 1, most_waiting=9).id, 1, None, bytes=11)
    store.create({}, 1, most_waiting=9)
    store.fail(store.create({}, 1, most_waiting=9).id, "code", "message")
    assert store.counts() == {"queued": 1, "in_progress": 1, "completed": 1, "failed": 1, "bytes": 111}


def test_only_so_many_are_unfinished(store: Store) -> None:
    first = store.create({}, 1, most_waiting=2)
    store.create({}, 1, most_waiting=2)
    with pytest.raises(Full, match="2 videos wait"):
        store.create({}, 1, most_waiting=2)
    assert len(os.listdir(store.folder / "videos")) == 2
    store.fail(first.id, "code", "message")
    store.create({}, 1, most_waiting=2)


def test_the_version_tells_of_every_change(store: Store) -> None:
    job = store.create({}, 1, most_waiting=9)
    with closing(store_of(store.folder)) as other:
        for change in (
            lambda: store.start(job.id),
            lambda: other.advance(job.id, 1, {}),
            lambda: store.complete(job.id, {}),
            lambda: other.delete(job.id),
        ):
            before = store.version(), other.version()
            assert (store.version(), other.version()) == before
            change()
            assert store.version() != before[0]
            assert other.version() != before[1]
            store.list(after=None, limit=9, order="asc")


# Pages.


def many(store: Store, count: int) -> list[str]:
    """Jobs, made while the clock is set back now and then; their ids in order."""
    ids = [f"video_{number:032x}" for number in range(count)]
    columns = "id, status, created_at, total_tokens, request, owner"
    with store._writing() as connection:
        connection.executemany(
            f"INSERT INTO jobs ({columns}) VALUES (?, 'queued', ?, 1, '{{}}', '')",
            [(id, number * 7 % 100) for number, id in enumerate(ids)],
        )
    return ids


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_pages_hold_every_job_once_while_others_come_and_go(store: Store, order: str) -> None:
    ids = many(store, 10_000)
    seen: list[str] = []
    more = True
    while more:
        page, more = store.list(after=seen[-1] if seen else None, limit=97, order=order)
        seen += [job.id for job in page]
        if len(seen) % 970 == 0:
            # One that was seen goes, and another one comes.
            assert store.delete(seen[-2])
            if order == "desc":
                store.create({}, 1, most_waiting=100_000)
    assert seen == (ids if order == "asc" else ids[::-1])


def test_ten_thousand_pages_of_one(store: Store) -> None:
    ids = many(store, 10_000)
    seen: list[str] = []
    more = True
    while more:
        page, more = store.list(after=seen[-1] if seen else None, limit=1, order="asc")
        seen += [job.id for job in page]
    assert seen == ids


def test_ends_of_pages(store: Store) -> None:
    ids = many(store, 3)
    assert store.list(after=None, limit=0, order="asc") == ([], True)
    assert [job.id for job in store.list(after=None, limit=3, order="desc")[0]] == ids[::-1]
    assert store.list(after=None, limit=3, order="desc")[1] is False
    assert store.list(after=ids[-1], limit=3, order="asc") == ([], False)
    with pytest.raises(KeyError):
        store.list(after="video_" + "f" * 32, limit=3, order="asc")


# Sweeping.


def test_what_has_had_its_time_goes(store: Store, clock: Clock) -> None:
    first, waiting = made(store), store.create({}, 1, most_waiting=9)
    clock.now += 500
    second = made(store)
    clock.now += 499
    assert store.sweep().expired == []
    clock.now += 1
    assert store.sweep().expired == [first.id]
    assert not store.path(first.id, "x").parent.exists()
    clock.now += 10_000
    assert store.sweep().expired == [second.id]
    assert store.exists(waiting.id)


def test_without_an_expiry_videos_stay(tmp_path: Path, clock: Clock) -> None:
    with closing(store_of(tmp_path, expire_seconds=None, clock=clock)) as store:
        job = made(store)
        clock.now += 10**9
        assert store.sweep().expired == []
        assert store.get(job.id).expires_at is None


def test_above_the_quota_what_ended_first_goes(tmp_path: Path, clock: Clock) -> None:
    with closing(store_of(tmp_path, quota_bytes=1000, clock=clock)) as store:
        late = store.create({}, 1, most_waiting=9)
        videos = []
        for _ in range(3):
            clock.now += 1
            videos.append(made(store, size=300))
        assert store.sweep().evicted == []
        clock.now += 1
        store.path(late.id, "video.mp4").write_bytes(b"x" * 300)
        store.complete(late.id, {})
        assert store.sweep().evicted == [videos[0].id]
        # One that is being made counts as it grows.
        grows = store.create({}, 1, most_waiting=9)
        store.advance(grows.id, 1, None, bytes=300)
        # Who asks for another one need not wait until somebody sweeps.
        store.create({}, 1, most_waiting=9)
        assert [video.id for video in videos if store.exists(video.id)] == [videos[2].id]
        assert store.exists(late.id)
        store.advance(grows.id, 1, None, bytes=1000)
        with pytest.raises(NoSpace):
            store.create({}, 1, most_waiting=9)
        assert store.counts() == {"queued": 1, "in_progress": 1, "completed": 0, "failed": 0, "bytes": 1000}
        store.delete(grows.id)
        store.create({}, 1, most_waiting=9)


def test_jobs_of_a_store_that_is_open_go_on(store: Store) -> None:
    other = store_of(store.folder, owner="another")
    waiting, begun, done = (other.create({}, 1, most_waiting=9) for _ in range(3))
    other.start(begun.id)
    other.complete(done.id, {})
    assert store.sweep().stopped == []
    other.close()
    # A server of that name that is there again keeps what was its own.
    other = store_of(store.folder, owner="another")
    assert store.sweep().stopped == []
    other.close()
    assert store.sweep().stopped == [waiting.id, begun.id]
    assert store.get(begun.id).error["code"] == "server_stopped"
    assert store.get(done.id).status == "completed"
    assert os.listdir(store.folder / "owners") == [store.owner]
    assert store.sweep().stopped == []


def test_jobs_of_a_killed_server_fail(store: Store) -> None:
    server = process("waits", store.folder)
    id = server.stdout.readline().strip()
    assert store.sweep().stopped == []
    assert store.get(id).status == "in_progress"
    server.kill()
    server.communicate()
    assert store.sweep().stopped == [id]
    assert store.get(id).error["code"] == "server_stopped"


def test_folders_and_rows_without_each_other_go(store: Store, clock: Clock) -> None:
    videos = store.folder / "videos"
    young, old, foreign = (videos / name for name in ("video_" + "1" * 32, "video_" + "2" * 32, "lost+found"))
    for folder, age in ((young, 10), (old, 100), (foreign, 1000)):
        folder.mkdir()
        os.utime(folder, (clock.now - age,) * 2)
    lost, kept = made(store), made(store)
    shutil.rmtree(store.path(lost.id, "x").parent)
    (store.folder / "trash" / "left").mkdir()
    (store.folder / "trash" / "left" / "video.mp4").write_bytes(b"x")
    swept = store.sweep()
    assert (swept.lost, swept.folders) == ([lost.id], 1)
    assert set(os.listdir(videos)) == {young.name, foreign.name, kept.id}
    assert os.listdir(store.folder / "trash") == []
    assert not store.exists(lost.id)


def test_files_written_after_a_failure_go(store: Store) -> None:
    job = store.create({}, 1, most_waiting=1)
    store.fail(job.id, "code", "message")
    store.path(job.id, "late.webp").write_bytes(b"x")
    store.sweep()
    assert os.listdir(store.path(job.id, "x").parent) == []


# Races.


def test_a_process_killed_at_any_step_leaves_nothing_that_is_not_mended(tmp_path: Path) -> None:
    server = process("killed", tmp_path, 1)
    output, errors = server.communicate(timeout=300)
    assert server.returncode == 0, errors
    # As many steps as were taken by hand: statements, and changes of files.
    assert int(output) > 100


def test_two_servers_at_once(tmp_path: Path) -> None:
    # Nobody has made the tables yet: all of them try.
    servers = [process("crowd", tmp_path / "store", 15, 6) for _ in range(2)]
    with closing(store_of(tmp_path / "store")) as store:
        while any(server.poll() is None for server in servers):
            counts = store.counts()
            assert counts["queued"] + counts["in_progress"] <= 6
            for job in store.list(after=None, limit=50, order="desc")[0]:
                check_events(store, job)
            assert store.sweep().lost == []
        for server in servers:
            _, errors = server.communicate()
            assert server.returncode == 0, errors
        check_whole(store)
        assert store.counts()["completed"] == 2 * 4 * 10


def test_a_deletion_may_race_with_the_end(store: Store) -> None:
    with closing(store_of(store.folder)) as other:
        for _ in range(30):
            job = store.create({}, 1, most_waiting=9)
            begin = threading.Barrier(2)

            def end(job: Job = job, begin: threading.Barrier = begin) -> None:
                begin.wait()
                with suppress(FileNotFoundError):
                    store.path(job.id, "growing.mp4").write_bytes(b"x" * 1000)
                    store.path(job.id, "growing.mp4").rename(store.path(job.id, "video.mp4"))
                store.complete(job.id, {})

            thread = threading.Thread(target=end)
            thread.start()
            begin.wait()
            assert other.delete(job.id)
            thread.join()
            assert not store.exists(job.id)
            assert not store.path(job.id, "x").parent.exists()
            assert os.listdir(store.folder / "trash") == []
    check_whole(store)


class Interrupted(Store):
    """A store within whose steps something else happens."""

    measured: Callable[[], object] = staticmethod(lambda: None)
    forgotten: Callable[[], object] = staticmethod(lambda: None)

    def _size(self, id: str) -> int:
        self.measured()
        return super()._size(id)

    def _discard(self, id: str) -> None:
        self.forgotten()
        super()._discard(id)


def test_a_deletion_may_come_between_any_two_steps_of_the_end(tmp_path: Path) -> None:
    with closing(Interrupted(tmp_path, expire_seconds=None, quota_bytes=None)) as store:
        job = store.create({}, 1, most_waiting=9)
        store.path(job.id, "video.mp4").write_bytes(b"x")
        store.measured = lambda: store.delete(job.id)
        assert not store.complete(job.id, {})
        check_whole(store)
        store.measured = lambda: None
        job = store.create({}, 1, most_waiting=9)

        def finish() -> None:
            # The row is gone, and the folder is still there.
            store.path(job.id, "video.mp4").write_bytes(b"x")
            assert not store.complete(job.id, {})
            assert not store.fail(job.id, "code", "message")

        store.forgotten = finish
        assert store.delete(job.id)
        check_whole(store)


def test_who_makes_a_deleted_video_finds_no_folder(store: Store) -> None:
    job = store.create({}, 1, most_waiting=1)
    store.path(job.id, "growing.mp4").write_bytes(b"x")
    with store.path(job.id, "growing.mp4").open("ab") as file:
        store.delete(job.id)
        file.write(b"more")
    for change in (
        lambda: store.path(job.id, "frame_00000.webp").write_bytes(b"x"),
        lambda: store.path(job.id, "growing.mp4").rename(store.path(job.id, "video.mp4")),
    ):
        with pytest.raises(FileNotFoundError):
            change()
    assert not store.advance(job.id, 1, {})
    check_whole(store)


# What breaks.


@contextmanager
def locked(store: Store) -> Iterator[None]:
    with closing(sqlite3.connect(store.folder / "videos.sqlite3", isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield


def test_a_locked_store_is_busy_and_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PATIENCE", 0.02)
    with closing(store_of(tmp_path)) as store:
        job = store.create({}, 1, most_waiting=9)
        with locked(store):
            for step in STEPS.values():
                with pytest.raises(StoreBusy):
                    step(store, job.id)
            with pytest.raises(StoreBusy):
                store.create({}, 1, most_waiting=9)
            assert store.get(job.id) == job
            assert store.path(job.id, "x").parent.is_dir()
            assert len(os.listdir(tmp_path / "videos")) == 1
        # That it failed is not forgotten: nobody else would say so.
        assert store.get(job.id).status == "queued"
        store.sweep()
        assert store.get(job.id).error == {"code": "code", "message": "message"}


class Racing:
    """A connection that meets another one which opens the same new database."""

    left = 1

    def execute(self, statement: str) -> Racing:
        if self.left:
            self.left -= 1
            error = sqlite3.OperationalError("database is locked")
            error.sqlite_errorcode = sqlite3.SQLITE_BUSY
            raise error
        return self

    def fetchone(self) -> tuple[str]:
        return ("wal",)


def test_two_servers_may_open_a_new_store_at_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    racing = Racing()
    store._journal(racing)
    assert racing.left == 0
    monkeypatch.setattr(module, "_PATIENCE", -1.0)
    racing.left = 9
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        store._journal(racing)
    assert racing.left == 8


def test_a_thread_that_writes_keeps_others_waiting_and_then_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PATIENCE", 0.02)
    with closing(store_of(tmp_path)) as store:
        job = store.create({}, 1, most_waiting=9)
        problems: list[type[BaseException]] = []

        def write() -> None:
            try:
                store.start(job.id)
            except StoreError as error:
                problems.append(type(error))

        with store._writing():
            thread = threading.Thread(target=write)
            thread.start()
            thread.join()
        assert problems == [StoreBusy]
        assert store.start(job.id)


class Limited(Store):
    """A store whose database may have so many pages."""

    pages = 2**30

    def _connect(self) -> sqlite3.Connection:
        connection = super()._connect()
        connection.execute(f"PRAGMA max_page_count = {self.pages}")
        return connection


def test_a_database_that_cannot_grow_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Limited, "pages", 40)
    with closing(Limited(tmp_path, expire_seconds=None, quota_bytes=None)) as store:
        jobs: list[Job] = []

        def more() -> None:
            jobs.extend(store.create({"prompt": "x" * 2000}, 1, most_waiting=9999) for _ in range(1000))

        with pytest.raises(StoreFull, match="full"):
            more()
        assert len(jobs) > 9
        assert {job.id for job in store.list(after=None, limit=999, order="asc")[0]} == {job.id for job in jobs}
        assert set(os.listdir(tmp_path / "videos")) == {job.id for job in jobs}
        assert store.advance(jobs[0].id, 1, None)
        assert store.delete(jobs[1].id)
        assert store.fail(jobs[0].id, "disk_full", "no room")
        store.create({"prompt": "x" * 1000}, 1, most_waiting=9999)


class Filling(Store):
    """A store on a disk that has room for a transaction only where something has been given up."""

    room: Callable[[], bool] = staticmethod(lambda: True)

    @contextmanager
    def _writing(self, *, durable: bool = False) -> Iterator[sqlite3.Connection]:
        with super()._writing(durable=durable) as connection:
            yield connection
            if not self.room():
                raise StoreFull("full")


def test_an_end_gets_through_where_the_disk_is_full(tmp_path: Path) -> None:
    with closing(Filling(tmp_path, expire_seconds=None, quota_bytes=None)) as store:
        done, failed, deleted, stuck = (store.create({}, 1, most_waiting=9) for _ in range(4))
        reserve, video = tmp_path / "reserve", store.path(done.id, "video.mp4")
        video.write_bytes(b"x")
        store.room = lambda: not reserve.exists()
        with pytest.raises(StoreFull):
            store.start(done.id)
        assert store.complete(done.id, {})
        assert video.exists()
        reserve.write_bytes(b"x")
        assert store.delete(deleted.id)
        reserve.write_bytes(b"x")
        growing = store.path(failed.id, "growing.mp4")
        growing.write_bytes(b"x")
        store.room = lambda: not reserve.exists() and not growing.exists()
        assert store.fail(failed.id, "disk_full", "no room")
        # Of what has ended nothing is removed, however full it is.
        reserve.write_bytes(b"x")
        store.room = lambda: False
        assert not store.fail(done.id, "disk_full", "no room")
        assert video.exists()
        # Nobody would say again that it failed: the store does, as soon as it can.
        with pytest.raises(StoreFull):
            store.fail(stuck.id, "disk_full", "no room")
        store.room = lambda: True
        store.sweep()
        assert store.get(stuck.id).error["code"] == "disk_full"
        assert reserve.stat().st_size == 2**20


def test_a_disk_without_room_for_a_folder(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for code, meant in ((errno.ENOSPC, StoreFull), (errno.EDQUOT, StoreFull), (errno.EIO, StoreError)):

        def refuse(path: Path, *args: object, code: int = code, **options: object) -> None:
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patch:
            patch.setattr(Path, "mkdir", refuse)
            with pytest.raises(StoreError) as caught:
                store.create({}, 1, most_waiting=9)
        assert type(caught.value) is meant
    assert store.list(after=None, limit=9, order="asc") == ([], False)


def test_a_disk_that_is_full_indeed(tmp_path: Path) -> None:
    if shutil.which("unshare") is None:
        pytest.skip("this machine has no unshare: nobody but root mounts a small disk")
    mounts = f"mount -t tmpfs -o size=4m tmpfs '{tmp_path}'"
    server = process("full", tmp_path / "store", inside=f"{mounts} || exit 77")
    _, errors = server.communicate(timeout=120)
    if server.returncode == 77 or errors.startswith("unshare:"):
        pytest.skip(f"this machine lets nobody mount a small disk: {errors.strip()}")
    assert server.returncode == 0, errors


def test_what_cannot_keep_videos_is_refused_in_one_sentence(tmp_path: Path) -> None:
    def refused(folder: Path, words: str) -> None:
        with pytest.raises(OSError, match=words) as caught:
            store_of(folder)
        assert "\n" not in str(caught.value)
        assert "name a folder on a local disk" in str(caught.value)

    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "Not a directory")
    refused(Path("/proc/none/here"), "No such file")
    for name, content in (("text", b"no database " * 100), ("empty", b"")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "videos.sqlite3").write_bytes(content)
    refused(tmp_path / "text", "not a database")
    store_of(tmp_path / "empty").close()
    (tmp_path / "folder" / "videos.sqlite3").mkdir(parents=True)
    refused(tmp_path / "folder", "unable to open")
    (tmp_path / "other").mkdir()
    with closing(sqlite3.connect(tmp_path / "other" / "videos.sqlite3")) as connection:
        connection.execute("CREATE TABLE photos (id)")
    refused(tmp_path / "other", "of another kind")
    with closing(sqlite3.connect(tmp_path / "empty" / "videos.sqlite3")) as connection:
        connection.execute("PRAGMA user_version = 2")
    refused(tmp_path / "empty", "newer version")


def test_a_store_that_may_not_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store_of(tmp_path).close()
    connect = sqlite3.connect

    def read_only(path: Path, **options: object) -> sqlite3.Connection:
        return connect(f"file:{path}?mode=ro", uri=True, **options)

    monkeypatch.setattr(sqlite3, "connect", read_only)
    with pytest.raises(OSError, match="readonly database"):
        store_of(tmp_path)


def test_an_owner_is_a_name(tmp_path: Path) -> None:
    for owner in ("", "../x", "a b", "x\n", ".", "x" * 201):
        with pytest.raises(ValueError, match="owner must be"):
            store_of(tmp_path, owner=owner)


def test_a_store_that_is_opened_again_has_what_it_had(tmp_path: Path) -> None:
    with closing(store_of(tmp_path)) as store:
        job = made(store, size=10)
    with closing(store_of(tmp_path)) as store:
        assert store.get(job.id) == job
        assert store.path(job.id, "video.mp4").stat().st_size == 10


def test_the_store_needs_neither_vllm_nor_torch() -> None:
    code = (
        "import sys, vllm_packcache.videos.store, vllm_packcache.videos.webhooks;"
        "assert not {'vllm', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
