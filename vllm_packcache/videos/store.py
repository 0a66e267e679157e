"""Videos on disk: a row for each in SQLite, and a folder with its files.

::

    videos.sqlite3          jobs, their events, and whom to tell of their end
    videos/video_.../       the files of one video
    trash/                  folders of deleted videos until they are removed
    owners/                 a file for each server, which it keeps locked as long as it lives
    reserve                 space that is given up when a full disk leaves none to write an end with

Servers of one host share a store: every step is one transaction, and what a server leaves half done when it is killed
is mended by `Store.sweep` of another. Calls block for up to some seconds; several threads may make them at once.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias

from vllm_packcache.config.errors import shown, shown_path

ID = re.compile(r"video_[0-9a-f]{32}")
"""What a whole id of a video looks like."""

STATES = ("queued", "in_progress", "completed", "failed")

Status = Literal["queued", "in_progress", "completed", "failed"]

# No name that begins with a point: neither the folder nor the one above, nor a file that is being written.
_NAME = re.compile(r"[a-z0-9_][a-z0-9_.]*")
_OWNER = re.compile(r"[A-Za-z0-9_:-][A-Za-z0-9_.:-]{0,199}")

_KIND, _VERSION = 0x70636B76, 1
"""What SQLite's header says of a database of this kind, and of this layout of its tables."""

_PATIENCE = 5.0
"""Seconds that a step waits for another one's end."""

_SETTLED = 60.0
"""Seconds after which a folder without a row is nobody's: who makes one writes its row at once."""

_LEASE = 60.0
"""Seconds that who has taken a delivery has for it; then it is due again."""

_TOLD_WITHIN = 86_400.0
"""Seconds after which nobody is told any more, such as an address that no server names now."""

_RESERVE = 2**20
"""Bytes that are held back for the ends of jobs."""

_TABLES = """
CREATE TABLE jobs (
    row INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    status TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    started_at REAL,
    completed_at INTEGER,
    expires_at INTEGER,
    tokens INTEGER NOT NULL DEFAULT 0,
    total_tokens INTEGER NOT NULL,
    bytes INTEGER NOT NULL DEFAULT 0,
    request TEXT NOT NULL,
    result TEXT NOT NULL DEFAULT '{}',
    error TEXT,
    owner TEXT NOT NULL
);
CREATE INDEX jobs_ended ON jobs (completed_at, row, bytes, status);
CREATE INDEX jobs_expiring ON jobs (expires_at) WHERE expires_at IS NOT NULL;
CREATE TABLE events (
    job INTEGER NOT NULL,
    seq INTEGER NOT NULL,
    kind TEXT NOT NULL,
    data TEXT NOT NULL,
    PRIMARY KEY (job, seq)
) WITHOUT ROWID;
CREATE TABLE deliveries (
    job INTEGER NOT NULL,
    address TEXT NOT NULL,
    event TEXT NOT NULL,
    type TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    tries INTEGER NOT NULL DEFAULT 0,
    due REAL NOT NULL,
    PRIMARY KEY (job, address)
) WITHOUT ROWID;
CREATE INDEX deliveries_due ON deliveries (address, due);
"""

_COLUMNS = (
    "id, status, created_at, started_at, completed_at, expires_at, tokens, total_tokens, bytes, request, result, "
    "error, owner, (SELECT json_group_array(address) FROM deliveries WHERE job = jobs.row)"
)

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


class StoreError(Exception):
    """A store cannot do what it is asked for. The message is one sentence that a client may read."""


class Full(StoreError):
    """Too many jobs are unfinished."""


class NoSpace(StoreError):
    """The quota is used up by videos that are being made."""


class StoreFull(StoreError):
    """The disk is full."""


