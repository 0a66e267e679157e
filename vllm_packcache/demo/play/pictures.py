"""Pictures of the world to play: every tile is drawn over the scenery of the room that its id says.

``python -m vllm_packcache.demo.play.pictures --seed 3 --frames 12 --out strip.png`` draws a play at random.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from vllm_packcache.demo.play.world import (
    COLUMNS,
    DOORS,
    FALL,
    FLOWER,
    GEM,
    KIND_OF,
    LANTERN,
    LEFT_DOOR,
    RISE,
    ROOMS,
    ROWS,
    SKY,
    STAND,
    TILES,
    VISUAL_IDS,
    WALL,
    Tile,
    make_world,
    play,
    random_actions,
    tile_of,
)

Picture = npt.NDArray[np.uint8]
Colour = tuple[int, int, int]

TILE = 32
"""Pixels per side of a tile."""
HEIGHT, WIDTH = ROWS * TILE, COLUMNS * TILE
"""Pixels of a picture."""
_FINE = 4
"""Everything is drawn so many times as large, and made smaller: edges are smooth."""
_UNKNOWN = 128
"""Grey of a tile whose id is none of a tile."""

_SKIES: tuple[tuple[Colour, Colour], ...] = (
    ((112, 190, 240), (222, 242, 250)),
    ((94, 62, 128), (255, 178, 108)),
    ((14, 20, 52), (70, 92, 150)),
)
"""Top and bottom of the sky of each room: noon, dusk, night."""
_STONES: tuple[tuple[Colour, Colour, Colour], ...] = (
    ((146, 100, 66), (118, 78, 52), (98, 186, 78)),
    ((190, 112, 74), (156, 86, 60), (236, 176, 112)),
    ((92, 104, 138), (72, 82, 114), (238, 244, 252)),
)
"""Walls of each room: the stone, its joints, and what lies on top."""
_OUTLINE: Colour = (40, 30, 44)


def picture(ids: npt.ArrayLike) -> Picture:
    """The picture of the tokens of one frame.

    Args:
        ids: of its tiles, row by row, int [63]; a token that is no tile shows as grey.

    Returns:
        uint8 [224, 288, 3].

    Raises:
        ValueError: there are more tokens, or fewer.
    """
    tokens = np.asarray(ids, dtype=np.int64).reshape(-1)
    if len(tokens) != TILES:
        raise ValueError(f"a picture has {TILES} tiles, not {len(tokens)}")
    result = np.full((HEIGHT, WIDTH, 3), _UNKNOWN, dtype=np.uint8)
    for place, token in enumerate(tokens.tolist()):
        if VISUAL_IDS[0] <= token <= VISUAL_IDS[1]:
            row, column = divmod(place, COLUMNS)
            above = int(tokens[place - COLUMNS]) if row else token
            open_above = not (0 <= above <= VISUAL_IDS[1] and KIND_OF[above] == WALL)
            top, left = row * TILE, column * TILE
            result[top : top + TILE, left : left + TILE] = _tile(token, row, column, open_above)
    return result


@lru_cache(maxsize=4096)
def _tile(token: int, row: int, column: int, open_above: bool) -> Picture:
    """One tile at its place, uint8 [32, 32, 3]; walls have something on top where nothing is above."""
    tile = tile_of(token)
    area = (column * TILE, row * TILE, (column + 1) * TILE, (row + 1) * TILE)
    canvas = _scenery(tile.room).crop(area).convert("RGBA")
    if tile.kind == WALL or tile.kind in DOORS:
        # Stones are not all alike.
        canvas.alpha_composite(_drawn(lambda draw: _wall(draw, tile.room, (row * 5 + column * 3) % 4, open_above)))
    if tile.kind in DOORS:
        canvas.alpha_composite(_door(tile.room, tile.kind))
    elif tile.kind not in (WALL, SKY):
        canvas.alpha_composite(_drawn(_THINGS[tile.kind]))
    if tile.motion is not None:
        canvas.alpha_composite(_drawn(lambda draw: _player(draw, tile)))
    return np.asarray(canvas.convert("RGB"))


class _Pen:
    """Draws in pixels of a tile on something larger."""

    def __init__(self, image: Image.Image) -> None:
        self._draw = ImageDraw.Draw(image)

    def ellipse(self, x: float, y: float, rx: float, ry: float, fill: Sequence[int], line: float = 0) -> None:
        """An ellipse around a point, with an outline of so many pixels."""
        box = [value * _FINE for value in (x - rx, y - ry, x + rx, y + ry)]
        self._draw.ellipse(box, fill=tuple(fill), outline=_OUTLINE if line else None, width=round(line * _FINE))

    def polygon(self, points: Sequence[tuple[float, float]], fill: Sequence[int], line: float = 0) -> None:
        """A polygon, with an outline of so many pixels."""
        fine = [(x * _FINE, y * _FINE) for x, y in points]
        self._draw.polygon(fine, fill=tuple(fill), outline=_OUTLINE if line else None, width=round(line * _FINE))

    def box(self, x: float, y: float, x2: float, y2: float, fill: Sequence[int], round_: float = 0) -> None:
        """A rectangle between two corners."""
        box = [value * _FINE for value in (x, y, x2, y2)]
        self._draw.rounded_rectangle([*box[:2], box[2] - 1, box[3] - 1], radius=round_ * _FINE, fill=tuple(fill))

    def path(self, points: Sequence[tuple[float, float]], fill: Sequence[int], width: float) -> None:
        """A line with round ends."""
        self._draw.line([(x * _FINE, y * _FINE) for x, y in points], fill=tuple(fill), width=round(width * _FINE))
        for x, y in (points[0], points[-1]):
            self.ellipse(x, y, width / 2, width / 2, fill)


def _drawn(draw: Callable[[_Pen], None]) -> Image.Image:
    """A tile, transparent where nothing is drawn."""
    image = Image.new("RGBA", (TILE * _FINE, TILE * _FINE))
    draw(_Pen(image))
    return image.resize((TILE, TILE), Image.Resampling.BOX)


@lru_cache(maxsize=ROOMS)
def _scenery(room: int) -> Image.Image:
    """What is behind the tiles of a room."""
    top, bottom = (np.array(colour) for colour in _SKIES[room])
    down = np.linspace(0, 1, HEIGHT * _FINE)[:, None, None]
    sky = np.broadcast_to(top * (1 - down) + bottom * down, (HEIGHT * _FINE, WIDTH * _FINE, 3))
    image = Image.fromarray(sky.astype(np.uint8)).convert("RGBA")
    pen = _Pen(image)
    (_noon, _dusk, _night)[room](pen)
    return image.convert("RGB").resize((WIDTH, HEIGHT), Image.Resampling.BOX)


def _ridge(pen: _Pen, colour: Colour, height: Callable[[float], float]) -> None:
    line = [(float(x), HEIGHT - height(x)) for x in range(0, WIDTH + 1, 2)]
    pen.polygon([(0, HEIGHT), *line, (WIDTH, HEIGHT)], colour)


def _noon(pen: _Pen) -> None:
    pen.ellipse(228, 62, 17, 17, (255, 246, 196))
    pen.ellipse(228, 62, 13, 13, (255, 234, 130))
    for x, y, size in ((76, 68, 1.0), (168, 96, 0.8)):
        for dx, dy, r in ((-18, 3, 9), (-6, -2, 12), (8, 0, 11), (19, 4, 8)):
            pen.ellipse(x + dx * size, y + dy * size, r * 1.2 * size, r * 0.8 * size, (250, 253, 255))
    _ridge(pen, (168, 212, 176), lambda x: 88 + 16 * math.sin(x / 46 + 0.6))
    _ridge(pen, (132, 192, 128), lambda x: 64 + 12 * math.sin(x / 31 + 2.2))
    _ridge(pen, (106, 174, 98), lambda x: 46 + 6 * math.sin(x / 22))
    for x, y in ((60, 160), (118, 172), (206, 166)):
        pen.box(x - 1.5, y, x + 1.5, y + 16, (120, 88, 60))
        pen.ellipse(x, y - 4, 11, 12, (76, 150, 84))
        pen.ellipse(x - 3, y - 7, 6, 6, (98, 172, 98))


def _dusk(pen: _Pen) -> None:
    pen.ellipse(150, 128, 34, 34, (255, 204, 132))
    pen.ellipse(150, 128, 28, 28, (255, 228, 168))
    for x, y, width in ((66, 64, 34), (214, 84, 40), (110, 92, 22)):
        pen.box(x - width, y, x + width, y + 4, (214, 134, 132), 2)
        pen.box(x - width * 0.5, y + 6, x + width * 0.8, y + 9, (232, 150, 126), 2)
    for left, right, height, colour in (
        (40, 104, 92, (170, 96, 104)),
        (196, 262, 104, (170, 96, 104)),
        (92, 150, 66, (142, 76, 88)),
        (226, 288, 62, (142, 76, 88)),
    ):
        top = HEIGHT - height
        pen.polygon([(left, HEIGHT), (left + 9, top), (right - 9, top), (right, HEIGHT)], colour)
    _ridge(pen, (120, 62, 74), lambda x: 44 + 5 * math.sin(x / 30 + 1))
    for x, y in ((62, 164), (182, 166)):
        pen.path([(x, y + 20), (x, y - 8)], (70, 84, 66), 5)
        pen.path([(x, y + 6), (x - 8, y + 5), (x - 8, y - 2)], (70, 84, 66), 4)
        pen.path([(x, y + 2), (x + 8, y + 1), (x + 8, y - 6)], (70, 84, 66), 4)


def _night(pen: _Pen) -> None:
    random = np.random.default_rng(5)
    for x, y, r in random.uniform((34, 34, 0.4), (254, 140, 1.3), (46, 3)).tolist():
        pen.ellipse(x, y, r, r, (236, 240, 255))
    pen.ellipse(84, 66, 17, 17, (244, 240, 214))
    pen.ellipse(91, 61, 15, 15, (24, 32, 68))
    for wave, colour in ((0.0, (72, 170, 150)), (7.0, (92, 120, 190))):
        band = [(float(x), 92 + wave + 9 * math.sin(x / 27 + wave)) for x in range(120, 258, 3)]
        pen.path(band, colour, 2.2)
    for x, height, width in ((70, 96, 66), (208, 108, 74), (140, 76, 58)):
        top = HEIGHT - height
        pen.polygon([(x - width, HEIGHT), (x, top), (x + width, HEIGHT)], (58, 70, 116))
        side, low = width * 0.26, top + height * 0.26
        snow = [(x, top), (x - side, low), (x - side / 3, low - 6), (x + side / 4, low + 2), (x + side, low)]
        pen.polygon(snow, (220, 230, 248))
    _ridge(pen, (128, 146, 192), lambda x: 44 + 5 * math.sin(x / 34))
    for x, y in ((58, 166), (112, 172), (176, 168), (236, 170)):
        for level in range(3):
            pen.polygon([(x, y - 22 + 8 * level), (x - 7 - 2 * level, y - 8 + 8 * level),
                         (x + 7 + 2 * level, y - 8 + 8 * level)], (36, 62, 78))  # fmt: skip


def _wall(draw: _Pen, room: int, look: int, open_above: bool) -> None:
    stone, joint, cap = _STONES[room]
    draw.box(0, 0, TILE, TILE, joint)
    # Two courses of stones, broken at another place in each.
    for course, (y, y2) in enumerate(((0.75, 15.25), (16.75, 31.25))):
        cut = (10, 19, 14, 22)[look] if course == 0 else (21, 12, 25, 8)[look]
        for x, x2 in ((0, cut - 0.75), (cut + 0.75, TILE)):
            shade = 6 if (course + look + (x > 0)) % 2 else -6
            colour = tuple(max(0, min(255, value + shade)) for value in stone)
            draw.box(x, y, x2, y2, colour)
            draw.box(x, y, x2, y + 2, tuple(min(255, value + 18) for value in colour))
    if open_above:
        draw.box(0, 0, TILE, 7, cap)
        for x in range(0, TILE, 8):
            draw.ellipse(x + 4, 7, 4.2, (4, 2.6, 5, 3.2)[(x // 8 + look) % 4], cap)
        draw.box(0, 0, TILE, 2.5, tuple(min(255, value + 26) for value in cap))


def _door(room: int, kind: int) -> Image.Image:
    """An arch in the wall, through which one sees the sky of the next room."""
    # A model may put a door where none is.
    beyond = _SKIES[min(max(room - 1 if kind == LEFT_DOOR else room + 1, 0), ROOMS - 1)]

    def draw(pen: _Pen) -> None:
        for inset, fill in ((0, _OUTLINE), (2, (112, 78, 50)), (5, beyond[1])):
            pen.ellipse(16, 15, 15 - inset, 14 - inset, fill)
            pen.box(1 + inset, 14, 31 - inset, 32, fill)
        pen.ellipse(16, 13, 9, 7, beyond[0])

    return _drawn(draw)


def _gem(pen: _Pen) -> None:
    light, middle, dark = (190, 246, 255), (70, 200, 236), (28, 132, 196)
    pen.polygon([(9, 14), (23, 14), (28, 19), (16, 31), (4, 19)], middle, 1.4)
    pen.polygon([(9, 14.8), (13, 19), (5.5, 19)], light)
    pen.polygon([(13, 19), (19, 19), (16, 29.5)], light)
    pen.polygon([(19, 19), (26.5, 19), (16, 29.5)], dark)


def _flower(pen: _Pen) -> None:
    pen.path([(16, 31), (16, 20)], (54, 128, 62), 2.4)
    pen.polygon([(16, 30), (23, 24), (24, 29)], (78, 162, 76))
    for turn in range(6):
        angle = turn * math.pi / 3
        pen.ellipse(16 + 5.6 * math.sin(angle), 15 + 5.6 * math.cos(angle), 4.2, 4.2, (250, 112, 160), 0.9)
    pen.ellipse(16, 15, 3.9, 3.9, (255, 222, 92), 0.9)


def _lantern(pen: _Pen) -> None:
    pen.ellipse(16, 21, 14, 11, (255, 226, 120, 70))
    pen.path([(16, 9), (16, 13)], _OUTLINE, 1.6)
    pen.box(8, 12, 24, 15.5, (86, 60, 52), 1.5)
    pen.box(9, 15, 23, 28, _OUTLINE, 2)
    pen.box(10.5, 15.5, 21.5, 27, (255, 212, 92), 1.5)
    pen.ellipse(16, 22, 3.2, 4.4, (255, 248, 206))
    pen.box(8, 27.5, 24, 31, (86, 60, 52), 1.5)


_THINGS: dict[int, Callable[[_Pen], None]] = {GEM: _gem, FLOWER: _flower, LANTERN: _lantern}


def _player(pen: _Pen, tile: Tile) -> None:
    """A small one in a red coat and a scarf that flies behind."""
    side = tile.facing
    coat, dark, skin, scarf = (228, 66, 62), (166, 36, 48), (255, 222, 186), (250, 204, 72)
    lift = {STAND: 0.0, RISE: -2.5, FALL: -1.0}[tile.motion or STAND]
    if tile.motion == STAND:
        feet = ((11.5, 30), (20.5, 30))
    elif tile.motion == RISE:
        feet = ((12 - side, 29), (19 - side, 27))
    else:
        feet = ((9, 30), (23, 30))
    for x, y in feet:
        pen.ellipse(x, y - 0.5, 3.4, 2.2, _OUTLINE)
    tail = {STAND: 3.0, RISE: 7.0, FALL: -6.0}[tile.motion or STAND]
    pen.path([(16 - 4 * side, 17 + lift), (16 - 10 * side, 17 + lift + tail * 0.5), (16 - 14 * side, 17 + lift + tail)],
             scarf, 3.4)  # fmt: skip
    pen.polygon([(9, 29 + lift), (11.5, 15 + lift), (20.5, 15 + lift), (23, 29 + lift)], coat, 1.3)
    hands = {STAND: 24.0, RISE: 11.0, FALL: 17.0}[tile.motion or STAND]
    for hand in (-1, 1):
        pen.path([(16 + 5.5 * hand, 19 + lift), (16 + 9.5 * hand, hands + lift)], dark, 3.2)
    pen.ellipse(16, 10.5 + lift, 8.2, 7.8, coat, 1.3)
    pen.ellipse(16 + 2 * side, 11.5 + lift, 5.8, 5.4, skin)
    pen.box(10.5, 16 + lift, 21.5, 19 + lift, scarf, 1.4)
    for eye in (0.5, 4.6):
        pen.ellipse(16 + side * eye, 11 + lift, 1.05, 1.7, _OUTLINE)


def strip(pictures: Sequence[Picture], columns: int = 4) -> Picture:
    """Pictures beside and below each other with a gap, uint8 [H, W, 3]."""
    gap = 6
    rows = -(-len(pictures) // columns)
    sheet = np.full((rows * (HEIGHT + gap) - gap, columns * (WIDTH + gap) - gap, 3), 255, dtype=np.uint8)
    for number, own in enumerate(pictures):
        row, column = divmod(number, columns)
        top, left = row * (HEIGHT + gap), column * (WIDTH + gap)
        sheet[top : top + HEIGHT, left : left + WIDTH] = own
    return sheet


def main() -> None:
    """Draw a play at random."""
    parser = argparse.ArgumentParser(description="Draw the world to play.")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--frames", type=int, default=12)
    parser.add_argument("--out", type=Path, required=True, help="picture file to write")
    args = parser.parse_args()
    world = make_world(args.seed)
    worlds = [world, *play(world, random_actions(np.random.default_rng(args.seed), args.frames - 1))]
    Image.fromarray(strip([picture(own.frame_ids()) for own in worlds])).save(args.out)


if __name__ == "__main__":
    main()
