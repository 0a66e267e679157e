"""A request of two causal streams: each has blocks of its own, and frees them by its own plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from tests.engine.harness import BLOCK, MAX_MODEL_LEN, stock_spec, video_options
from vllm_packcache import families
from vllm_packcache.config.server import POLICY_KEY, ServerConfig, read_config
from vllm_packcache.config.sources import CONFIG_KEY
from vllm_packcache.core.layout import VideoLayout
from vllm_packcache.core.plan import Plan, Stream, VideoRequest
from vllm_packcache.core.policies import SlidingWindow
from vllm_packcache.core.positions import Positions
from vllm_packcache.core.retention import Retention
from vllm_packcache.engine.manager import retention_managers
from vllm_packcache.engine.spec import STREAM_SPECS, as_json, fields_of
from vllm_packcache.families.base import Family, Prompt, Server
from vllm_packcache.hooks.startup import choose_backend

TEXT = 21
"""Tokens of the prompt that the second stream does not have."""


class TwoStreams(Family):
    """A guided causal video: the stream without the text has a shorter condition, and here a policy of its own."""

    name = "two"
    architectures = ("TwoStreams",)
    streams = 2

    def request(self, server: Server, extra_args: Mapping[str, Any] | None, prompt: Prompt) -> VideoRequest | None:
        made = server.video(extra_args, prompt if isinstance(prompt, int) else len(prompt))
        if made is None:
            return None
        (stream,) = made.streams
        plan = stream.plan
        layout = VideoLayout(plan.layout.frame, plan.layout.condition_tokens - TEXT)
        second = Plan(layout, SlidingWindow(window=1), Positions(layout))
        return VideoRequest((stream, Stream(second, TEXT)), made.frames)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ServerConfig]:
    monkeypatch.setattr(families, "_BUILT_IN", (*families._BUILT_IN, TwoStreams()))
    families.find.cache_clear()
    yield ServerConfig.parse(
        "packcache", {"history_frames": 2, "window": 3, "selection": "spatial"}, family=TwoStreams()
    )
    families.find.cache_clear()


def manager_of(server: ServerConfig, *, caching: bool) -> KVCacheManager:
    groups = [
        KVCacheGroupSpec(
            [f"layer.{stream}"],
            spec(
                **fields_of(stock_spec()),
                retention=as_json(server),
                tokens_ahead=0,
                frame_by_frame=True,
                largest_frame=12,
            ),
        )
        for stream, spec in enumerate(STREAM_SPECS)
    ]
    return KVCacheManager(
        KVCacheConfig(400, [], groups),
        max_model_len=MAX_MODEL_LEN,
        scheduler_block_size=BLOCK,
        hash_block_size=BLOCK,
        enable_caching=caching,
    )


def new_request(name: str, prompt: int, options: dict[str, Any] | None) -> Request:
    params = SamplingParams(max_tokens=MAX_MODEL_LEN, extra_args=options)
    return Request(name, list(range(prompt)), params, None, block_hasher=get_request_block_hasher(BLOCK, sha256))


@pytest.mark.parametrize("caching", [False, True])
def test_each_stream_frees_by_its_own_plan(server: ServerConfig, caching: bool) -> None:
    kv = manager_of(server, caching=caching)
    free = kv.block_pool.get_num_free_blocks()
    prompt = TEXT + 16
    request = new_request("a", prompt, video_options(12, prompt))
    managers = retention_managers(kv)
    assert [manager.stream for manager in managers] == [0, 1]
    made = managers[0].request(request)
    assert made is not None
    retentions = [Retention(own.plan.layout, own.plan.policy, BLOCK) for own in made.streams]

    blocks, hit, _ = kv.get_computed_blocks(request)
    computed = hit
    for count in [prompt, *[1] * 100]:
        for manager in managers:
            manager.decide(request, computed + count)
        before = computed
        arguments = (hit, blocks) if computed == 0 else ()
        assert kv.allocate_slots(request, count, *arguments) is not None
        computed = request.num_computed_tokens = computed + count
        if request.num_tokens == computed:
            request.append_output_token_ids(computed)
        for manager, retention, stream in zip(managers, retentions, made.streams, strict=True):
            held = [i for i, block in enumerate(manager.req_to_blocks["a"]) if not block.is_null]
            # What lived when slots were asked for, and what has come since.
            own = stream.own_tokens(before)
            since = range(-(-own // BLOCK), -(-stream.own_tokens(computed) // BLOCK))
            assert held == [*retention.live_blocks(own).tolist(), *since], (stream.start, computed)
    first, second = (len(manager.req_to_blocks["a"]) for manager in managers)
    assert (first, second) == (-(-computed // BLOCK), -(-(computed - TEXT) // BLOCK))
    # The policies differ, and so does what is left.
    assert managers[0].videos()[0].resident_blocks > managers[1].videos()[0].resident_blocks
    kv.free(request)
    assert kv.block_pool.get_num_free_blocks() == free


def test_a_chunk_ends_where_any_stream_needs_it(server: ServerConfig) -> None:
    kv = manager_of(server, caching=False)
    prompt = TEXT + 16
    request = new_request("a", prompt + 60, video_options(12, prompt))
    ends = [manager.chunk_ends(request, 0) for manager in retention_managers(kv)]
    # Both conditions end with the same token of the request.
    assert ends == [prompt, prompt]
    ends = [manager.chunk_ends(request, prompt) for manager in retention_managers(kv)]
    assert ends == [prompt + 12, prompt + 12]


def test_a_text_has_blocks_in_the_first_stream_alone(server: ServerConfig) -> None:
    kv = manager_of(server, caching=False)
    request = new_request("a", 30, None)
    for manager in retention_managers(kv):
        manager.decide(request, 30)
    assert kv.allocate_slots(request, 30) is not None
    assert [len(manager.req_to_blocks["a"]) for manager in retention_managers(kv)] == [8, 0]


def test_the_scheduler_is_told_the_family(server: ServerConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides must ask the same family what a request makes."""

    class Backend:
        @staticmethod
        def get_name() -> str:
            return "CPU_ATTN"

        @classmethod
        def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
            return spec

    engine = SimpleNamespace(
        model_config=SimpleNamespace(hf_config=SimpleNamespace(architectures=["TwoStreams"])),
        additional_config={
            POLICY_KEY: "packcache",
            CONFIG_KEY: {"history_frames": 2, "window": 3, "selection": "spatial"},
        },
        use_v2_model_runner=False,
        max_concurrent_batches=1,
        cache_config=SimpleNamespace(cache_dtype="auto"),
    )
    monkeypatch.setattr("vllm.config.get_current_vllm_config", lambda: engine)
    backend = choose_backend(lambda: Backend)()
    assert backend.customize_spec(stock_spec()).server_config == read_config(engine) == server
