"""Guided causal videos on vLLM's Model Runner V2: each has a second stream, to which its tokens are fed too.

The runner knows the first streams, and runs them as if there were no others. Rows of the second streams go through the
same layers in a forward pass of their own, when the runner hands the step's logits to its sampler: what it has put
together for the first ones has been read by then, from a captured graph or not. They have blocks, positions and an
account of what lives of their own. Which of their tokens a step computes follows from how many the request has, and
which ids those have from the request's, which the runner keeps on the device: the host waits for nothing. A step
without guided requests does nothing of this.

The logits of guided rows are changed before anything of the request's own sampling is applied.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from vllm.forward_context import set_forward_context
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
from vllm.v1.worker.gpu.buffer_utils import StagedWriteTensor
from vllm.v1.worker.gpu.model_states.interface import ModelState

from vllm_packcache.config.errors import ConfigError
from vllm_packcache.config.guidance import GUIDANCE_KEY
from vllm_packcache.config.sources import CONFIG_KEY
from vllm_packcache.core.plan import Stream
from vllm_packcache.core.retention import Decision, Written
from vllm_packcache.worker.blocks.kernel import CompactedRows
from vllm_packcache.worker.runner_v2 import DeviceCompaction, KeptBlocks, retaining_model_state
from vllm_packcache.worker.step import Kept, Row, position_shifts, publish

if TYPE_CHECKING:
    from vllm.config.compilation import CUDAGraphMode
    from vllm.v1.attention.backend import AttentionMetadataBuilder
    from vllm.v1.core.sched.output import NewRequestData
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.worker.gpu.block_table import BlockTables
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.sample.output import SamplerOutput
    from vllm.v1.worker.gpu.states import RequestState
    from vllm.v1.worker.utils import AttentionGroup

_SHARED = -1
"""In place of an id: that of the request's token."""


def guided(conditional: Tensor, unconditional: Tensor, scales: Tensor) -> Tensor:
    """The logits that guided tokens are sampled from: ``u + s (c - u)``, c and u logarithms of probabilities.

    Source: classifier-free guidance (arXiv 2207.12598), as of Emu3's public code.

    Args:
        conditional: [n, V], logits of the first streams.
        unconditional: [n, V], those of the second ones.
        scales: float32, [n]: s.

    Returns:
        float32, [n, V].
    """
    own = conditional.float().log_softmax(-1)
    other = unconditional.float().log_softmax(-1)
    return other + scales[:, None] * (own - other)


@dataclass
class SecondStream:
    """The second stream of a request in the worker.

    Args:
        slot: of its request.
        stream: what it is.
        kept: what of it lives, and where its tokens are.
        scale: s of the request.
        computed: tokens of which keys and values have been computed, or are in the step being run.
    """

    slot: int
    stream: Stream
    kept: Kept
    scale: float
    computed: int = 0


class Second(NamedTuple):
    """The tokens of one second stream that a step computes.

    Attributes:
        place: of its request in the step's batch.
        slot: of its request.
        stream: whose they are.
        row: they, all of one frame.
        scale: s of the request.
    """

    place: int
    slot: int
    stream: Stream
    row: Row
    scale: float


class Part(NamedTuple):
    """Tokens of one `Second` that go through the model together: all, as a rule.

    Attributes:
        second: whose.
        row: they.
        last: whether none follow in this step.
    """

    second: Second
    row: Row
    last: bool


def passes(seconds: Sequence[Second], most: int) -> Iterator[list[Part]]:
    """The forward passes of a step, each of at most ``most`` tokens, which is what memory was measured with.

    The scheduler counts the tokens of first streams. A second one has more in a step that begins it, where its
    condition is longer, or where less of it was found in the prefix cache.
    """
    parts: list[Part] = []
    room = most
    for second in seconds:
        start, stop = second.row.computed, second.row.computed + second.row.scheduled
        while start < stop:
            count = min(room, stop - start)
            parts.append(Part(second, second.row._replace(computed=start, scheduled=count), start + count == stop))
            start, room = start + count, room - count
            if room == 0:
                yield parts
                parts, room = [], most
    if parts:
        yield parts


