"""The KV cache spec that carries the configuration from the workers to the engine core."""

from __future__ import annotations

import pickle
import re
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, SlidingWindowManager
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from tests.engine.harness import stock_spec
from tests.strategies import quick
from vllm_packcache.config.errors import ConfigError
from vllm_packcache.config.server import ServerConfig, _digest
from vllm_packcache.core import policies
from vllm_packcache.core.blocks import BlockIndices, BlockMap
from vllm_packcache.core.layout import FrameLayout, VideoLayout
from vllm_packcache.core.policies import Policy, SlidingWindow
from vllm_packcache.core.positions import Positions
from vllm_packcache.core.retention import Retention
from vllm_packcache.engine.manager import RetentionManager
from vllm_packcache.engine.spec import RetentionSpec, of_json

CONFIGS = [
    ServerConfig.parse("packcache", {"history_frames": 3, "layout": {"grid": [4, 6], "row_end_tokens": 1}}),
    ServerConfig.parse("packcache", {"layout": {"tokens_per_frame": 4084, "condition_image_tokens": 12}}),
    ServerConfig.parse("sliding_window", {"window": 7}),
    ServerConfig.parse("attention_sink"),
    ServerConfig.parse("full"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_the_configuration_arrives_as_it_was_sent(config: ServerConfig) -> None:
    spec = RetentionSpec.retaining(stock_spec(), config, 0)
    assert isinstance(spec, RetentionSpec)
    received = pickle.loads(pickle.dumps(spec))
    assert received == spec
    assert hash(received) == hash(spec)
    assert received.server_config == config


@dataclass(frozen=True, kw_only=True)
class Other(SlidingWindow):
    """Has the name of its parent, and keeps a frame more."""

    def past_blocks(self, blocks: BlockMap, frame: int) -> BlockIndices:
        return SlidingWindow(window=self.window + 1).past_blocks(blocks, frame)

    def most_past_blocks(self, blocks: BlockMap) -> int:
        return SlidingWindow(window=self.window + 1).most_past_blocks(blocks)

    @property
    def history_window(self) -> int:
        return self.window + 1


def install(patch: pytest.MonkeyPatch, **own: type[Policy]) -> None:
    """As if packages had these entry points."""
    find = policies.find
    patch.setattr(policies, "find", lambda name: own.get(name) or find(name))


def test_a_policy_arrives_by_the_name_of_its_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, other=Other)
    config = ServerConfig.parse("other", {"window": 3})
    spec = RetentionSpec.retaining(stock_spec(), config, 0)
    assert isinstance(spec, RetentionSpec)
    assert type(spec.server_config.policy) is Other
    assert spec.server_config == config


def test_what_is_said_of_videos_stays_with_the_api_servers() -> None:
    """Secrets are in no form that is sent on, so what has them could not be read there."""
    plain = {"layout": {"grid": [2, 3]}, "window": 3}
    webhooks = [{"url": "https://a/b", "secret": "whsec_" + "A" * 32}]
    config = ServerConfig.parse("packcache", {**plain, "videos": {"store": "/a", "webhooks": webhooks}})
    spec = RetentionSpec.retaining(stock_spec(), config, 0)
    assert isinstance(spec, RetentionSpec)
    assert spec.server_config == ServerConfig.parse("packcache", plain)
    assert "/a" not in spec.retention


@pytest.mark.parametrize(
    ("here", "there"), [(SlidingWindow, "policies.sliding_window:SlidingWindow"), (Other, "test_spec:Other")]
)
def test_a_policy_that_is_another_one_in_the_scheduler_is_refused(
    monkeypatch: pytest.MonkeyPatch, here: type[Policy], there: str
) -> None:
    install(monkeypatch, mine=Other)
    spec = RetentionSpec.retaining(stock_spec(), ServerConfig.parse("mine", {"window": 5}), 0)
    assert isinstance(spec, RetentionSpec)
    with monkeypatch.context() as patch:
        # Another class of that name, or another version of the same one.
        install(patch, mine=here)
        if here is Other:
            patch.setattr(Other, "past_blocks", SlidingWindow.past_blocks)
            _digest.cache_clear()
        with pytest.raises(ConfigError) as error:
            of_json(spec.retention)
    _digest.cache_clear()
    sentence = str(error.value)
    assert re.fullmatch(
        r"kv_cache_policy: 'mine' is tests\.engine\.test_spec:Other \(decisions \w{16}\) in the workers and "
        r"\S+ \(decisions \w{16}\) in the scheduler: install the same package in the same version for every process "
        r"and node",
        sentence,
    )
    assert f"{there} (decisions" in sentence.partition(" and ")[2]


def test_the_spec_is_the_stock_one_in_every_other_respect() -> None:
    stock = stock_spec(32, head_size_v=16, dtype=torch.bfloat16, dcp_sharded=False, non_causal=True)
    spec = RetentionSpec.retaining(stock, CONFIGS[0], 0)
    assert isinstance(spec, FullAttentionSpec)
    for name in stock.__dataclass_fields__:
        assert getattr(spec, name) == getattr(stock, name)
    assert spec.page_size_bytes == stock.page_size_bytes


@pytest.mark.parametrize(
    "spec",
    [
        SlidingWindowSpec(block_size=16, num_kv_heads=1, head_size=8, dtype=torch.float32, sliding_window=64),
        MLAAttentionSpec(block_size=16, num_kv_heads=1, head_size=8, dtype=torch.float32),
    ],
    ids=lambda spec: type(spec).__name__,
)
def test_what_is_no_plain_full_attention_is_left_alone(spec: KVCacheSpec) -> None:
    assert RetentionSpec.retaining(spec, CONFIGS[0], 0) is spec


def test_layers_merge_into_one_spec_with_the_same_configuration() -> None:
    spec = RetentionSpec.retaining(stock_spec(), CONFIGS[0], 0)
    assert RetentionSpec.merge([spec, spec, spec]) == spec


def test_layers_with_different_policies_do_not_merge() -> None:
    specs = [RetentionSpec.retaining(stock_spec(), config, 0) for config in CONFIGS[:2]]
    with pytest.raises(AssertionError, match="differ in policy"):
        RetentionSpec.merge(specs)


def test_the_registry_finds_our_manager_and_still_the_stock_ones() -> None:
    spec = RetentionSpec.retaining(stock_spec(), CONFIGS[0], 0)
    window = SlidingWindowSpec(block_size=16, num_kv_heads=1, head_size=8, dtype=torch.float32, sliding_window=64)
    assert KVCacheSpecRegistry.get_manager_class(spec) is RetentionManager
    assert KVCacheSpecRegistry.get_manager_class(stock_spec()) is FullAttentionManager
    assert KVCacheSpecRegistry.get_manager_class(window) is SlidingWindowManager
    assert KVCacheSpecRegistry.get_uniform_type_base_spec(spec) is FullAttentionSpec


def lengths(max_model_len: int) -> Any:
    """As much of a `VllmConfig` as is read."""
    return SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=max_model_len),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
    )


