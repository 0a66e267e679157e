"""Video as a model sees it: discrete codes, a grid of them for every latent frame.

For Lumos-1 a latent frame stands for `lumos.FRAMES_PER_LATENT` frames of the video, the first for one: 1 + 4 k frames
are 1 + k latent frames.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vllm_packcache.families import lumos
from vllm_packcache.families.lumos import FRAMES_PER_LATENT, PIXELS_PER_TOKEN
from vllm_packcache.media.pictures import Pixels

logger = logging.getLogger("vllm.packcache")

Codes = npt.NDArray[np.int64]

CODES = 64_000
"""Codes of Cosmos DV4x8x8: the levels of its quantizer, 8 x 8 x 8 x 5 x 5 x 5."""


class VideoTokenizer(Protocol):
    """What turns frames into codes and back."""

    def encode(self, pixels: Pixels) -> Codes:
        """Codes of a video.

        Args:
            pixels: uint8, [T, H, W, 3], where T is 1 + 4 k, or any where each frame is one by itself.

        Returns:
            int64, [t, rows, columns], where t is 1 + k, or T.

        Raises:
            ValueError: there is no such video, or it cannot be encoded.
        """
        ...

    def decode(self, codes: Codes) -> Pixels:
        """The inverse of `encode`: int64, [t, rows, columns], to uint8, [T, H, W, 3].

        Raises:
            ValueError: these are no codes, or they cannot be decoded.
        """
        ...


class CosmosTokenizer:
    """Cosmos DV4x8x8 in its published form: one TorchScript file for each direction.

    A file is on the device only while it runs, in bfloat16 on a GPU and float32 on a CPU: beside a server there is
    little room.

    Source: github.com/NVIDIA/Cosmos-Tokenizer. Pixels lie in [-1, 1], as [batch, 3, T, H, W]; the encoder returns the
    codes first of several tensors.

    Args:
        folder: with ``encoder.jit`` and ``decoder.jit``.

    Raises:
        FileNotFoundError: one is missing.
        ValueError: one is no TorchScript.
    """

    def __init__(self, folder: Path) -> None:
        self._encoder, self._decoder = folder / "encoder.jit", folder / "decoder.jit"
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._dtype = torch.bfloat16 if self._device == "cuda" else torch.float32
        for file in (self._encoder, self._decoder):
            if not file.is_file():
                raise FileNotFoundError(
                    f"{file} is missing: the video needs encoder.jit and decoder.jit of Cosmos DV4x8x8"
                )
            _load(file, "cpu")

    def encode(self, pixels: Pixels) -> Codes:
        """See `VideoTokenizer.encode`; H and W are multiples of `lumos.PIXELS_PER_SIZE`."""
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
            raise ValueError(f"a video is uint8 [frames, height, width, 3], not {pixels.dtype} {list(pixels.shape)}")
        frames, height, width, _ = pixels.shape
        if frames % FRAMES_PER_LATENT != 1:
            raise ValueError(f"a video to encode has 1 + {FRAMES_PER_LATENT} k frames, not {frames}")
        shape = (1 + frames // FRAMES_PER_LATENT, *lumos.grid_of(width, height))
        scaled = torch.tensor(pixels).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        codes = self._run(self._encoder, scaled.to(self._dtype))[0][0].long().cpu().numpy()
        if codes.shape != shape:
            raise ValueError(
                f"{self._encoder} makes codes of shape {list(codes.shape)} of {frames} frames of {width} x {height} "
                f"pixels, and Cosmos DV4x8x8 makes {list(shape)}"
            )
        return codes

    def decode(self, codes: Codes) -> Pixels:
        """See `VideoTokenizer.decode`."""
        if codes.ndim != 3 or not codes.size:
            raise ValueError(f"codes of a video are [latent frames, rows, columns], not {list(codes.shape)}")
        if codes.min() < 0 or codes.max() >= CODES:
            raise ValueError(f"codes lie between 0 and {CODES - 1}, not {codes.min()} and {codes.max()}")
        frames, rows, columns = codes.shape
        shape = (1 + FRAMES_PER_LATENT * (frames - 1), rows * PIXELS_PER_TOKEN, columns * PIXELS_PER_TOKEN, 3)
        scaled = self._run(self._decoder, torch.from_numpy(codes)[None])[0].float().permute(1, 2, 3, 0)
        pixels = ((scaled + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
        if pixels.shape != shape:
            raise ValueError(
                f"{self._decoder} makes pixels of shape {list(pixels.shape)} of codes of shape {list(codes.shape)}, "
                f"and Cosmos DV4x8x8 makes {list(shape)}"
            )
        return pixels

    @torch.inference_mode()
    def _run(self, file: Path, given: Tensor) -> Any:
        # Not moved once it is loaded: tensors among its constants would stay behind.
        module = _load(file, self._device).eval().to(self._dtype)
        try:
            return module(given.to(self._device))
        except (RuntimeError, torch.jit.Error) as error:
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(f"{file} fails with an input of shape {list(given.shape)}: {reason}") from None


class OneAtATime:
    """A video tokenizer for several threads: two that run at once need twice the memory, which the model has.

    Args:
        tokenizer: that does the work.
    """

    def __init__(self, tokenizer: VideoTokenizer) -> None:
        self._tokenizer, self._turn = tokenizer, Lock()

    def encode(self, pixels: Pixels) -> Codes:
        """See `VideoTokenizer.encode`."""
        with self._turn, _for_clients():
            return self._tokenizer.encode(pixels)

    def decode(self, codes: Codes) -> Pixels:
        """See `VideoTokenizer.decode`."""
        with self._turn, _for_clients():
            return self._tokenizer.decode(codes)


@contextmanager
def _for_clients() -> Iterator[None]:
    """Tell the log why a tokenizer fails, and the client that it does: the reason names files of the server."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        logger.warning("--video-tokenizer: %s", " ".join(str(error).split()))
        raise ValueError(
            "the server's video tokenizer failed, and its log says why: ask for a smaller size, or try again later"
        ) from None


def _load(file: Path, device: str) -> torch.jit.ScriptModule:
    try:
        return torch.jit.load(str(file), map_location=device)
    except RuntimeError as error:
        raise ValueError(f"{file} is no TorchScript: {str(error).strip().splitlines()[0]}") from None
