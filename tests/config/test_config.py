"""What an operator writes, what a request may change, and what each is told when it is wrong."""

import json
import math
from typing import Any

import pytest
import yaml

from tests.strategies import POLICY_NAMES
from vllm_packcache.config.errors import ConfigError
from vllm_packcache.config.server import POLICY_KEY, POSITION_LIMIT_KEY, LayoutConfig, ServerConfig
from vllm_packcache.config.sources import CONFIG_KEY, load_mapping, presets
from vllm_packcache.core.layout import FrameLayout, VideoLayout
from vllm_packcache.core.policies import AttentionSink, Full, PackCache, SlidingWindow
from vllm_packcache.core.positions import Positions
from vllm_packcache.families import DECODER, LUMOS, lumos
from vllm_packcache.families.lumos import CanvasRequest, MaskedOptions

PACKCACHE_OPTIONS = "history_frames, window, decay, gamma_text, gamma_condition, selection, changed_tokens, episodes"
LAYOUT_OPTIONS = (
    "grid, tokens_per_frame, frame_start_tokens, row_end_tokens, frame_end_tokens, condition_image_tokens, axis_scale, "
    "visual_ids, frame_start_ids, row_end_ids, last_row_end_ids, frame_end_ids, digit_ids, actions, action_ranges"
)
GRID = {"grid": [16, 16], "frame_start_tokens": 1}
SCALED = {**GRID, "axis_scale": [4, 8, 8]}


def refusal(call) -> str:
    with pytest.raises(ConfigError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("policy", "source", "message"),
    [
        (3, None, "kv_cache_policy must be the name of a policy, not 3"),
        (
            "nope",
            None,
            "kv_cache_policy: unknown policy 'nope': choose one of attention_sink, full, packcache, reset, "
            "sliding_window",
        ),
        (
            "packcache",
            {"windoww": 4},
            "kv_cache_policy_config: windoww is no option of policy 'packcache': its options are "
            f"{PACKCACHE_OPTIONS}, layout, positions, sessions, videos, guidance, passes",
        ),
        (
            "sliding_window",
            {"decay": 1},
            "kv_cache_policy_config: decay is no option of policy 'sliding_window': its options are window, layout, "
            "positions, sessions, videos, guidance, passes",
        ),
        (
            "full",
            {"window": 4},
            "kv_cache_policy_config: window is no option of policy 'full': its options are layout, positions, "
            "sessions, videos, guidance, passes",
        ),
        (
            "packcache",
            {"window": 0},
            "kv_cache_policy_config: window must be 1 or more and at most 256, not 0",
        ),
        (
            "packcache",
            {"window": 10**30},
            f"kv_cache_policy_config: window must be 1 or more and at most 256, not {10**30}",
        ),
        (
            "packcache",
            {"window": "4"},
            "kv_cache_policy_config: window: input should be a valid integer, not '4'",
        ),
        (
            "packcache",
            {"window": True},
            "kv_cache_policy_config: window: input should be a valid integer, not True",
        ),
        (
            "packcache",
            {"window": 4.0},
            "kv_cache_policy_config: window: input should be a valid integer, not 4.0",
        ),
        (
            "packcache",
            {"decay": math.nan},
            "kv_cache_policy_config: decay must be above 0 and at most 1, not nan",
        ),
        (
            "packcache",
            {"history_frames": math.inf},
            "kv_cache_policy_config: history_frames must be above 0 and at most 1048576, not inf",
        ),
        (
            "packcache",
            {"gamma_text": 2},
            "kv_cache_policy_config: gamma_text must be 0 or more and at most 1, not 2.0",
        ),
        (
            "sliding_window",
            {"window": 0},
            "kv_cache_policy_config: window must be 1 or more and at most 1048576, not 0",
        ),
        (
            "attention_sink",
            {"sink_tokens": -1},
            "kv_cache_policy_config: sink_tokens must be 0 or more and at most 1099511627776, not -1",
        ),
        (
            "attention_sink",
            {"recent_tokens": 0},
            "kv_cache_policy_config: recent_tokens must be 1 or more and at most 1099511627776, not 0",
        ),
        (
            "packcache",
            {"layout": {"grid": [4, 4], "tokens_per_frame": 7}},
            "kv_cache_policy_config: layout: tokens_per_frame is 7, but the grid of 4 x 4 with its extra "
            "tokens makes 16: give one of the two, or make them agree",
        ),
        (
            "packcache",
            {"layout": {"gridd": 3}},
            f"kv_cache_policy_config: layout.gridd is no known option: known are {LAYOUT_OPTIONS}",
        ),
        (
            "packcache",
            {"layout": {"grid": [4]}},
            "kv_cache_policy_config: layout.grid: item 2: Field required, not [4]",
        ),
        (
            "packcache",
            {"layout": {"grid": [4, "4"]}},
            "kv_cache_policy_config: layout.grid: item 2: Input should be a valid integer, not '4'",
        ),
        (
            "packcache",
            {"layout": {"grid": [0, 4]}},
            "kv_cache_policy_config: layout: grid must have at least one row and one column, not 0 x 4",
        ),
        (
            "packcache",
            {"layout": {"tokens_per_frame": 8, "condition_image_tokens": -1}},
            "kv_cache_policy_config: layout.condition_image_tokens: input should be greater than or equal to 0, not -1",
        ),
        (
            "packcache",
            {"layout": {}},
            "kv_cache_policy_config: layout: layout needs grid or tokens_per_frame",
        ),
        (
            "packcache",
            {"layout": [3]},
            "kv_cache_policy_config: layout must be a mapping or a preset's name, not [3]",
        ),
        (
            "packcache",
            {"layout": {(1, 2): 3}},
            f"kv_cache_policy_config: layout.(1, 2) is no known option: known are {LAYOUT_OPTIONS}",
        ),
        (
            "packcache",
            {"layout": {"tokens_per_frame": 8, "axis_scale": [4, 8, 8]}},
            "kv_cache_policy_config: layout: grid is needed: this model's positions follow rows and columns, which "
            "axis_scale scales",
        ),
        (
            "packcache",
            {"layout": {**SCALED, "condition_image_tokens": 256}},
            "kv_cache_policy_config: layout: condition_image_tokens is 256, which is no whole number of frames of "
            "257 tokens: with axis_scale a conditioning image has a frame's shape",
        ),
        (
            "packcache",
            {"layout": {**GRID, "axis_scale": [4, 8]}},
            "kv_cache_policy_config: layout.axis_scale: item 3: Field required, not [4, 8]",
        ),
        (
            "packcache",
            {"layout": {**GRID, "axis_scale": [4, 8, 8, 8]}},
            "kv_cache_policy_config: layout.axis_scale: tuple should have at most 3 items after validation, not 4, "
            "not [4, 8, 8, 8]",
        ),
        (
            "packcache",
            {"layout": {**GRID, "axis_scale": 4}},
            "kv_cache_policy_config: layout.axis_scale: input should be a valid array, not 4",
        ),
        (
            "packcache",
            {"layout": {**GRID, "axis_scale": [4, 0, 8]}},
            "kv_cache_policy_config: layout.axis_scale: item 2: Input should be greater than or equal to 1, not 0",
        ),
        (
            "packcache",
            {"layout": {**GRID, "axis_scale": [4, 8, 1.5]}},
            "kv_cache_policy_config: layout.axis_scale: item 3: Input should be a valid integer, not 1.5",
        ),
        (
            "packcache",
            {"positions": "relative"},
            "kv_cache_policy_config: positions must be rebase or absolute, not 'relative'",
        ),
        (
            "sliding_window",
            {"positions": True},
            "kv_cache_policy_config: positions must be rebase or absolute, not True",
        ),
        (
            "packcache",
            {"positions": ["rebase"]},
            "kv_cache_policy_config: positions must be rebase or absolute, not ['rebase']",
        ),
        *(
            (
                policy,
                {"positions": "rebase"},
                "kv_cache_policy_config: positions: rebase needs a policy that keeps a window of frames, and "
                f"{policy} does not: use packcache or sliding_window, or positions: absolute",
            )
            for policy in ("attention_sink", "full")
        ),
        (
            "packcache",
            "{",
            "kv_cache_policy_config is not valid JSON: Expecting property name enclosed in double quotes: "
            "line 1 column 2 (char 1)",
        ),
        (
            "packcache",
            4,
            "kv_cache_policy_config must be a mapping, JSON text, a file or a preset, not 4",
        ),
    ],
)
def test_a_wrong_configuration_is_refused_in_one_sentence(policy, source, message):
    assert refusal(lambda: ServerConfig.parse(policy, source)) == message