def needed_blocks(spec: KVCacheSpec, max_model_len: int) -> int:
    needed, rest = divmod(spec.max_memory_usage_bytes(lengths(max_model_len)), spec.page_size_bytes)
    assert rest == 0
    return needed


@pytest.mark.parametrize("ahead", [0, 1])
def test_the_pool_must_hold_the_usual_video_and_not_its_length(ahead: int) -> None:
    layout = {"tokens_per_frame": 100, "condition_image_tokens": 30}
    options = {"history_frames": 2, "window": 4, "selection": "spatial"}
    config = ServerConfig.parse("packcache", {**options, "layout": layout})
    spec = RetentionSpec.retaining(stock_spec(16), config, ahead)
    # The image takes 2 blocks; of four frames 100, 50, 25 and 25 tokens are kept, each rounded up; the frame being
    # made begins anywhere in a block.
    assert needed_blocks(spec, 100_000) == 2 + (7 + 4 + 2 + 2) + 8
    assert needed_blocks(spec, 300) == 19


def test_without_a_layout_it_must_hold_every_position_that_the_model_has() -> None:
    spec = RetentionSpec.retaining(stock_spec(16), ServerConfig.parse("packcache", position_limit=1000), 1)
    # 1001 tokens are 63 blocks; three more are shared with tokens that are gone.
    assert needed_blocks(spec, 100_000) == 66
    assert needed_blocks(spec, 500) == 32


def test_of_two_bounds_the_lower_one_counts() -> None:
    config = ServerConfig.parse("packcache", {"layout": {"tokens_per_frame": 400}}, position_limit=1000)
    assert needed_blocks(RetentionSpec.retaining(stock_spec(16), config, 0), 100_000) == 66


@pytest.mark.parametrize("policy", ["packcache", "full"])
def test_where_nothing_is_known_it_must_hold_the_longest_request(policy: str) -> None:
    layout = {"tokens_per_frame": 100} if policy == "full" else None
    config = ServerConfig.parse(policy, layout and {"layout": layout})
    assert needed_blocks(RetentionSpec.retaining(stock_spec(16), config, 1), 100_000) == 6250


@quick
@given(
    condition=st.integers(0, 300),
    frame=st.integers(1, 200),
    window=st.integers(1, 6),
    block_size=st.sampled_from([8, 16, 32]),
    made=st.integers(0, 12),
)
def test_no_video_within_the_limit_holds_more(
    condition: int, frame: int, window: int, block_size: int, made: int
) -> None:
    """All of the window kept, and the frame being made in one chunk: no policy with this window holds more."""
    layout = VideoLayout(FrameLayout(frame), condition)
    positions = Positions(layout, window)
    limit = positions.limit(layout.frame_start(100))
    config = ServerConfig.parse("packcache", position_limit=limit)
    spec = RetentionSpec.retaining(stock_spec(block_size), config, 0)
    held = Retention(layout, SlidingWindow(window=window), block_size).live_blocks(layout.frame_start(made + 1) - 1)
    assert len(held) + 1 <= needed_blocks(spec, 10**6)


@pytest.mark.parametrize("max_model_len", [160, 100_000])
def test_the_pool_must_hold_both_streams_where_videos_may_be_guided(max_model_len: int) -> None:
    """A video's bound where it has one, and its length where that is less."""
    options = {"layout": {"tokens_per_frame": 100, "condition_image_tokens": 30}}
    one, two = (
        RetentionSpec.retaining(stock_spec(16), ServerConfig.parse("packcache", {**options, "guidance": guidance}), 2)
        for guidance in (False, True)
    )
    assert needed_blocks(two, max_model_len) == 2 * needed_blocks(one, max_model_len)
