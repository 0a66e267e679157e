"""The world to play: what moves, what stays, what is left, and that all of it can be seen."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_packcache.config.server import ServerConfig
from vllm_packcache.demo.play import pictures, tokenizer
from vllm_packcache.demo.play.tokenizer import KIND_NAMES, SIDE_NAMES
from vllm_packcache.demo.play.world import (
    ACTION_IDS,
    COLUMNS,
    CONDITION_TOKENS,
    DOOR_ROW,
    DOORS,
    FALL,
    FRAME_TOKENS,
    GEM,
    KIND_OF,
    LEFT,
    LEFT_DOOR,
    PICTURE_ID,
    PLAYER_IN,
    RIGHT,
    RISE,
    ROOM_IDS,
    ROOM_OF,
    ROOMS,
    ROWS,
    SKY,
    STAND,
    THINGS,
    TILES,
    UNKNOWN_ID,
    VISUAL_IDS,
    VOCABULARY,
    WALL,
    Action,
    Int64,
    Player,
    World,
    action_of,
    make_world,
    play,
    random_actions,
    sequence_ids,
    tile_of,
    token_of,
)
from vllm_packcache.families.actions import find

seeds = st.integers(0, 2**32 - 1)
any_actions = st.lists(st.integers(*ACTION_IDS).map(action_of), max_size=80)


def plain() -> World:
    """Rooms with nothing in them, and the player in the middle of the one in the middle."""
    rooms = make_world(0).rooms.copy()
    rooms[:, 1:-1, 1:-1] = SKY
    return World(rooms, Player(1, DOOR_ROW, 4))


def seen_world(newest: Int64, shown: int) -> World:
    """The world as its pictures tell, of which the one of the room ``shown`` is the last."""
    rooms = KIND_OF[newest].reshape(ROOMS, ROWS, COLUMNS).astype(np.int8)
    (place,) = np.flatnonzero(PLAYER_IN[newest[shown]])
    tile = tile_of(int(newest[shown, place]))
    assert tile.motion is not None
    return World(rooms, Player(shown, *divmod(int(place), COLUMNS), tile.motion, tile.facing))


def test_every_id_says_what_it_stands_for() -> None:
    for token in range(VISUAL_IDS[0], VISUAL_IDS[1] + 1):
        assert token_of(tile_of(token)) == token
    for token in range(ACTION_IDS[0], ACTION_IDS[1] + 1):
        assert action_of(token).id == token
    assert [*range(VISUAL_IDS[1] + 1), PICTURE_ID, *range(ACTION_IDS[0], ACTION_IDS[1] + 1), UNKNOWN_ID] == list(
        range(VOCABULARY)
    )
    for wrong in (-1, PICTURE_ID, UNKNOWN_ID):
        with pytest.raises(ValueError, match="the id of a tile"):
            tile_of(wrong)
        with pytest.raises(ValueError, match="the id of an action"):
            action_of(wrong)


@given(seeds, any_actions)
@settings(max_examples=100, deadline=None)
def test_whatever_is_done_there_is_one_player_and_walls_stay(seed: int, actions: list[Action]) -> None:
    first = make_world(seed)
    fixed = np.isin(first.rooms, (WALL, *DOORS))
    for world in play(first, actions):
        ids, player = world.frame_ids(), world.player
        assert PLAYER_IN[ids].sum() == 1
        assert (ROOM_OF[ids] == player.room).all()
        assert (KIND_OF[ids].reshape(ROWS, COLUMNS) == world.rooms[player.room]).all()
        assert (world.rooms[fixed] == first.rooms[fixed]).all()
        assert np.isin(world.rooms[~fixed], (SKY, *THINGS.values())).all()
        assert world.rooms[player.room, player.row, player.column] != WALL
        # Who stands has a floor, and who has a floor stands.
        assert (player.motion == STAND) == (world.rooms[player.room, player.row + 1, player.column] == WALL)


@given(seeds, any_actions)
@settings(max_examples=100, deadline=None)
def test_what_comes_next_follows_from_what_was_seen(seed: int, actions: list[Action]) -> None:
    """The newest picture of every room and the action tell the next picture."""
    world = make_world(seed)
    condition = np.array(world.condition_ids()).reshape(ROOMS, FRAME_TOKENS)[:, 1:]
    newest = condition[np.argsort(ROOM_OF[condition[:, 0]])]
    assert (np.array(world.condition_ids())[::FRAME_TOKENS] == PICTURE_ID).all()
    assert ROOM_OF[condition[-1, 0]] == world.player.room
    for action in actions:
        shown = world.player.room
        world = world.step(action)
        assert (seen_world(newest, shown).step(action).frame_ids() == world.frame_ids()).all()
        newest[world.player.room] = world.frame_ids()


def test_a_world_is_that_of_its_seed() -> None:
    assert (make_world(5).rooms == make_world(5).rooms).all()
    assert len({make_world(seed).rooms.tobytes() for seed in range(50)}) == 50


@pytest.mark.parametrize("seed", range(60))
def test_every_door_can_be_reached(seed: int) -> None:
    world = make_world(seed)
    found, next_ones = {world.player}, [world.player]
    while next_ones:
        player = next_ones.pop()
        for move in (LEFT, 0, RIGHT):
            for jump in (False, True):
                after = World(world.rooms, player).step(Action(move, jump)).player
                if after not in found:
                    found.add(after)
                    next_ones.append(after)
    for room in range(ROOMS):
        doors = {column for column in (0, COLUMNS - 1) if world.rooms[room, DOOR_ROW, column] in DOORS}
        assert doors <= {player.column for player in found if (player.room, player.row) == (room, DOOR_ROW)}
        assert doors == {column for column, side in ((0, 0), (COLUMNS - 1, ROOMS - 1)) if room != side}


def test_a_jump_is_two_rows_up_and_down_again() -> None:
    worlds = play(plain(), [Action(jump=True), *[Action()] * 4])
    assert [(world.player.row, world.player.motion) for world in worlds] == [
        (DOOR_ROW - 1, RISE),
        (DOOR_ROW - 2, FALL),
        (DOOR_ROW - 1, FALL),
        (DOOR_ROW, STAND),
        (DOOR_ROW, STAND),
    ]
    # Nobody jumps in the air, but one can turn there.
    world = worlds[2].step(Action(LEFT, True))
    assert (world.player.row, world.player.column, world.player.facing) == (DOOR_ROW, 3, LEFT)


def test_walls_are_in_the_way() -> None:
    world = plain()
    world.rooms[1, DOOR_ROW - 1, 4] = WALL
    assert world.step(Action(jump=True)).player == world.player._replace(motion=STAND)
    world.rooms[1, DOOR_ROW, 5] = WALL
    assert world.step(Action(RIGHT)).player.column == 4
    assert world.step(Action(LEFT)).player.column == 3


def test_who_walks_off_a_platform_falls() -> None:
    world = plain()
    world.rooms[1, 3, 4] = WALL
    world = World(world.rooms, Player(1, 2, 4)).step(Action(RIGHT))
    assert world.player == Player(1, 2, 5, FALL, RIGHT)
    assert play(world, [Action()] * 3)[-1].player == Player(1, DOOR_ROW, 5, STAND, RIGHT)


@pytest.mark.parametrize("thing", THINGS.values())
def test_what_was_left_is_there_on_return(thing: int) -> None:
    world = plain()
    left = world.step(Action(drop=thing))
    assert left.rooms[1, DOOR_ROW, 4] == thing
    assert world.rooms[1, DOOR_ROW, 4] == SKY
    there_and_back = [*[Action(RIGHT)] * 5, *[Action(RIGHT)] * 3, *[Action(LEFT)] * 5]
    worlds = play(left, there_and_back)
    rooms = [own.player.room for own in worlds]
    assert rooms == [1] * 4 + [2] * 7 + [1] * 2
    back = worlds[-1]
    assert back.player == Player(1, DOOR_ROW, COLUMNS - 2, STAND, LEFT)
    assert back.frame_ids()[DOOR_ROW * COLUMNS + 4] == token_of(tile_of(ROOM_IDS + thing))
    taken = play(back, [Action(LEFT)] * 3 + [Action(drop=GEM)])[-1]
    assert taken.rooms[1, DOOR_ROW, 4] == SKY


def test_nothing_is_left_in_a_door_or_in_the_air() -> None:
    rooms = plain().rooms
    for player in (Player(1, DOOR_ROW, 0), Player(1, 3, 4, FALL), Player(1, 3, 4, RISE)):
        world = World(rooms, player)
        assert (world.step(Action(drop=GEM)).rooms == rooms).all()
    assert rooms[1, DOOR_ROW, 0] == LEFT_DOOR


def test_a_door_leads_to_the_door_on_the_other_side() -> None:
    world = World(plain().rooms, Player(1, DOOR_ROW, 0, STAND, LEFT)).step(Action(LEFT))
    assert world.player == Player(0, DOOR_ROW, COLUMNS - 1, STAND, LEFT)
    assert world.step(Action(RIGHT)).player == Player(1, DOOR_ROW, 0, STAND, RIGHT)


def test_the_coding_that_a_server_has_makes_the_ids_of_the_world() -> None:
    coding = find("play")
    assert coding.ids({}) == [Action().id]
    assert coding.spans == (ACTION_IDS,)
    for number in range(ACTION_IDS[0], ACTION_IDS[1] + 1):
        move, jump, drop = action_of(number)
        own = {"move": SIDE_NAMES.get(move, ""), "jump": jump, "drop": KIND_NAMES[drop] if drop else ""}
        assert coding.ids(own) == [number]
        assert coding.ids({name: value for name, value in own.items() if value}) == [number]


def test_a_sequence_is_the_condition_and_frames() -> None:
    world, actions = make_world(3), random_actions(np.random.default_rng(3), 7)
    ids = sequence_ids(world, actions)
    assert len(ids) == CONDITION_TOKENS + 7 * FRAME_TOKENS
    frames = ids[CONDITION_TOKENS:].reshape(7, FRAME_TOKENS)
    assert frames[:, 0].tolist() == [action.id for action in actions]
    assert (frames[-1, 1:] == play(world, actions)[-1].frame_ids()).all()


def test_the_preset_says_which_ids_may_stand_where() -> None:
    config = ServerConfig.parse("packcache", "play")
    world, actions = make_world(1), random_actions(np.random.default_rng(1), 5)
    options = {"packcache_frames": 5, "packcache_given_ids": [action.id for action in actions]}
    request = config.request(options, CONDITION_TOKENS)
    assert request is not None
    assert request.grammar is not None
    ids = sequence_ids(world, actions).tolist()
    assert request.grammar.first_wrong(ids) is None
    ids[-1] = actions[0].id
    assert request.grammar.first_wrong(ids) == len(ids) - 1
    for frame, action in enumerate(actions):
        assert request.grammar.allowed(CONDITION_TOKENS + frame * FRAME_TOKENS) == (action.id, action.id)
    plan = request.streams[0].plan
    assert plan.layout.frame.tokens_per_frame == FRAME_TOKENS
    assert plan.layout.frame.grid == (ROWS, COLUMNS)
    assert plan.layout.condition_image_tokens == CONDITION_TOKENS


def test_every_tile_looks_different() -> None:
    shown = {}
    for token in range(VISUAL_IDS[1] + 1):
        ids = np.full(TILES, token)
        shown[token] = pictures.picture(ids)[-2 * pictures.TILE : -pictures.TILE, : pictures.TILE].tobytes()
    assert len(set(shown.values())) == len(shown)


def test_a_picture_is_drawn_of_any_ids() -> None:
    ids = make_world(2).frame_ids()
    drawn = pictures.picture(ids)
    assert drawn.shape == (pictures.HEIGHT, pictures.WIDTH, 3)
    assert drawn.dtype == np.uint8
    assert (pictures.picture(ids.tolist()) == drawn).all()
    ids[[0, 1, 2]] = -1, UNKNOWN_ID, ACTION_IDS[0]
    assert (pictures.picture(ids)[: pictures.TILE, : 3 * pictures.TILE] == 128).all()
    with pytest.raises(ValueError, match="a picture has 63 tiles, not 64"):
        pictures.picture(np.zeros(FRAME_TOKENS, dtype=int))
    assert pictures.strip([drawn] * 5).shape == (2 * 224 + 6, 4 * 288 + 3 * 6, 3)


def test_every_token_has_a_word() -> None:
    own = tokenizer.build_tokenizer()
    ids = sequence_ids(make_world(4), random_actions(np.random.default_rng(4), 3)).tolist()
    text = own.decode(ids)
    assert own.encode(text).ids == ids
    assert own.encode("wait right+jump+gem somewhere").ids == [Action().id, Action(RIGHT, True, GEM).id, UNKNOWN_ID]
    assert len({tokenizer.name_of(token) for token in range(VOCABULARY)}) == VOCABULARY == own.get_vocab_size()
