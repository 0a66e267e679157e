"""Blocks of several videos of one request, at the size of the published model; no model runs."""

from __future__ import annotations

from typing import Any

import pytest
from vllm import SamplingParams
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from tests.engine.harness import stock_spec
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.core.forks import FORK_OPTION
from vllm_packcache.core.layout import CONDITION
from vllm_packcache.engine import forks
from vllm_packcache.engine.manager import retention_managers
from vllm_packcache.engine.spec import STREAM_SPECS, as_json, fields_of
from vllm_packcache.families import LUMOS, lumos

BLOCK = 32
GRID = (48, 84)
FRAME = lumos.frame_layout(GRID).tokens_per_frame
TEXT = 60


class Videos:
    """Requests of one pool, scheduled step by step."""

    def __init__(self, config: dict[str, Any], blocks: int = 20_000) -> None:
        server = ServerConfig.parse("packcache", {"layout": {"grid": list(GRID)}, **config}, family=LUMOS)
        of_stream = {"retention": as_json(server), "tokens_ahead": 0, "frame_by_frame": True, "largest_frame": FRAME}
        groups = [
            KVCacheGroupSpec([f"layer.{stream}"], spec(**fields_of(stock_spec(BLOCK)), **of_stream))
            for stream, spec in enumerate(STREAM_SPECS)
        ]
        self.kv = KVCacheManager(
            KVCacheConfig(blocks, [], groups),
            max_model_len=100_000,
            scheduler_block_size=BLOCK,
            hash_block_size=BLOCK,
            enable_caching=False,
        )
        self.managers = retention_managers(self.kv)
        self.copied = 0

    @property
    def held(self) -> int:
        """Blocks of the pool that are in use."""
        return self.kv.block_pool.num_gpu_blocks - 1 - self.kv.block_pool.get_num_free_blocks()

    def add(self, seed: int, family: str | None, given: int) -> Request:
        ids = lumos.text_prompt([5] * TEXT, 6, 8)
        ids += lumos.frame_of_codes([[1] * GRID[1]] * GRID[0]).tolist() * (1 + given)
        options: dict[str, Any] = {"packcache_seed": seed, "packcache_condition_frames": 1, "packcache_steps": 1}
        options |= {FORK_OPTION: family} if family else {}
        return Request(f"r{seed}", ids, SamplingParams(max_tokens=10**5, extra_args=options), None)

    def step(self, request: Request, tokens: int) -> bool:
        """Schedule ``tokens`` tokens of a request, or find what others have computed; False: there is no room."""
        name, hit, arguments = request.request_id, 0, ()
        made = self.managers[0].request(request)
        assert made is not None
        layout = made.streams[0].plan.layout
        if request.num_computed_tokens == 0:
            assert not forks.waits(self.managers, request)
            blocks, hit, _ = self.kv.get_computed_blocks(request)
            tokens, arguments = (1, (hit, blocks)) if hit else (tokens, ())
        computed = request.num_computed_tokens + hit
        frame = layout.frame_of(computed)
        begins = frame != CONDITION and computed == layout.frame_start(frame)
        for manager in self.managers:
            manager.video(request)
            if manager.shared is not None and manager.shared.knows(name):
                manager.shared.enter(name, frame if begins else None)
        if self.kv.allocate_slots(request, tokens, *arguments) is None:
            return False
        request.num_computed_tokens = computed + tokens
        if request.num_tokens < request.num_computed_tokens:
            request.append_output_token_ids([lumos.VISUAL_BEGIN] * FRAME)
        return True

    def end_step(self) -> None:
        """The workers have run it."""
        copies, kept = self.kv.take_kv_cache_block_copies()
        self.copied += len(copies)
        self.kv.block_pool.free_blocks(kept)

    def begin(self, family: str | None, given: int) -> list[Request]:
        """Four videos, whose prompts are computed."""
        requests = [self.add(seed, family, given) for seed in range(4)]
        for request in requests:
            assert self.step(request, TEXT + lumos.LEAST_TEXT_TOKENS)
            self.end_step()
            if family and request is requests[0]:
                assert forks.waits(self.managers, requests[1])
            while request.num_computed_tokens < request.num_prompt_tokens:
                assert self.step(request, FRAME)
                self.end_step()
        return requests

    def run(self, family: str | None, given: int, frames: int) -> list[int]:
        """Blocks that four videos hold with each of the frames that they make."""
        requests, held = self.begin(family, given), []
        for _ in range(frames):
            for request in requests:
                assert self.step(request, FRAME)
            self.end_step()
            held.append(self.held)
        for request in requests:
            self.kv.free(request)
        assert self.held == 0
        return held


@pytest.mark.parametrize(
    ("given", "config", "most"),
    [
        # The image is a frame, and so is what each makes: (1 + 4) / (4 + 4), then (1 + 8) / (4 + 8).
        (0, {"history_frames": 2, "window": 4}, (0.63, 0.76)),
        (1, {"history_frames": 2, "window": 4}, (0.51, 0.63)),
        (2, {"history_frames": 2, "window": 4}, (0.44, 0.63)),
        # The window slides with the second frame: all has been copied but the condition.
        (4, {"history_frames": 2, "window": 4}, (0.44, 0.82)),
        (4, {"history_frames": 8, "window": 8}, (0.38, 0.47)),
        (6, {"history_frames": 2, "window": 4, "positions": "absolute"}, (0.44, 0.63)),
    ],
    ids=str,
)
def test_four_forks_hold_fewer_blocks_than_four_videos(given: int, config: dict[str, Any], most: Any) -> None:
    """The condition and the given frames are there once, whatever of them is kept."""
    config = {"selection": "spatial", **config}
    together, apart = Videos(config), Videos(config)
    shared, alone = together.run("a", given, len(most)), apart.run(None, given, len(most))
    assert together.copied
    assert not apart.copied
    for own, other, bound in zip(shared, alone, most, strict=True):
        assert bound - 0.02 < own / other < bound


def test_what_is_copied_has_room_or_waits_for_it() -> None:
    """Who cannot copy changes nothing; whoever is left alone turns what it has."""
    config = {"history_frames": 2, "window": 2, "selection": "spatial"}
    videos = Videos(config, blocks=2 * 128 * 7)
    requests, pool = videos.begin("a", 3), videos.kv.block_pool
    free = pool.get_num_free_blocks()
    first, second, *others = requests
    for request in others:
        videos.kv.free(request)
    assert pool.get_num_free_blocks() == free, "the other two have it still"
    # With the fourth frame the window slides. A frame fits, and not what is turned.
    taken = pool.get_new_blocks(free - 2 * 129)
    assert not videos.step(first, FRAME)
    # What the fourth frame drops, and the second video has never had.
    room = pool.get_num_free_blocks()
    assert room >= 2 * 129
    assert not videos.step(first, FRAME)
    assert pool.get_num_free_blocks() == room
    videos.kv.free(second)
    assert videos.step(first, FRAME)
    videos.end_step()
    assert videos.copied == 0
    videos.kv.free(first)
    pool.free_blocks(taken)
    assert videos.held == 0
