"""The presets in configs/: they parse and mean what their comments and the demo say."""

from __future__ import annotations

import re

import pytest

from vllm_packcache.config.server import ServerConfig
from vllm_packcache.config.sources import load_mapping, presets
from vllm_packcache.core.policies import PAPER, PackCache
from vllm_packcache.core.retention import Retention, some_tokens
from vllm_packcache.families.lumos import MM_ROPE_SCALE
from vllm_packcache.tools.explain import TEXT_TOKENS

FRAME_TOKENS = {
    "demo": 257,
    "demo_masked": 276,
    "emu3": 8191,
    "emu3_5": 2077,
    "lumos1_256p": 1828,
    "lumos1_384p": 4084,
    "lumos1_480p": 5824,
    "play": 64,
}

POLICIES = {
    "demo": PackCache(),
    "demo_masked": PackCache(),
    # An anchor of each room that is not shown.
    "play": PackCache(history_frames=4, window=8, episodes=2),
}
"""What changed first was measured on the demos' models; the others have the rule of the paper."""

LUMOS1 = ("demo_masked", "lumos1_256p", "lumos1_384p", "lumos1_480p")


def test_all_presets_are_known_here() -> None:
    assert set(presets()) == set(FRAME_TOKENS)


@pytest.mark.parametrize(("name", "tokens"), FRAME_TOKENS.items())
def test_tokens_per_frame(name: str, tokens: int) -> None:
    config = ServerConfig.parse("packcache", name)
    assert config.policy == POLICIES.get(name, PAPER)
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
    assert set(load_mapping(name)["layout"]) == set(config.as_mapping()["layout"]) - {"tokens_per_frame"}


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
