"""What the files in a video's folder are called."""

from __future__ import annotations

IDS, GROWING, VIDEO = "ids.i4", "growing.mp4", "video.mp4"
THUMBNAIL, SPRITESHEET = "thumbnail.webp", "spritesheet.jpg"
PREPARED, INPUT = "prepared.json", "input.png"


def preview_name(frame: int) -> str:
    """File of a frame's picture, counted from 0."""
    return f"frame_{frame:05d}.webp"
