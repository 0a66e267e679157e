"""The presets in configs/: they parse and mean what their comments and the demo say."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest

from vllm_packcache.config.server import ServerConfig
from vllm_packcache.config.sources import load_mapping, presets
from vllm_packcache.core.grammar import IdRange
from vllm_packcache.core.policies import PAPER, PackCache
from vllm_packcache.core.retention import Retention, some_tokens
from vllm_packcache.families import LUMOS
from vllm_packcache.families.lumos import MM_ROPE_SCALE, MaskedOptions
from vllm_packcache.families.schedule import schedule
from vllm_packcache.tools.explain import TEXT_TOKENS

FRAME_TOKENS = {
    "demo": 257,
    "demo_masked": 276,
    "emu3": 8191,
    "emu3_5": 2077,
    "ivideogpt": 17,
    "lumos1_256p": 1828,
    "lumos1_384p": 4084,
    "lumos1_480p": 5824,
    "lumos1_fast": 4084,
    "mineworld_16f": 347,
    "mineworld_32f": 347,
    "play": 64,
    "rt1_multi_step": 93,
    "univla": 1035,
}

POLICIES = {
    "demo": PackCache(),
    "demo_masked": PackCache(),
    # One picture fills the model's positions.
    "emu3": dataclasses.replace(PAPER, window=1, history_frames=1),
    "emu3_5": PAPER,
    # An anchor of each room that is not shown.
    "play": PackCache(history_frames=4, window=8, episodes=2),
}
"""What changed first was measured on the demos' models; the others have the rule of the paper."""

LUMOS1 = ("demo_masked", "lumos1_256p", "lumos1_384p", "lumos1_480p", "lumos1_fast")

GIVEN = (8215, 8235), (8236, 8256), (8206, 8258), (8194, 8258), (8196, 8258), (8199, 8258), (8192, 8258)
MINEWORLD = [*[(0, 8191)] * 336, 8257, *GIVEN, (8198, 8258), (8201, 8258), 8259]
# Written out place by place: an id is fixed, a pair is a range. "1*32*32" and "1*24*30" of single characters.
EMU3_5_ROW = [(151854, 282925)] * 45
FRAMES = {
    "emu3": [*[*[(151854, 184621)] * 90, 151846] * 90, 151847],
    "emu3_5": [151852, 19, 20, 9, 19, 20, 151851, *[*EMU3_5_ROW, 151846] * 44, *EMU3_5_ROW, 151853],
    "ivideogpt": [16385, *[(8192, 16383)] * 16],
    "mineworld_16f": MINEWORLD,
    "mineworld_32f": MINEWORLD,
    "rt1_multi_step": [*[(0, 4374)] * 80, *[(8750, 9005)] * 13],
    "univla": [*[(151854, 184621)] * 1024, 151847, 151853, 151852, 16, 9, 18, 17, 9, 18, 17, 151851],
}
UNIVLA_24_30 = [*[(151854, 184621)] * 720, 151847, 151853, 151852, 16, 9, 17, 19, 9, 18, 15, 151851]
GIVEN_PLACES = {
    "mineworld_16f": range(337, 346),
    "mineworld_32f": range(337, 346),
    "rt1_multi_step": range(80, 93),
}
CODINGS = {"mineworld_16f": "mineworld", "mineworld_32f": "mineworld", "rt1_multi_step": "rt1"}
# Tokens of the longest condition that the comment speaks of, and the positions that frames were trained at.
TRAINED = {
    "emu3_5": (1000, 32768),
    "ivideogpt": (513, 513 + 14 * 17),
    "mineworld_16f": (8 * 347, 16 * 347),
    "mineworld_32f": (8 * 347, 32 * 347),
    "rt1_multi_step": (1280, 1280 + 8 * 93),
    "univla": (900 + 1044, 5120),
}


def test_all_presets_are_known_here() -> None:
    assert set(presets()) == set(FRAME_TOKENS)


