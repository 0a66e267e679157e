"""Videos that grow, and what is shown of them."""

from __future__ import annotations

import errno
import io
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from vllm_packcache.media.growing import (
    COLOURS,
    LOSSLESS_SIDE,
    SHEET_PICTURES,
    GrowingVideo,
    finish,
    preview,
    sheet_pictures,
    spritesheet,
    thumbnail,
)

CLOSE = 12
"""Mean difference of colours after H.264, of 255; of two pictures of `pictures` it is about 85."""


def pictures(count: int, width: int, height: int, seed: int = 0) -> np.ndarray:
    """Squares of 8 pixels in colours that differ from picture to picture, uint8 [count, H, W, 3]."""
    colours = np.random.default_rng(seed).integers(0, 256, (count, -(-height // 8), -(-width // 8), 3))
    return colours.astype(np.uint8).repeat(8, 1).repeat(8, 2)[:, :height, :width]


def decoded(path: Path) -> list[tuple[np.ndarray, float]]:
    """Pictures of a file, [H, W, 3], and when each is shown."""
    with av.open(str(path)) as container:
        return [(frame.to_ndarray(format="rgb24"), float(frame.time or 0)) for frame in container.decode(video=0)]


def same(shown: np.ndarray, picture: np.ndarray) -> bool:
    height, width, _ = picture.shape
    return bool(np.abs(shown[:height, :width].astype(int) - picture).mean() < CLOSE)


@pytest.fixture(params=[(64, 64), (63, 71), (1, 1), (672, 384)], ids=str)
def size(request: pytest.FixtureRequest) -> tuple[int, int]:
    return request.param


def test_every_picture_can_be_seen_as_soon_as_it_is_there(size: tuple[int, int], tmp_path: Path) -> None:
    path, shown = tmp_path / "growing.mp4", pictures(6, *size)
    with GrowingVideo(path, size, 4) as video:
        assert path.stat().st_size, "the head is there before the first picture is"
        for number, picture in enumerate(shown):
            video.add(picture)
            seen = decoded(path)
            assert [time for _, time in seen] == [k / 4 for k in range(number + 1)]
            assert same(seen[-1][0], picture)
    grown = path.read_bytes()
    video.close()
    assert path.read_bytes() == grown


def test_odd_sizes_are_padded_at_the_end(tmp_path: Path) -> None:
    with GrowingVideo(tmp_path / "a.mp4", (33, 15), 8) as video:
        video.add(np.full((15, 33, 3), 200, np.uint8))
    ((seen, _),) = decoded(tmp_path / "a.mp4")
    assert seen.shape == (16, 34, 3)
    assert np.abs(seen.astype(int) - 200).max() < 10, "what is added is as its neighbours are"


def test_a_run_is_so_many_pictures(tmp_path: Path) -> None:
    shown = pictures(5, 32, 32)
    with GrowingVideo(tmp_path / "a.mp4", (32, 32), 8) as video:
        video.add(shown[:1])
        video.add(shown[1:1])
        video.add(shown[1:])
    seen = decoded(tmp_path / "a.mp4")
    assert len(seen) == 5
    assert all(same(own, picture) for (own, _), picture in zip(seen, shown, strict=True))


@pytest.mark.parametrize("shape", [(32, 31, 3), (31, 32, 3), (2, 32, 31, 3), (32, 32, 4), (32, 32)])
def test_pictures_of_another_size_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    with (
        GrowingVideo(tmp_path / "a.mp4", (32, 32), 8) as video,
        pytest.raises(ValueError, match=r"pictures must be uint8 \[32, 32, 3\], not uint8 "),
    ):
        video.add(np.zeros(shape, np.uint8))


@pytest.mark.parametrize("finished", [1, 3])
def test_a_file_that_is_cut_has_the_pictures_before(finished: int, tmp_path: Path) -> None:
    """As a reader sees it in the middle of a write, or a server that died has left it."""
    path, shown = tmp_path / "growing.mp4", pictures(5, 64, 64)
    sizes = []
    with GrowingVideo(path, (64, 64), 4) as video:
        for picture in shown:
            video.add(picture)
            sizes.append(path.stat().st_size)
    whole = path.read_bytes()
    for cut in (sizes[finished - 1], sizes[finished - 1] + 3, sizes[finished - 1] + 60):
        path.write_bytes(whole[:cut])
        seen = decoded(path)
        assert len(seen) == finished
        assert all(same(own, picture) for (own, _), picture in zip(seen, shown, strict=False))
    finish(path, tmp_path / "video.mp4")
    assert len(decoded(tmp_path / "video.mp4")) == finished


def boxes(data: bytes) -> Iterator[bytes]:
    """Names of the boxes of an MP4."""
    place = 0
    while place < len(data):
        yield data[place + 4 : place + 8]
        place += int.from_bytes(data[place : place + 4], "big")


def test_a_finished_video_is_the_same_and_can_be_played_while_it_is_loaded(
    size: tuple[int, int], tmp_path: Path
) -> None:
    growing, out, shown = tmp_path / "growing.mp4", tmp_path / "video.mp4", pictures(9, *size)
    with GrowingVideo(growing, size, 4) as video:
        for picture in shown:
            video.add(picture)
    finish(growing, out)
    names = list(boxes(out.read_bytes()))
    assert names.index(b"moov") < names.index(b"mdat")
    assert b"moof" not in names
    for (seen, time), (first, first_time) in zip(decoded(out), decoded(growing), strict=True):
        np.testing.assert_array_equal(seen, first)
        assert time == first_time
    with av.open(str(out)) as container:
        stream = container.streams.video[0]
        assert (stream.frames, stream.average_rate, stream.codec_context.name) == (9, 4, "h264")
        context = stream.codec_context
        assert context.pix_fmt == "yuv420p"
        assert (context.colorspace, context.color_range, context.color_primaries, context.color_trc) == COLOURS
        assert stream.duration is not None
        assert stream.time_base is not None
        assert stream.duration * stream.time_base == Fraction(9, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["growing.mp4", "video.mp4"]


def test_a_player_can_begin_every_two_seconds(tmp_path: Path) -> None:
    with GrowingVideo(tmp_path / "a.mp4", (16, 16), 4) as video:
        for _ in range(20):
            video.add(np.zeros((16, 16, 3), np.uint8))
    with av.open(str(tmp_path / "a.mp4")) as container:
        keys = [packet.is_keyframe for packet in container.demux(video=0) if packet.size]
    assert keys == [number % 8 == 0 for number in range(20)]


@pytest.mark.parametrize("content", [None, b"", b"no video"])
def test_what_cannot_be_finished_leaves_nothing(content: bytes | None, tmp_path: Path) -> None:
    GrowingVideo(tmp_path / "growing.mp4", (16, 16), 4).close()
    if content is not None:
        (tmp_path / "growing.mp4").write_bytes(content)
    (tmp_path / "video.mp4").write_bytes(b"an older one")
    with pytest.raises(ValueError):  # noqa: PT011
        finish(tmp_path / "growing.mp4", tmp_path / "video.mp4")
    assert (tmp_path / "video.mp4").read_bytes() == b"an older one"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_says_so() -> None:
    with pytest.raises(OSError, match="No space left") as raised:
        GrowingVideo(Path("/dev/full"), (16, 16), 4)
    assert raised.value.errno == errno.ENOSPC


def test_there_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        GrowingVideo(tmp_path / "gone" / "a.mp4", (16, 16), 4)


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def test_small_previews_are_exact_and_large_ones_are_small() -> None:
    small = np.random.default_rng(0).integers(0, 256, (LOSSLESS_SIDE, 64, 3), dtype=np.uint8)
    found = opened(preview(small))
    assert found.format == "WEBP"
    np.testing.assert_array_equal(np.asarray(found.convert("RGB")), small)
    large = np.random.default_rng(0).integers(0, 256, (LOSSLESS_SIDE + 1, 64, 3), dtype=np.uint8)
    assert opened(preview(large)).size == (64, LOSSLESS_SIDE + 1)
    assert len(preview(large)) < len(preview(small))
    assert opened(preview(np.zeros((1, 20_000, 3), np.uint8))).size == (16_383, 1)


def test_a_thumbnail_has_the_shape_of_its_picture() -> None:
    found = opened(thumbnail(np.zeros((384, 672, 3), np.uint8)))
    assert (found.format, found.size) == ("WEBP", (512, 293))
    assert opened(thumbnail(np.zeros((64, 64, 3), np.uint8))).size == (64, 64)


@pytest.mark.parametrize(
    ("count", "size", "expected"),
    [
        (1, (64, 64), (1, 1)),
        (5, (64, 64), (2, 3)),
        (36, (64, 64), (6, 6)),
        (500, (64, 64), (6, 6)),
        (36, (256, 64), (3, 12)),
        (12, (64, 256), (7, 2)),
    ],
)
def test_a_sprite_sheet_is_about_square(count: int, size: tuple[int, int], expected: tuple[int, int]) -> None:
    shades = np.linspace(0, 255, count).astype(np.uint8)
    found = opened(spritesheet([np.full((size[1], size[0], 3), shade) for shade in shades]))
    columns, rows = expected
    assert (found.format, found.size) == ("JPEG", (columns * size[0], rows * size[1]))
    centres = np.asarray(found.convert("L"))[size[1] // 2 :: size[1], size[0] // 2 :: size[0]].ravel()
    picked = shades[sheet_pictures(count)]
    assert np.abs(centres[: len(picked)].astype(int) - picked).max() <= 3
    assert (centres[len(picked) :] <= 3).all()


def test_a_sheet_has_the_first_and_the_last_picture() -> None:
    assert sheet_pictures(0) == []
    assert sheet_pictures(3) == [0, 1, 2]
    many = sheet_pictures(1000)
    assert (len(many), many[0], many[-1]) == (SHEET_PICTURES, 0, 999)
    assert many == sorted(set(many))
    with pytest.raises(ValueError, match="must have a picture"):
        spritesheet([])


def test_large_pictures_make_a_small_sheet() -> None:
    assert opened(spritesheet([np.zeros((384, 672, 3), np.uint8)] * 2)).size == (256, 292)
