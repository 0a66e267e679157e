"""What the model of the world to play learns from: single steps in all kinds of situations, with mistakes in the past.

What comes next follows from the last picture, the newest of every other room and the action. So a step is drawn by
itself: the player anywhere, things anywhere, rooms that were seen lately, long ago or never. A long play has nothing
else in it, and learning need not wait until a play gets there.

Some of what the model sees is wrong, as its own mistakes may be. What it is to say is then as if somebody had put that
right who cannot know what lay there: walls and doors are those of the condition, what else cannot be is empty.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.training.play_sparse import LOOKS
from vllm_packcache.demo.play.world import (
    ACTION_IDS,
    COLUMNS,
    DOOR_ROW,
    DOORS,
    FALL,
    FRAME_TOKENS,
    KIND_OF,
    LEFT,
    LEFT_DOOR,
    PICTURE_ID,
    PLAYER_IN,
    RIGHT,
    RIGHT_DOOR,
    RISE,
    ROOM_IDS,
    ROOM_OF,
    ROOMS,
    SKY,
    STAND,
    THINGS,
    TILES,
    VOCABULARY,
    WALL,
    Int64,
    Player,
    World,
    action_of,
    make_world,
)

WORLDS, STEPS = 8, 10
"""Worlds of a batch, and steps that are drawn in each."""
REMEMBERED = 0.7
"""Share of the other rooms that were seen since the condition."""
IN_DOOR, STANDING = 0.25, 0.45
"""Shares of players in a door, and on a floor; the others are anywhere."""
MISTAKEN, MOST_MISTAKES = 0.3, 3
"""Share of pictures with mistakes, and the most of them."""
SLIP = 0.02
"""Share of the tiles of the new picture that are mistaken where the model sees them."""
ASKED_NEAR, ASKED_CHANGED, ASKED_ELSEWHERE, ASKED_FIRST = 1.0, 0.4, 0.06, 0.5
"""Shares of the tiles that are asked for: around the player, those of another room or mistaken, others, the first."""

_TILE = np.arange(TILES)


class Batch(NamedTuple):
    """Tokens to predict.

    Args:
        own: the token before each, [A].
        seen: what each head sees from there, [A, heads].
        targets: what is right, [A].
        changed: whether that differs from the same place of the last picture, bool [A].
    """

    own: Int64
    seen: Int64
    targets: Int64
    changed: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Past:
    """What is seen of the past while a picture is made.

    Args:
        condition: a picture of each room, [`ROOMS`, `TILES`].
        start: the room whose picture is the last of the condition.
        newest: the newest picture of each room, which may be that of the condition, [`ROOMS`, `TILES`].
        shown: the room of the last picture.
        line: what is before the last picture and its tiles, [2 F]; of it heads see the end.
    """

    condition: Int64
    start: int
    newest: Int64
    shown: int
    line: Int64

    def seen(self, action: int, said: Int64) -> tuple[Int64, Int64]:
        """What is seen of past and picture.

        Args:
            action: the token of it.
            said: tiles of the picture, as far as there are any, [`TILES`].

        Returns:
            The token before each tile, [`TILES`], and what each head sees from there, [`TILES`, heads].
        """
        line = np.concatenate([self.line, [action], said])
        at = len(self.line) + _TILE
        own = line[at]
        # An action is of no room: the newest picture of all is the last, the oldest the first of the condition.
        first = 1 if self.start == 0 else 0
        newest, oldest = (np.append(room, ROOM_OF[own[1:]]) for room in (self.shown, first))
        content = [self.newest[newest, _TILE], self.condition[oldest, _TILE], np.full(TILES, action)]
        return own, np.concatenate([line[at[:, None] - np.array(LOOKS)], np.stack(content, 1)], 1)


def make_batch(seed: int) -> Batch:
    """The tokens of a batch."""
    random = np.random.default_rng(seed)
    parts = []
    for _ in range(WORLDS):
        first = make_world(int(random.integers(2**31)))
        condition = np.stack([_picture(first, room) for room in range(ROOMS)])
        parts += [_step(random, first, condition) for _ in range(STEPS)]
    return Batch(*(np.concatenate(values) for values in zip(*parts, strict=True)))


def _picture(world: World, room: int) -> Int64:
    return world.frame_ids() if room == world.player.room else world.room_ids(room)


def _step(random: np.random.Generator, first: World, condition: Int64) -> Batch:
    """Some tokens of one step in a world whose condition is given."""
    rooms, newest = first.rooms.copy(), condition.copy()
    shown = int(random.integers(ROOMS))
    for room in range(ROOMS):
        if room == shown or random.random() < REMEMBERED:
            _rearrange(random, rooms[room])
            newest[room] = World(rooms, _player(random, rooms, room, left=room != shown)).frame_ids()
    player = _player(random, rooms, shown)
    world = World(rooms, player)
    newest[shown] = world.frame_ids()
    action = action_of(int(random.integers(ACTION_IDS[0], ACTION_IDS[1] + 1)))
    if player.column in (0, COLUMNS - 1) and random.random() < 0.5:
        action = action._replace(move=LEFT if player.column == 0 else RIGHT)
    true = world.step(action)

    mistaken = np.zeros((ROOMS, TILES), dtype=bool)
    for room in range(ROOMS):
        if random.random() < MISTAKEN:
            _mistake(random, newest[room], mistaken[room], player if room == shown else None)
    targets = true.frame_ids()
    wrong = mistaken[true.player.room] & ~PLAYER_IN[targets]
    targets[wrong] = _mended(newest[true.player.room], condition[true.player.room])[wrong]

    before = random.integers(VOCABULARY, size=FRAME_TOKENS + 1)
    before[-1] = PICTURE_ID if random.random() < 0.1 else random.integers(ACTION_IDS[0], ACTION_IDS[1] + 1)
    said = targets.copy()
    slips = np.flatnonzero(random.random(TILES) < SLIP)
    said[slips] = true.player.room * ROOM_IDS + random.integers(ROOM_IDS, size=len(slips))
    past = Past(condition, first.player.room, newest, shown, np.concatenate([before, newest[shown]]))
    own, seen = past.seen(action.id, said)

    changed = targets != newest[shown]
    chance = np.where(changed | wrong, ASKED_CHANGED, ASKED_ELSEWHERE)
    near = _near(true.player)
    if true.player.room == shown:
        near |= _near(player)
    chance[near | PLAYER_IN[newest[true.player.room]]] = ASKED_NEAR
    chance[0] = 1.0 if player.column in (0, COLUMNS - 1) else ASKED_FIRST
    asked = random.random(TILES) < chance
    return Batch(own[asked], seen[asked], targets[asked], changed[asked])


def _rearrange(random: np.random.Generator, room: npt.NDArray[np.int8]) -> None:
    """Leave and take things in a room."""
    for place in np.flatnonzero((room != WALL) & ~np.isin(room, DOORS)):
        if random.random() < 0.15:
            room.flat[place] = random.choice((SKY, *THINGS.values()))


def _player(random: np.random.Generator, rooms: npt.NDArray[np.int8], room: int, left: bool = False) -> Player:
    """A player somewhere in a room; most of those who have left it did so through a door."""
    kinds = rooms[room]
    facing = LEFT if random.random() < 0.5 else RIGHT
    kind = random.random()
    if kind < (0.8 if left else IN_DOOR):
        doors = [column for column in (0, COLUMNS - 1) if kinds[DOOR_ROW, column] in DOORS]
        return Player(room, DOOR_ROW, int(random.choice(doors)), STAND, facing)
    free = (kinds[:-1] != WALL) & ~np.isin(kinds[:-1], DOORS)
    standing = free & (kinds[1:] == WALL)
    row, column = (
        int(number) for number in random.choice(np.argwhere(standing if kind < IN_DOOR + STANDING else free))
    )
    motion = STAND if standing[row, column] else (RISE, FALL)[int(random.integers(2))]
    return Player(room, row, column, motion, facing)


def _mistake(
    random: np.random.Generator, picture: Int64, mistaken: npt.NDArray[np.bool_], player: Player | None
) -> None:
    """Put wrong tiles into a picture, away from the player, whose way hangs on what is there."""
    far = ~PLAYER_IN[picture]
    if player is not None:
        far &= ~_near(player, 2)
    places = random.choice(np.flatnonzero(far), size=int(random.integers(1, MOST_MISTAKES + 1)), replace=False)
    # Mostly a tile of the room; another player is none that could be told from the first.
    room = ROOM_OF[picture[0]] if random.random() < 0.8 else random.integers(ROOMS)
    picture[places] = room * ROOM_IDS + random.choice((SKY, WALL, *THINGS.values(), LEFT_DOOR, RIGHT_DOOR), len(places))
    mistaken[places] = True


def _mended(picture: Int64, condition: Int64) -> Int64:
    """A picture with mistakes, as far as they can be told by the condition's picture of the room, [`TILES`]."""
    fixed = np.isin(KIND_OF[condition], (WALL, *DOORS))
    room = ROOM_OF[condition]
    kinds = np.where(fixed, KIND_OF[condition], SKY)
    thing = ~fixed & np.isin(KIND_OF[picture], list(THINGS.values())) & (ROOM_OF[picture] == room)
    return np.where(thing, picture, room * ROOM_IDS + kinds)


def _near(player: Player, distance: int = 1) -> npt.NDArray[np.bool_]:
    """Places around a player, bool [`TILES`]."""
    rows, columns = np.divmod(_TILE, COLUMNS)
    return (abs(rows - player.row) <= distance) & (abs(columns - player.column) <= distance)


class Steps:
    """Batches, one after another.

    Args:
        first_seed: of them.
    """

    def __init__(self, first_seed: int) -> None:
        self._seed = first_seed

    def next(self) -> Batch:
        """A batch that was not seen before."""
        self._seed += 1
        return make_batch(self._seed - 1)

    def state(self) -> dict[str, Any]:
        """What `resume` needs."""
        return {"seed": self._seed}

    def resume(self, state: dict[str, Any]) -> None:
        """Go on where `state` was asked for."""
        self._seed = state["seed"]