@pytest.mark.parametrize("name", ["no_such_preset", "~no_such_user/x.yaml", "a\0b", "a\nb", "[1, 2]", "/dev/zero"])
def test_a_name_that_is_no_file_and_no_preset_is_refused(name):
    assert refusal(lambda: ServerConfig.parse("packcache", name)) == (
        f"kv_cache_policy_config: {name!r} is neither a file nor a preset: presets are {', '.join(presets())}"
    )


def test_a_json_number_too_long_for_python_is_refused():
    message = refusal(lambda: ServerConfig.parse("packcache", '{"window": ' + "1" * 5000 + "}"))

    assert message.startswith("kv_cache_policy_config is not valid JSON: ")


def test_a_budget_that_leaves_a_frame_nothing_is_refused_when_the_frame_is_known():
    options = {"history_frames": 0.01, "window": 4, "selection": "spatial"}
    ServerConfig.parse("packcache", options)

    message = refusal(lambda: ServerConfig.parse("packcache", {**options, "layout": GRID}))

    assert message.startswith("kv_cache_policy_config: history_frames = 0.01 leaves ")
    assert message.endswith("of window = 4 frames: raise history_frames or lower window")


@pytest.mark.parametrize(
    ("policy", "options", "parsed"),
    [
        ("packcache", {}, PackCache()),
        ("packcache", {"window": 3, "history_frames": 1}, PackCache(window=3, history_frames=1.0)),
        ("packcache", {"decay": 1}, PackCache(decay=1.0)),
        ("sliding_window", {"window": 300}, SlidingWindow(window=300)),
        ("attention_sink", {"sink_tokens": 0}, AttentionSink(sink_tokens=0)),
        ("full", {}, Full()),
    ],
)
def test_good_options_are_taken(policy, options, parsed):
    positions = "rebase" if policy == "packcache" else "absolute"
    assert ServerConfig.parse(policy, options) == ServerConfig(parsed, None, positions, name=policy)
    assert ServerConfig.parse(policy, {**options, "layout": GRID}).layout == LayoutConfig(
        grid=(16, 16), frame_start_tokens=1
    )


