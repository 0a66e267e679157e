"""A picture that clients send."""

from __future__ import annotations

import base64
import io

from PIL import Image

COLOUR, SIZE = (10, 200, 30), (4, 3)


def png() -> bytes:
    """A file of one colour."""
    file = io.BytesIO()
    Image.new("RGB", SIZE, COLOUR).save(file, "PNG")
    return file.getvalue()


PNG = png()
DATA_URL = "data:image/png;base64," + base64.b64encode(PNG).decode()
