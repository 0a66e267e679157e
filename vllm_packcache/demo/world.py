"""A procedurally generated toy world in which a video model has to remember.

One or two coloured shapes slide along horizontal lanes at one token per frame, bounce between the two side
walls, and pass behind an opaque pillar that hides them completely for three to six frames.  Pictures are
16x16 tokens; a token is one 4x4-pixel patch of a finite codebook, so a picture is 64x64 RGB pixels.
Everything is a pure function of the seed, and any frame number can be asked for, so the true continuation of
a video is known for ever.

Preview: ``python -m vllm_packcache.demo.world --seed 3 --out preview.gif``
"""

from __future__ import annotations

import argparse
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np

GRID = 16
"""Tokens per picture side."""
PATCH = 4
"""Pixels per token side."""
SIZE = GRID * PATCH
"""Pixels per picture side."""
OBJECT_CELLS = 3
"""Tokens per object side."""

SHAPES = ("circle", "square", "triangle", "diamond")
COLOURS = ("red", "yellow", "green", "blue", "purple", "white")
SCENES = ("night", "desert", "sea", "meadow")
PILLARS = ("grey", "brown", "black")
WIDTHS = {5: "narrow", 6: "medium", 7: "wide", 8: "huge"}
"""Pillar width in tokens, and the word the prompt has for it."""

PHOTO = "photo"
"""Name of the extra background used only in training: a random picture made of plain-colour patches."""
PLAIN_LEVELS = np.array([0, 51, 102, 153, 204, 255])
GREY_LEVELS = np.arange(8, 256, 16)

_FILM = 1
"""Makes the numbers that a film is drawn from others than those of the world of its seed."""

_FIRST_X, _LAST_X = 1, GRID - 1 - OBJECT_CELLS
_PERIOD = 2 * (_LAST_X - _FIRST_X)
_UPPER_ROWS, _LOWER_ROWS = (1, 2, 3), (6, 7, 8)
_SINGLE_ROWS = tuple(range(1, 9))
_OPENING_ROWS = {1: (4,), 2: (2, 7)}

_RGB = {
    "red": (224, 52, 48),
    "yellow": (250, 208, 44),
    "green": (40, 168, 80),
    "blue": (48, 96, 226),
    "purple": (156, 64, 190),
    "white": (244, 244, 240),
}
_PILLAR_RGB = {"grey": (134, 138, 146), "brown": (140, 92, 54), "black": (56, 56, 64)}
# What shows through the corners of a round or pointed object.  One colour per scene keeps the codebook
# finite; the skies below vary only gently around it, so the seam is not visible.
_SKY = {
    "night": ((22, 26, 62), (44, 42, 92)),
    "desert": ((250, 196, 140), (252, 216, 166)),
    "sea": ((140, 196, 236), (176, 216, 240)),
    "meadow": ((196, 226, 232), (218, 236, 226)),
}


def _mix(a: tuple[int, ...], b: tuple[int, ...], t: float) -> np.ndarray:
    return np.rint(np.asarray(a) * (1 - t) + np.asarray(b) * t).astype(np.uint8)


def _disc(picture: np.ndarray, cx: float, cy: float, radius: float, colour: tuple[int, ...]) -> None:
    ys, xs = np.mgrid[0:SIZE, 0:SIZE] + 0.5
    picture[(xs - cx) ** 2 + (ys - cy) ** 2 <= radius**2] = colour


def _sky_colour(scene: str) -> tuple[int, ...]:
    return tuple(int(c) for c in _mix(*_SKY[scene], 0.5))


