"""Videos: their frames as a person sees them, at the rate and of the size that is asked for; and files of frames."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import av
import imageio.v3 as iio
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.codeccontext import VideoCodecContext
from PIL import Image

from vllm_packcache.media.pictures import MOST_PIXELS, MOST_PIXELS_OF_CLIENT, Pixels, fit, over_white

SUFFIXES = (".mp4", ".gif")
"""Of the videos that are written."""

DECODERS_WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
"""FFmpeg's own decoders of these leave transparency out."""

CONTAINERS_OF_CLIENT = ("mp4", "webm", "gif")

OF_CLIENT = {"format_whitelist": ",".join(CONTAINERS_OF_CLIENT), "protocol_whitelist": "file"}
"""FFmpeg's options for them. Others are playlists too, which name files of the server and of others."""

USUAL_RATE = 25
"""Frames a second of a stream that states no rate: FFmpeg's own assumption."""

ROUNDING = Fraction(1, 4)
"""Of a frame: times in files are rounded, so one that begins so much late is still the one that is shown."""

SHORTFALL = Fraction(1, 2)
"""Seconds by which a header may state more than is there, and nothing is said: sound is often a little longer."""


class Clip(NamedTuple):
    """A video, or as much of its beginning as was asked for.

    Args:
        frames: uint8, [T, height, width, 3].
        total: how many frames the whole video has at their rate.
        seconds: duration of the whole video.
        size: width and height of a frame as it is seen, in square pixels.
        notes: what was read and how it was taken, in words.
    """

    frames: Pixels
    total: int
    seconds: Fraction
    size: tuple[int, int]
    notes: list[str]


def read_video(path: Path, width: int, height: int, rate: int, most: int, of_client: bool = False) -> Clip:
    """Read a video as it is meant to be seen: upright, in square pixels, over white where it is transparent.

    Args:
        path: of the file.
        width: of the frames, of which the middle is cut out.
        height: of the frames.
        rate: of the frames, a second.
        most: so many frames are made; what follows in the file is not decoded.
        of_client: a client has sent it: only `CONTAINERS_OF_CLIENT` are read, and frames of `MOST_PIXELS_OF_CLIENT`.

    Raises:
        OSError: there is no such file, it is no video, it is damaged, or its frames are too large.
    """
    reading = None
    try:
        # What stands before a colon would be a protocol.
        with av.open(f"file:{path}", metadata_errors="replace", options=OF_CLIENT if of_client else {}) as container:
            reading = _Reading(container, MOST_PIXELS_OF_CLIENT if of_client else MOST_PIXELS)
            return _clip(reading, width, height, rate, most)
    except (av.InvalidDataError, _Damaged):
        reason = "it is no video, or it is cut off or damaged" if path.stat().st_size else "it is empty"
        if reading is not None:
            reason = f"it is cut off or damaged after {reading.frames} frames"
    except _Unusable as error:
        reason = str(error)
    except (av.FFmpegError, OSError) as error:
        reason = str(error.strerror)
        if of_client and reading is None and isinstance(error, av.ArgumentError):
            # That its container is not allowed is all that FFmpeg says so.
            reason = f"it is none of {', '.join(CONTAINERS_OF_CLIENT)}"
    raise OSError(f"{path} cannot be read as a video: {reason}")


def encode_video(frames: Pixels, suffix: str, rate: int) -> bytes:
    """Frames [T, H, W, 3] as a file of the format of a suffix, one of `SUFFIXES`."""
    if suffix == ".gif":
        return iio.imwrite("<bytes>", frames, extension=suffix, duration=1000 / rate, loop=0)
    return iio.imwrite("<bytes>", frames, extension=suffix, plugin="pyav", codec="libx264", fps=rate)


def as_gif(video: bytes, rate: int) -> bytes:
    """A video file as GIF, so many frames a second."""
    return encode_video(iio.imread(video, extension=".mp4", plugin="pyav"), ".gif", rate)