@pytest.mark.parametrize(
    ("policy", "given", "positions"),
    [
        ("packcache", None, "rebase"),
        ("packcache", "rebase", "rebase"),
        ("packcache", "absolute", "absolute"),
        ("sliding_window", None, "absolute"),
        ("sliding_window", "rebase", "rebase"),
        ("sliding_window", "absolute", "absolute"),
        ("attention_sink", None, "absolute"),
        ("attention_sink", "absolute", "absolute"),
        ("full", None, "absolute"),
        ("full", "absolute", "absolute"),
    ],
)
def test_positions_are_rebased_where_the_policy_or_the_operator_says(policy, given, positions):
    config = ServerConfig.parse(policy, {"positions": given, "layout": GRID})

    assert config.positions == positions
    assert config.as_mapping()["positions"] == positions
    # A YAML file may leave the value empty; not naming it means the same.
    if given is None:
        assert config == ServerConfig.parse(policy, {"layout": GRID})


def test_mapping_json_text_yaml_file_json_file_and_preset_mean_the_same(tmp_path, monkeypatch):
    options = {"layout": GRID, "history_frames": 3, "window": 5, "decay": 0.4}
    as_json, as_yaml = tmp_path / "mine.json", tmp_path / "mine.yaml"
    as_json.write_text(json.dumps(options))
    as_yaml.write_text(yaml.safe_dump(options))
    monkeypatch.setattr("vllm_packcache.config.sources.presets", lambda: {"mine": as_yaml})

    expected = ServerConfig.parse("packcache", options)

    assert expected.policy == PackCache(history_frames=3.0, window=5, decay=0.4)
    for source in (json.dumps(options), f"  {json.dumps(options)}", str(as_json), str(as_yaml), "mine"):
        assert ServerConfig.parse("packcache", source) == expected
    assert ServerConfig.parse("packcache", {**options, "layout": "mine"}) == expected


@pytest.mark.parametrize("positions", ["rebase", "absolute"])
@pytest.mark.parametrize("layout", [None, GRID, SCALED, {"tokens_per_frame": 8}])
def test_a_written_out_configuration_reads_back(layout, positions):
    config = ServerConfig.parse("packcache", {"layout": layout, "window": 3, "positions": positions})

    mapping = config.as_mapping()

    assert ServerConfig.parse("packcache", json.dumps(mapping)) == config
    assert mapping["decay"] == 0.5
    assert mapping["positions"] == positions
    # What is not given is left out: null is no number of tokens.
    given = {**dict.fromkeys(("row_end_tokens", "frame_end_tokens", "condition_image_tokens"), 0)}
    expected = None if layout is None else {"frame_start_tokens": 0, **given, **layout}
    assert mapping.get("layout") == expected


@pytest.mark.parametrize("name", presets())
@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_another_policy_takes_a_presets_layout_alone(name, policy):
    taken = ServerConfig.parse(policy, name)

    assert taken == ServerConfig.parse(policy, load_mapping(name))
    # What an operator can write instead.
    others = {part: load_mapping(name).get(part) for part in ("sessions", "guidance", "passes")}
    alone = ServerConfig.parse(policy, {"layout": name, **others})
    assert taken.layout is not None
    assert taken.layout == alone.layout
    if policy != load_mapping(name)["policy"]:
        assert taken == alone


def test_whose_options_a_configuration_holds():
    options = {"layout": GRID, "window": 3, "positions": "rebase"}

    assert ServerConfig.parse("packcache", {**options, "policy": "packcache"}) == ServerConfig.parse(
        "packcache", options
    )
    # Not the window, which the policy has too, and not the positions.
    assert ServerConfig.parse("sliding_window", {**options, "policy": "packcache"}) == ServerConfig(
        SlidingWindow(), LayoutConfig(grid=(16, 16), frame_start_tokens=1), "absolute", name="sliding_window"
    )
    assert ServerConfig.parse("full", {"policy": "packcache", "window": 3}) == ServerConfig(Full())


@pytest.mark.parametrize(
    ("owner", "shown"), [("packcash", "'packcash'"), (3, "3"), (["packcache"], "['packcache']"), ({}, "{}")]
)
@pytest.mark.parametrize("policy", ["packcache", "full"])
def test_an_owner_of_options_that_nobody_knows_is_refused(policy, owner, shown):
    assert refusal(lambda: ServerConfig.parse(policy, {"policy": owner, "window": 3})) == (
        "kv_cache_policy_config: policy must be the policy whose options these are, one of attention_sink, full, "
        f"packcache, reset, sliding_window, not {shown}"
    )


@pytest.mark.parametrize(
    ("policy", "options", "end"),
    [
        (
            "sliding_window",
            {"decay": 0.5, "layout": GRID},
            "decay is no option of policy 'sliding_window': its options are window, layout, positions, sessions, "
            "videos, guidance, passes; to take the layout alone, say policy: packcache beside it, or leave decay out",
        ),
        (
            "full",
            {"sink_tokens": 4, "layout": "demo"},
            "sink_tokens is no option of policy 'full': its options are layout, positions, sessions, videos, "
            "guidance, passes; to take the layout alone, say policy: attention_sink beside it, or leave sink_tokens "
            "out",
        ),
        (
            "full",
            {"decai": 0.5, "layout": GRID},
            "decai is no option of policy 'full': its options are layout, positions, sessions, videos, guidance, "
            "passes",
        ),
    ],
)
def test_options_of_another_policy_are_refused_with_the_way_to_their_layout(policy, options, end):
    assert refusal(lambda: ServerConfig.parse(policy, options)) == f"kv_cache_policy_config: {end}"