def _draw_scene(scene: str) -> np.ndarray:
    """The background picture, uint8 [64, 64, 3]; the sky fills rows 0-43, the ground the rest."""
    picture = np.empty((SIZE, SIZE, 3), np.uint8)
    for row in range(SIZE):
        picture[row] = _mix(*_SKY[scene], min(1.0, (row // PATCH) / 10))
    xs = np.arange(SIZE)
    ridges: tuple[tuple[np.ndarray, tuple[int, int, int]], ...]
    if scene == "night":
        _disc(picture, 50, 11, 6, (246, 240, 206))
        _disc(picture, 53, 9, 5, tuple(picture[0, 0]))
        for x, y in ((9, 6), (21, 14), (33, 5), (14, 27), (41, 22), (28, 34), (55, 30), (8, 39), (46, 40)):
            picture[y, x] = (255, 250, 220)
        ridges = ((47 + 3 * np.sin(xs / 7), (34, 44, 72)), (54 + 2.5 * np.sin(xs / 5 + 2), (18, 26, 44)))
    elif scene == "desert":
        _disc(picture, 13, 11, 6.5, (255, 240, 180))
        ridges = (
            (48 + 3 * np.sin(xs / 9 + 1), (222, 160, 90)),
            (55 + 3 * np.sin(xs / 8 + 4), (196, 126, 66)),
        )
    elif scene == "sea":
        for x, y, r in ((14, 10, 4), (19, 8, 5), (24, 10, 4), (46, 26, 3), (50, 24, 4), (54, 26, 3)):
            _disc(picture, x, y, r, (244, 250, 252))
        ridges = (
            (46 + 0 * xs, (56, 128, 184)),
            (51 + 1.2 * np.sin(xs / 1.9), (40, 108, 168)),
            (58 + 1.2 * np.sin(xs / 1.9 + 2), (28, 88, 146)),
        )
    else:
        ridges = ((46 + 2.5 * np.sin(xs / 8), (128, 190, 104)), (54 + 2 * np.sin(xs / 6 + 3), (92, 160, 80)))
    for heights, colour in ridges:
        for x, height in enumerate(heights):
            picture[round(float(height)) :, x] = colour
    if scene == "meadow":
        for x, y, colour in ((9, 57, (240, 90, 110)), (20, 61, (250, 220, 90)), (33, 58, (250, 250, 250)),
                             (44, 62, (240, 90, 110)), (55, 59, (250, 220, 90))):  # fmt: skip
            picture[y : y + 2, x : x + 2] = colour
    return picture


def _draw_object(shape: str, colour: str) -> tuple[np.ndarray, np.ndarray]:
    """One object: colours uint8 [12, 12, 3] and coverage bool [12, 12]."""
    side = OBJECT_CELLS * PATCH
    ys, xs = np.mgrid[0:side, 0:side] - (side - 1) / 2
    if shape == "circle":
        depth = 6.2 - np.hypot(xs, ys)
    elif shape == "square":
        depth = 6.0 - np.maximum(abs(xs), abs(ys))
    elif shape == "diamond":
        depth = (6.3 - abs(xs) - abs(ys)) / 1.2
    else:
        depth = np.minimum((6.2 + ys - 2 * abs(xs)) / 1.6 + 0.2, 6.0 - ys)
    inside = depth > 0
    base = np.asarray(_RGB[colour], float)
    picture = np.empty((side, side, 3), np.uint8)
    picture[:] = base
    picture[(xs + ys < -3) & (depth > 1.2)] = np.rint(base + (255 - base) * 0.35)
    picture[depth <= 1.2] = np.rint(base * 0.5)
    return picture, inside


def _draw_pillar(kind: str) -> dict[str, np.ndarray]:
    """Pillar patches uint8 [4, 4, 3] by name: ``left0/1``, ``right0/1`` (row parity), ``mid00..11``."""
    base = np.asarray(_PILLAR_RGB[kind], float)
    joint = np.rint(base * 0.72).astype(np.uint8)
    wall = np.empty((2 * PATCH, 2 * PATCH, 3), np.uint8)
    wall[:] = base
    wall[3::PATCH] = joint
    wall[0:3, 3] = joint
    wall[4:7, 7] = joint
    patches = {}
    for row in (0, 1):
        for col in (0, 1):
            patches[f"mid{row}{col}"] = wall[row * 4 : row * 4 + 4, col * 4 : col * 4 + 4].copy()
        for side, column, shade in (("left", 0, 0.4), ("right", 3, 0.4)):
            patch = patches[f"mid{row}0"].copy()
            patch[:, column] = np.rint(base * shade)
            patches[f"{side}{row}"] = patch
    return patches


def _draw_wall() -> dict[str, np.ndarray]:
    """Side-wall patches uint8 [4, 4, 3]: ``left0/1`` and ``right0/1`` by row parity."""
    patches = {}
    for side, edge in (("left", 3), ("right", 0)):
        for row in (0, 1):
            patch = np.full((PATCH, PATCH, 3), (88, 72, 66), np.uint8)
            patch[:, edge] = (48, 38, 36)
            patch[1 + 2 * row, 1:3] = (120, 100, 90)
            patches[f"{side}{row}"] = patch
    return patches


@dataclass(frozen=True)
class Palette:
    """The world's codebook and the token grids its pictures are made from (indices into ``patches``).

    ``patches`` is uint8 [V, 4, 4, 3].  ``scenes[name]`` is int [16, 16]; ``objects[shape, colour, scene]`` is
    int [3, 3] with -1 where the background shows through; the first ``num_plain`` codewords are plain.
    """

    patches: np.ndarray
    num_plain: int
    scenes: dict[str, np.ndarray]
    objects: dict[tuple[str, str, str], np.ndarray]
    pillars: dict[str, dict[str, int]]
    walls: dict[str, int]

    @property
    def parts(self) -> np.ndarray:
        """Codewords of which objects are made, whatever their shape, colour and scene."""
        found = np.unique(np.concatenate([grid.ravel() for grid in self.objects.values()]))
        return found[found >= 0]


@lru_cache(maxsize=1)
def palette() -> Palette:
    """Draw every patch the world can show, drop duplicates, and index them."""
    index: dict[bytes, int] = {}
    patches: list[np.ndarray] = []

    def add(patch: np.ndarray) -> int:
        key = patch.tobytes()
        if key not in index:
            index[key] = len(patches)
            patches.append(patch.copy())
        return index[key]

    def plain(colour: tuple[np.integer, ...]) -> None:
        add(np.full((PATCH, PATCH, 3), colour, np.uint8))

    for red in PLAIN_LEVELS:
        for green in PLAIN_LEVELS:
            for blue in PLAIN_LEVELS:
                plain((red, green, blue))
    for grey in GREY_LEVELS:
        plain((grey, grey, grey))
    num_plain = len(patches)

    def tile(picture: np.ndarray) -> np.ndarray:
        rows, cols = picture.shape[0] // PATCH, picture.shape[1] // PATCH
        cells = picture.reshape(rows, PATCH, cols, PATCH, 3).swapaxes(1, 2)
        return np.array([[add(cells[r, c]) for c in range(cols)] for r in range(rows)])

    scenes = {name: tile(_draw_scene(name)) for name in SCENES}
    objects = {}
    for shape in SHAPES:
        for colour in COLOURS:
            picture, inside = _draw_object(shape, colour)
            covered = inside.reshape(OBJECT_CELLS, PATCH, OBJECT_CELLS, PATCH).any(axis=(1, 3))
            # A photo has no one sky colour; mid grey is as good as any behind the corners.
            for scene in (*SCENES, PHOTO):
                behind = (128, 128, 128) if scene == PHOTO else _sky_colour(scene)
                composed = np.where(inside[..., None], picture, np.asarray(behind, np.uint8))
                cells = composed.reshape(OBJECT_CELLS, PATCH, OBJECT_CELLS, PATCH, 3).swapaxes(1, 2)
                grid = np.full((OBJECT_CELLS, OBJECT_CELLS), -1)
                for r, c in np.argwhere(covered):
                    grid[r, c] = add(cells[r, c])
                objects[shape, colour, scene] = grid
    pillars = {kind: {name: add(p) for name, p in _draw_pillar(kind).items()} for kind in PILLARS}
    walls = {name: add(p) for name, p in _draw_wall().items()}
    return Palette(np.stack(patches), num_plain, scenes, objects, pillars, walls)


@dataclass(frozen=True)
class MovingObject:
    """One object: its look, the grid row of its top edge, and its phase on the path between the walls."""

    shape: str
    colour: str
    row: int
    phase: int

    def column(self, k: int) -> int:
        """Grid column of the left edge at frame ``k``."""
        step = (self.phase + k) % _PERIOD
        return _FIRST_X + min(step, _PERIOD - step)

    def direction(self, k: int) -> str:
        """``"right"`` or ``"left"``: where the object goes between frames ``k`` and ``k + 1``."""
        return "right" if (self.phase + k) % _PERIOD < _PERIOD // 2 else "left"


@dataclass(frozen=True)
class Pillar:
    """The opaque occluder: full height, ``width`` tokens from grid column ``left``."""

    colour: str
    left: int
    width: int


class Video(Protocol):
    """What has a sentence and frames: a world, or a film of several."""

    @property
    def prompt(self) -> str:
        """The English sentence that describes the video."""

    def frame_ids(self, k: int) -> np.ndarray:
        """Codebook indices of frame ``k``, int [16, 16]; ``k`` is any integer from 0."""


@dataclass(frozen=True)
class World:
    """One video of the toy world; frame 0 is the conditioning picture, frames 1, 2, ... are the video."""

    scene: str
    objects: tuple[MovingObject, ...]
    pillar: Pillar | None
    background: np.ndarray = field(compare=False, repr=False)

    @property
    def prompt(self) -> str:
        """The English sentence that describes the video."""
        movers = " and ".join(f"a {o.colour} {o.shape} moves {o.direction(0)}" for o in self.objects)
        place = {"night": "at night", "desert": "in a desert", "sea": "at sea", "meadow": "in a meadow",
                 PHOTO: "on a photo"}[self.scene]  # fmt: skip
        if self.pillar is None:
            return f"{movers} {place}"
        return f"{movers} {place} behind a {WIDTHS[self.pillar.width]} {self.pillar.colour} pillar"

    def position(self, i: int, k: int) -> tuple[int, int]:
        """Top-left grid cell (column, row) of object ``i`` at frame ``k``."""
        return self.objects[i].column(k), self.objects[i].row

    def hidden(self, i: int, k: int) -> bool:
        """Whether object ``i`` is wholly behind the pillar at frame ``k``."""
        if self.pillar is None:
            return False
        x = self.objects[i].column(k)
        return self.pillar.left <= x and x + OBJECT_CELLS <= self.pillar.left + self.pillar.width

    def object_cells(self, i: int, k: int) -> np.ndarray:
        """Grid cells where object ``i`` shows at frame ``k``: int [n, 3] of (row, column, codeword)."""
        obj = self.objects[i]
        grid = palette().objects[obj.shape, obj.colour, self.scene]
        x, y = self.position(i, k)
        cells = []
        for r, c in np.argwhere(grid >= 0):
            column = x + c
            if self.pillar and self.pillar.left <= column < self.pillar.left + self.pillar.width:
                continue
            cells.append((y + r, column, grid[r, c]))
        return np.array(cells, int).reshape(-1, 3)

    def frame_ids(self, k: int) -> np.ndarray:
        """Codebook indices of frame ``k``, int [16, 16]; ``k`` is any integer from 0."""
        if k < 0:
            raise ValueError(f"frame number must not be negative, got {k}")
        ids = self.background.copy()
        for i in range(len(self.objects)):
            cells = self.object_cells(i, k)
            ids[cells[:, 0], cells[:, 1]] = cells[:, 2]
        return ids

    def frame(self, k: int) -> np.ndarray:
        """Frame ``k`` as a picture, uint8 [64, 64, 3]."""
        return palette().patches[self.frame_ids(k)].swapaxes(1, 2).reshape(SIZE, SIZE, 3)

    def emerging(self, k: int) -> np.ndarray:
        """Cells of frame ``k`` that show a part of an object which was behind the pillar one frame before.

        Returns:
            bool [16, 16].
        """
        mask = np.zeros((GRID, GRID), bool)
        if self.pillar is None:
            return mask
        for i in range(len(self.objects)):
            rows, columns, _ = self.object_cells(i, k).T
            before = columns - (self.position(i, k)[0] - self.position(i, k - 1)[0])
            hidden = (self.pillar.left <= before) & (before < self.pillar.left + self.pillar.width)
            mask[rows[hidden], columns[hidden]] = True
        return mask

    def unseen(self) -> np.ndarray:
        """Cells covered by an object in frame 0, bool [16, 16]: what lies behind them cannot be known."""
        mask = np.zeros((GRID, GRID), bool)
        for i in range(len(self.objects)):
            cells = self.object_cells(i, 0)
            mask[cells[:, 0], cells[:, 1]] = True
        return mask


@dataclass(frozen=True)
class Film:
    """A video that cuts from one world to another and returns.

    Time stands still in a scene that is not seen, so that a return shows what followed on the last frame before the
    cut, however long ago that was.

    Args:
        scenes: two worlds or more, which take turns.
        cuts: frames with which a shot begins, ascending; the last shot goes on for ever.
    """

    scenes: tuple[World, ...]
    cuts: tuple[int, ...]

    @property
    def prompt(self) -> str:
        """The sentence of the first scene: nothing tells of the others before they are seen."""
        return self.scenes[0].prompt

    def scene(self, k: int) -> int:
        """Which of the scenes frame ``k`` shows."""
        return bisect_right(self.cuts, k) % len(self.scenes)

    def time(self, k: int) -> int:
        """How many frames before ``k`` have shown the same scene."""
        return sum(self.scene(earlier) == self.scene(k) for earlier in range(k))

    def frame_ids(self, k: int) -> np.ndarray:
        """Codebook indices of frame ``k``, int [16, 16]; ``k`` is any integer from 0."""
        return self.scenes[self.scene(k)].frame_ids(self.time(k))

    def returns(self, k: int) -> bool:
        """Whether frame ``k`` is the first after a cut to a scene that was seen before."""
        return k in self.cuts and self.time(k) > 0

    def known(self, k: int) -> np.ndarray:
        """Cells of frame ``k`` that its scene's earlier frames tell, bool [16, 16].

        All but those that show a background which an object has covered in each of them.
        """
        world, time = self.scenes[self.scene(k)], self.time(k)
        shown = [world.frame_ids(earlier) == world.background for earlier in range(time)]
        uncovered: np.ndarray = np.any(shown, axis=0)
        return uncovered | (world.frame_ids(time) != world.background)


def _photo_background(rng: np.random.Generator) -> np.ndarray:
    """A random picture of plain-colour codewords, int [16, 16]: smooth colour fields with hard edges."""
    steps = len(PLAIN_LEVELS)
    cells = rng.choice([1, 2, 4, 8])
    coarse = rng.uniform(0, steps, (GRID // cells, GRID // cells, 3)).repeat(cells, 0).repeat(cells, 1)
    slope = rng.uniform(-0.15, 0.15, (2, 3))
    ramp = np.arange(GRID)[:, None, None] * slope[0] + np.arange(GRID)[None, :, None] * slope[1]
    levels = np.clip(coarse + ramp, 0, steps - 1).astype(int)
    return levels[..., 0] * steps * steps + levels[..., 1] * steps + levels[..., 2]


def _compose_background(scene: np.ndarray, pillar: Pillar | None) -> np.ndarray:
    """Scene, side walls and pillar as one grid of codebook indices, int [16, 16]."""
    ids = scene.copy()
    walls = palette().walls
    for row in range(GRID):
        ids[row, 0] = walls[f"left{row % 2}"]
        ids[row, -1] = walls[f"right{row % 2}"]
        if pillar:
            parts = palette().pillars[pillar.colour]
            for c in range(pillar.width):
                ids[row, pillar.left + c] = parts[f"mid{row % 2}{c % 2}"]
            ids[row, pillar.left] = parts[f"left{row % 2}"]
            ids[row, pillar.left + pillar.width - 1] = parts[f"right{row % 2}"]
    return ids


def make_world(seed: int, photo_share: float = 0.0) -> World:
    """The world of one seed.

    ``photo_share`` is the chance of a random plain-colour background instead of one of the four scenes
    (training uses it so that the model also keeps backgrounds it has never seen).
    Every object is wholly visible in frame 0, and in nine worlds of ten there is a pillar to pass behind.
    """
    rng = np.random.default_rng(seed)
    is_photo = rng.random() < photo_share
    scene = PHOTO if is_photo else str(rng.choice(SCENES))
    pillar = None
    if rng.random() < 0.9:
        width = int(rng.choice(list(WIDTHS)))
        left = int(rng.integers(_FIRST_X + OBJECT_CELLS, GRID - 1 - OBJECT_CELLS - width + 1))
        pillar = Pillar(str(rng.choice(PILLARS)), left, width)
    rows = [(int(rng.choice(_SINGLE_ROWS)))]
    if rng.random() < 0.55:
        rows = [int(rng.choice(_UPPER_ROWS)), int(rng.choice(_LOWER_ROWS))]
    looks = rng.choice(len(SHAPES) * len(COLOURS), size=len(rows), replace=False)
    objects = []
    for row, look in zip(rows, looks, strict=True):
        while True:
            obj = MovingObject(
                SHAPES[look % len(SHAPES)], COLOURS[look // len(SHAPES)], row, int(rng.integers(_PERIOD))
            )
            x = obj.column(0)
            if pillar is None or x + OBJECT_CELLS <= pillar.left or x >= pillar.left + pillar.width:
                break
        objects.append(obj)
    background = _photo_background(rng) if is_photo else palette().scenes[scene]
    return World(scene, tuple(objects), pillar, _compose_background(background, pillar))


def opening(world: World) -> World:
    """The world of the same sentence whose frame 0 the sentence alone tells.

    Everything begins at the wall that it moves away from, in a lane by its turn in the sentence, and the pillar stands
    in the middle.
    """
    rows = _OPENING_ROWS[len(world.objects)]
    objects = tuple(
        replace(thing, row=row, phase=0 if thing.direction(0) == "right" else _PERIOD // 2)
        for thing, row in zip(world.objects, rows, strict=True)
    )
    pillar = world.pillar and replace(world.pillar, left=(GRID - world.pillar.width) // 2)
    return World(world.scene, objects, pillar, _compose_background(palette().scenes[world.scene], pillar))


def make_film(seed: int, cuts: Sequence[int]) -> Film:
    """The film of one seed: two worlds that take turns, and ``cuts`` are the frames with which a shot begins."""
    seeds = np.random.default_rng((seed, _FILM)).integers(2**62, size=2)
    return Film(tuple(make_world(int(own)) for own in seeds), tuple(cuts))


def main() -> None:
    """Write an animated GIF of one world."""
    import imageio.v3 as imageio

    parser = argparse.ArgumentParser(description="Preview one video of the toy world.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--frames", type=int, default=16, help="video frames after the conditioning picture")
    parser.add_argument("--out", type=Path, required=True, help="GIF file to write")
    args = parser.parse_args()
    world = make_world(args.seed)
    frames = np.stack([world.frame(k) for k in range(args.frames + 1)])
    imageio.imwrite(args.out, frames.repeat(4, 1).repeat(4, 2), duration=150, loop=0)
    print(f"{args.out}: {world.prompt}")


if __name__ == "__main__":
    main()
