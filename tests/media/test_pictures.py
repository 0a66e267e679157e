"""Pictures as a person sees them. `inputs` went wrong once; their kin are made here."""

from __future__ import annotations

import contextlib
import io
import re
import resource
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from vllm_packcache.media.pictures import MOST_PIXELS, MOST_PIXELS_OF_CLIENT, fit, read_picture, read_picture_bytes

INPUTS = Path(__file__).parent / "inputs"
GREY, RGB, GREY_ALPHA = 0, 2, 4
"""Colour types of PNG."""


def refused(sentence: str) -> pytest.RaisesExc[OSError]:
    return pytest.raises(OSError, match=f"^{re.escape(sentence)}$")


def png(path: Path, depth: int, colours: int, row: bytes, size: tuple[int, int], key: bytes | None = None) -> Path:
    """Write a PNG of equal rows: Pillow writes neither 2 bits a pixel nor a key colour of 16."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colours, 0, 0, 0))
    keyed = b"" if key is None else chunk(b"tRNS", key)
    pixels = chunk(b"IDAT", zlib.compress((b"\0" + row) * size[1]))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + keyed + pixels + chunk(b"IEND", b""))
    return path


@pytest.mark.parametrize(
    ("name", "colour"), [("pal.png", (0, 128, 0)), ("l.png", (200, 200, 200)), ("rgbt.png", (9, 200, 9))]
)
def test_what_is_transparent_is_white(name: str, colour: tuple[int, int, int]) -> None:
    """By palette and by key colour: the left half."""
    picture = read_picture(INPUTS / name)
    assert picture.shape == (64, 64, 3)
    assert (picture[:, :32] == 255).all()
    assert (picture[:, 32:] == colour).all()


def test_grey_of_16_bits_stays_grey() -> None:
    np.testing.assert_array_equal(read_picture(INPUTS / "g16.png")[::16, 0, 0], [0, 64, 128, 191])


@pytest.mark.parametrize(
    ("depth", "colours", "row", "width", "key", "expected"),
    [
        (1, GREY, bytes([0b01000000]), 2, bytes([0, 1]), [0, 255]),
        (1, GREY, bytes([0b01000000]), 2, bytes([0, 0]), [255, 255]),
        (2, GREY, bytes([0b00011011]), 4, bytes([0, 1]), [0, 255, 170, 255]),
        (4, GREY, bytes([0x2F]), 2, bytes([0, 2]), [255, 255]),
        (4, GREY, bytes([0x2F]), 2, bytes([0, 15]), [34, 255]),
        (16, GREY, struct.pack(">3H", 0x1234, 0x8000, 0x1235), 3, struct.pack(">H", 0x1234), [255, 128, 18]),
        (16, RGB, struct.pack(">6H", *[0x1234] * 3, *[0x8080] * 3), 2, struct.pack(">3H", *[0x1234] * 3), [255, 128]),
        (16, GREY_ALPHA, struct.pack(">4H", 0x1234, 0, 0x8080, 0xFFFF), 2, None, [255, 128]),
    ],
)
def test_keys_and_depths_of_png(
    depth: int, colours: int, row: bytes, width: int, key: bytes | None, expected: list[int], tmp_path: Path
) -> None:
    picture = read_picture(png(tmp_path / "a.png", depth, colours, row, (width, 1), key))
    assert picture.dtype == np.uint8
    np.testing.assert_array_equal(picture[0], np.array(expected)[:, None].repeat(3, 1))


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGBA", (0, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (0, 0, 0, 255), (0, 0, 0)),
        ("LA", (0, 51), (204, 204, 204)),
        ("CMYK", (255, 0, 0, 0), (0, 255, 255)),
        ("1", 1, (255, 255, 255)),
        ("I;16", 0x8080, (128, 128, 128)),
        ("I", 0x8080, (128, 128, 128)),
        ("F", 0.5, (128, 128, 128)),
    ],
)
def test_kinds_of_pixels(mode: str, colour: float | tuple[int, ...], expected: tuple[int, ...], tmp_path: Path) -> None:
    Image.new(mode, (2, 3), colour).save(tmp_path / "a.tiff")
    picture = read_picture(tmp_path / "a.tiff")
    assert picture.shape == (3, 2, 3)
    assert (picture == expected).all()


@pytest.mark.parametrize(
    ("mode", "value", "said"),
    [("F", 1.5, "1.5 and 1.5, and must between 0 and 1"), ("F", float("nan"), "nan"), ("I", -1, "0 and 65535")],
)
def test_grey_without_a_known_white_is_refused(mode: str, value: float, said: str, tmp_path: Path) -> None:
    Image.new(mode, (2, 2), value).save(tmp_path / "a.tiff")
    with pytest.raises(OSError, match=rf"a\.tiff cannot be read as a picture: its grey lies between .*{said}"):
        read_picture(tmp_path / "a.tiff")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "I;16", "P"])
def test_a_photo_is_seen_as_the_camera_was_held(mode: str, tmp_path: Path) -> None:
    """Stored upright and marked to be turned by a quarter, as a phone does."""
    stored = Image.new("L", (6, 4))
    stored.paste(255, (0, 0, 6, 1))
    if mode == "I;16":
        stored = Image.fromarray(np.asarray(stored).astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    stored.convert(mode).save(tmp_path / "photo.png", exif=exif)
    expected = np.zeros((6, 4, 3), dtype=np.uint8)
    expected[:, -1] = 255
    np.testing.assert_array_equal(read_picture(tmp_path / "photo.png"), expected)


def test_of_several_pictures_it_is_the_first(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second])
    assert (read_picture(tmp_path / "a.gif") == (255, 0, 0)).all()


@pytest.mark.parametrize(
    ("name", "reason"), [("empty.png", "it is empty"), ("trunc.png", "it is cut off or damaged (Truncated File Read)")]
)
def test_what_is_no_picture_is_said_in_a_sentence(name: str, reason: str) -> None:
    with refused(f"{INPUTS / name} cannot be read as a picture: {reason}"):
        read_picture(INPUTS / name)


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "tiff", "webp", "bmp"])
def test_files_that_are_cut_off(suffix: str, tmp_path: Path) -> None:
    """Anywhere: whatever the decoder raises is one sentence."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / f"whole.{suffix}")
    whole = (tmp_path / f"whole.{suffix}").read_bytes()
    cut = tmp_path / f"cut.{suffix}"
    for share in (0.01, 0.1, 0.5, 0.9):
        cut.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(OSError, match=rf"^{re.escape(str(cut))} cannot be read as a picture: it is [^\n]*$"):
            read_picture(cut)