@pytest.mark.parametrize(("name", "tokens"), FRAME_TOKENS.items())
def test_tokens_per_frame(name: str, tokens: int) -> None:
    config = ServerConfig.parse("packcache", name)
    # Others that have the demos' rule say that nothing was measured.
    assert isinstance(config.policy, PackCache)
    other = PackCache(window=config.policy.window) if name in FRAMES else PAPER
    assert config.policy == POLICIES.get(name, other)
    assert config.layout is not None
    assert config.layout.frame_layout().tokens_per_frame == tokens
    comment = presets()[name].read_text(encoding="utf-8")
    (documented,) = re.findall(r"^#   frame  .* F = .* = ([\d,]+)$", comment, re.MULTILINE)
    assert int(documented.replace(",", "")) == tokens


@pytest.mark.parametrize("name", FRAME_TOKENS)
def test_every_option_is_spelled_out(name: str) -> None:
    config = ServerConfig.parse("packcache", name)
    assert set(load_mapping(name)) == {"policy", *config.as_mapping()}
    assert load_mapping(name)["policy"] == PackCache.name
    # The digits of a grid say how many tokens a head has.
    counted = {"univla": {"frame_end_tokens"}, "emu3_5": {"frame_start_tokens"}}.get(name, set())
    assert set(load_mapping(name)["layout"]) == set(config.as_mapping()["layout"]) - {"tokens_per_frame"} - counted


@pytest.mark.parametrize("name", FRAME_TOKENS)
def test_positions(name: str) -> None:
    """Time is counted from the window; only Lumos-1 has axes of its own for rows and columns."""
    config = ServerConfig.parse("packcache", name)
    assert load_mapping(name)["positions"] == config.positions == "rebase"
    assert config.layout is not None
    assert config.layout.axis_scale == ((4, 8, 8) if name in LUMOS1 else None)
    plan = config.plan({"packcache_window": 3}, 20_000)
    assert plan is not None
    assert plan.positions.window == 3
    assert plan.positions.scale == config.layout.axis_scale


@pytest.mark.parametrize("name", LUMOS1)
def test_lumos1_conditioning_image_is_a_frame(name: str) -> None:
    layout = ServerConfig.parse("packcache", name).layout
    assert layout is not None
    assert layout.condition_image_tokens == FRAME_TOKENS[name]


def test_the_fast_preset_of_lumos1_is_that_of_384p_with_less_computed() -> None:
    fast, usual = (load_mapping(name) for name in ("lumos1_fast", "lumos1_384p"))
    passes = fast.pop("passes")
    assert fast == usual
    made = ServerConfig.parse("packcache", "lumos1_fast", family=LUMOS).passes
    assert made == MaskedOptions(**passes) == MaskedOptions(refresh=8, reuse=0.02, guidance_interval=2)
    whole, own = (sum(sum(one.rows) for one in schedule(options, (48, 84))) for options in (MaskedOptions(), made))
    # With the commits, which are whole.
    assert (whole + 2 * 4084) / (own + 2 * 4084) == pytest.approx(2.8, abs=0.05)


def test_demo_agrees_with_its_tokenizer() -> None:
    from vllm_packcache.demo import tokenizer

    layout = ServerConfig.parse("packcache", "demo").layout
    assert layout is not None
    assert layout.grid == (tokenizer.GRID, tokenizer.GRID)
    assert layout.frame_layout().tokens_per_frame == tokenizer.FRAME_TOKENS
    assert layout.condition_image_tokens == tokenizer.VISUAL_TOKENS
    assert tokenizer.CONDITION_TOKENS == TEXT_TOKENS + tokenizer.VISUAL_TOKENS


@pytest.mark.parametrize("block_size", [16, 32])
def test_what_changed_takes_no_more_room_than_the_papers_rule(block_size: int) -> None:
    plan = ServerConfig.parse("packcache", "demo").plan({"packcache_frames": 1}, 288)
    assert plan is not None
    changed, papers = (Retention(plan.layout, policy, block_size, some_tokens) for policy in (plan.policy, PAPER))
    assert changed.most_blocks() == papers.most_blocks()


def test_masked_demo_agrees_with_its_tokenizer() -> None:
    from vllm_packcache.demo.masked import tokenizer

    layout = ServerConfig.parse("packcache", "demo_masked").layout
    assert layout is not None
    assert layout.frame_layout() == tokenizer.FRAME
    assert layout.axis_scale == MM_ROPE_SCALE