class StoreBusy(StoreError):
    """Others have kept the store locked."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A video that is to be made, is being made, or has been.

    Args:
        id: of the video.
        status: of its making.
        created_at: seconds of Unix time, as all times here.
        started_at: when the engine began with it.
        completed_at: when it ended, well or not.
        expires_at: when it is deleted.
        tokens: made so far.
        total_tokens: to be made.
        bytes: of its files, as far as they have been counted.
        request: what was asked for; any JSON.
        result: what was made; any JSON.
        error: why it failed: ``code`` and ``message``.
        owner: the server that makes it.
        webhooks_due: addresses that are still to be told of its end.
    """

    id: str
    status: Status
    created_at: int
    started_at: float | None = None
    completed_at: int | None = None
    expires_at: int | None = None
    tokens: int = 0
    total_tokens: int
    bytes: int = 0
    request: dict[str, Any]
    result: dict[str, Any] = field(default_factory=dict)
    error: dict[str, str] | None = None
    owner: str
    webhooks_due: list[str] = field(default_factory=list)

    @property
    def progress(self) -> int:
        """Percent of the tokens that are made; 100 only of a video that is there."""
        if self.status == "completed":
            return 100
        return min(99, 100 * self.tokens // self.total_tokens) if self.total_tokens > 0 else 0

    @property
    def ended(self) -> bool:
        """Whether nothing of it changes any more."""
        return self.completed_at is not None


@dataclass(frozen=True)
class Event:
    """Something that happened to a video.

    Args:
        seq: 1, 2, ... of each video.
        kind: ``status``, ``frame``, ``completed`` or ``failed``.
        data: of it; any JSON.
    """

    seq: int
    kind: str
    data: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """Somebody who is to be told of a video's end, taken by who called `Store.due`.

    Args:
        event: its id, the same however often it is tried and whomever it is told.
        type: ``video.completed`` or ``video.failed``.
        video: id of the video.
        created_at: when the video ended.
        address: that is to be told.
        tries: how often it has been taken, this time included.
    """

    event: str
    type: str
    video: str
    created_at: int
    address: str
    tries: int


@dataclass(frozen=True, kw_only=True)
class Swept:
    """What `Store.sweep` did.

    Args:
        expired: videos deleted since their time had come.
        evicted: videos deleted since the quota was used up.
        stopped: jobs that failed since their server is gone.
        lost: videos whose files are gone.
        folders: count of folders removed that belonged to no video.
    """

    expired: list[str]
    evicted: list[str]
    stopped: list[str]
    lost: list[str]
    folders: int


_Jobs: TypeAlias = list[Job]
_Strings: TypeAlias = list[str]
_Events: TypeAlias = list[Event]
_Deliveries: TypeAlias = list[Delivery]
"""Within `Store` the name ``list`` is a method's."""


class Store:
    """All videos of the servers of one host.

    Args:
        folder: where they are kept, on a local disk; made if there is none.
        expire_seconds: after its end a video is kept for so long; none: until it is deleted.
        quota_bytes: if so many are kept, videos that ended first are deleted; none: no limit.
        owner: what jobs made here are marked with; by default new for each store. Jobs of an owner without an open
            store fail, whether it was closed or its process is gone.
        clock: seconds of Unix time.

    Raises:
        OSError: the folder cannot be used, or holds a database of another kind or of a newer version.
        ValueError: the owner is no name.
    """

    def __init__(
        self,
        folder: Path,
        *,
        expire_seconds: float | None,
        quota_bytes: int | None,
        owner: str | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.folder = Path(folder)
        self.expire_seconds, self.quota_bytes, self.clock = expire_seconds, quota_bytes, clock
        self.owner = f"{os.getpid()}:{secrets.token_hex(8)}" if owner is None else owner
        if not _OWNER.fullmatch(self.owner):
            raise ValueError(f"owner must be letters, digits and _.:- (1 to 200), not {shown(self.owner)}")
        self._videos, self._trash = self.folder / "videos", self.folder / "trash"
        self._owners, self._reserve = self.folder / "owners", self.folder / "reserve"
        self._database = self.folder / "videos.sqlite3"
        self._told: dict[str, tuple[str, ...]] = {}
        self._owed: dict[str, tuple[str, str]] = {}
        self._idle: list[sqlite3.Connection] = []
        self._writer = threading.Lock()
        self._watching = threading.Lock()
        try:
            for each in (self._videos, self._trash, self._owners):
                each.mkdir(parents=True, exist_ok=True)
            self._prepare()
            self._claim: IO[str] = self._claimed()
            self._watcher = self._connect()
        except (OSError, sqlite3.Error) as error:
            raise OSError(
                f"{shown_path(self.folder)} cannot keep videos ({_reason(error)}): name a folder on a local disk that "
                "this process may write to"
            ) from error
        self._hold_back()

    def close(self) -> None:
        """Let go of the files. Jobs of this store that are unfinished count as those of a dead server."""
        with self._watching:
            self._watcher.close()
        while self._idle:
            self._idle.pop().close()
        self._claim.close()

    def tell(self, webhooks: Mapping[str, Sequence[str]]) -> None:
        """Say whom to tell of videos that end from now on.

        Args:
            webhooks: for each address the types of events that it wants.
        """
        self._told = {address: tuple(types) for address, types in webhooks.items()}

    # One job.

    def create(self, request: dict[str, Any], total_tokens: int, *, most_waiting: int) -> Job:
        """A new job, which waits.

        Args:
            request: what was asked for; any JSON.
            total_tokens: that will be made.
            most_waiting: jobs that may be unfinished, this one included.

        Raises:
            Full: there are too many.
            NoSpace: videos that are being made use up the quota.
            StoreError: the disk is full, or the store is locked.
        """
        self._evict()
        name = f"video_{secrets.token_hex(16)}"
        job = Job(
            id=name,
            status="queued",
            created_at=int(self.clock()),
            total_tokens=total_tokens,
            request=request,
            owner=self.owner,
        )
        values = (name, job.status, job.created_at, total_tokens, _text(request), self.owner)
        made = False
        try:
            with self._writing(durable=True) as connection:
                (waiting,) = connection.execute("SELECT count(*) FROM jobs WHERE completed_at IS NULL").fetchone()
                if waiting >= most_waiting:
                    raise Full(f"{waiting} videos wait or are being made, which is the most: try again later")
                if self._excess(connection) >= 0:
                    raise NoSpace("videos that are being made use up the space that videos may use: try again later")
                # Before its row: a job that is seen has a folder.
                self._home(name).mkdir()
                made = True
                row = connection.execute(
                    "INSERT INTO jobs (id, status, created_at, total_tokens, request, owner) VALUES (?, ?, ?, ?, ?, ?)",
                    values,
                ).lastrowid
                _happened(connection, row, "status", {"status": "queued"})
        except BaseException:
            if made:
                with suppress(OSError):
                    self._home(name).rmdir()
            raise
        return job

    def get(self, id: str) -> Job | None:
        """The job of that id; none if there is no such, or it was deleted."""
        with self._reading() as connection:
            row = _row(connection, id)
            if row is None:
                return None
            return _job(connection.execute(f"SELECT {_COLUMNS} FROM jobs WHERE row = ?", (row,)).fetchone())

    def exists(self, id: str) -> bool:
        """Whether there is a job of that id."""
        with self._reading() as connection:
            return _row(connection, id) is not None

    def path(self, id: str, name: str) -> Path:
        """Where a file of a video is, whether it is there or not.

        Raises:
            ValueError: the id or the name does not look like one.
        """
        if not ID.fullmatch(id):
            raise ValueError(f"the id of a video must be video_ and 32 digits from 0 to f, not {shown(id)}")
        if not _NAME.fullmatch(name):
            raise ValueError(f"the name of a file must be of a-z, 0-9, _ and points, not {shown(name)}")
        return self._home(id) / name

    def start(self, id: str) -> bool:
        """Say that the engine has begun with a job.

        Returns:
            Whether it is there and has not ended.
        """
        with self._writing() as connection:
            row = _unfinished(connection, id)
            if row is not None:
                self._begin(connection, row)
            return row is not None

    def advance(self, id: str, tokens: int, event: dict[str, Any] | None, *, bytes: int | None = None) -> bool:
        """Say how far a job is.

        Args:
            id: of the video.
            tokens: made so far, all of them; fewer than before change nothing.
            event: data of an event ``frame``, which is seen together with the tokens; none: no event.
            bytes: of all its files so far; none: as before.

        Returns:
            Whether it is there and has not ended. If not, there is nothing to go on with.
        """
        with self._writing() as connection:
            row = _unfinished(connection, id)
            if row is None:
                return False
            self._begin(connection, row)
            connection.execute(
                "UPDATE jobs SET tokens = max(tokens, ?), bytes = coalesce(?, bytes) WHERE row = ?",
                (tokens, bytes, row),
            )
            if event is not None:
                _happened(connection, row, "frame", event)
        return True

    def complete(self, id: str, result: dict[str, Any]) -> bool:
        """Say that a video is there, with all of its files.

        Returns:
            Whether it is: not if it was deleted meanwhile, or has ended otherwise.
        """
        if not self.exists(id):
            return False
        size = self._size(id)

        def ended() -> bool:
            return self._end(id, "completed", {"result": _text(result), "bytes": size}, {"status": "completed"})

        try:
            return ended()
        except StoreFull:
            self._reserve.unlink(missing_ok=True)
            return ended()

    def fail(self, id: str, code: str, message: str) -> bool:
        """Say that a video will not be, and remove its files.

        If that cannot be written even so, it is written by a later `sweep` of this store.

        Returns:
            Whether that is new: not if it was deleted, or has ended otherwise.
        """
        error = {"code": code, "message": message}

        def ended() -> bool:
            return self._end(id, "failed", {"error": _text(error), "bytes": 0}, {"status": "failed", "error": error})

        try:
            try:
                new = ended()
            except StoreFull:
                job = self.get(id)
                if job is None or job.ended:
                    return False
                self._clear(id)
                self._reserve.unlink(missing_ok=True)
                new = ended()
        except StoreError:
            self._owed[id] = (code, message)
            raise
        if new:
            self._clear(id)
        return new

    def delete(self, id: str) -> bool:
        """Forget a video, whatever its state, and remove its files.

        Whoever makes it is told by `advance`, and finds no folder to write to.

        Returns:
            Whether there was one.
        """

        def forget() -> bool:
            with self._writing(durable=True) as connection:
                row = _row(connection, id)
                if row is not None:
                    connection.execute("DELETE FROM jobs WHERE row = ?", (row,))
                    connection.execute("DELETE FROM events WHERE job = ?", (row,))
                    connection.execute("DELETE FROM deliveries WHERE job = ?", (row,))
                return row is not None

        try:
            there = forget()
        except StoreFull:
            self._reserve.unlink(missing_ok=True)
            there = forget()
        if there:
            self._discard(id)
        return there

    # All jobs.

    def list(self, *, after: str | None, limit: int, order: Literal["asc", "desc"]) -> tuple[_Jobs, bool]:
        """A page of jobs in the order in which they came.

        Args:
            after: id of the job that the page comes after; none: it is the first one.
            limit: jobs of it at most.
            order: ``asc``: the oldest first; ``desc``: the newest first.

        Returns:
            The jobs, and whether there are more.

        Raises:
            KeyError: there is no job of the id ``after``.
        """
        # By their rows, not by their times: the clock of a machine may be set back.
        where, values = "", [limit + 1]
        way = {"asc": ">", "desc": "<"}[order]
        with self._reading() as connection:
            if after is not None:
                row = _row(connection, after)
                if row is None:
                    raise KeyError(after)
                where, values = f"WHERE row {way} ?", [row, limit + 1]
            rows = connection.execute(
                f"SELECT {_COLUMNS} FROM jobs {where} ORDER BY row {order} LIMIT ?", values
            ).fetchall()
        return [_job(row) for row in rows[:limit]], len(rows) > limit

    def events(self, id: str, after: int = 0, limit: int = 64) -> _Events | None:
        """What happened to a video.

        Args:
            id: of it.
            after: number of the event that is known; 0: none is.
            limit: events at most.

        Returns:
            The next events, or none if the video is gone.
        """
        with self._reading() as connection:
            row = _row(connection, id)
            if row is None:
                return None
            rows = connection.execute(
                "SELECT seq, kind, data FROM events WHERE job = ? AND seq > ? ORDER BY seq LIMIT ?",
                (row, min(after, 2**63 - 1), limit),
            ).fetchall()
        return [Event(seq, kind, json.loads(data)) for seq, kind, data in rows]

    def version(self) -> int:
        """A number that differs after anything was written, by whatever process. Cheap."""
        # Of a connection that never writes: SQLite does not count a connection's own changes.
        with self._meant(), self._watching:
            (version,) = self._watcher.execute("PRAGMA data_version").fetchone()
        return version

    def counts(self) -> dict[str, int]:
        """Count of jobs by state, and under ``bytes`` those of their files."""
        with self._reading() as connection:
            rows = connection.execute("SELECT status, count(*), sum(bytes) FROM jobs GROUP BY status").fetchall()
        counts = dict.fromkeys(STATES, 0) | {status: count for status, count, _ in rows}
        return counts | {"bytes": sum(size for *_, size in rows)}

    # What is mended.

    def sweep(self) -> Swept:
        """Delete what has had its time, end what nobody goes on with, remove what belongs to nothing.

        Every server may call it, also at once.
        """
        # First what makes room.
        for trash in _entries(self._trash):
            shutil.rmtree(self._trash / trash, ignore_errors=True)
        with self._reading() as connection:
            expired = _names(
                connection.execute(
                    "SELECT id FROM jobs WHERE expires_at <= ? ORDER BY expires_at, row", (self.clock(),)
                )
            )
        expired = [name for name in expired if self.delete(name)]
        evicted = self._evict()
        for name in list(self._owed):
            with suppress(StoreError):
                self.fail(name, *self._owed.pop(name))
        stopped = self._stopped()
        lost, folders = self._matched()
        with self._writing() as connection:
            connection.execute("DELETE FROM deliveries WHERE created_at < ?", (self.clock() - _TOLD_WITHIN,))
        self._hold_back()
        return Swept(expired=expired, evicted=evicted, stopped=stopped, lost=lost, folders=folders)

    def _stopped(self) -> _Strings:
        """Fail the jobs of servers that are gone."""
        with self._reading() as connection:
            owners = _names(connection.execute("SELECT DISTINCT owner FROM jobs WHERE completed_at IS NULL"))
        stopped = []
        for owner in owners:
            if self._lives(owner):
                continue
            with self._reading() as connection:
                names = _names(
                    connection.execute("SELECT id FROM jobs WHERE completed_at IS NULL AND owner = ?", (owner,))
                )
            why = "the server that was to make this video has stopped: ask for it again"
            stopped += [name for name in names if self.fail(name, "server_stopped", why)]
        for owner in _entries(self._owners):
            self._lives(owner)
        return stopped

    def _matched(self) -> tuple[_Strings, int]:
        """Rows without a folder are deleted, folders without a row removed, and files of what has failed."""
        with self._reading() as connection:
            rows = connection.execute("SELECT id, status FROM jobs").fetchall()
        lost, folders = [], 0
        for name, status in rows:
            if not self._home(name).is_dir():
                if self.delete(name):
                    lost.append(name)
            elif status == "failed":
                self._clear(name)
        known = {name for name, _ in rows}
        for name in _entries(self._videos):
            if name in known or not ID.fullmatch(name):
                continue
            try:
                age = self.clock() - self._home(name).stat().st_mtime
            except FileNotFoundError:
                continue
            if age > _SETTLED and not self.exists(name):
                self._discard(name)
                folders += 1
        return lost, folders

    def _evict(self) -> _Strings:
        """Delete videos that ended first as long as the quota is used up."""
        evicted: list[str] = []
        if self.quota_bytes is None:
            return evicted
        with self._reading() as connection:
            excess = self._excess(connection)
            rows = (
                connection.execute(
                    "SELECT id, bytes FROM jobs WHERE completed_at IS NOT NULL AND bytes > 0 ORDER BY completed_at, row"
                ).fetchall()
                if excess >= 0
                else []
            )
        for name, size in rows:
            if excess < 0:
                break
            if self.delete(name):
                evicted.append(name)
            excess -= size
        return evicted

    def _excess(self, connection: sqlite3.Connection) -> int:
        """Bytes kept beyond the quota; below zero: so many may come."""
        if self.quota_bytes is None:
            return -1
        (kept,) = connection.execute("SELECT coalesce(sum(bytes), 0) FROM jobs").fetchone()
        return kept - self.quota_bytes

    # Whom to tell.

    def due(self, address: str, limit: int = 8) -> _Deliveries:
        """Take deliveries to an address that are due.

        Nobody else takes them for a minute. Each must be given to `done` within it.
        """
        now = self.clock()
        where = "address = ? AND due <= ?"
        with self._reading() as connection:
            if connection.execute(f"SELECT 1 FROM deliveries WHERE {where} LIMIT 1", (address, now)).fetchone() is None:
                return []
        with self._writing() as connection:
            rows = connection.execute(
                "SELECT event, type, id, deliveries.created_at, address, tries + 1, job FROM deliveries "
                f"JOIN jobs ON jobs.row = job WHERE {where} ORDER BY due LIMIT ?",
                (address, now, limit),
            ).fetchall()
            connection.executemany(
                "UPDATE deliveries SET tries = tries + 1, due = ? WHERE job = ? AND address = ?",
                [(now + _LEASE, row[-1], address) for row in rows],
            )
        return [
            Delivery(event=event, type=type, video=video, created_at=created, address=address, tries=tries)
            for event, type, video, created, address, tries, _ in rows
        ]

    def done(self, delivery: Delivery, again: float | None = None) -> None:
        """Say how a delivery ended.

        Args:
            delivery: that was taken.
            again: seconds after which it is due once more; none: never, it was delivered or is given up.
        """
        # Whoever was too slow has lost it to another one, who has counted one more.
        taken = "event = ? AND address = ? AND tries = ?"
        values = (delivery.event, delivery.address, delivery.tries)
        with self._writing() as connection:
            if again is None:
                connection.execute(f"DELETE FROM deliveries WHERE {taken}", values)
            else:
                connection.execute(f"UPDATE deliveries SET due = ? WHERE {taken}", (self.clock() + again, *values))

    # Steps of one transaction.

    def _begin(self, connection: sqlite3.Connection, row: int) -> None:
        changed = connection.execute(
            "UPDATE jobs SET status = 'in_progress', started_at = ? WHERE row = ? AND status = 'queued'",
            (self.clock(), row),
        )
        if changed.rowcount:
            _happened(connection, row, "status", {"status": "in_progress"})

    def _end(self, id: str, status: str, values: dict[str, Any], data: dict[str, Any]) -> bool:
        now = self.clock()
        expires = None if self.expire_seconds is None else int(now + self.expire_seconds)
        values = {"status": status, "completed_at": int(now), "expires_at": expires, **values}
        with self._writing(durable=True) as connection:
            row = _unfinished(connection, id)
            if row is None:
                return False
            sets = ", ".join(f"{name} = ?" for name in values)
            connection.execute(f"UPDATE jobs SET {sets} WHERE row = ?", (*values.values(), row))
            _happened(connection, row, status, data)
            event, kind = f"evt_{secrets.token_hex(16)}", f"video.{status}"
            connection.executemany(
                "INSERT INTO deliveries (job, address, event, type, created_at, due) VALUES (?, ?, ?, ?, ?, ?)",
                [(row, each, event, kind, int(now), now) for each, types in self._told.items() if kind in types],
            )
        return True

    # Files.

    def _home(self, id: str) -> Path:
        return self._videos / id

    def _size(self, id: str) -> int:
        """Bytes of a video's files."""
        size = 0
        for name in _entries(self._home(id)):
            with suppress(FileNotFoundError):
                size += (self._home(id) / name).lstat().st_size
        return size

    def _clear(self, id: str) -> None:
        """Remove a video's files, and keep its folder."""
        for name in _entries(self._home(id)):
            with suppress(OSError):
                (self._home(id) / name).unlink()

    def _discard(self, id: str) -> None:
        """Remove a video's folder: nobody finds it any more at once, then its files go."""
        trash = self._trash / f"{id}.{secrets.token_hex(8)}"
        try:
            self._home(id).rename(trash)
        except FileNotFoundError:
            return
        except OSError:
            # A full disk may have no room for another name.
            trash = self._home(id)
        # What cannot be removed now has no row: it is found by `sweep`.
        shutil.rmtree(trash, ignore_errors=True)

    def _hold_back(self) -> None:
        # A disk that is full now has nothing to hold back.
        with suppress(OSError):
            if not self._reserve.exists():
                # No zeros: a file system may keep them without any space.
                self._reserve.write_bytes(os.urandom(_RESERVE))

    def _claimed(self) -> IO[str]:
        """The file of this owner, locked until it is closed or its process ends, however it does."""
        path = self._owners / self.owner
        while True:
            file = path.open("a")
            fcntl.flock(file, fcntl.LOCK_SH)
            # Somebody who found it without a lock may have removed it meanwhile.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    return file
            file.close()

    def _lives(self, owner: str) -> bool:
        """Whether a server lives. The file of one that does not is removed."""
        if owner == self.owner:
            return True
        path = self._owners / owner
        try:
            with path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    # The database.

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._database, timeout=_PATIENCE, isolation_level=None, check_same_thread=False, cached_statements=64
        )
        connection.execute("PRAGMA journal_size_limit = 16777216")
        return connection

    def _prepare(self) -> None:
        """Make the tables if there are none, and check that they are ours."""
        with closing(self._connect()) as connection:
            (kind,) = connection.execute("PRAGMA application_id").fetchone()
            (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if tables and kind != _KIND:
                raise OSError(f"{self._database.name} in it is a database of another kind")
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version > _VERSION:
                raise OSError(f"{self._database.name} in it was written by a newer version")
            self._journal(connection)
            connection.execute("BEGIN IMMEDIATE")
            # Whoever was first has made them.
            if connection.execute("PRAGMA user_version").fetchone() == (0,):
                for statement in _TABLES.split(";"):
                    connection.execute(statement)
                connection.execute(f"PRAGMA application_id = {_KIND}")
            # Each time: whether it can be written is to be known now.
            connection.execute(f"PRAGMA user_version = {_VERSION}")
            connection.execute("COMMIT")

    def _journal(self, connection: sqlite3.Connection) -> None:
        """Let readers and a writer go on beside each other."""
        last = time.monotonic() + _PATIENCE
        while True:
            try:
                (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
                break
            except sqlite3.OperationalError as error:
                # SQLite does not wait here if others are about the same.
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > last:
                    raise
                time.sleep(0.01)
        if mode != "wal":
            raise OSError("its file system cannot share memory between processes")

    @contextmanager
    def _borrowed(self) -> Iterator[sqlite3.Connection]:
        """A connection that no other thread has."""
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = self._connect()
        try:
            yield connection
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            self._idle.append(connection)

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """What is read within is of one moment."""
        with self._meant(), self._borrowed() as connection:
            connection.execute("BEGIN")
            yield connection

    @contextmanager
    def _writing(self, *, durable: bool = False) -> Iterator[sqlite3.Connection]:
        """What is written within is written as a whole or not at all.

        Args:
            durable: whether it outlasts a loss of power, too.
        """
        with self._meant():
            # Threads of a process wait here in turn: SQLite would let them try again and again.
            if not self._writer.acquire(timeout=_PATIENCE):
                raise StoreBusy(_BUSY)
            try:
                with self._borrowed() as connection:
                    connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
                    connection.execute("BEGIN IMMEDIATE")
                    yield connection
                    connection.execute("COMMIT")
            finally:
                self._writer.release()

    @contextmanager
    def _meant(self) -> Iterator[None]:
        """Say what SQLite and the disk mean in errors of this module."""
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0)
            if code & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise StoreBusy(_BUSY) from error
            # The latter is what a full disk says where memory is to be shared.
            if code & 0xFF == sqlite3.SQLITE_FULL or code == sqlite3.SQLITE_IOERR_SHMSIZE:
                raise StoreFull(_FULL) from error
            raise StoreError(f"videos cannot be looked up now: {_reason(error)}") from error
        except OSError as error:
            if error.errno in _FULL_DISK:
                raise StoreFull(_FULL) from error
            raise StoreError(f"videos cannot be kept now: {_reason(error)}") from error


_BUSY = "videos are kept locked by another process: try again later"
_FULL = "the disk that videos are kept on is full: delete some, or try again later"


def _row(connection: sqlite3.Connection, id: str) -> int | None:
    # What is no id may not even be text that SQLite takes.
    found = connection.execute("SELECT row FROM jobs WHERE id = ?", (id,)).fetchone() if ID.fullmatch(id) else None
    return None if found is None else found[0]


def _unfinished(connection: sqlite3.Connection, id: str) -> int | None:
    row = _row(connection, id)
    found = connection.execute("SELECT 1 FROM jobs WHERE row = ? AND completed_at IS NULL", (row,)).fetchone()
    return None if found is None else row


def _happened(connection: sqlite3.Connection, row: int | None, kind: str, data: dict[str, Any]) -> None:
    connection.execute(
        "INSERT INTO events (job, seq, kind, data) "
        "SELECT ?1, coalesce(max(seq), 0) + 1, ?2, ?3 FROM events WHERE job = ?1",
        (row, kind, _text(data)),
    )


def _job(row: Sequence[Any]) -> Job:
    name, status, created, started, completed, expires, tokens, total, size, request, result, error, owner, due = row
    return Job(
        id=name,
        status=status,
        created_at=created,
        started_at=started,
        completed_at=completed,
        expires_at=expires,
        tokens=tokens,
        total_tokens=total,
        bytes=size,
        request=json.loads(request),
        result=json.loads(result),
        error=None if error is None else json.loads(error),
        owner=owner,
        webhooks_due=json.loads(due),
    )


def _names(rows: sqlite3.Cursor) -> list[str]:
    return [name for (name,) in rows.fetchall()]


def _entries(folder: Path) -> list[str]:
    """Names of what is in a folder that may be removed meanwhile."""
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def _text(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _reason(error: Exception) -> str:
    reason = getattr(error, "strerror", None) or str(error)
    return reason.splitlines()[0] if reason else type(error).__name__
