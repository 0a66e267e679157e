"""What turns the ids of one frame into a picture and back, where an operator names something that does."""

from __future__ import annotations

import base64
import binascii
import io
from typing import cast

import numpy as np
from PIL import Image

from vllm_packcache.config.errors import ConfigError, shown
from vllm_packcache.media.pictures import Pixels
from vllm_packcache.media.processors.base import load
from vllm_packcache.media.processors.pictures import Pictures, are_pictures

LARGEST_PIXELS = 2**24
"""Pixels of a picture that a client may send: more are not decoded."""


def pictures_of(name: str | None) -> Pictures | None:
    """What an operator has named; a class is called without arguments.

    Raises:
        ConfigError: it cannot be imported, or does not make pictures.
    """
    if name is None:
        return None
    try:
        found = load(name)
    except ValueError as error:
        raise ConfigError(f"sessions: pictures {shown(name)}: {error}") from None
    if not are_pictures(found):
        raise ConfigError(f"sessions: pictures must have decode and size, and {shown(name)} has not")
    return cast(Pictures, found)


def png(pixels: Pixels) -> bytes:
    """A picture as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def read_picture(text: str, size: tuple[int, int]) -> Pixels:
    """A picture that a client sends, as base64 or as a data URL.

    Args:
        text: of the client.
        size: width and height that it must have.

    Raises:
        ValueError: it is none, or has another size.
    """
    data = text.partition("base64,")[2] if text.startswith("data:") else text
    try:
        file = io.BytesIO(base64.b64decode(data, validate=True))
        with Image.open(file) as picture:
            found = picture.size
            if found != size:
                raise ValueError(f"picture must be {size[0]} x {size[1]} pixels, not {found[0]} x {found[1]}")
            if found[0] * found[1] > LARGEST_PIXELS:
                raise ValueError(f"picture must have at most {LARGEST_PIXELS} pixels")
            return np.array(picture.convert("RGB"))
    except binascii.Error:
        raise ValueError(f"picture must be base64 of a file, not {shown(text)}") from None
    except (OSError, SyntaxError, Image.DecompressionBombError):
        raise ValueError("picture must be a PNG, JPEG or WebP file that can be read: send another") from None