class _Unusable(ValueError):
    """Why a video cannot be read."""


class _Damaged(ValueError):
    """What is decoded is not what was encoded."""


class _Look(NamedTuple):
    """How stored frames are seen: rows and columns change places, then they are mirrored, then stretched."""

    swapped: bool = False
    across: bool = False
    down: bool = False
    aspect: Fraction = Fraction(1)
    """Width of a pixel to its height, as it is seen."""

    @classmethod
    def of(cls, frame: av.VideoFrame, aspect: Fraction) -> _Look:
        """As the display matrix of a frame says, whose pixels have this aspect where they are stored.

        Raises:
            _Unusable: it is not turned by quarters.
        """
        data: Any = frame.side_data.get("DISPLAYMATRIX")
        matrix = np.zeros((2, 2)) if data is None else np.frombuffer(data, np.int32).reshape(3, 3)[:2, :2]
        if not matrix.any():
            return cls(aspect=aspect)
        # What is stored at (x, y) is seen at (a x + c y, b x + d y).
        (a, b), (c, d) = np.rint(matrix / np.abs(matrix).max()).astype(int).tolist()
        if a and d and not (b or c):
            return cls(False, a < 0, d < 0, aspect)
        if b and c and not (a or d):
            return cls(True, c < 0, b < 0, 1 / aspect)
        raise _Unusable("it is to be seen turned, and not by quarters: turn it before")

    @property
    def upright(self) -> bool:
        return not (self.swapped or self.across or self.down)

    def size(self, frame: av.VideoFrame) -> tuple[int, int]:
        """Width and height of a frame as it is seen, in square pixels."""
        width, height = (frame.height, frame.width) if self.swapped else (frame.width, frame.height)
        return round(width * self.aspect), height

    def turned(self, stored: Pixels) -> Pixels:
        """A frame, [H, W, 3], as it is seen, before it is stretched."""
        picture = stored.swapaxes(0, 1) if self.swapped else stored
        return np.ascontiguousarray(picture[:: -1 if self.down else 1, :: -1 if self.across else 1])


