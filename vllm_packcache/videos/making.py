"""One video is made: ids come from the engine, frame by frame, and become files and events."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from PIL import Image

from vllm_packcache.media import growing
from vllm_packcache.media.pictures import Pixels
from vllm_packcache.media.processors.base import Decoder, Kept, Prepared
from vllm_packcache.videos.files import (
    GROWING,
    IDS,
    INPUT,
    PREPARED,
    SPRITESHEET,
    THUMBNAIL,
    VIDEO,
    preview_name,
)
from vllm_packcache.videos.living import Living
from vllm_packcache.videos.store import Store, StoreBusy

_WHOLE = "whole.mp4"

_PATIENCE = 60.0
"""Seconds for which the store may be locked before a video fails of it."""


class Making:
    """Writes a video as it is made. It blocks, and is called by one thread at a time.

    Args:
        store: of all videos.
        name: id of this one, whose folder is there.
        prepared: what the engine is asked for.
        decoder: makes its pictures.
        living: knows what lives of it.
    """

    def __init__(self, store: Store, name: str, prepared: Prepared, decoder: Decoder, living: Living) -> None:
        self._store, self._name, self._prepared = store, name, prepared
        self._decoder, self._living = decoder, living
        self._growing: growing.GrowingVideo | None = None
        self._frame = self._tokens = self._bytes = 0
        self._last = time.monotonic()
        self._began: float | None = None
        self._resident: list[int] = []
        self._full = 0
        self._shown: list[int] = []
        self._decode_seconds = self._storage_seconds = 0.0

    def note(self, picture: Pixels | None) -> None:
        """Write what it takes to make it again, or to go on with it.

        Args:
            picture: that the client has given.

        Raises:
            OSError: it cannot be written.
        """
        prepared = self._prepared
        said = {
            "prompt_ids": prepared.prompt_ids,
            "options": prepared.options,
            "tokens_per_frame": prepared.tokens_per_frame,
            "given": prepared.given.tolist(),
            "grid": list(prepared.given.shape[1:]),
            "size": list(prepared.size),
            "fps": prepared.fps,
            "pictures": prepared.pictures,
        }
        self._file(PREPARED).write_text(json.dumps(said), encoding="utf-8")
        if picture is not None:
            Image.fromarray(picture).save(self._file(INPUT))

    def begin(self) -> bool:
        """Show what is given.

        Returns:
            Whether anybody still wants the video.
        """
        return all(self._show(pixels, {"given": True}, 0.0) for pixels in self._decoder.given())

    def start(self) -> None:
        """The engine has begun, which is known when it says so or with the first token: frames are timed from now."""
        if self._began is None:
            self._began = self._last = time.monotonic()

    def add(self, ids: Sequence[int], arrived: float) -> bool:
        """Write a frame.

        Args:
            ids: its tokens.
            arrived: when the last of them came, by the monotonic clock.

        Returns:
            Whether anybody still wants the video.

        Raises:
            ValueError: it cannot be decoded.
            OSError: it cannot be written.
        """
        began = time.monotonic()
        with self._file(IDS).open("ab") as file:
            file.write(np.array(ids, dtype="<i4").tobytes())
        self._bytes += 4 * len(ids)
        living = self._living.add(ids)
        self._resident.append(living["resident_tokens"])
        self._full = living["full_tokens"]
        self._storage_seconds += time.monotonic() - began
        began = time.monotonic()
        if self._growing is None and self._prepared.pictures:
            # Not before: a thousand videos may wait, and an encoder takes memory.
            self._growing = growing.GrowingVideo(self._file(GROWING), self._prepared.size, self._prepared.fps)
            for pixels in self._decoder.given():
                self._growing.add(pixels)
        pixels = self._decoder.add(ids)
        if self._growing is not None:
            self._growing.add(pixels)
        self._decode_seconds += time.monotonic() - began
        self._tokens += len(ids)
        seconds, self._last = arrived - self._last, arrived
        return self._show(pixels, {"given": False, **living}, seconds)

    def _show(self, pixels: Pixels, more: dict[str, Any], seconds: float) -> bool:
        began = time.monotonic()
        if len(pixels):
            preview = growing.preview(pixels[-1])
            self._file(preview_name(self._frame)).write_bytes(preview)
            self._bytes += len(preview)
            self._shown.append(self._frame)
        total = self._prepared.made * self._prepared.tokens_per_frame
        data = {
            "object": "video.frame",
            "video": self._name,
            "progress": min(99, 100 * self._tokens // total),
            "frame": self._frame,
            "frames": len(self._prepared.given) + self._prepared.made,
            "pictures": len(pixels),
            "seconds": round(max(0.0, seconds), 6),
            "tokens": self._tokens,
            **more,
        }
        self._frame += 1
        wanted = _patiently(lambda: self._store.advance(self._name, self._tokens, data, bytes=self._bytes))
        self._storage_seconds += time.monotonic() - began
        return wanted

    def finish(self) -> bool:
        """All frames are there: write the files that are made of them, and say so.

        Returns:
            Whether it is there: not if it was deleted meanwhile.
        """
        made, prepared = time.monotonic(), self._prepared
        if self._growing is not None:
            self._growing.close()
            source, began = self._file(GROWING), time.monotonic()
            whole = self._decoder.whole()
            if whole is not None:
                source = self._file(_WHOLE)
                with growing.GrowingVideo(source, prepared.size, prepared.fps) as video:
                    for run in whole:
                        video.add(run)
            self._decode_seconds += time.monotonic() - began
            began = time.monotonic()
            growing.finish(source, self._file(VIDEO))
            previews = _Previews([self._file(preview_name(frame)) for frame in self._shown])
            self._file(THUMBNAIL).write_bytes(growing.thumbnail(previews[len(previews) // 2]))
            self._file(SPRITESHEET).write_bytes(growing.spritesheet(previews))
            for name in (GROWING, _WHOLE):
                self._file(name).unlink(missing_ok=True)
            self._storage_seconds += time.monotonic() - began
        seconds = made - (made if self._began is None else self._began)
        result = {
            "pictures": prepared.pictures,
            "resident_tokens": max(self._resident, default=0),
            "full_tokens": self._full,
            "seconds_per_frame": round((self._last - (self._began or self._last)) / max(1, prepared.made), 6),
            "inference_time_s": round(seconds, 6),
            "decode_s": round(self._decode_seconds, 6),
            "storage_s": round(self._storage_seconds, 6),
        }
        return _patiently(lambda: self._store.complete(self._name, result))

    def close(self) -> None:
        """Let go of files. May be called again."""
        if self._growing is not None:
            # The folder of a video that nobody wants any more may be gone, and its disk full.
            with contextlib.suppress(OSError, ValueError):
                self._growing.close()

    def _file(self, name: str) -> Path:
        return self._store.path(self._name, name)


def _patiently(call: Callable[[], bool]) -> bool:
    """Call what writes to the store, again and again while others keep it locked.

    Raises:
        StoreBusy: they do for too long.
    """
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            return call()
        except StoreBusy:
            # It has waited for some seconds.
            if time.monotonic() > deadline:
                raise


class _Previews(Sequence[Pixels]):
    """Pictures that are read when they are asked for: never all of them are in memory."""

    def __init__(self, files: list[Path]) -> None:
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    @overload
    def __getitem__(self, index: int) -> Pixels: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Pixels]: ...
    def __getitem__(self, index: int | slice) -> Pixels | Sequence[Pixels]:
        if isinstance(index, slice):
            return _Previews(self._files[index])
        with Image.open(self._files[index]) as picture:
            return np.array(picture.convert("RGB"))


def kept(store: Store, name: str) -> Kept:
    """A finished video as far as it takes to go on with it.

    Raises:
        OSError: its files are gone.
    """
    said = json.loads(store.path(name, PREPARED).read_text(encoding="utf-8"))
    ids = np.fromfile(store.path(name, IDS), dtype="<i4").astype(np.int64)
    given = np.array(said["given"], dtype=np.int64).reshape(len(said["given"]), *said["grid"])
    return Kept(
        prompt_ids=said["prompt_ids"],
        frame_ids=ids.reshape(-1, said["tokens_per_frame"]),
        given=given,
        size=tuple(said["size"]),
        fps=said["fps"],
        pictures=said["pictures"],
        options=said["options"],
    )
