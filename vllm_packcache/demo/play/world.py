"""A row of rooms to play in: walk, jump, leave things behind, turn the corner and come back.

A picture shows one room as 7 x 9 tiles, one token each. The player walks through a door into the next room and finds
there on return what was left. What a picture does not show has to be remembered: what lies in the other rooms.

Everything that moves is seen: the next picture follows from the last one, from the newest of every other room, and from
the action. A tile that the player stands in has an id of its own for everything that may be behind the player.

A sequence begins with a picture of every room, then comes frame by frame the action and the picture that it leads to::

    [<picture> 63 tiles] x 3 rooms   [action 63 tiles] [action 63 tiles] ...
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]

MODEL_DIR = Path(__file__).parent / "model"
"""The bundled model."""

ROWS, COLUMNS = 7, 9
TILES = ROWS * COLUMNS
"""Tiles of a picture, row by row."""
ROOMS = 3
FRAME_TOKENS = 1 + TILES
"""F: the action, then the tiles of the picture that it leads to."""
CONDITION_TOKENS = ROOMS * FRAME_TOKENS
"""A picture of every room, each behind a token that says so; the room of the player is the last."""

SKY, WALL, GEM, FLOWER, LANTERN, LEFT_DOOR, RIGHT_DOOR = range(7)
"""What a tile shows. All but walls can be walked through."""
KINDS = 7
THINGS = {"gem": GEM, "flower": FLOWER, "lantern": LANTERN}
"""What can be left in a room, and taken."""
DOORS = (LEFT_DOOR, RIGHT_DOOR)
PASSABLE = (SKY, GEM, FLOWER, LANTERN, LEFT_DOOR, RIGHT_DOOR)

STAND, RISE, FALL = range(3)
"""What the player does."""
LEFT, RIGHT = -1, 1
POSES = 6
"""Standing, rising and falling, to the left and to the right."""

ROOM_IDS = KINDS + POSES * len(PASSABLE)
"""Ids of each room: rooms look different, so a tile says which one it is of."""
VISUAL_IDS = (0, ROOMS * ROOM_IDS - 1)
"""The first and the last id of tiles."""
PICTURE_ID = ROOMS * ROOM_IDS
"""Stands before each picture of the condition."""

MOVES = {"left": LEFT, "": 0, "right": RIGHT}
DROPS = ("", *THINGS)
FIRST_ACTION_ID = PICTURE_ID + 1
ACTION_IDS = (FIRST_ACTION_ID, FIRST_ACTION_ID + len(MOVES) * 2 * len(DROPS) - 1)
"""The first and the last id of actions."""
UNKNOWN_ID = ACTION_IDS[1] + 1
"""A word of a prompt that is no token's."""
VOCABULARY = UNKNOWN_ID + 1

DOOR_ROW = ROWS - 2
_SEED = 7
"""Makes the numbers that a world is drawn from others than those of another program's world of its seed."""


class Action(NamedTuple):
    """What the player is to do in one frame.

    Args:
        move: `LEFT`, 0 or `RIGHT`.
        jump: whether to jump; only who stands can.
        drop: the thing to leave where the player stands, one of `THINGS`, or 0. What lies there already is taken
            instead, whatever it is. In a door and in the air nothing is left.
    """

    move: int = 0
    jump: bool = False
    drop: int = 0

    @property
    def id(self) -> int:
        """The token of the action."""
        drop = DROPS.index(next((name for name, kind in THINGS.items() if kind == self.drop), ""))
        return FIRST_ACTION_ID + ((self.move + 1) * 2 + int(self.jump)) * len(DROPS) + drop


def action_of(token: int) -> Action:
    """The action of a token.

    Raises:
        ValueError: the token is none of an action.
    """
    if not ACTION_IDS[0] <= token <= ACTION_IDS[1]:
        raise ValueError(f"the id of an action is from {ACTION_IDS[0]} to {ACTION_IDS[1]}, not {token}")
    rest, drop = divmod(token - FIRST_ACTION_ID, len(DROPS))
    move, jump = divmod(rest, 2)
    return Action(move - 1, bool(jump), THINGS.get(DROPS[drop], 0))


class Tile(NamedTuple):
    """What a tile's id says.

    Args:
        room: 0 .. `ROOMS` - 1.
        kind: what is there, behind the player where the player is.
        motion: `STAND`, `RISE` or `FALL`; None: the player is not there.
        facing: `LEFT` or `RIGHT`; 0 without the player.
    """

    room: int
    kind: int
    motion: int | None = None
    facing: int = 0