class _Reading:
    """Decodes the video of a file, and keeps the time.

    Attributes:
        frames: that were decoded by now.
        aspect: of a stored pixel, width to height.
    """

    def __init__(self, container: InputContainer, most_pixels: int) -> None:
        self._most_pixels = most_pixels
        # The cover of a piece of music is no video.
        streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if not streams:
            raise _Unusable("there is no video in it")
        (stream, *_) = streams
        self._check_size(stream.width, stream.height)
        self.frames = 0
        self.aspect = Fraction(stream.sample_aspect_ratio or 1)
        self._rate = Fraction(stream.guessed_rate or USUAL_RATE)
        self._unit = Fraction(stream.time_base or 1 / self._rate)
        self._stated = Fraction(container.duration or 0, av.time_base)
        if stream.duration:
            self._stated = stream.duration * self._unit
        self._decoder: VideoCodecContext = stream.codec_context
        if stream.metadata.get("alpha_mode") == "1" and self._decoder.name in DECODERS_WITH_ALPHA:
            decoder = VideoCodecContext.create(DECODERS_WITH_ALPHA[self._decoder.name], "r")
            assert isinstance(decoder, VideoCodecContext)
            self._decoder = decoder
        self._packets = container.demux(stream)
        self._packets_read = self._timeless = 0
        self._origin: Fraction | None = None
        """Time of the first frame in the file's own count."""

    def shown(self) -> Iterator[tuple[av.VideoFrame, Fraction]]:
        """Frames, each with the time at which it is no longer shown, in seconds from the first one.

        One that does not say when it is shown, or says that it is not after the one before, follows that one.
        """
        begin, before = Fraction(0), None
        for frame in self._decoded():
            stamp = frame.pts if frame.pts is not None else frame.dts
            if before is not None:
                end = Fraction(0) if stamp is None or self._origin is None else stamp * self._unit - self._origin
                if end <= begin:
                    end = begin + self._own(before)
                    self._timeless += 1
                yield before, end
                begin = end
            if self._origin is None and stamp is not None:
                self._origin = stamp * self._unit - begin
            before = frame
        if before is not None:
            yield before, begin + self._own(before)

    def whole(self, read: Fraction) -> Fraction:
        """Duration of a video of which so many seconds were read: as stated, or else the rest is looked through."""
        if self._stated:
            return max(self._stated, read)
        for packet in self._packets:
            self._packets_read += packet.size > 0
            if packet.pts is not None and self._origin is not None:
                read = max(read, (packet.pts + (packet.duration or 0)) * self._unit - self._origin)
        return max(read, self._packets_read / self._rate) if self._origin is None else read

    def notes(self, read: Fraction) -> Iterator[str]:
        """What is to be said of a video that was read to its end, after so many seconds."""
        yield f"{self.frames} frames in {float(read):.1f} s"
        if self._timeless:
            which = "they" if self._timeless >= self.frames - 1 else f"{self._timeless} of them"
            yield f"{which} do not say when they are shown, {float(self._rate):g} a second are assumed"
        if self._stated > read + SHORTFALL:
            yield f"its header says {float(self._stated):.1f} s"
        if self.aspect != 1:
            yield f"its pixels are {self.aspect.numerator}:{self.aspect.denominator} and were stretched"

    def _own(self, frame: av.VideoFrame) -> Fraction:
        """For how long a frame says that it is shown."""
        return frame.duration * self._unit if frame.duration else 1 / self._rate

    def _check_size(self, width: int, height: int) -> None:
        most = self._most_pixels
        if width * height > most:
            raise _Unusable(f"its frames have {width} x {height} pixels, and {most:,} at most are decoded")

    def _decoded(self) -> Iterator[av.VideoFrame]:
        """Frames that are whole. A recording may begin in the middle: what cannot be decoded there is left out.

        Raises:
            av.InvalidDataError: one is not.
            _Damaged: one may not be.
        """
        for packet in self._packets:
            self._packets_read += packet.size > 0
            try:
                frames = self._decoder.decode(packet)
            except av.InvalidDataError:
                if self.frames:
                    raise
                continue
            if packet.is_corrupt or any(frame.is_corrupt for frame in frames):
                if self.frames:
                    raise _Damaged
                continue
            for frame in frames:
                self._check_size(frame.width, frame.height)
                self.frames += 1
                yield frame


def _clip(reading: _Reading, width: int, height: int, rate: int, most: int) -> Clip:
    frames: list[Pixels] = []
    first: tuple[av.VideoFrame, _Look] | None = None
    end = Fraction(0)
    for frame, end in reading.shown():
        look = _Look.of(frame, reading.aspect)
        first = first or (frame, look)
        picture = None
        # The first is seen, however short it is.
        while len(frames) < most and (not frames or (len(frames) + ROUNDING) / rate < end):
            if picture is None:
                picture = fit(look.turned(_pixels(frame)), width, height, look.aspect)
            frames.append(picture)
        if len(frames) == most:
            end = reading.whole(end)
            break
    if first is None:
        raise _Unusable("it is cut off or damaged: it has no whole frame")
    shown, look = first
    notes = [*reading.notes(end), *([] if look.upright else ["turned upright"])]
    total = max(len(frames), ceil(end * rate - ROUNDING))
    return Clip(np.stack(frames), total, end, look.size(shown), notes)


def _pixels(frame: av.VideoFrame) -> Pixels:
    """A frame as it is stored, [H, W, 3]."""
    # A palette may be transparent, and does not say so.
    if frame.format.name == "pal8" or any(component.is_alpha for component in frame.format.components):
        return np.asarray(over_white(Image.fromarray(frame.to_ndarray(format="rgba"))))
    return frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)
