"""Where a video is written."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def claimed(path: Path) -> Iterator[Callable[[bytes], None]]:
    """Make sure that a file can be written, minutes before there is something to write, and that no other run will.

    Its folder is created. A file that is there already stays whole until the new one is.

    Yields:
        What puts content in the file's place.

    Raises:
        OSError: it is a folder, cannot be written, or another run is going to write it.
    """
    unfinished = path.with_name(f".{path.stem}.part")
    with _sentences(path):
        file = _locked(path, unfinished)

    def put(content: bytes) -> None:
        with _sentences(path):
            file.write(content)
            file.flush()
            os.replace(unfinished, path)

    with file:
        try:
            yield put
        finally:
            unfinished.unlink(missing_ok=True)


def _locked(path: Path, unfinished: Path) -> BinaryIO:
    if path.is_dir():
        raise OSError(None, "it is a folder, name a file in it")
    path.parent.mkdir(parents=True, exist_ok=True)
    file = unfinished.open("ab")
    try:
        # Let go when the process ends, however it ends: what a killed one has left behind is taken over.
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # By a name that is gone, the other run has just finished.
        mine = os.path.samestat(os.fstat(file.fileno()), unfinished.stat())
    except (BlockingIOError, FileNotFoundError):
        mine = False
    if not mine:
        file.close()
        raise OSError(None, "another run is going to write it, name another file or wait")
    file.truncate(0)
    return file


@contextmanager
def _sentences(path: Path) -> Iterator[None]:
    try:
        yield
    except (FileExistsError, NotADirectoryError):
        file = next(folder for folder in path.parents if folder.exists())
        raise OSError(f"{path} cannot be written: {file} is no folder") from None
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror}") from None