@pytest.mark.parametrize("additional_config", [None, {}, {"other": 1}, 3, {"kv_cache_policy": None}])
def test_not_switched_on(additional_config):
    assert ServerConfig.from_additional_config(additional_config) is None


def test_switched_on():
    config = ServerConfig.from_additional_config(
        {"kv_cache_policy": "sliding_window", "kv_cache_policy_config": {"window": 3}}
    )

    assert config == ServerConfig(SlidingWindow(window=3), name="sliding_window")


def test_the_position_limit_comes_with_the_additional_config():
    def limit(additional_config: dict) -> int | None:
        return ServerConfig.from_additional_config({POLICY_KEY: "packcache", **additional_config}).position_limit

    assert limit({POSITION_LIMIT_KEY: 4096}) == 4096
    assert limit({POSITION_LIMIT_KEY: 4096, CONFIG_KEY: {"window": 3}}) == 4096
    assert limit({}) is None
    assert ServerConfig.from_additional_config({POSITION_LIMIT_KEY: 4096}) is None
    assert ServerConfig.parse("full", None, 77).position_limit == 77


def test_options_without_a_policy_are_refused():
    message = refusal(lambda: ServerConfig.from_additional_config({"kv_cache_policy_config": {"window": 3}}))

    assert message == "kv_cache_policy_config is given without kv_cache_policy: name a policy too"


@pytest.fixture
def server():
    return ServerConfig.parse("packcache", {"layout": GRID, "window": 3})


@pytest.fixture
def server_without_layout():
    return ServerConfig.parse("packcache")


@pytest.mark.parametrize("extra_args", [None, {}, {"temperature": 1}, {"kv_transfer_params": {}}])
def test_a_request_without_our_options_keeps_its_whole_cache(server, extra_args):
    assert server.plan(extra_args, 300) is None


@pytest.mark.parametrize(
    "extra_args",
    [
        {"packcache_policy": "packcache"},
        {"packcache_condition_tokens": 300},
        {"packcache_grid": [16, 16]},
        {"packcache_window": 3},
        {"packcache_tokens_per_frame": None},
        {"packcache_policy": "packcache", "other": object()},
    ],
)
def test_any_option_of_ours_makes_a_video_request_with_the_servers_defaults(server, extra_args):
    plan = server.plan(extra_args, 300)

    assert plan.policy == PackCache(window=3)
    assert plan.layout == VideoLayout(FrameLayout(257, (16, 16), frame_start_tokens=1), 300)


def test_a_request_overrides_policy_options_and_layout(server):
    plan = server.plan(
        {
            "packcache_window": 2,
            "packcache_history_frames": 1,
            "packcache_grid": [8, 4],
            "packcache_condition_tokens": 200,
            "packcache_condition_image_tokens": 120,
        },
        300,
    )

    assert plan.policy == PackCache(window=2, history_frames=1.0)
    assert plan.layout == VideoLayout(FrameLayout(33, (8, 4), frame_start_tokens=1), 200, 120)
    assert server.policy == PackCache(window=3)


def test_tokens_per_frame_of_a_request_replaces_the_grid_of_the_server(server):
    plan = server.plan({"packcache_tokens_per_frame": 100}, 300)

    assert plan.layout == VideoLayout(FrameLayout(100), 300)


def test_the_servers_image_tokens_hold_where_they_fit():
    server = ServerConfig.parse("packcache", {"layout": {**GRID, "condition_image_tokens": 257}})

    assert server.plan({"packcache_window": 4}, 300).layout.condition_image_tokens == 257
    assert server.plan({"packcache_window": 4}, 40).layout.condition_image_tokens == 0


@pytest.mark.parametrize(
    "extra_args", [{"packcache_policy": "full"}, {"packcache_policy": "full", "packcache_grid": [8, 8]}]
)
def test_a_request_opts_out(server, server_without_layout, extra_args):
    assert server.plan(extra_args, 300) is None
    assert server_without_layout.plan(extra_args, 300) is None


@pytest.mark.parametrize(
    ("policy", "options", "extra_args", "window"),
    [
        ("packcache", {"window": 3}, {}, 3),
        ("packcache", {"window": 3}, {"packcache_window": 5}, 5),
        ("packcache", {"window": 3, "positions": "absolute"}, {"packcache_window": 5}, None),
        ("sliding_window", {"window": 3}, {}, None),
        ("sliding_window", {"window": 3, "positions": "rebase"}, {}, 3),
        ("sliding_window", {"window": 3, "positions": "rebase"}, {"packcache_window": 1}, 1),
        ("attention_sink", {}, {}, None),
    ],
)
@pytest.mark.parametrize("scale", [None, (4, 8, 8)])
def test_positions_of_a_plan_follow_its_layout_and_its_window(policy, options, extra_args, window, scale):
    server = ServerConfig.parse(policy, {**options, "layout": {**GRID, "axis_scale": scale and [*scale]}})

    plan = server.plan({"packcache_condition_tokens": 200, **extra_args}, 300)

    assert plan.positions == Positions(VideoLayout(FrameLayout(257, (16, 16), 1), 200), window, scale)
    assert plan.positions.layout is plan.layout


