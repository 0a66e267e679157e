"""The file of a video: claimed before it is made, whole or not there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vllm_packcache.media.files import claimed


def refused(sentence: str) -> pytest.RaisesExc[OSError]:
    return pytest.raises(OSError, match=f"^{re.escape(sentence)}$")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_takes_its_place_when_it_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "new" / "video.mp4"
    with claimed(out) as put:
        assert not out.exists()
        put(b"whole")
    assert out.read_bytes() == b"whole"
    assert names(out.parent) == ["video.mp4"]


def test_what_was_there_stays_if_nothing_comes(tmp_path: Path) -> None:
    out = tmp_path / "video.mp4"
    out.write_bytes(b"before")
    with pytest.raises(KeyboardInterrupt), claimed(out):
        raise KeyboardInterrupt
    assert out.read_bytes() == b"before"
    assert names(tmp_path) == ["video.mp4"]


def test_a_second_run_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    """Also with another suffix: the server's log is of the same name."""
    out, other = tmp_path / "video.mp4", tmp_path / "video.gif"
    with claimed(out) as put:
        for path in (out, other):
            with (
                refused(f"{path} cannot be written: another run is going to write it, name another file or wait"),
                claimed(path),
            ):
                pytest.fail("both write it")
        put(b"first")
    assert out.read_bytes() == b"first"
    with claimed(out) as put:
        put(b"second")
    assert out.read_bytes() == b"second"


def test_what_a_killed_run_has_left_behind_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / ".video.part").write_bytes(b"half of an earlier one")
    with claimed(tmp_path / "video.mp4") as put:
        put(b"whole")
    assert (tmp_path / "video.mp4").read_bytes() == b"whole"
    assert names(tmp_path) == ["video.mp4"]


def test_files_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    long = tmp_path / f"{'x' * 300}.mp4"
    for path, reason in (
        (tmp_path, "it is a folder, name a file in it"),
        (file / "video.mp4", f"{file} is no folder"),
        (file / "sub" / "video.mp4", f"{file} is no folder"),
        (Path("/dev/null/video.mp4"), "/dev/null is no folder"),
        (long, "File name too long"),
        (Path("/proc/video.mp4"), "No such file or directory"),
    ):
        with refused(f"{path} cannot be written: {reason}"), claimed(path):
            pytest.fail("it can be written")
    assert names(tmp_path) == ["file"]
