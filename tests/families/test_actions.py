"""Codings of actions: ids against tables written out by hand, and every mistake in one sentence."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import quick
from vllm_packcache.config.errors import ConfigError
from vllm_packcache.config.server import LayoutConfig, ServerConfig
from vllm_packcache.core.grammar import FrameIds, IdRange, grammar_of
from vllm_packcache.core.layout import FrameLayout
from vllm_packcache.families import actions
from vllm_packcache.families.actions.mineworld import camera_bin
from vllm_packcache.families.actions.rt1 import value_bin

MINEWORLD = actions.find("mineworld")
NO_ACT = 8258
REST = [8225, 8246, NO_ACT, NO_ACT, NO_ACT, NO_ACT, NO_ACT, NO_ACT, NO_ACT]
# Published order of ids and of the block without its first and last one: place in what is made, and id.
BUTTONS = {
    "use": (6, 8192),
    "attack": (6, 8193),
    "forward": (3, 8194),
    "back": (3, 8195),
    "left": (4, 8196),
    "right": (4, 8197),
    "jump": (7, 8198),
    "sneak": (5, 8199),
    "sprint": (5, 8200),
    "drop": (8, 8201),
    "pickItem": (8, 8203),
}
PAIRS = [("forward", "back"), ("left", "right"), ("sprint", "sneak"), ("use", "attack"), ("drop", "pickItem")]


def refusal(name: str, action: dict[str, Any], ranges: actions.Ranges | None = None) -> str:
    with pytest.raises(ValueError, match=r".") as error:
        actions.find(name, ranges).ids(action)
    message = str(error.value)
    assert "\n" not in message
    return message


# MineWorld


def test_the_empty_action_does_nothing() -> None:
    assert MINEWORLD.ids({}) == REST
    assert MINEWORLD.ids_per_frame == 9


@pytest.mark.parametrize("name", BUTTONS)
@pytest.mark.parametrize("pressed", [1, True])
def test_a_button_stands_in_its_place(name: str, pressed: int) -> None:
    place, own = BUTTONS[name]
    assert MINEWORLD.ids({name: pressed}) == [*REST[:place], own, *REST[place + 1 :]]
    assert MINEWORLD.ids({name: 0}) == MINEWORLD.ids({name: False}) == REST


@pytest.mark.parametrize("pair", PAIRS, ids="|".join)
def test_both_of_a_pair_are_none(pair: tuple[str, str]) -> None:
    assert MINEWORLD.ids(dict.fromkeys(pair, 1)) == REST
    assert MINEWORLD.ids({pair[0]: 1, pair[1]: 0}) == MINEWORLD.ids({pair[0]: 1})


def test_the_hotbar_has_nine_slots() -> None:
    assert [MINEWORLD.ids({"hotbar": slot})[2] for slot in range(1, 10)] == [*range(8206, 8215)]


def test_a_whole_action() -> None:
    action = {"forward": 1, "sprint": True, "jump": 1, "attack": 1, "camera": [0, 12], "hotbar": 3}
    assert MINEWORLD.ids(action) == [8225, 8250, 8208, 8194, NO_ACT, 8200, 8193, 8198, NO_ACT]


# By hand: ln(1 + 11.4887 x / 90) / ln(12.4887) x 10, rounded. ln(12.4887) = 2.52482.
#   1: ln(1.12765) = 0.12014 -> 0.476    2: ln(1.25530) = 0.22738 -> 0.901    5: ln(1.63826) = 0.49364 -> 1.955
#   12: ln(2.53183) = 0.92894 -> 3.679   30: ln(4.82957) = 1.57475 -> 6.237   45: ln(6.74435) = 1.90871 -> 7.560
#   80: ln(11.21218) = 2.41700 -> 9.573  90: 10
@pytest.mark.parametrize(
    ("degrees", "bins"), [(0, 0), (1, 0), (2, 1), (5, 2), (12, 4), (30, 6), (45, 8), (80, 10), (90, 10)]
)
def test_bins_of_the_camera_by_hand(degrees: float, bins: int) -> None:
    assert camera_bin(degrees) == 10 + bins
    assert camera_bin(-degrees) == 10 - bins
    assert MINEWORLD.ids({"camera": [degrees, -degrees]})[:2] == [8215 + 10 + bins, 8236 + 10 - bins]


@quick
@given(st.floats(0, 90), st.floats(0, 90))
def test_bins_of_the_camera_are_symmetric_and_grow(one: float, other: float) -> None:
    small, large = sorted((one, other))
    assert 10 <= camera_bin(small) <= camera_bin(large) <= 20
    assert camera_bin(-one) == 20 - camera_bin(one)


def test_a_bin_is_where_its_middle_is() -> None:
    for own in range(21):
        share = (own - 10) / 10
        # The inverse of the mu-law.
        middle = math.copysign(90 / 11.4887 * ((1 + 11.4887) ** abs(share) - 1), share)
        assert camera_bin(middle) == own


@pytest.mark.parametrize(
    ("action", "words"),
    [
        ({"walk": 1}, "an action must be made of camera, hotbar, forward, back, left, right, sprint, sneak, use, "),
        ({"walk": 1}, "drop, pickItem, not of walk"),
        ({"hotbar.3": 1}, "not of hotbar.3"),
        ({"x" * 1000: 1}, "not of '" + "x" * 78 + "…"),
        ({"inventory": 1}, "an action of MineWorld must leave inventory out: it has an id, but no place in a frame"),
        ({"ESC": 0}, "must leave ESC out"),
        ({"swapHands": 1}, "must leave swapHands out"),
        ({"jump": 2}, "jump must be true or 1 where it is pressed, false or 0 else, not 2"),
        ({"jump": 1.0}, "jump must be true or 1 where it is pressed, false or 0 else, not 1.0"),
        ({"jump": "1"}, "not '1'"),
        ({"jump": None}, "not None"),
        ({"jump": [1] * 100}, "not [1, 1, 1, 1"),
        ({"camera": 5}, "camera must be [pitch, yaw], two numbers of degrees from -90 to 90, not 5"),
        ({"camera": [0]}, "not [0]"),
        ({"camera": [0, 90.5]}, "not [0, 90.5]"),
        ({"camera": [-91, 0]}, "not [-91, 0]"),
        ({"camera": [0, True]}, "not [0, True]"),
        ({"camera": [0, float("nan")]}, "not [0, nan]"),
        ({"camera": [0, 10**5000]}, "not a number too long to show"),
        ({"camera": None}, "not None"),
        ({"hotbar": 0}, "hotbar must be a slot, a whole number from 1 to 9, not 0"),
        ({"hotbar": 10}, "not 10"),
        ({"hotbar": 2.0}, "not 2.0"),
        ({"hotbar": True}, "not True"),
    ],
)
def test_what_is_no_action_of_mineworld(action: dict[str, Any], words: str) -> None:
    message = refusal("mineworld", action)
    assert words in message
    assert len(message) < 260


def test_a_client_can_say_every_id_and_no_other() -> None:
    made = [MINEWORLD.ids({name: 1}) for name in BUTTONS]
    made += [MINEWORLD.ids({"hotbar": slot, "camera": [slot * 10, -slot * 10]}) for slot in range(1, 10)]
    for ids in made:
        for own, (first, last) in zip(ids, MINEWORLD.spans, strict=True):
            assert first <= own <= last
    # The ends of the ranges are ids that are made.
    for place, (first, last) in enumerate(MINEWORLD.spans[2:], 2):
        assert {first, last} <= {ids[place] for ids in [*made, REST]}


# rt1

PARTS = {
    "base_displacement_vector": [1, 2],
    "base_displacement_vertical_rotation": 3,
    "gripper_closedness": 4,
    "rotation_delta": [5, 6, 7],
    "terminate_episode": [8, 9, 10],
    "world_vector": [11, 12, 255],
}
RANGES = tuple((-1.0, 1.0 + number) for number in range(13))


def test_without_ranges_bins_are_given_in_the_published_order() -> None:
    coding = actions.find("rt1")
    assert coding.ids_per_frame == 13
    assert coding.ids(PARTS) == [8750 + own for own in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 255)]
    assert coding.ids(dict(reversed(PARTS.items()))) == coding.ids(PARTS)


# By hand, of 256 bins: the ends, halves and quarters of a range of 2; what lies outside it is at its ends.
@pytest.mark.parametrize(
    ("value", "own"), [(-1, 0), (-0.5, 63), (-0.4999, 64), (0.001, 128), (0.9, 243), (1, 255), (-7, 0), (1e300, 255)]
)
def test_bins_of_a_range_by_hand(value: float, own: int) -> None:
    assert value_bin(value, -1, 1) == own


def test_a_range_of_one_value_has_its_first_bin_there_and_its_last_one_above() -> None:
    assert value_bin(3, 3, 3) == 0
    assert value_bin(4, 3, 3) == 255


def test_with_ranges_what_is_left_out_is_nought() -> None:
    coding = actions.find("rt1", RANGES)
    assert coding.ids({}) == [8750 + value_bin(0, *own) for own in RANGES]
    made = coding.ids({"gripper_closedness": [4.0], "world_vector": [0, 11, 100]})
    assert made[3] == 9005
    assert made[11] == 8750 + math.floor(256 * 12 / 13)
    assert made[12] == 9005
    assert made[:3] == coding.ids({})[:3]


@pytest.mark.parametrize(
    ("action", "ranges", "words"),
    [
        (
            {"arm": 1},
            RANGES,
            "an action must be made of base_displacement_vector, base_displacement_vertical_rotation, ",
        ),
        ({"world_vector": [0, 1]}, RANGES, "world_vector must be 3 finite numbers, not [0, 1]"),
        ({"gripper_closedness": float("inf")}, RANGES, "gripper_closedness must be 1 finite number, not inf"),
        ({"gripper_closedness": True}, RANGES, "not True"),
        ({"gripper_closedness": 10**400}, RANGES, "not 1000"),
        (
            {**PARTS, "world_vector": [0, 1, 256]},
            None,
            "world_vector must be 3 whole numbers from 0 to 255, the bins, not ",
        ),
        ({**PARTS, "gripper_closedness": 1.0}, None, "must be 1 whole number from 0 to 255, the bin, not 1.0"),
        ({}, None, "where the layout has no action_ranges, and base_displacement_vector is not given"),
    ],
)
def test_what_is_no_action_of_rt1(action: dict[str, Any], ranges: actions.Ranges | None, words: str) -> None:
    assert words in refusal("rt1", action, ranges)


# In a layout

RT1_LAYOUT = {"grid": [2, 2], "frame_end_tokens": 13, "frame_end_ids": [[8750, 9005]] * 13, "actions": "rt1"}


# The world to play, whose ids are held against the world itself in tests/demo/test_play_world.py.


@pytest.mark.parametrize(
    ("action", "words"),
    [
        ({"move": "up"}, "move must be left, right, or left out, not 'up'"),
        ({"move": ["left"]}, "move must be left, right, or left out, not ['left']"),
        ({"jump": 2}, "jump must be true or 1, false or 0 else, not 2"),
        ({"jump": 1.0}, "jump must be true or 1"),
        ({"drop": "hat"}, "drop must be gem, flower, lantern, or left out, not 'hat'"),
        ({"drop": 1}, "drop must be gem"),
        ({"fly": 1}, "an action must be made of move, jump, drop, not of fly"),
    ],
)
def test_what_is_no_action_of_the_world_to_play(action: dict[str, Any], words: str) -> None:
    assert words in refusal("play", action)


def test_a_layout_names_its_coding() -> None:
    assert LayoutConfig(grid=(2, 2)).coding() is None
    server = ServerConfig.parse("packcache", {"layout": {**RT1_LAYOUT, "action_ranges": [[-1, 1]] * 13}})
    assert server.layout is not None
    coding = server.layout.coding()
    assert coding is not None
    assert coding.ids({"world_vector": [1, 1, 1]})[-3:] == [9005] * 3
    grammar = server.layout.grammar()
    assert grammar is not None
    grammar.check_given(coding.ids({}))
    assert ServerConfig.parse("packcache", {"layout": server.as_mapping()["layout"]}) == server


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ({"actions": "doom"}, "layout: actions must be one of mineworld, play, rt1, not 'doom'"),
        ({"actions": 3}, "layout.actions: input should be a valid string, not 3"),
        (
            {"frame_end_tokens": 3, "frame_end_ids": [1, [8750, 9005], [8750, 9005]]},
            "layout: actions: rt1 makes 13 ids for each frame, and the layout must leave as many to a client, as "
            "ranges in frame_start_ids and frame_end_ids, not 2",
        ),
        ({"frame_end_ids": None, "frame_end_tokens": 0}, "must leave as many to a client"),
        (
            {"frame_end_ids": [[8750, 9005]] * 12 + [[8750, 9000]]},
            "layout: actions: range 13 of what the layout leaves to a client must hold the ids of rt1 there, "
            "[8750, 9005], and it is [8750, 9000]",
        ),
        (
            {"action_ranges": [[0, 1]]},
            "layout: action_ranges must be 13 pairs, one for each number of an action of rt1",
        ),
        ({"action_ranges": [[1, 0]] * 13}, "pair 1 must be the smallest and the largest value, not [1.0, 0.0]"),
        ({"action_ranges": [[0, 1e7]] * 13}, "layout.action_ranges: item 1: "),
        ({"action_ranges": [[0, float("nan")]] * 13}, "layout.action_ranges: item 1: "),
        ({"actions": None, "action_ranges": [[0, 1]]}, "layout: action_ranges needs actions, the coding"),
        ({"actions": "mineworld", "action_ranges": [[0, 1]]}, "action_ranges must be left out: mineworld has its own"),
    ],
)
def test_a_layout_that_does_not_go_with_its_coding_is_refused(layout: dict[str, Any], words: str) -> None:
    given = {key: value for key, value in {**RT1_LAYOUT, **layout}.items() if value is not None}
    with pytest.raises(ConfigError) as error:
        ServerConfig.parse("packcache", {"layout": given})
    message = str(error.value)
    assert message.startswith("kv_cache_policy_config: layout")
    assert words in message
    assert "\n" not in message


def test_a_coding_of_anybodys_is_checked_against_frames() -> None:
    class Doors(actions.ActionCoding):
        name = "doors"
        spans = (IdRange(5, 6),)

        def ids(self, action: Any) -> list[int]:
            return [5 + bool(action)]

    frame = FrameLayout.from_grid((1, 1), frame_start_tokens=1)
    Doors().check(grammar_of(frame, FrameIds(frame_start=(IdRange(0, 9),))))
    with pytest.raises(ValueError, match="doors makes 1 ids for each frame"):
        Doors().check(grammar_of(frame, FrameIds(frame_start=(5,))))


def test_codings_are_listed_by_name() -> None:
    assert actions.names() == ["mineworld", "play", "rt1"]
    assert [actions.find(name).name for name in actions.names()] == actions.names()