@pytest.mark.parametrize("policy", ["packcache", "full"])
def test_with_three_axes_a_request_that_keeps_everything_still_has_positions(policy):
    server = ServerConfig.parse(policy, {"layout": SCALED})

    plan = server.plan({"packcache_policy": "full", "packcache_grid": [8, 4]}, 300)

    assert plan.policy == Full()
    assert plan.layout == VideoLayout(FrameLayout(33, (8, 4), 1), 300)
    assert plan.positions == Positions(plan.layout, None, (4, 8, 8))
    assert server.plan({"temperature": 1}, 300) is None


def test_with_three_axes_a_request_may_give_another_grid_and_its_images():
    server = ServerConfig.parse("packcache", {"layout": {**SCALED, "condition_image_tokens": 257}})

    same = server.plan({"packcache_window": 4}, 300)
    other = server.plan({"packcache_grid": [8, 4], "packcache_condition_image_tokens": 66}, 300)
    text = server.plan({"packcache_window": 4}, 40)

    assert same.positions.layout.condition_image_tokens == 257
    assert other.positions.layout == VideoLayout(FrameLayout(33, (8, 4), 1), 300, 66)
    assert text.positions.layout.condition_image_tokens == 0


@pytest.mark.parametrize(
    ("extra_args", "message"),
    [
        (
            {"packcache_tokens_per_frame": 257},
            "packcache_grid is needed: this model's positions follow rows and columns, which axis_scale scales",
        ),
        (
            {"packcache_condition_image_tokens": 256},
            "packcache_condition_image_tokens is 256, which is no whole number of frames of 257 tokens: with "
            "axis_scale a conditioning image has a frame's shape",
        ),
        (
            {"packcache_policy": "full", "packcache_tokens_per_frame": 257},
            "packcache_grid is needed: this model's positions follow rows and columns, which axis_scale scales",
        ),
    ],
)
def test_with_three_axes_a_request_without_their_places_is_refused(extra_args, message):
    server = ServerConfig.parse("packcache", {"layout": SCALED})

    assert refusal(lambda: server.plan(extra_args, 300)) == message


def test_a_request_cannot_change_how_tokens_are_positioned(server):
    for option in ("positions", "axis_scale"):
        message = refusal(lambda option=option: server.plan({f"packcache_{option}": "absolute"}, 300))
        assert message == f"packcache_{option} is no known option: known are {REQUEST_OPTIONS}"


def test_a_request_builds_no_validator_of_its_own(server, monkeypatch):
    """Three processes plan every request, and a validator takes longer than all the rest."""
    options = {"packcache_window": 3, "packcache_grid": [4, 6]}
    expected = server.plan(options, 100)
    monkeypatch.setattr("vllm_packcache.config.server.TypeAdapter", None)
    assert server.plan(options, 100).policy == expected.policy


def test_on_a_server_that_keeps_everything_a_request_needs_no_plan():
    server = ServerConfig.parse("full", {"layout": GRID})

    assert server.plan({"packcache_grid": [8, 8]}, 300) is None


REQUEST_OPTIONS = ", ".join(
    f"packcache_{name}"
    for name in (
        "policy",
        "grid",
        "tokens_per_frame",
        "condition_tokens",
        "condition_image_tokens",
        "frames",
        "given_ids",
        "guidance",
        "negative_prompt_ids",
        "session_tokens",
        "forget_frames",
        "forget_from",
        "changed_tokens",
        "decay",
        "episodes",
        "gamma_condition",
        "gamma_text",
        "history_frames",
        "selection",
        "window",
    )
)


@pytest.mark.parametrize(
    ("extra_args", "message"),
    [
        ({"packcache_foo": 1}, f"packcache_foo is no known option: known are {REQUEST_OPTIONS}"),
        ({"packcache_grid": [8]}, "packcache_grid: item 2: Field required, not [8]"),
        (
            {"packcache_grid": [0, 8]},
            "packcache_grid must have at least one row and one column, not 0 x 8",
        ),
        (
            {"packcache_policy": "sliding_window"},
            "packcache_policy must be 'packcache', the policy of this server, or 'full', not 'sliding_window'",
        ),
        ({"packcache_window": 0}, "packcache_window must be 1 or more and at most 256, not 0"),
        ({"packcache_window": 257}, "packcache_window must be 1 or more and at most 256, not 257"),
        ({"packcache_window": "a"}, "packcache_window: input should be a valid integer, not 'a'"),
        ({"packcache_window": [4]}, "packcache_window: input should be a valid integer, not [4]"),
        (
            {"packcache_history_frames": "2"},
            "packcache_history_frames: input should be a valid number, not '2'",
        ),
        ({"packcache_history_frames": -1}, "packcache_history_frames must be above 0 and at most 1048576, not -1.0"),
        (
            {"packcache_history_frames": 10**400},
            "packcache_history_frames must be above 0 and at most 1048576, not inf",
        ),
        (
            {"packcache_history_frames": 0.9},
            "packcache_history_frames of selection = changed must be 1 or more, not 0.9",
        ),
        (
            {"packcache_selection": "spatial", "packcache_changed_tokens": 2},
            "packcache_changed_tokens is for selection = changed, not for spatial, where it must be 1, not 2",
        ),
        (
            {"packcache_selection": "spatial", "packcache_episodes": 1},
            "packcache_episodes is for selection = changed, not for spatial, where it must be 0, not 1",
        ),
        (
            {"packcache_selection": "changed", "packcache_episodes": 1, "packcache_history_frames": 1},
            "packcache_history_frames of episodes must be above 1, not 1.0",
        ),
        (
            {"packcache_selection": "changed", "packcache_changed_tokens": 0},
            "packcache_changed_tokens must be 1 or more and at most 1048576, not 0",
        ),
        (
            {"packcache_selection": "changes"},
            "packcache_selection: input should be 'spatial', 'rows', 'tail', 'random' or 'changed', not 'changes'",
        ),
        ({"packcache_tokens_per_frame": 0}, "packcache_tokens_per_frame must be 1 or more, not 0"),
        (
            {"packcache_tokens_per_frame": 1.5},
            "packcache_tokens_per_frame: input should be a valid integer, not 1.5",
        ),
        (
            {"packcache_tokens_per_frame": 10**400},
            f"packcache_tokens_per_frame must be at most 1048576, not {10**400}",
        ),
        (
            {"packcache_condition_tokens": 301},
            "packcache_condition_tokens is 301, but the prompt has 300 tokens: the condition is the part of "
            "the prompt before the first frame",
        ),
        (
            {"packcache_condition_tokens": -1},
            "packcache_condition_tokens: input should be greater than or equal to 0, not -1",
        ),
        (
            {"packcache_condition_image_tokens": 301},
            "packcache_condition_image_tokens must lie between 0 and condition_tokens (300), not 301",
        ),
    ],
)
def test_a_wrong_request_is_refused_in_one_sentence(server, extra_args, message):
    assert refusal(lambda: server.plan(extra_args, 300)) == message


