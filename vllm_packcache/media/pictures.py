"""Pictures: files of any kind as a person sees them, and the middle of them that is asked for."""

from __future__ import annotations

import io
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

Pixels = npt.NDArray[np.uint8]

MOST_PIXELS = 178_956_970
"""A picture or a frame with more is not decoded: Pillow's own limit, for which it raises."""

MOST_PIXELS_OF_CLIENT = 2**24
"""The same of what a client sends: 50 MB once it is decoded."""

KINDS_OF_CLIENT = ("PNG", "JPEG", "WEBP", "GIF")
"""That a client may send. Pillow has many more, of which each is code that reads what anybody sends."""


def read_picture(path: Path) -> Pixels:
    """A picture file as it is meant to be seen: upright, over white where it is transparent.

    Of several pictures in a file it is the first.

    Returns:
        uint8, [height, width, 3].

    Raises:
        OSError: there is no such file, it is no picture, it is damaged, or larger than `MOST_PIXELS`.
    """
    try:
        with warnings.catch_warnings():
            # From half its limit on, and of damage that it raises for as well.
            warnings.simplefilter("ignore")
            with Image.open(path) as opened:
                return _upright(opened)
    except Image.DecompressionBombError:
        raise OSError(f"{path} has more than {MOST_PIXELS:,} pixels: give a smaller picture") from None
    except UnidentifiedImageError:
        reason = "it is of no known kind" if path.stat().st_size else "it is empty"
    except _Unscalable as error:
        reason = str(error)
    # Of damaged files, decoders raise whatever they stumble over: SyntaxError, IndexError, struct.error.
    except Exception as error:
        told = error.strerror if isinstance(error, OSError) else None
        reason = told or f"it is cut off or damaged ({' '.join(str(error).split())[:80]})"
    raise OSError(f"{path} cannot be read as a picture: {reason}")


def read_picture_bytes(data: bytes, most_pixels: int = MOST_PIXELS_OF_CLIENT) -> Pixels:
    """A picture file that a client has sent, as `read_picture` reads it.

    Args:
        data: of the file, one of `KINDS_OF_CLIENT`.
        most_pixels: a picture with more is not decoded.

    Raises:
        ValueError: it is no such picture, it is damaged, or it is larger.
    """
    try:
        with Image.open(io.BytesIO(data), formats=KINDS_OF_CLIENT) as opened:
            # The header's size: nothing is decoded yet.
            if opened.width * opened.height > most_pixels:
                raise _TooLarge(opened.width, opened.height)
            return _upright(opened)
    except _TooLarge as error:
        width, height = error.args
        reason = f"it has {width} x {height} pixels, and {most_pixels:,} at most are read: send a smaller one"
    except Image.DecompressionBombError:
        reason = f"more than {most_pixels:,} pixels are not read: send a smaller one"
    except UnidentifiedImageError:
        kinds = ", ".join(KINDS_OF_CLIENT)
        reason = f"it is none of {kinds}: send such a file" if data else "it is empty: send a file with a picture"
    except _Unscalable as error:
        reason = f"{error}: send another"
    except Exception as error:
        reason = f"it is cut off or damaged ({' '.join(str(error).split())[:80]}): send it again, or another"
    raise ValueError(f"the picture cannot be read: {reason}")


def over_white(image: Image.Image) -> Image.Image:
    """A picture without transparency, by alpha channel, palette or key colour: in RGB, laid over white."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")


def middle(width: int | Fraction, height: int, wide: int, high: int) -> tuple[Fraction, Fraction]:
    """Width and height of the largest box of a shape, ``wide`` to ``high``, that a picture holds."""
    return min(Fraction(width), Fraction(height * wide, high)), min(Fraction(height), width * Fraction(high, wide))


def used(size: tuple[int, int], asked: tuple[int, int]) -> str:
    """What of a picture of a size, width and height, `fit` takes for another one, in words."""
    across, down = (round(side) for side in middle(*size, *asked))
    part = "all" if (across, down) == size else f"the middle {across} x {down}"
    return f"{part} of {size[0]} x {size[1]} pixels, as {asked[0]} x {asked[1]}"


def fit(picture: Pixels, width: int, height: int, aspect: Fraction = Fraction(1)) -> Pixels:
    """A picture, resized to cover ``width`` x ``height`` pixels, of which the middle is cut out.

    Args:
        picture: uint8, [H, W, 3].
        width: in square pixels.
        height: in square pixels.
        aspect: width of a pixel of the picture to its height.
    """
    image = Image.fromarray(picture)
    across, down = middle(image.width * aspect, image.height, width, height)
    across /= aspect
    left, top = (image.width - across) / 2, (image.height - down) / 2
    box = float(left), float(top), float(left + across), float(top + down)
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, box=box))


def _upright(opened: ImageFile.ImageFile) -> Pixels:
    _scale_key(opened)
    # A photo is often stored as the camera was held.
    return np.asarray(over_white(_of_eight_bits(ImageOps.exif_transpose(opened))))


class _TooLarge(ValueError):
    """Width and height of a picture that is not decoded."""


class _Unscalable(ValueError):
    """Values of grey whose white is not known."""


def _of_eight_bits(image: Image.Image) -> Image.Image:
    """A picture with 8 bits a channel: Pillow has deeper ones in grey only, and converts them by clipping.

    Raises:
        _Unscalable: where white lies is not known.
    """
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    white = 1 if image.mode == "F" else 2**16 - 1
    if not (values.min() >= 0 and values.max() <= white):
        raise _Unscalable(
            f"its grey lies between {values.min():g} and {values.max():g}, and must between 0 and {white}"
        )
    grey = Image.fromarray(np.rint(values.astype(np.float32) * (255 / white)).astype(np.uint8))
    if (key := image.info.get("transparency")) is not None:
        grey.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return grey


def _scale_key(image: ImageFile.ImageFile) -> None:
    """Bring the transparent colour of a PNG to the 8 bits to which Pillow brings its pixels, and only these."""
    key = image.info.get("transparency")
    if image.format != "PNG" or key is None or not image.tile:
        return
    match image.tile[0].args:
        case "L;2":
            image.info["transparency"] = key * 85
        case "L;4":
            image.info["transparency"] = key * 17
        case "RGB;16B":
            image.info["transparency"] = tuple(value >> 8 for value in key)