@pytest.mark.parametrize("name", FRAMES)
def test_ids_stand_where_the_models_code_has_them(name: str) -> None:
    server = ServerConfig.parse("packcache", name)
    assert server.layout is not None
    grammar = server.layout.grammar()
    assert grammar is not None
    assert len(FRAMES[name]) == FRAME_TOKENS[name]
    for place, own in enumerate(FRAMES[name]):
        assert grammar.range_at(place) == (IdRange(own, own) if isinstance(own, int) else own), place
    assert grammar.given.tolist() == [*GIVEN_PLACES.get(name, ())]
    # A frame of such ids may stand there, and not one that is a token late.
    made = server.video({"packcache_frames": 2, "packcache_guidance": 1}, 2000)
    assert made is not None
    assert made.grammar is not None
    ids = [own if isinstance(own, int) else own[1] for own in FRAMES[name]]
    assert made.grammar.first_wrong([0] * 2000 + 2 * ids) is None
    assert made.grammar.first_wrong([0] * 2001 + ids[:-1]) is not None


def test_a_picture_of_emu3_and_a_video_of_smaller_ones_fit_its_positions() -> None:
    server = ServerConfig.parse("packcache", "emu3")
    picture = server.plan({"packcache_frames": 1}, 1025)
    video = server.plan({"packcache_frames": 99, "packcache_grid": [64, 64]}, 894)
    assert picture is not None
    assert video is not None
    assert picture.positions.limit(1025 + 8191) == 9216
    assert video.positions.limit(894 + 99 * 4161) == 9216


def test_the_head_of_univlas_frames_states_the_requests_grid() -> None:
    made = ServerConfig.parse("packcache", "univla").video({"packcache_grid": [24, 30], "packcache_window": 4}, 745)
    assert made is not None
    assert made.grammar is not None
    allowed = [made.grammar.allowed(745 + place) for place in range(731)]
    assert allowed == [IdRange(own, own) if isinstance(own, int) else own for own in UNIVLA_24_30]
    assert made.streams[0].plan.positions.limit(10**6) <= 5120


@pytest.mark.parametrize("name", FRAMES)
def test_the_coding_of_actions_makes_what_is_given(name: str) -> None:
    layout = ServerConfig.parse("packcache", name).layout
    assert layout is not None
    coding, grammar = layout.coding(), layout.grammar()
    assert grammar is not None
    if coding is None:
        assert name not in CODINGS
        assert grammar.given.size == 0
    else:
        assert coding.name == CODINGS[name]
        assert [grammar.range_at(place) for place in grammar.given.tolist()] == list(coding.spans)


@pytest.mark.parametrize("name", TRAINED)
def test_positions_are_trained_ones(name: str) -> None:
    condition, trained = TRAINED[name]
    server = ServerConfig.parse("packcache", name)
    plan = server.plan({"packcache_condition_tokens": condition}, condition)
    assert plan is not None
    tokens = condition + 100 * FRAME_TOKENS[name]
    assert plan.positions.limit(tokens) <= trained
    # The largest position of each of the last tokens, as the model sees them.
    for token in range(tokens - FRAME_TOKENS[name], tokens):
        start = plan.positions.window_start(plan.layout.frame_of(token))
        assert plan.positions.of(np.array([token]), start).max() < trained


@pytest.mark.parametrize(
    ("name", "image", "prompts"),
    [
        # One frame with its action, or eight; a picture, and one frame; two pictures, a begun frame.
        ("mineworld_16f", 347, [347, 8 * 347]),
        ("mineworld_32f", 347, [347, 8 * 347]),
        ("rt1_multi_step", 1280, [1373]),
        ("ivideogpt", 513, [514]),
        ("univla", 9 + 1024 + 11, [50 + 1044]),
    ],
)
def test_conditions_are_those_of_the_models_prompts(name: str, image: int, prompts: list[int]) -> None:
    server = ServerConfig.parse("packcache", name)
    assert server.layout is not None
    assert server.layout.condition_image_tokens == image
    for tokens in prompts:
        said = {"packcache_condition_tokens": image} if name in ("rt1_multi_step", "ivideogpt") else {}
        made = server.video({"packcache_frames": 1, **said}, tokens)
        assert made is not None
        layout = made.streams[0].plan.layout
        assert layout.condition_tokens == (image if said else tokens)
        assert layout.condition_image_tokens == image