def test_a_request_cannot_choose_by_changes_under_another_policy():
    server = ServerConfig.parse("sliding_window", {"layout": {"grid": [16, 16]}})

    message = refusal(lambda: server.plan({"packcache_selection": "changed"}, 300))

    assert message.startswith("packcache_selection is no known option: known are ")


@pytest.mark.parametrize("own", ["spatial", "changed"])
def test_a_request_may_choose_by_changes_whatever_the_server_does(own):
    server = ServerConfig.parse("packcache", {"layout": GRID, "window": 4, "selection": own})
    policy = server.plan({"packcache_selection": "changed", "packcache_changed_tokens": 3}, 300).policy

    assert policy.reads_tokens
    assert server.plan({"packcache_window": 3}, 300).policy.reads_tokens is (own == "changed")
    assert not server.plan({"packcache_selection": "spatial"}, 300).policy.reads_tokens


def test_a_request_must_give_the_frame_where_the_server_has_none(server_without_layout):
    assert server_without_layout.plan({"packcache_grid": [4, 4]}, 300).layout.tokens_per_frame == 16

    assert refusal(lambda: server_without_layout.plan({"packcache_window": 4}, 300)) == (
        "packcache_grid or packcache_tokens_per_frame is needed: this server was started without a layout"
    )


def test_a_budget_too_small_for_the_requests_frame_is_refused(server):
    options = {"packcache_tokens_per_frame": 1, "packcache_window": 8, "packcache_selection": "spatial"}
    message = refusal(lambda: server.plan(options, 300))

    assert message.startswith("packcache: history_frames = 2 leaves ")


# --------------------------------------------------------------------------- ids of frames

ACTIONS = {"grid": [2, 3], "visual_ids": [0, 7], "frame_end_tokens": 2, "frame_end_ids": [8, [10, 12]]}


@pytest.mark.parametrize(("place", "before"), [("frame_start", 0), ("frame_end", 1230)])
def test_numbers_of_a_frame_have_as_many_tokens_as_digits(place, before):
    header = {f"{place}_ids": [90, "rows", 91, "columns"], "digit_ids": [*range(50, 60)], "grid": [3, 12]}
    server = ServerConfig.parse("packcache", {"layout": header})
    for grid, tokens in ((None, 5 + 36), ([10, 123], 7 + 1230)):
        made = server.video({"packcache_frames": 1, **({"packcache_grid": grid} if grid else {})}, 300)
        assert made.streams[0].plan.layout.tokens_per_frame == tokens
        shape = made.grammar.frame.frame
        assert getattr(shape, f"{place}_tokens") == tokens - (36 if grid is None else 1230)
        assert shape.frame_start_tokens + shape.frame_end_tokens == getattr(shape, f"{place}_tokens")
    ids = [made.grammar.allowed(300 + before + offset).first for offset in range(7)]
    assert ids == [90, 51, 50, 91, 51, 52, 53]
    assert ServerConfig.parse("packcache", {"layout": {**header, f"{place}_tokens": 5}}).layout.has_ids


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ({"visual_ids": [7, 0]}, "layout: visual_ids must be the first and the last id of a range, not [7, 0]"),
        ({"visual_ids": [0, 2**31]}, "layout.visual_ids: item 2: Input should be less than or equal to 2147483647"),
        ({"row_end_ids": [1]}, "layout: row_end_ids must be of 0 tokens, as many as row_end_tokens, not of 1"),
        (
            {"last_row_end_ids": [1]},
            "layout: last_row_end_ids must be of 0 tokens, as many as row_end_tokens, not of 1",
        ),
        ({"frame_end_ids": [8]}, "layout: frame_end_ids must be of 2 tokens, as many as frame_end_tokens, not of 1"),
        ({"frame_start_ids": ["rows"]}, "layout: frame_start_ids: rows needs grid and digit_ids"),
        ({"frame_end_ids": [8, "columns"]}, "layout: frame_end_ids: columns needs grid and digit_ids"),
        ({"frame_end_ids": [8, [3, 2]]}, "frame_end_ids must be the first and the last id of a range, not [3, 2]"),
        ({"digit_ids": [1, 2]}, "layout.digit_ids: tuple should have at least 10 items after validation, not 2"),
        (
            {"frame_start_ids": ["rows"], "digit_ids": [*range(50, 60)], "frame_start_tokens": 2},
            "layout: frame_start_tokens must be 1 where rows and columns have so many digits, not 2: leave it out",
        ),
        (
            {"frame_end_ids": ["rows", "columns", 8], "digit_ids": [*range(50, 60)]},
            "layout: frame_end_tokens must be 3 where rows and columns have so many digits, not 2: leave it out",
        ),
        ({"grid": None, "tokens_per_frame": 8}, "layout: ids of a frame need grid, not tokens_per_frame alone"),
    ],
)
def test_ids_that_cannot_be_are_refused_in_one_sentence(layout, words):
    given = {key: value for key, value in {**ACTIONS, **layout}.items() if value is not None}
    message = refusal(lambda: ServerConfig.parse("packcache", {"layout": given}))
    assert message.startswith("kv_cache_policy_config: ")
    assert words in message