def tile_of(token: int) -> Tile:
    """What a visual id says.

    Raises:
        ValueError: it is none.
    """
    if not VISUAL_IDS[0] <= token <= VISUAL_IDS[1]:
        raise ValueError(f"the id of a tile is from {VISUAL_IDS[0]} to {VISUAL_IDS[1]}, not {token}")
    room, own = divmod(int(token), ROOM_IDS)
    if own < KINDS:
        return Tile(room, own)
    behind, pose = divmod(own - KINDS, POSES)
    return Tile(room, PASSABLE[behind], pose // 2, RIGHT if pose % 2 else LEFT)


def token_of(tile: Tile) -> int:
    """The id of a tile."""
    if tile.motion is None:
        return tile.room * ROOM_IDS + tile.kind
    pose = 2 * tile.motion + (tile.facing == RIGHT)
    return tile.room * ROOM_IDS + KINDS + PASSABLE.index(tile.kind) * POSES + pose


ROOM_OF = np.array([tile_of(token).room for token in range(VISUAL_IDS[1] + 1)])
"""Room of each visual id."""
KIND_OF = np.array([tile_of(token).kind for token in range(VISUAL_IDS[1] + 1)])
"""What is there, behind the player where the player is, by visual id."""
PLAYER_IN = np.array([tile_of(token).motion is not None for token in range(VISUAL_IDS[1] + 1)])
"""Whether the player is there, by visual id."""


class Player(NamedTuple):
    """Where the player is, and what the player does."""

    room: int
    row: int
    column: int
    motion: int = STAND
    facing: int = RIGHT


@dataclass(frozen=True)
class World:
    """All rooms at one time.

    Args:
        rooms: kinds of tiles without the player, int8 [`ROOMS`, `ROWS`, `COLUMNS`].
        player: of the room that is shown.
    """

    rooms: npt.NDArray[np.int8]
    player: Player

    def frame_ids(self) -> Int64:
        """Tokens of the picture of the room that is shown, [`TILES`]."""
        player = self.player
        ids = self.room_ids(player.room)
        place = player.row * COLUMNS + player.column
        kind = int(self.rooms[player.room, player.row, player.column])
        ids[place] = token_of(Tile(player.room, kind, player.motion, player.facing))
        return ids

    def room_ids(self, room: int) -> Int64:
        """Tokens of a picture of a room without the player, [`TILES`]."""
        return self.rooms[room].reshape(-1).astype(np.int64) + room * ROOM_IDS

    def condition_ids(self) -> list[int]:
        """Tokens of a sequence that begins now: a picture of every room, the one with the player last."""
        others = [self.room_ids(room) for room in range(ROOMS) if room != self.player.room]
        return [token for ids in (*others, self.frame_ids()) for token in (PICTURE_ID, *ids.tolist())]

    def step(self, action: Action) -> World:
        """The world one frame later.

        The player leaves or takes a thing, then goes through a door, or up or down, then to the side.
        """
        rooms, player = self.rooms, self.player
        room = rooms[player.room]
        here = int(room[player.row, player.column])
        standing = player.motion == STAND
        if action.drop and standing and here not in DOORS:
            rooms = rooms.copy()
            room = rooms[player.room]
            room[player.row, player.column] = action.drop if here == SKY else SKY
        facing = action.move or player.facing
        if standing and (here, action.move) in ((LEFT_DOOR, LEFT), (RIGHT_DOOR, RIGHT)):
            column = COLUMNS - 1 if action.move == LEFT else 0
            return World(rooms, Player(player.room + action.move, DOOR_ROW, column, STAND, facing))
        row, column, motion = player.row, player.column, FALL
        if (standing and action.jump) or player.motion == RISE:
            if room[row - 1, column] != WALL:
                row -= 1
                motion = RISE if standing else FALL
        elif player.motion == FALL and room[row + 1, column] != WALL:
            row += 1
        # Doors open to one side: a step out of the picture is a step through a door, which is taken above.
        beside = column + action.move
        if 0 <= beside < COLUMNS and room[row, beside] != WALL:
            column = beside
        if room[row + 1, column] == WALL:
            motion = STAND
        return World(rooms, Player(player.room, row, column, motion, facing))


def make_world(seed: int) -> World:
    """The world of a seed: platforms, a few things, and the player on the floor of some room."""
    random = np.random.default_rng([_SEED, seed])
    rooms = np.full((ROOMS, ROWS, COLUMNS), SKY, dtype=np.int8)
    for number, room in enumerate(rooms):
        room[0] = room[-1] = WALL
        room[:, 0] = room[:, -1] = WALL
        if number > 0:
            room[DOOR_ROW, 0] = LEFT_DOOR
        if number < ROOMS - 1:
            room[DOOR_ROW, -1] = RIGHT_DOOR
        # Low enough to be jumped on, high enough that nobody is shut in between one and the floor's step.
        for _ in range(int(random.integers(1, 4))):
            row, first = int(random.integers(2, DOOR_ROW - 1)), int(random.integers(1, COLUMNS - 2))
            room[row, first : min(first + int(random.integers(1, 4)), COLUMNS - 1)] = WALL
        # A step on the floor, not before a door.
        if random.random() < 0.5:
            room[DOOR_ROW, int(random.integers(3, COLUMNS - 3))] = WALL
        for row, column in np.argwhere((room[:-1] == SKY) & (room[1:] == WALL)):
            if random.random() < 0.12:
                room[row, column] = random.choice(list(THINGS.values()))
    number = int(random.integers(ROOMS))
    free = np.flatnonzero(rooms[number, DOOR_ROW, 1:-1] == SKY) + 1
    facing = LEFT if random.random() < 0.5 else RIGHT
    return World(rooms, Player(number, DOOR_ROW, int(random.choice(free)), STAND, facing))


def play(world: World, actions: list[Action]) -> list[World]:
    """The world after each action."""
    worlds = []
    for action in actions:
        world = world.step(action)
        worlds.append(world)
    return worlds


def sequence_ids(world: World, actions: list[Action]) -> Int64:
    """Tokens of condition and frames of a play, [`CONDITION_TOKENS` + len(actions) * `FRAME_TOKENS`]."""
    ids = world.condition_ids()
    for action, after in zip(actions, play(world, actions), strict=True):
        ids += [action.id, *after.frame_ids().tolist()]
    return np.array(ids)


def random_actions(random: np.random.Generator, frames: int) -> list[Action]:
    """What somebody may press: mostly on in one direction, now and then a jump or a thing."""
    actions, move = [], 0
    for _ in range(frames):
        if random.random() < 0.15:
            move = int(random.integers(-1, 2)) if random.random() < 0.2 else (LEFT, RIGHT)[int(random.integers(2))]
        drop = int(random.choice(list(THINGS.values()))) if random.random() < 0.12 else 0
        actions.append(Action(move, bool(random.random() < 0.2), drop))
    return actions