@pytest.mark.parametrize(("path", "reason"), [("none.png", "No such file or directory"), (".", "Is a directory")])
def test_paths_without_a_file(path: str, reason: str, tmp_path: Path) -> None:
    with refused(f"{tmp_path / path} cannot be read as a picture: {reason}"):
        read_picture(tmp_path / path)


def test_a_text_is_no_picture() -> None:
    with pytest.raises(OSError, match="cannot be read as a picture: it is of no known kind"):
        read_picture(Path(__file__))


def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    """The pixels are not even there: it is not looked for them."""
    huge = png(tmp_path / "huge.png", 8, GREY, b"", (MOST_PIXELS // 1000 + 1, 1000))
    with refused(f"{huge} has more than 178,956,970 pixels: give a smaller picture"):
        read_picture(huge)


def test_large_pictures_are_read_without_a_warning(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    Image.new("1", (10_000, 9_000)).save(tmp_path / "large.png")
    assert read_picture(tmp_path / "large.png").shape == (9_000, 10_000, 3)
    assert not recwarn.list


def test_a_picture_is_made_to_fit() -> None:
    picture = np.zeros((90, 40, 3), dtype=np.uint8)
    picture[30:50] = 255  # What is left of the height: 20 of 40 pixels of width, so 20 of the middle's.
    fitted = fit(picture, 64, 32)
    assert fitted.shape == (32, 64, 3)
    assert fitted[4:12].min() > 200
    assert fitted[28:].max() == 0


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1)])
def test_the_thinnest_picture_fits(size: tuple[int, int]) -> None:
    assert (fit(np.full((*size, 3), 7, dtype=np.uint8), 64, 32) == 7).all()


# Of clients


def of_client(sentence: str) -> pytest.RaisesExc[ValueError]:
    return pytest.raises(ValueError, match=re.compile(rf"\Athe picture cannot be read: {sentence}[^\n]*\Z"))


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_clients_picture_is_read_as_a_file_is(suffix: str, orientation: int, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (6, 4, 4), dtype=np.uint8)
    image = Image.fromarray(noise)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = tmp_path / f"a.{suffix}"
    (image.convert("RGB") if suffix == "jpg" else image).save(path, **({} if suffix == "gif" else {"exif": exif}))
    found = read_picture_bytes(path.read_bytes())
    np.testing.assert_array_equal(found, read_picture(path))
    assert found.shape == ((4, 6, 3) if orientation == 6 and suffix != "gif" else (6, 4, 3))