def test_a_masked_models_frames_have_ids_that_are_known():
    layout = {**load_mapping("lumos1_256p")["layout"], "visual_ids": [0, 7]}
    message = refusal(lambda: ServerConfig.parse("packcache", {"layout": layout}, family=LUMOS))
    assert message == "kv_cache_policy_config: layout: ids of frames are known of Lumos-1: leave them out"


def test_what_a_client_gives_belongs_to_a_request_of_such_frames():
    server = ServerConfig.parse("packcache", {"layout": ACTIONS})
    made = server.video({"packcache_given_ids": [11, 12]}, 20)
    assert made.grammar.given == ((11,), (12,))
    assert [made.grammar.allowed(27 + 8 * frame) for frame in range(3)] == [(11, 11), (12, 12), (10, 12)]
    message = refusal(lambda: server.video({"packcache_given_ids": [11, 13]}, 20))
    assert message == "packcache_given_ids, frame 2: it must have ids from 10 to 12 as number 1, not 13"
    plain = ServerConfig.parse("packcache", {"layout": GRID})
    message = refusal(lambda: plain.video({"packcache_given_ids": [1]}, 300))
    assert message.startswith("packcache_given_ids is given, and frames of this server have no ids that a client gives")
    assert plain.video({"packcache_frames": 1}, 300).grammar is None


GUIDED = {"packcache_guidance": 3, "packcache_negative_prompt_ids": [5, 6, 7]}


def test_a_guided_video_has_a_second_stream_with_a_condition_of_its_own():
    config = {"layout": {**GRID, "condition_image_tokens": 257}, "guidance": True, "window": 3}
    server = ServerConfig.parse("packcache", config)
    assert ServerConfig.parse("packcache", server.as_mapping()) == server
    assert (server.streams, ServerConfig.parse("packcache").streams) == (2, 1)
    made = server.request(GUIDED, 300)
    first, second = made.streams
    assert made.guidance == 3
    assert not made.as_stock
    assert (first.start, second.start, second.condition) == (0, 297, (5, 6, 7))
    assert second.plan.layout == VideoLayout(first.plan.layout.frame, 3, 0), "no image: there is no room for one"
    assert (second.plan.policy, second.plan.positions.window) == (first.plan.policy, 3)
    longer = server.request({**GUIDED, "packcache_negative_prompt_ids": [1] * 320}, 300).streams[1]
    assert (longer.start, longer.plan.layout.condition_image_tokens) == (-20, 257)


def test_guidance_of_one_is_none():
    """On any server, with a negative prompt and without."""
    for guidance in (True, False):
        server = ServerConfig.parse("packcache", {"layout": GRID, "guidance": guidance})
        for options in ({**GUIDED, "packcache_guidance": 1}, {"packcache_guidance": 1.0}):
            made = server.request(options, 300)
            assert (made.guidance, made.streams) == (1, server.request({"packcache_grid": [16, 16]}, 300).streams)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (
            {"guidance": False},
            GUIDED,
            "packcache_guidance is 3, and this server has no room for a second stream: start it on vLLM's Model Runner "
            "V2 with guidance: true in kv_cache_policy_config, or leave packcache_guidance out",
        ),
        (
            {},
            {"packcache_guidance": 3},
            "packcache_negative_prompt_ids is needed: it stands in place of the condition in the stream that "
            "packcache_guidance leads away from",
        ),
        (
            {},
            {"packcache_negative_prompt_ids": [1]},
            "packcache_negative_prompt_ids is for guided videos: give packcache_guidance too",
        ),
        ({}, {**GUIDED, "packcache_guidance": 0}, "packcache_guidance: input should be greater than 0, not 0"),
        (
            {},
            {**GUIDED, "packcache_negative_prompt_ids": []},
            "packcache_negative_prompt_ids: tuple should have at least 1 item after validation, not 0, not []",
        ),
        (
            {},
            {**GUIDED, "packcache_condition_tokens": 0},
            "packcache_guidance needs a condition, and this video has none: raise packcache_condition_tokens",
        ),
        (
            {"layout": None},
            {**GUIDED, "packcache_policy": "full"},
            "packcache_guidance needs packcache_grid or packcache_tokens_per_frame: this server was started without a "
            "layout",
        ),
    ],
)
def test_a_wrong_guided_request_is_refused_in_one_sentence(config, options, message):
    server = ServerConfig.parse("packcache", {"layout": GRID, "guidance": True, **config})
    assert refusal(lambda: server.request(options, 300)) == message


