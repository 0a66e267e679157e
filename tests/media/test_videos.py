"""Videos as a person sees them. `inputs` went wrong once; their kin are made here."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image

from vllm_packcache.media import videos
from vllm_packcache.media.videos import Clip, encode_video, read_video

INPUTS = Path(__file__).parent / "inputs"
RATE = 8
LOSSLESS = {"codec": "ffv1", "pixels": "bgra"}


def write(
    path: Path,
    frames: Sequence[np.ndarray],
    codec: str = "libx264",
    pixels: str = "yuv420p",
    *,
    rate: int = RATE,
    times: Sequence[int] | None = None,
    aspect: Fraction | None = None,
    turned: tuple[int, bool, bool] | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """Write frames, [H, W, 3 or 4]; ``times`` in frames."""
    with av.open(str(path), "w", options=options or {}) as container:
        stream: Any = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pixels
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if turned is not None:
            stream.set_display_rotation(turned[0], hflip=turned[1], vflip=turned[2])
        for number, pixels_of_frame in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels_of_frame, "rgb24" if pixels_of_frame.shape[2] == 3 else "rgba")
            frame.pts, frame.time_base = (number if times is None else times[number]), Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def grey(*levels: int, size: tuple[int, int] = (32, 64)) -> list[np.ndarray]:
    return [np.full((*size, 3), level, dtype=np.uint8) for level in levels]


def levels(clip: Clip) -> list[int]:
    """Mean grey of every frame, to the tens."""
    return [round(frame.mean() / 10) * 10 for frame in clip.frames]


def read(path: Path, size: tuple[int, int] = (64, 32), rate: int = RATE, most: int = 1000) -> Clip:
    return read_video(path, *size, rate, most)


def refused(sentence: str) -> pytest.RaisesExc[OSError]:
    return pytest.raises(OSError, match=f"^{re.escape(sentence)}$")


def test_a_sideways_video_is_turned() -> None:
    """The phone was held upright: what changes is above, blue is below."""
    clip = read(INPUTS / "rot.mp4", (64, 128))
    assert clip.size == (64, 128)
    assert clip.frames.shape == (24, 128, 64, 3)
    below = clip.frames[:, 70:].reshape(-1, 3)
    assert (below[:, 2] > 180).all()
    assert (below[:, :2] < 20).all()
    assert (clip.frames[:, :58, :, 2] < 20).all()
    assert "turned upright" in clip.notes


@pytest.mark.parametrize("turned", itertools.product([0, 90, 180, 270], [False, True], [False, True]))
def test_every_way_that_a_camera_can_be_held(turned: tuple[int, bool, bool], tmp_path: Path) -> None:
    corner = np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    path = write(tmp_path / "a.mov", [corner] * 2, "png", "rgb24", turned=turned)
    degrees, across, down = turned
    expected = np.rot90(corner, degrees // 90)
    expected = expected[:, ::-1] if across else expected
    expected = expected[::-1] if down else expected
    clip = read(path, expected.shape[1::-1])
    np.testing.assert_array_equal(clip.frames[0], expected)
    assert ("turned upright" in clip.notes) == (turned not in ((0, False, False), (180, True, True)))


def test_turned_by_half_a_right_angle_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mov", grey(0), "png", "rgb24", turned=(45, False, False))
    with refused(f"{path} cannot be read as a video: it is to be seen turned, and not by quarters: turn it before"):
        read(path)


def test_pixels_that_are_not_square_are_stretched() -> None:
    clip = read(INPUTS / "sar.mp4", (128, 64))
    assert clip.size == (128, 64)
    assert clip.frames.shape == (9, 64, 128, 3)
    assert "its pixels are 2:1 and were stretched" in clip.notes


@pytest.mark.parametrize("degrees", [0, 90])
def test_they_are_stretched_before_the_middle_is_cut_out(degrees: int, tmp_path: Path) -> None:
    """A disc stays one, also where rows become columns."""
    y, x = np.mgrid[:64, :64]
    disc = np.where(((x - 31.5) * 2) ** 2 + (y - 31.5) ** 2 < 24**2, 255, 0).astype(np.uint8)
    frames = [disc[..., None].repeat(3, 2)]
    path = write(tmp_path / "a.mov", frames, aspect=Fraction(2), turned=(degrees, False, False))
    seen = read(path, (64, 64)).frames[0, :, :, 0] > 128
    assert np.flatnonzero(seen.any(0)).tolist() == np.flatnonzero(seen.any(1)).tolist() == list(range(8, 56))


def test_a_stream_without_times_has_all_of_its_frames() -> None:
    clip = read(INPUTS / "a.h264")
    assert len(clip.frames) == 24
    assert len(np.unique(clip.frames.reshape(24, -1), axis=0)) == 24
    assert clip.seconds == 3
    assert clip.notes == ["24 frames in 3.0 s", "they do not say when they are shown, 8 a second are assumed"]
    # As any video it is resampled.
    np.testing.assert_array_equal(read(INPUTS / "a.h264", rate=4).frames, clip.frames[::2])


def test_times_that_stand_still_or_go_back(tmp_path: Path) -> None:
    """As where recordings were joined: a frame follows the one before."""

    class Frame:
        duration = 125
        dts = None

        def __init__(self, pts: int | None) -> None:
            self.pts = pts

    class Reading(videos._Reading):
        def __init__(self, *times: int | None) -> None:
            self._unit, self._rate, self._origin, self._timeless = Fraction(1, 1000), Fraction(8), None, 0
            self._times = times

        def _decoded(self) -> Any:
            return map(Frame, self._times)

    def ends(*times: int | None) -> list[int]:
        return [int(end * 1000) for _, end in Reading(*times).shown()]

    assert ends(0, 125, 250) == [125, 250, 375]
    assert ends(500, 625, 1000) == [125, 500, 625]
    assert ends(0, 0, 0, 0) == [125, 250, 375, 500]
    assert ends(0, 125, 0, 125) == [125, 250, 375, 500]
    assert ends(None, None, None) == [125, 250, 375]
    assert ends(None, 1000, 1100, None) == [125, 225, 350, 475]


def test_what_is_transparent_is_white() -> None:
    assert (read(INPUTS / "t.gif", (64, 64)).frames == 255).all()
    clip = read(INPUTS / "tr_ffv1.mkv", (64, 64))
    expected = np.full((9, 64, 64, 3), 255)
    for number, frame in enumerate(expected):
        frame[20:44, 20 + number : 44 + number] = (220, 40, 40)
    np.testing.assert_array_equal(clip.frames, expected)


@pytest.mark.parametrize(
    ("name", "codec", "pixels"),
    [
        ("a.mov", "qtrle", "argb"),
        ("a.mov", "prores_ks", "yuva444p10le"),
        ("a.webm", "libvpx-vp9", "yuva420p"),
        ("a.mkv", "ffv1", "bgra"),
        ("a.gif", "gif", "bgra"),
    ],
)
def test_transparency_of_every_kind(name: str, codec: str, pixels: str, tmp_path: Path) -> None:
    frame = np.zeros((32, 64, 4), dtype=np.uint8)
    frame[:, 32:] = (0, 200, 0, 255)
    path = tmp_path / name
    if codec == "gif":
        Image.fromarray(frame).save(path)
    else:
        write(path, [frame] * 2, codec, pixels)
    seen = read(path).frames[0].astype(int)
    assert (seen[:, :30] >= 253).all()
    assert np.abs(seen[:, 34:] - (0, 200, 0)).max() < 5


@pytest.mark.parametrize(
    ("own", "rate", "expected"),
    [
        (8, 8, [0, 50, 100, 150, 200]),
        (16, 8, [0, 100, 200]),
        (4, 8, [0, 0, 50, 50, 100, 100, 150, 150, 200, 200]),
        (30, 4, [0]),
        (30, 1, [0]),
    ],
)
def test_resampled(own: int, rate: int, expected: list[int], tmp_path: Path) -> None:
    clip = read(write(tmp_path / "a.mkv", grey(0, 50, 100, 150, 200), **LOSSLESS, rate=own), rate=rate)
    assert levels(clip) == expected
    assert clip.total == len(expected)
    assert float(clip.seconds) == pytest.approx(5 / own, abs=0.01)


def test_frames_are_shown_until_the_next(tmp_path: Path) -> None:
    clip = read(write(tmp_path / "a.mkv", grey(0, 50, 100), **LOSSLESS, times=[0, 3, 4]))
    assert levels(clip) == [0, 0, 0, 50, 100]


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "webm", "h264"])
def test_of_a_longer_video_no_more_is_decoded_and_its_length_is_known(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = "libvpx-vp9" if suffix == "webm" else "libx264"
    options = {"live": "1"} if suffix == "webm" else None
    path = write(tmp_path / f"a.{suffix}", grey(*range(0, 240, 2)), codec, options=options)
    pixels, converted = videos._pixels, []
    monkeypatch.setattr(videos, "_pixels", lambda frame: converted.append(frame) or pixels(frame))
    clip = read(path, most=9)
    assert len(clip.frames) == len(converted) == 9
    assert clip.total == 120
    assert clip.seconds == 15


@pytest.mark.parametrize("options", [{"movflags": "faststart"}, {}])
def test_a_video_that_is_cut_off(options: dict[str, str], tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (24, 32, 64, 3), dtype=np.uint8)
    whole = write(tmp_path / "whole.mp4", list(noise), options=options).read_bytes()
    cut = tmp_path / "cut.mp4"
    for share in (0.02, 0.3, 0.7, 0.95):
        cut.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(
            OSError, match=f"^{re.escape(str(cut))} cannot be read as a video: it is [^\n]*cut off or damaged"
        ):
            read(cut)


def test_a_header_that_states_more_than_is_there(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (24, 32, 64, 3), dtype=np.uint8)
    whole = write(tmp_path / "a.mkv", list(noise), **LOSSLESS).read_bytes()
    (tmp_path / "a.mkv").write_bytes(whole[: len(whole) // 2])
    assert "its header says 3.0 s" in read(tmp_path / "a.mkv").notes


def test_what_is_no_video_is_said_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    for path, reason in (
        (tmp_path / "empty.mp4", "it is empty"),
        (tmp_path / "none.mp4", "No such file or directory"),
        (tmp_path, "Is a directory"),
        (Path(__file__), "it is no video, or it is cut off or damaged"),
        (INPUTS / "trunc.png", "it is cut off or damaged: it has no whole frame"),
    ):
        with refused(f"{path} cannot be read as a video: {reason}"):
            read(path)


def test_sound_and_its_cover_are_no_video(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), layout="mono")
        sound.rate = 8000
        container.mux(stream.encode(sound))
    with refused(f"{path} cannot be read as a video: there is no video in it"):
        read(path)


def test_frames_that_are_too_large_are_refused_before_they_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.mp4", grey(0, size=(64, 128)))
    monkeypatch.setattr(videos, "MOST_PIXELS", 8191)
    monkeypatch.setattr(videos._Reading, "shown", lambda self: pytest.fail("it was decoded"))
    with refused(f"{path} cannot be read as a video: its frames have 128 x 64 pixels, and 8,191 at most are decoded"):
        read(path)


@pytest.mark.parametrize("suffix", videos.CONTAINERS_OF_CLIENT)
def test_a_clients_video_is_read_as_another_is(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    frames = np.stack(grey(0, 100, 200))
    if suffix == "webm":
        iio.imwrite(path, frames, plugin="pyav", codec="libvpx", fps=10)
    else:
        path.write_bytes(encode_video(frames, f".{suffix}", 10))
    found = read_video(path, 16, 16, 10, 9, of_client=True)
    np.testing.assert_array_equal(found.frames, read_video(path, 16, 16, 10, 9).frames)
    assert len(found.frames) == 3


def test_a_clients_file_opens_no_other(tmp_path: Path) -> None:
    """A playlist names files of the server: what the operator may read, a client may not."""
    write(tmp_path / "secret.mp4", grey(0))
    playlist = tmp_path / "upload.mp4"
    playlist.write_text("ffconcat version 1.0\nfile secret.mp4\n")
    assert len(read(playlist).frames) == 1
    with refused(f"{playlist} cannot be read as a video: it is none of mp4, webm, gif"):
        read_video(playlist, 16, 16, 1, 9, of_client=True)


def test_frames_of_a_client_are_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.mp4", grey(0, size=(64, 128)))
    monkeypatch.setattr(videos, "MOST_PIXELS_OF_CLIENT", 8191)
    assert len(read(path).frames) == 1
    with refused(f"{path} cannot be read as a video: its frames have 128 x 64 pixels, and 8,191 at most are decoded"):
        read_video(path, 16, 16, 1, 9, of_client=True)


def test_a_colon_is_part_of_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "12.30.mp4", grey(0)).rename(tmp_path / "12:30.mp4")
    monkeypatch.chdir(tmp_path)
    assert len(read(Path("12:30.mp4")).frames) == 1


@pytest.mark.parametrize("suffix", videos.SUFFIXES)
def test_what_is_written_is_read_again(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"a{suffix}").write_bytes(encode_video(np.stack(grey(0, 100, 200)), suffix, 10))
    assert levels(read(tmp_path / f"a{suffix}", rate=10)) == [0, 100, 200]
