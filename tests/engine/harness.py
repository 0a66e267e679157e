"""A scheduler's view of vLLM's real KV cache manager, with the steps that are still in flight.

It follows what ``AsyncScheduler`` does to a request, call by call: slots are allocated when a step is
scheduled, its output is processed up to two steps later, and the step reads its blocks until then. The
worker's block table is kept besides, as the worker keeps it: blocks are only ever appended. So is the worker's
retention, which knows no tokens and hears what the scheduler decides.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock, get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request, RequestStatus

from vllm_packcache.config.server import REQUEST_PREFIX, ServerConfig
from vllm_packcache.core.retention import Retention
from vllm_packcache.engine.manager import RetentionManager
from vllm_packcache.engine.spec import RetentionSpec
from vllm_packcache.hooks import startup as plugin
from vllm_packcache.worker.blocks.compaction import compact
from vllm_packcache.worker.step import Row, Step

plugin.register()
init_none_hash(sha256)

BLOCK = 4
MAX_MODEL_LEN = 4096


def stock_spec(block_size: int = BLOCK, **changes: Any) -> FullAttentionSpec:
    return FullAttentionSpec(
        **{"block_size": block_size, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32, **changes}
    )


def video_options(tokens_per_frame: int, condition_tokens: int | None = None, **options: Any) -> dict[str, Any]:
    """The ``extra_args`` of a video request."""
    options["tokens_per_frame"] = tokens_per_frame
    if condition_tokens is not None:
        options["condition_tokens"] = condition_tokens
    return {REQUEST_PREFIX + name: value for name, value in options.items()}


def prompt(stream: int, length: int) -> list[int]:
    """The first ``length`` tokens of an endless stream: prompts of one stream share their prefix."""
    return [stream * 100_000 + index for index in range(length)]


@dataclass
class InFlight:
    """A step that was scheduled and whose output has not been processed."""

    tokens: int
    samples: bool
    reads: frozenset[int]
    stale: bool = False


@dataclass
class Served:
    """A request, what the worker knows of it, and what it keeps by a retention of our own, which knows all tokens."""

    request: Request
    retention: Retention | None
    worker: Retention | None = None
    worker_table: list[int] = field(default_factory=list)
    in_flight: deque[InFlight] = field(default_factory=deque)
    running: bool = False
    # Processed tokens when slots were last asked for: what has been freed follows from them. The first time,
    # the manager has not seen the request yet.
    decided_at: int = 0


class Harness:
    """One pool of blocks and the requests served from it.

    Args:
        distinct_ids: ids that are generated at random; None: those of a token's index.
        forgets: whether a worker forgets a preempted request, as the V2 runner does.
    """

    def __init__(
        self,
        config: ServerConfig,
        *,
        enable_caching: bool,
        num_blocks: int,
        block_size: int = BLOCK,
        steps_ahead: int = 0,
        frame_by_frame: bool = False,
        distinct_ids: int | None = None,
        forgets: bool = False,
    ) -> None:
        self.config = config
        self.block_size = block_size
        self._distinct_ids, self._forgets = distinct_ids, forgets
        self._random = np.random.default_rng(0)
        spec = RetentionSpec.retaining(stock_spec(block_size), config, steps_ahead, frame_by_frame)
        self.kv = KVCacheManager(
            KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(["layer"], spec)]),
            max_model_len=MAX_MODEL_LEN,
            scheduler_block_size=block_size,
            hash_block_size=block_size,
            enable_caching=enable_caching,
        )
        manager = self.kv.coordinator.single_type_managers[0]
        assert type(manager) is RetentionManager
        self.manager = manager
        self.pool = self.kv.block_pool
        self.initially_free = self.pool.get_num_free_blocks()
        self.served: dict[str, Served] = {}
        self._hasher = get_request_block_hasher(block_size, sha256)
        self._count = 0

    # ----------------------------------------------------------------- what a scheduler does

    def add(self, token_ids: list[int], extra_args: Mapping[str, Any] | None = None) -> Served:
        """A waiting request."""
        self._count += 1
        params = SamplingParams(max_tokens=MAX_MODEL_LEN, extra_args=dict(extra_args) if extra_args else None)
        request = Request(f"r{self._count}", token_ids, params, None, block_hasher=self._hasher)
        plan = self.config.plan(params.extra_args, len(token_ids))
        served = Served(request, None)
        if plan is not None:
            served.retention = Retention(
                plan.layout,
                plan.policy,
                self.block_size,
                lambda start, stop: np.array(request.all_token_ids[start:stop], dtype=np.int64),
            )
            served.worker = Retention(plan.layout, plan.policy, self.block_size)
        self.served[request.request_id] = served
        return served

    def admit(self, served: Served, chunk: int) -> int | None:
        """Start or resume a request with at most ``chunk`` tokens: the prefix hit, None for no room."""
        request = served.request
        assert not served.running
        blocks, hit, _ = self.kv.get_computed_blocks(request)
        count = min(chunk, request.num_tokens - hit)
        self.manager.decide(request, hit + count)
        if self.kv.allocate_slots(request, count, hit, blocks) is None:
            return None
        request.num_computed_tokens = hit
        request.status = RequestStatus.RUNNING
        served.running = True
        served.decided_at = 0
        served.worker_table = list(self.kv.get_block_ids(request.request_id)[0])
        self._launch(served, count)
        return hit

    def step(self, served: Served, chunk: int, lag: int = 0) -> bool:
        """Run at most ``chunk`` more tokens, leaving ``lag`` steps in flight; False: nothing was run."""
        request = served.request
        assert served.running
        count = min(chunk, request.num_tokens + request.num_output_placeholders - request.num_computed_tokens)
        scheduled = count > 0
        if scheduled:
            served.decided_at = self.processed(served)
            self.manager.decide(request, request.num_computed_tokens + count)
            new_blocks = self.kv.allocate_slots(request, count)
            scheduled = new_blocks is not None
            if new_blocks is not None:
                served.worker_table += new_blocks.get_block_ids()[0]
                self._launch(served, count)
        while len(served.in_flight) > lag:
            self.process(served)
        return scheduled

    def process(self, served: Served) -> None:
        """Process the output of the oldest step in flight."""
        request = served.request
        step = served.in_flight.popleft()
        request.num_in_flight_tokens -= step.tokens
        if step.stale or not step.samples:
            return
        distinct = self._distinct_ids
        request.append_output_token_ids(
            request.num_tokens if distinct is None else int(self._random.integers(distinct))
        )
        request.num_output_placeholders -= 1
        self.kv.cache_blocks(request, request.num_computed_tokens - request.num_output_placeholders)

    def preempt(self, served: Served) -> None:
        """Take the request's blocks away; it will start anew."""
        request = served.request
        self.kv.free(request)
        request.status = RequestStatus.PREEMPTED
        request.num_computed_tokens = 0
        request.num_output_placeholders = 0
        served.running = False
        if self._forgets and served.worker is not None:
            served.worker = Retention(served.worker.layout, served.worker.policy, self.block_size)
        for step in served.in_flight:
            step.stale = True

    def end(self, served: Served) -> None:
        """Finish the request, or abort it with steps in flight."""
        self.kv.free(served.request)
        del self.served[served.request.request_id]

    def run(self, served: Served, num_tokens: int, chunk: int = 64, lag: int = 0) -> None:
        """Admit if need be, then run until ``num_tokens`` tokens are computed."""
        if not served.running:
            assert self.admit(served, min(chunk, num_tokens)) is not None
        while served.request.num_computed_tokens < num_tokens:
            assert self.step(served, min(chunk, num_tokens - served.request.num_computed_tokens), lag)
        while len(served.in_flight) > lag:
            self.process(served)

    def _launch(self, served: Served, count: int) -> None:
        request = served.request
        first = request.num_computed_tokens
        request.num_computed_tokens += count
        request.num_in_flight_tokens += count
        if request.request_id in self.manager.decisions:
            assert served.worker is not None, "only what a video keeps is told"
            served.worker.tell(self.manager.take_decisions(request))
        if served.worker is not None and served.retention is not None:
            heard, known = (own.segments(first, first + count) for own in (served.worker, served.retention))
            for one, other in zip(heard, known, strict=True):
                assert one._replace(past=one.past.tolist()) == other._replace(past=other.past.tolist())
        row = Row(served.worker, first, count)
        table = np.array([served.worker_table], dtype=np.int32)
        batch = compact(Step([row], table, self.block_size), self.block_size)
        named = (blocks[: -(-length // self.block_size)] for blocks, length in zip(*batch[:2], strict=True))
        reads = frozenset(np.concatenate(list(named)).tolist())
        samples = request.num_computed_tokens == request.num_tokens + request.num_output_placeholders
        request.num_output_placeholders += samples
        served.in_flight.append(InFlight(count, samples, reads))

    # ----------------------------------------------------------------- what can be seen

    @staticmethod
    def processed(served: Served) -> int:
        return max(0, served.request.num_computed_tokens - served.request.num_in_flight_tokens)

    def blocks(self, served: Served) -> list[KVCacheBlock]:
        return self.manager.req_to_blocks.get(served.request.request_id, [])

    def held(self, served: Served) -> list[int]:
        """Logical indices of the blocks that the request holds."""
        return [index for index, block in enumerate(self.blocks(served)) if not block.is_null]

    def evictions(self, served: Served) -> list[int]:
        return [index for index, block in enumerate(self.blocks(served)) if block.is_null]

    # ----------------------------------------------------------------- what must always hold

    def check(self) -> None:
        self._check_pool()
        for served in self.served.values():
            if not served.running:
                assert self.blocks(served) == []
            elif served.retention is None:
                self._check_stock(served)
            else:
                self._check_video(served, served.retention)
            self._check_in_flight(served)
        running = {name for name, served in self.served.items() if served.running}
        assert set(self.manager._videos) <= set(self.served), "the manager remembers requests that are gone"
        assert set(self.manager.decisions) <= set(self.served)
        assert set(self.manager.req_to_blocks) <= running

    def _check_pool(self) -> None:
        references = Counter(
            block.block_id for served in self.served.values() for block in self.blocks(served) if not block.is_null
        )
        free = {block.block_id for block in self.pool.free_block_queue.get_all_free_blocks()}
        assert len(free) == self.pool.get_num_free_blocks()
        for block in self.pool.blocks:
            if block.is_null:
                assert block.block_id not in free
                continue
            assert block.ref_cnt == references[block.block_id]
            assert (block.block_id in free) == (block.ref_cnt == 0)

    def _check_stock(self, served: Served) -> None:
        blocks = self.blocks(served)
        assert self.evictions(served) == []
        assert len(blocks) == -(-served.request.num_computed_tokens // self.block_size)
        assert [block.block_id for block in blocks] == served.worker_table

    def _check_video(self, served: Served, retention: Retention) -> None:
        blocks = self.blocks(served)
        computed = served.request.num_computed_tokens
        held = self.held(served)
        assert len(blocks) == -(-computed // self.block_size)

        # Exactly what lived when slots were last asked for, and everything since.
        since = range(-(-served.decided_at // self.block_size), len(blocks))
        assert held == [*retention.live_blocks(served.decided_at).tolist(), *since]
        assert set(held) >= set(retention.live_blocks(self.processed(served)).tolist())

        condition = retention.blocks.condition_blocks
        if getattr(retention.policy, "gamma_text", 0) == getattr(retention.policy, "gamma_condition", 0) == 1:
            assert set(condition[: len(blocks)]) <= set(held)

        full = min(retention.layout.condition_tokens, computed) // self.block_size
        for index in held:
            assert blocks[index].block_id == served.worker_table[index]
            hashed = blocks[index].block_hash is not None
            assert hashed == (self.kv.enable_caching and index < full), f"block {index} of {len(condition)} + frames"

    def _check_in_flight(self, served: Served) -> None:
        held = {block.block_id for block in self.blocks(served) if not block.is_null}
        for step in served.in_flight:
            if not step.stale:
                assert step.reads <= held, "a step in flight reads a block that was freed"

    def check_empty(self, requests: Iterable[Served] = ()) -> None:
        """Nothing is left of requests that have ended."""
        for served in list(requests or self.served.values()):
            self.end(served)
        self.check()
        assert self.pool.get_num_free_blocks() == self.initially_free
        assert not self.manager._videos
        assert not self.manager.req_to_blocks
        assert not self.manager.num_cached_block