@pytest.mark.parametrize("name", ["pal.png", "l.png", "rgbt.png", "g16.png"])
def test_a_clients_picture_is_laid_over_white(name: str) -> None:
    np.testing.assert_array_equal(read_picture_bytes((INPUTS / name).read_bytes()), read_picture(INPUTS / name))


@pytest.mark.parametrize(
    ("size", "sentence"),
    [
        ((4097, 4096), "it has 4097 x 4096 pixels, and 16,777,216 at most are read: send a smaller one"),
        ((10_000, 10_000), "it has 10000 x 10000 pixels, and 16,777,216 at most are read"),
        ((60_000, 60_000), "more than 16,777,216 pixels are not read"),
    ],
)
def test_a_clients_picture_is_measured_before_it_is_decoded(
    size: tuple[int, int], sentence: str, tmp_path: Path
) -> None:
    """What would have to be decoded is not even there."""
    huge = png(tmp_path / "huge.png", 8, GREY, b"", size)
    with of_client(sentence):
        read_picture_bytes(huge.read_bytes())


def test_the_largest_picture_of_a_client_is_read() -> None:
    file = io.BytesIO()
    Image.new("1", (4096, 4096)).save(file, "PNG")
    assert MOST_PIXELS_OF_CLIENT == 4096 * 4096
    assert read_picture_bytes(file.getvalue()).shape == (4096, 4096, 3)
    with of_client("it has 4096 x 4096 pixels, and 16,777,215 at most"):
        read_picture_bytes(file.getvalue(), MOST_PIXELS_OF_CLIENT - 1)


@pytest.mark.parametrize("chunk", [b"zTXt", b"iCCP"])
def test_a_bomb_in_a_png_stays_small(chunk: bytes) -> None:
    """A megabyte of text that would be a gigabyte."""
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    compressor = zlib.compressobj(9)
    zeros = b"\0" * 2**20
    packed = b"".join(compressor.compress(zeros) for _ in range(1024)) + compressor.flush()
    body = b"name\0\0" + packed
    data = struct.pack(">I", len(body)) + chunk + body + struct.pack(">I", zlib.crc32(chunk + body))
    whole = file.getvalue()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.suppress(ValueError):
        assert read_picture_bytes(whole[:33] + data + whole[33:]).shape == (4, 4, 3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "kilobytes"


def test_more_pixels_than_the_header_says_are_left_out(tmp_path: Path) -> None:
    whole = png(tmp_path / "a.png", 8, GREY, b"\7\7", (2, 2)).read_bytes()
    more = png(tmp_path / "b.png", 8, GREY, b"\7\7", (2, 4_000_000)).read_bytes()
    assert (read_picture_bytes(whole[:33] + more[33:]) == 7).all()


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "it is empty: send a file with a picture"),
        (b"a text", "it is none of PNG, JPEG, WEBP, GIF: send such a file"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "it is none of PNG, JPEG, WEBP, GIF"),
    ],
)
def test_what_is_no_picture_of_a_client(data: bytes, sentence: str) -> None:
    with of_client(sentence):
        read_picture_bytes(data)


@pytest.mark.parametrize("suffix", ["bmp", "tiff", "ppm", "ico"])
def test_other_kinds_are_not_read_for_a_client(suffix: str, tmp_path: Path) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / f"a.{suffix}")
    read_picture(tmp_path / f"a.{suffix}")
    with of_client("it is none of"):
        read_picture_bytes((tmp_path / f"a.{suffix}").read_bytes())


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp"])
def test_pictures_of_clients_that_are_cut_off_or_changed(suffix: str) -> None:
    """Anywhere: a picture or one sentence."""
    rng = np.random.default_rng(0)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(file, suffix.replace("jpg", "jpeg"))
    whole = file.getvalue()
    for share in (0.01, 0.1, 0.5, 0.9):
        with of_client("it is "):
            read_picture_bytes(whole[: int(len(whole) * share)])
    for _ in range(100):
        changed = bytearray(whole)
        changed[rng.integers(len(whole))] = rng.integers(256)
        said = ""
        try:
            read_picture_bytes(bytes(changed))
        except ValueError as error:
            said = str(error)
        assert re.fullmatch(r"(the picture cannot be read: [^\n]+)?", said)
