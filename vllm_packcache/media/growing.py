"""Videos that grow on disk picture by picture, and what else is shown of a video: previews, thumbnail, sprite sheet."""

from __future__ import annotations

import io
import math
import os
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import av
import numpy as np
from PIL import Image

from vllm_packcache.media.pictures import Pixels

TICKS = 1000
"""A picture is shown for so many units of the file's clock."""

ENCODING = {"preset": "veryfast", "tune": "zerolatency", "crf": "18", "threads": "1"}
"""Of libx264: a picture is encoded as soon as it is there, and one thread encodes alike on every machine."""

COLOURS = (5, 1, 1, 13)
"""Of ISO/IEC 23091-2: BT.601 as FFmpeg converts by it, in the range of television; primaries and curve of sRGB."""

KEY_SECONDS = 2
"""From one picture to the next that stands for itself: a player can begin there."""

THUMBNAIL_SIDE = 512
"""The longer side of a thumbnail at most."""

SHEET_PICTURES = 36
"""Of a sprite sheet at most."""

SHEET_SIDE = 256
"""The longer side of a picture in a sprite sheet at most."""

LOSSLESS_SIDE = 128
"""Previews up to this side are lossless: of small pictures every pixel is looked at."""

WEBP_SIDE = 16_383
"""The longest side that WebP has."""

QUALITY = 85

_SYNC, _DEPENDS = 0x02000000, 0x01010000
"""Flags of a sample that stands for itself, and of one that does not."""