def test_a_server_says_how_videos_are_guided_that_do_not_say_it():
    negative = [5, "rows", 9, "columns"]
    config = {
        "layout": {**GRID, "digit_ids": list(range(20, 30))},
        "guidance": {"scale": 3, "negative_prompt_ids": negative},
    }
    server = ServerConfig.parse("packcache", config)
    assert ServerConfig.parse("packcache", server.as_mapping()) == server
    made = server.request({"packcache_frames": 1}, 300)
    assert (made.guidance, made.streams[1].condition) == (3, (5, 21, 26, 9, 21, 26))
    assert server.request({"packcache_frames": 1, "packcache_grid": [8, 9]}, 300).streams[1].condition == (5, 28, 9, 29)
    own = server.request({"packcache_guidance": 2, "packcache_negative_prompt_ids": [7]}, 300)
    assert (own.guidance, own.streams[1].condition) == (2, (7,))
    # Without a scale of its own it has the server's.
    own = server.request({"packcache_negative_prompt_ids": [7]}, 300)
    assert (own.guidance, own.streams[1].condition) == (3, (7,))
    assert len(server.request({"packcache_guidance": 1}, 300).streams) == 1
    assert server.request({}, 300) is None
    assert server.request({"temperature": 1}, 300) is None


@pytest.mark.parametrize(
    ("guidance", "family", "message"),
    [
        (3, DECODER, "guidance must be true, false or a mapping, not 3"),
        (True, LUMOS, "guidance: Lumos-1 has streams of its own: leave it out"),
        ({"scale": 0}, DECODER, "guidance.scale: input should be greater than 0, not 0"),
        ({"scales": 2}, DECODER, "guidance.scales is no known option: known are scale, negative_prompt_ids"),
        ({"negative_prompt_ids": ["rows"]}, DECODER, "guidance.negative_prompt_ids: rows needs grid and digit_ids"),
    ],
)
def test_a_wrong_guidance_of_a_server_is_refused_in_one_sentence(guidance, family, message):
    config = {"layout": GRID if family is DECODER else {"grid": [8, 8]}, "guidance": guidance}
    said = refusal(lambda: ServerConfig.parse("packcache", config, family=family))
    assert said == f"kv_cache_policy_config: {message}"


PASSES = {"steps": 20, "refresh": 8, "guidance_interval": 2}


def made_in(extra_args: dict[str, Any], passes: dict[str, Any] | None = PASSES) -> MaskedOptions:
    """How a server of such passes makes the frames of a request."""
    server = ServerConfig.parse("packcache", {"layout": {"grid": [3, 4]}, "passes": passes}, family=LUMOS)
    made = server.request(extra_args, lumos.text_prompt([5], 1, 8))
    assert isinstance(made, CanvasRequest)
    return made.options


def test_a_server_says_how_frames_are_made_where_a_request_does_not():
    assert made_in({}) == MaskedOptions(steps=20, refresh=8, guidance_interval=2)
    own = {"packcache_steps": 50, "packcache_refresh": 1, "packcache_share_history": 0, "packcache_seed": 3}
    assert made_in(own) == MaskedOptions(guidance_interval=2, share_history=False, seed=3)
    # Who asks for no guidance does not ask for some of it.
    assert made_in({"packcache_guidance": 1}) == MaskedOptions(steps=20, refresh=8, guidance=1)
    assert made_in({}, {}) == made_in({}, None) == MaskedOptions()
    assert "packcache_guidance_interval" in refusal(
        lambda: made_in({"packcache_guidance": 1, "packcache_guidance_interval": 2})
    )


def test_another_process_is_told_how_frames_are_made():
    server = ServerConfig.parse("packcache", {"layout": {"grid": [3, 4]}, "passes": PASSES}, family=LUMOS)
    assert ServerConfig.parse("packcache", server.as_mapping(), family=LUMOS) == server
    assert server.passes == MaskedOptions(**PASSES)


@pytest.mark.parametrize(
    ("passes", "family", "message"),
    [
        (3, LUMOS, "passes must be a mapping, not 3"),
        ({"steps": 0}, LUMOS, "passes.steps must be 1 or more and at most 1000, not 0"),
        ({"refresh": "8"}, LUMOS, "passes.refresh: input should be a valid integer, not '8'"),
        (
            PASSES,
            DECODER,
            "passes is for models that make a frame in passes, and this one does not: leave it out",
        ),
    ],
)
def test_wrong_passes_of_a_server_are_refused_in_one_sentence(passes, family, message):
    config = {"layout": {"grid": [8, 8]}, "passes": passes}
    assert refusal(lambda: ServerConfig.parse("packcache", config, family=family)) == (
        f"kv_cache_policy_config: {message}"
    )


def test_frames_that_a_servers_negative_prompt_is_not_for_need_one():
    server = ServerConfig.parse("packcache", {"guidance": {"scale": 2, "negative_prompt_ids": ["rows"]}})
    message = refusal(lambda: server.request({"packcache_tokens_per_frame": 30}, 300))
    assert message == (
        "packcache_negative_prompt_ids is needed, for the server's is of no such frames: negative_prompt_ids: rows "
        "needs grid and digit_ids"
    )