@dataclass(frozen=True)
class Step:
    """A step that computes tokens of second streams.

    Args:
        vllm: vLLM's own description of it.
        seconds: in the order in which they are run.
    """

    vllm: InputBatch
    seconds: list[Second]


class GuidedSampler:
    """vLLM's sampler, given guided logits.

    Args:
        sampler: vLLM's.
        state: knows which rows are guided.
    """

    def __init__(self, sampler: Any, state: Any) -> None:
        self._sampler = sampler
        self._state = state

    def __call__(self, logits: Tensor, input_batch: InputBatch) -> SamplerOutput:
        """Sample a token for each request."""
        return self._sampler(self._state.guide(logits, input_batch), input_batch)

    def __getattr__(self, name: str) -> Any:
        # The runner tells its sampler of requests, and asks it about their sampling.
        return getattr(self._sampler, name)


@cache
def guiding_model_state(base: type[ModelState]) -> type[ModelState]:
    """A subclass of the model state ``base`` for a server with a policy, whose videos may be guided."""

    class GuidingModelState(retaining_model_state(base)):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._seconds: dict[str, SecondStream] = {}
            self._step: Step | None = None
            self._second_kept: KeptBlocks
            self._second_table: StagedWriteTensor
            self._second_compacted: dict[AttentionMetadataBuilder[Any], CompactedRows] = {}
            self._attn_groups: list[list[AttentionGroup]] = []
            self._kv_cache_config: KVCacheConfig
            self._token_ids: Tensor

        def custom_sampler(self, sampler: Any) -> tuple[GuidedSampler, None]:
            return GuidedSampler(sampler, self), None

        def initialize_kv_cache(self, kv_cache_config: KVCacheConfig, block_tables: BlockTables) -> None:
            super().initialize_kv_cache(kv_cache_config, block_tables)
            check_groups(kv_cache_config, self.model_config.model)
            self._kv_cache_config = kv_cache_config
            first = block_tables.block_tables[0].gpu
            # The runner has none for it: its kernels would run for every request, guided or not.
            self._second_table = StagedWriteTensor(tuple(first.shape), dtype=first.dtype, device=self.device)
            self._second_kept = self._new_kept(kv_cache_config, block_tables)
            self._second_compacted.clear()

        def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
            super().add_request(req_index, new_req_data)
            made = self._requested(new_req_data)
            if made is None or len(made.streams) == 1:
                return
            (first, stream), computed = made.streams, new_req_data.num_computed_tokens
            # What is found in the prefix cache is less than a condition, and of a second stream it is told. More than
            # that is of a session, whose turn begins.
            own = stream.own_tokens(computed) if computed >= first.plan.layout.condition_tokens else 0
            kept = Kept.of_stream(stream, self._second_kept.block_size)
            self._seconds[new_req_data.req_id] = SecondStream(req_index, stream, kept, made.guidance, own)
            self._second_kept.forget(req_index)

        def remove_request(self, req_id: str) -> None:
            super().remove_request(req_id)
            self._seconds.pop(req_id, None)

        def hear(self, told: Mapping[str, Sequence[Decision]]) -> None:
            firsts = {}
            for name, decisions in told.items():
                first, second = ([own for own in decisions if own.stream == stream] for stream in (0, 1))
                if first:
                    firsts[name] = first
                if second:
                    self._seconds[name].kept.retention.tell(second)
            super().hear(firsts)

        def hear_blocks(self, told: Mapping[str, Written]) -> None:
            """Blocks of second streams; all their requests have been added."""
            for name, (start, blocks, found) in told.items():
                second = self._seconds[name]
                self._second_table.stage_write(second.slot, start, blocks)
                second.computed = found or second.computed

        def preprocess_state(
            self,
            input_batch: InputBatch,
            block_tables: tuple[Tensor, ...],
            kv_cache_config: KVCacheConfig,
            num_computed_tokens: Tensor,
        ) -> None:
            super().preprocess_state(input_batch, block_tables, kv_cache_config, num_computed_tokens)
            self._step = None
            if not self._seconds:
                return
            self._second_table.apply_write()
            found = []
            for index, (name, first) in enumerate(zip(input_batch.req_ids, self._rows, strict=True)):
                second = self._seconds.get(name)
                if second is None:
                    continue
                start, stop = second.computed, second.stream.own_tokens(first.computed + first.scheduled)
                if stop <= start:
                    # Its condition is shorter, and begins later, or was in the prefix cache.
                    continue
                retention, positions = second.kept
                row = Row(retention, start, stop - start, positions)
                _check_one_frame(row)
                self._second_kept.enter(second.slot, row)
                if positions.slides(start):
                    self._key_rotation().slide(retention, positions, start, self._second_table.gpu[second.slot])
                second.computed = stop
                found.append(Second(index, second.slot, second.stream, row, second.scale))
            self._second_kept.apply()
            if found:
                # What one has found may be computed by another in this step, which begins before: it is run before.
                found.sort(key=lambda second: second.row.computed)
                self._step = Step(input_batch, found)

        def prepare_attn(
            self,
            input_batch: InputBatch,
            cudagraph_mode: CUDAGraphMode,
            block_tables: tuple[Tensor, ...],
            slot_mappings: Tensor,
            attn_groups: list[list[AttentionGroup]],
            kv_cache_config: KVCacheConfig,
            for_capture: bool = False,
            ubatch_idx: int = 0,
        ) -> dict[str, Any]:
            self._attn_groups = attn_groups
            return super().prepare_attn(
                input_batch,
                cudagraph_mode,
                block_tables,
                slot_mappings,
                attn_groups,
                kv_cache_config,
                for_capture=for_capture,
                ubatch_idx=ubatch_idx,
            )

        def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
            self._token_ids = req_states.all_token_ids.gpu
            return super().prepare_inputs(input_batch, req_states)

        def guide(self, logits: Tensor, input_batch: InputBatch) -> Tensor:
            """The logits that tokens are sampled from: those of guided rows lead away from their second stream's.

            Args:
                logits: [n, V], those of the first streams, a row for each request of the batch.
                input_batch: the step.
            """
            step = self._step
            if step is None or step.vllm is not input_batch:
                if not self._attn_groups:
                    # Memory is measured, before there is a cache: as if all requests were guided.
                    guided(logits, logits, logits.new_ones(len(logits), dtype=torch.float32))
                return logits
            self._step = None
            hidden = torch.cat([self._run(step, parts) for parts in passes(step.seconds, self.max_num_tokens)])
            unconditional = self.model.compute_logits(hidden)
            rows = async_tensor_h2d(np.array([second.place for second in step.seconds]), device=self.device)
            scales = async_tensor_h2d(
                np.array([second.scale for second in step.seconds], dtype=np.float32), device=self.device
            )
            logits = logits.float()
            return logits.index_copy(0, rows, guided(logits[rows], unconditional, scales))

        def _run(self, step: Step, parts: Sequence[Part]) -> Tensor:
            """Run some tokens of second streams; hidden states of the last ones of their step, [parts, hidden]."""
            rows = [part.row for part in parts]
            counts = np.array([row.scheduled for row in rows])
            starts = np.concatenate([[0], counts.cumsum()]).astype(np.int32)
            lengths = np.array([row.computed + row.scheduled for row in rows], dtype=np.int32)
            slots_np = np.array([part.second.slot for part in parts])
            places = np.array([part.second.place for part in parts])
            per_row, per_token = (
                async_tensor_h2d(numbers, device=self.device)
                for numbers in (
                    np.stack([slots_np, starts[1:] - 1]),
                    np.stack([np.repeat(np.arange(len(rows)), counts), *_tokens(parts)]),
                )
            )
            slots, ends = per_row
            row_of, tokens, sources, own_ids, positions = per_token
            table, size = self._second_table.gpu[slots], self._second_kept.block_size
            ids = torch.where(own_ids == _SHARED, self._token_ids[slots[row_of], sources].long(), own_ids)
            mapping = table[row_of, tokens // size].long() * size + tokens % size
            compaction = DeviceCompaction(self._second_kept, slots, slots_np, self._second_compacted, self._max_blocks)
            with publish(compaction):
                metadata = build_attn_metadata(
                    attn_groups=self._attn_groups,
                    num_reqs=len(rows),
                    num_tokens=len(tokens),
                    query_start_loc_gpu=async_tensor_h2d(starts, device=self.device),
                    query_start_loc_cpu=torch.from_numpy(starts),
                    max_query_len=int(counts.max()),
                    seq_lens=async_tensor_h2d(lengths, device=self.device),
                    seq_lens_cpu_upper_bound=torch.from_numpy(lengths),
                    max_seq_len=int(lengths.max()),
                    block_tables=(table,),
                    slot_mappings=mapping[None],
                    kv_cache_config=self._kv_cache_config,
                    positions=positions,
                    is_prefilling=torch.from_numpy(step.vllm.is_prefilling_np[places]),
                )
            layers = self._kv_cache_config.kv_cache_groups[0].layer_names
            with set_forward_context(
                metadata, self.vllm_config, num_tokens=len(tokens), slot_mapping=dict.fromkeys(layers, mapping)
            ):
                hidden = self.model(
                    input_ids=ids.int(), positions=positions, intermediate_tensors=None, inputs_embeds=None
                )
            done = [number for number, part in enumerate(parts) if part.last]
            return hidden[ends if len(done) == len(parts) else ends[: len(done)]]

    GuidingModelState.__qualname__ = f"Guiding{base.__qualname__}"
    return GuidingModelState


def check_groups(kv_cache_config: KVCacheConfig, model: str) -> None:
    """Refuse a model of whose layers' caches a block is not a place of one size in every one.

    Raises:
        ConfigError: naming the model.
    """
    # Only a spec of ours is of a stream.
    if [getattr(group.kv_cache_spec, "stream", None) for group in kv_cache_config.kv_cache_groups] != [0]:
        raise ConfigError(
            f"{CONFIG_KEY}: {GUIDANCE_KEY} is for a model whose layers all have the same cache, and those of {model} "
            "differ: leave it out"
        )


def _check_one_frame(row: Row) -> None:
    """Of a step's rows each is of one frame, those of second streams too: they end where the first ones do."""
    assert row.retention is not None
    layout = row.retention.layout
    if layout.frame_of(row.computed) != layout.frame_of(row.computed + row.scheduled - 1):
        raise RuntimeError(
            f"tokens {row.computed} to {row.computed + row.scheduled} of a second stream are run in one step, and they "
            "are of several frames: the scheduler did not end the chunk where the first one ends"
        )


def _tokens(parts: Sequence[Part]) -> Iterator[npt.NDArray[np.int64]]:
    """Of all tokens of ``parts``: index in the stream, index in the request, id or `_SHARED`, model position."""
    tokens = np.concatenate([np.arange(row.computed, row.computed + row.scheduled) for _, row, _ in parts])
    yield tokens
    yield np.concatenate(
        [
            np.maximum(np.arange(row.computed, row.computed + row.scheduled) + second.stream.start, 0)
            for second, row, _ in parts
        ]
    )
    own = np.full(len(tokens), _SHARED)
    first = 0
    for second, row, _ in parts:
        condition = second.stream.condition[row.computed : row.computed + row.scheduled]
        own[first : first + len(condition)] = condition
        first += row.scheduled
    yield own
    shifts = position_shifts([row for _, row, _ in parts])
    yield tokens if shifts is None else tokens + shifts[0]