class GrowingVideo:
    """A fragmented MP4: a fragment for every picture, which can be played as soon as `add` returns.

    H.264 in yuv420p. Odd sizes are made even by repeating the last column and row.

    Args:
        path: of the file, which is written anew.
        size: width and height of the pictures.
        fps: pictures a second.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, size: tuple[int, int], fps: int) -> None:
        self._size = size
        self._padding = ((0, size[1] % 2), (0, size[0] % 2), (0, 0))
        self._pictures = 0
        head = io.BytesIO()
        options = {"movflags": "empty_moov+default_base_moof", "video_track_timescale": str(fps * TICKS)}
        # It writes the head and encodes. It writes a fragment with the picture after it, so fragments are written here.
        self._container = av.open(head, "w", format="mp4", options=options)
        self._stream = self._container.add_stream("libx264", rate=fps, options=ENCODING)
        self._stream.width, self._stream.height = size[0] + size[0] % 2, size[1] + size[1] % 2
        self._stream.pix_fmt = "yuv420p"
        context = self._stream.codec_context
        context.gop_size = max(1, KEY_SECONDS * fps)
        # Left alone, players guess by the size.
        context.colorspace, context.color_range, context.color_primaries, context.color_trc = COLOURS
        self._container.start_encoding()
        self._file = path.open("wb", buffering=0)
        self._write(head.getvalue())

    def __enter__(self) -> GrowingVideo:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def add(self, pixels: Pixels) -> None:
        """Append pictures.

        Args:
            pixels: one picture, uint8 [H, W, 3], or a run of them, [n, H, W, 3].

        Raises:
            ValueError: they have another size.
            OSError: the file cannot be written.
        """
        width, height = self._size
        if pixels.dtype != np.uint8 or pixels.shape[-3:] != (height, width, 3) or pixels.ndim not in (3, 4):
            raise ValueError(f"pictures must be uint8 [{height}, {width}, 3], not {pixels.dtype} {list(pixels.shape)}")
        for picture in pixels.reshape(-1, height, width, 3):
            frame = av.VideoFrame.from_ndarray(np.pad(picture, self._padding, mode="edge"), format="rgb24")
            for packet in self._stream.encode(frame):
                self._append(packet)

    def close(self) -> None:
        """Write what is left. May be called again."""
        if self._file.closed:
            return
        try:
            for packet in self._stream.encode(None):
                self._append(packet)
        finally:
            self._file.close()
            self._container.close()

    def _append(self, packet: av.Packet) -> None:
        self._write(_fragment(self._pictures, _length_prefixed(bytes(packet)), packet.is_keyframe))
        self._pictures += 1

    def _write(self, data: bytes) -> None:
        # Unbuffered, a file may take less than all: a full disk says so at the next try.
        while data:
            data = data[self._file.write(data) :]


def _box(name: bytes, *contents: bytes) -> bytes:
    """A box of ISO/IEC 14496-12."""
    return struct.pack(">I", 8 + sum(map(len, contents))) + name + b"".join(contents)


def _fragment(number: int, data: bytes, key: bool) -> bytes:
    """The boxes of a fragment that is one picture: of ISO/IEC 14496-12, ``moof`` and ``mdat``.

    Args:
        number: of the picture, from 0.
        data: of the picture.
        key: whether it stands for itself.
    """

    def moof(offset: int) -> bytes:
        sample = struct.pack(">IIIiII", 0x701, 1, offset, TICKS, len(data), _SYNC if key else _DEPENDS)
        return _box(
            b"moof",
            _box(b"mfhd", struct.pack(">II", 0, number + 1)),
            _box(
                b"traf",
                # Offsets count from the beginning of this box.
                _box(b"tfhd", struct.pack(">II", 0x020000, 1)),
                _box(b"tfdt", struct.pack(">IQ", 0x01000000, number * TICKS)),
                _box(b"trun", sample),
            ),
        )

    return moof(len(moof(0)) + 8) + _box(b"mdat", data)


def _length_prefixed(data: bytes) -> bytes:
    """H.264 as MP4 has it: its units after their lengths, where the encoder puts a start code before each."""
    units = re.split(b"\0*\0\0\1", data)
    return b"".join(struct.pack(">I", len(unit)) + unit for unit in units if unit)


def finish(growing: Path, out: Path) -> None:
    """Make a plain MP4 of a growing one, without encoding it again: it can be played while it is loaded.

    The file is there as a whole or not at all.

    Args:
        growing: written by `GrowingVideo`.
        out: in a folder that is there.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: there is no picture in it.
    """
    part = out.with_name(f".{out.name}.part")
    try:
        # What stands before a colon would be a protocol.
        with (
            av.open(f"file:{growing}") as source,
            av.open(f"file:{part}", "w", format="mp4", options={"movflags": "faststart"}) as target,
        ):
            stream = source.streams.video[0]
            copied = target.add_stream_from_template(stream)
            pictures = 0
            for packet in source.demux(stream):
                # The last one is empty.
                if packet.dts is not None:
                    packet.stream = copied
                    target.mux(packet)
                    pictures += 1
            if not pictures:
                raise ValueError(f"{growing} has no picture: there is nothing to finish")
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)


def preview(picture: Pixels) -> bytes:
    """A picture [H, W, 3] as WebP: small ones lossless."""
    lossless = max(picture.shape[:2]) <= LOSSLESS_SIDE
    return _webp(_shrunk(picture, WEBP_SIDE), lossless=lossless)


def thumbnail(picture: Pixels) -> bytes:
    """A picture [H, W, 3] as WebP, with sides of at most `THUMBNAIL_SIDE`."""
    return _webp(_shrunk(picture, THUMBNAIL_SIDE))


def sheet_pictures(pictures: int) -> list[int]:
    """Which pictures of a video are in its sprite sheet: all, or `SHEET_PICTURES` from the first to the last."""
    count = min(pictures, SHEET_PICTURES)
    return np.linspace(0, pictures - 1, count).round().astype(int).tolist() if count else []


def spritesheet(pictures: Sequence[Pixels]) -> bytes:
    """Pictures [H, W, 3] row by row on one sheet, which is about square, as JPEG; of many, those of `sheet_pictures`.

    Raises:
        ValueError: there are none.
    """
    if not pictures:
        raise ValueError("a sprite sheet must have a picture, and there is none")
    cells = [_shrunk(pictures[number], SHEET_SIDE) for number in sheet_pictures(len(pictures))]
    width, height = cells[0].size
    columns = min(len(cells), max(1, round(math.sqrt(len(cells) * height / width))))
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height))
    for number, cell in enumerate(cells):
        sheet.paste(cell, (number % columns * width, number // columns * height))
    file = io.BytesIO()
    sheet.save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def _shrunk(picture: Pixels, side: int) -> Image.Image:
    image = Image.fromarray(picture)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


def _webp(image: Image.Image, lossless: bool = False) -> bytes:
    file = io.BytesIO()
    image.save(file, "WEBP", lossless=lossless, quality=QUALITY)
    return file.getvalue()
