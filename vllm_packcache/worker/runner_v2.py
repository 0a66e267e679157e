"""Adapter of vLLM's Model Runner V2 (what vLLM uses on a GPU).

The runner hands everything that a model may want to know of its requests to a `ModelState`. Ours is made of the
model's own: it learns the layout of a request when the request is added, puts what the request keeps on the device
when it enters a frame, rotates cached keys where a window slides, has block tables compacted on the device while the
attention metadata is built, and positions new tokens.

A step's rows are its requests, and the queries of each are of one frame: the scheduler ends prefill chunks there (see
`vllm_packcache.engine.manager`). More rows than requests would fit neither a captured graph nor what GPU backends set
aside for ``max_num_seqs`` rows. So one kernel compacts every step, decoding or not, and writes to memory that stays
where it is: whatever graph vLLM replays, piecewise or full, for decoding or mixed batches, reads this step's blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, wraps
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.worker.gpu.buffer_utils import StagedWriteTensor
from vllm.v1.worker.gpu.model_states.interface import ModelState

from vllm_packcache.config.server import config_of
from vllm_packcache.core.forks import FORKS
from vllm_packcache.core.layout import CONDITION
from vllm_packcache.core.plan import VideoRequest
from vllm_packcache.core.retention import DECISIONS, SECOND_BLOCKS, Decision
from vllm_packcache.worker.blocks.kernel import HEADER, CompactedRows, compact_rows
from vllm_packcache.worker.keys.layout import cached_keys
from vllm_packcache.worker.keys.rotation import KeyRotation, rotary_of
from vllm_packcache.worker.step import Kept, Row, position_shifts, publish

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.worker.gpu.block_table import BlockTables
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    from vllm.v1.worker.gpu.states import RequestState


_NOBODY = CONDITION - 1
"""The frame of a slot of which the device does not know yet what its request keeps."""


class KeptBlocks:
    """What each request keeps of the past, on the device; see `vllm_packcache.worker.blocks.kernel`.

    Args:
        slots: requests that there may be at a time.
        max_blocks: that a request may hold.
        block_size: tokens of the manager's blocks.
        device: where the block tables are.
    """

    def __init__(self, slots: int, max_blocks: int, block_size: int, device: torch.device) -> None:
        self.block_size = block_size
        self._memory = StagedWriteTensor((slots, HEADER + max_blocks), dtype=torch.int32, device=device)
        self._frames = np.full(slots, _NOBODY)
        self._dropped_tokens = np.zeros(slots, dtype=np.int32)

    @property
    def memory(self) -> Tensor:
        """Int32, [slots, HEADER + max_blocks]."""
        return self._memory.gpu

    def forget(self, slot: int) -> None:
        """Another request has ``slot`` now."""
        self._frames[slot] = _NOBODY

    def enter(self, slot: int, row: Row) -> None:
        """The request in ``slot`` computes the tokens of ``row``: if it is in another frame, keep that in mind."""
        frame = CONDITION if row.retention is None else row.retention.layout.frame_of(row.computed)
        if self._frames[slot] == frame:
            return
        first, past = 0, []
        if row.retention is not None and frame != CONDITION:
            first, past = row.retention.blocks.tail_start(frame), row.retention.past(frame).tolist()
        self._memory.stage_write(slot, 0, [len(past), first, *past])
        self._frames[slot] = frame
        self._dropped_tokens[slot] = (first - len(past)) * self.block_size

    def apply(self) -> None:
        """Bring to the device what has changed.

        To be called once a step: what carries the changes is used again as soon as all steps in flight may have it.
        """
        self._memory.apply_write()

    def dropped_tokens(self, slots: npt.NDArray[np.intp], rows: int) -> npt.NDArray[np.int32]:
        """How many tokens fewer than computed ones each row reads, [rows]; rows behind ``slots`` read all."""
        dropped = np.zeros(rows, dtype=np.int32)
        dropped[: len(slots)] = self._dropped_tokens[slots]
        return dropped


@dataclass(frozen=True, slots=True)
class DeviceCompaction:
    """Compacts a step on the device.

    Args:
        kept: what requests keep.
        slots: int64 on the device, [n]: the slots of the requests; the rows behind them fill up the batch.
        slots_np: the same on the host.
        out: the memory of each builder, made when it first builds.
        max_blocks: of the manager's that a request may hold.
    """

    kept: KeptBlocks
    slots: Tensor
    slots_np: npt.NDArray[np.intp]
    out: dict[AttentionMetadataBuilder[Any], CompactedRows]
    max_blocks: int

    def __call__(
        self, common: CommonAttentionMetadata, builder: AttentionMetadataBuilder[Any]
    ) -> CommonAttentionMetadata:
        """See `vllm_packcache.worker.step.Compaction`."""
        table, rows = common.block_table_tensor, len(common.seq_lens)
        split = self.kept.block_size // builder.kv_cache_spec.block_size
        if builder not in self.out:
            most_rows = builder.vllm_config.scheduler_config.max_num_seqs
            self.out[builder] = CompactedRows.empty(most_rows, self.max_blocks * split, table.device)
        out = self.out[builder].first(rows)
        compact_rows(table, common.seq_lens, self.kept.memory, self.slots, out, self.kept.block_size, split)
        compacted = replace(
            common,
            seq_lens=out.seq_lens,
            block_table_tensor=out.block_table,
            _num_computed_tokens_cache=None,
            _token_to_req_indices_cache=None,
        )
        if len(self.slots_np) == 0:
            # Warm-up and capture: lengths on the host are bounds for whatever is replayed.
            return replace(compacted, max_seq_len=min(common.max_seq_len, self.max_blocks * self.kept.block_size))
        lengths = common.seq_lens_cpu_upper_bound - self.kept.dropped_tokens(self.slots_np, rows)
        return replace(compacted, seq_lens_cpu_upper_bound=lengths, max_seq_len=int(lengths.max()))


def hear_decisions(update_requests: Callable[..., None]) -> Callable[..., None]:
    """Wrap ``GPUModelRunner.update_requests``, after which the runner knows the requests of the step."""

    @wraps(update_requests)
    def wrapper(runner: GPUModelRunner, scheduler_output: SchedulerOutput) -> None:
        update_requests(runner, scheduler_output)
        if told := getattr(scheduler_output, DECISIONS, None):
            runner.model_state.hear(told)
        if written := getattr(scheduler_output, SECOND_BLOCKS, None):
            runner.model_state.hear_blocks(written)
        if forked := getattr(scheduler_output, FORKS, None):
            runner.model_state.hear_forks(forked)

    return wrapper


@cache
def retaining_model_state(base: type[ModelState]) -> type[ModelState]:
    """A subclass of the model state ``base`` for a server with a policy."""

    class RetainingModelState(base):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            config = config_of(self)
            assert config is not None, "only a server that is switched on has such a state"
            self._config = config
            self._videos: dict[str, Kept | None] = {}
            self._kept: KeptBlocks
            self._compacted: dict[AttentionMetadataBuilder[Any], CompactedRows] = {}
            self._batch: Any = None
            self._rows: list[Row] = []
            self._no_slots = torch.empty(0, dtype=torch.int64, device=self.device)
            # The model's copy: slots are mapped, and samplers seeded, by a token's index.
            self._positions = torch.zeros(self.max_num_tokens, dtype=torch.int64, device=self.device)

        def initialize_kv_cache(self, kv_cache_config: KVCacheConfig, block_tables: BlockTables) -> None:
            super().initialize_kv_cache(kv_cache_config, block_tables)
            group = kv_cache_config.kv_cache_groups[0]
            # However long a video may get, it holds no more than there is.
            self._max_blocks = min(block_tables.block_tables[0].gpu.shape[1], kv_cache_config.num_blocks)
            self._kept = self._new_kept(kv_cache_config, block_tables)
            # vLLM may do this twice, the first time to profile: nothing of that may stay alive.
            self._compacted.clear()
            self._rotation: KeyRotation | None = None
            layers = self.vllm_config.compilation_config.static_forward_context
            self._layers = [layers[name] for name in group.layer_names]
            if self._config.positions == "rebase":
                rotary_of(self.model)
                for layer in self._layers:
                    cached_keys(layer)

        def _new_kept(self, kv_cache_config: KVCacheConfig, block_tables: BlockTables) -> KeptBlocks:
            slots = len(block_tables.block_tables[0].gpu)
            size = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
            return KeptBlocks(slots, self._max_blocks, size, self.device)

        def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
            super().add_request(req_index, new_req_data)
            made = self._requested(new_req_data)
            self._videos[new_req_data.req_id] = Kept.of(made, self._kept.block_size)
            self._kept.forget(req_index)

        def _requested(self, new_req_data: NewRequestData) -> VideoRequest | None:
            params, token_ids = new_req_data.sampling_params, new_req_data.prompt_token_ids
            return self._config.request_of(params, token_ids, new_req_data.prompt_len)

        def remove_request(self, req_id: str) -> None:
            super().remove_request(req_id)
            self._videos.pop(req_id, None)

        def hear(self, told: Mapping[str, Sequence[Decision]]) -> None:
            """What lives of videos whose policy reads tokens; all of them have been added."""
            for name, decisions in told.items():
                video = self._videos[name]
                assert video is not None, "only what a video keeps is told"
                video.retention.tell(decisions)

        def preprocess_state(
            self,
            input_batch: InputBatch,
            block_tables: tuple[Tensor, ...],
            kv_cache_config: KVCacheConfig,
            num_computed_tokens: Tensor,
        ) -> None:
            super().preprocess_state(input_batch, block_tables, kv_cache_config, num_computed_tokens)
            self._batch, self._rows = input_batch, self._rows_of(input_batch)
            for index, (row, slot) in enumerate(zip(self._rows, input_batch.idx_mapping_np, strict=True)):
                self._kept.enter(slot, row)
                if row.retention is not None and row.positions is not None and row.positions.slides(row.computed):
                    blocks = block_tables[0][index]
                    self._key_rotation().slide(row.retention, row.positions, row.computed, blocks)
            self._kept.apply()

        def prepare_attn(self, input_batch: InputBatch, *args: Any, **kwargs: Any) -> dict[str, Any]:
            slots, slots_np = self._no_slots, np.empty(0, dtype=np.intp)
            if input_batch is self._batch:
                slots, slots_np = input_batch.idx_mapping, input_batch.idx_mapping_np
            with publish(DeviceCompaction(self._kept, slots, slots_np, self._compacted, self._max_blocks)):
                return super().prepare_attn(input_batch, *args, **kwargs)

        def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
            inputs = super().prepare_inputs(input_batch, req_states)
            if not self._positions_change:
                return inputs
            positions = inputs.get("positions")
            if positions is None:
                positions = self._positions[: len(input_batch.positions)].copy_(input_batch.positions)
            shifts = position_shifts(self._rows) if input_batch is self._batch else None
            if shifts is not None:
                on_device = async_tensor_h2d(shifts, device=self.device)
                positions[..., : shifts.shape[1]] += on_device if positions.dim() > 1 else on_device[0]
            return {**inputs, "positions": positions}

        def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
            inputs = super().prepare_dummy_inputs(num_reqs, num_tokens)
            if self._positions_change:
                inputs.setdefault("positions", self._positions[:num_tokens])
            return inputs

        @property
        def _positions_change(self) -> bool:
            layout = self._config.layout
            return self._config.positions == "rebase" or (layout is not None and layout.axis_scale is not None)

        def _rows_of(self, input_batch: InputBatch) -> list[Row]:
            rows = []
            for name, computed, scheduled in zip(
                input_batch.req_ids,
                input_batch.num_computed_tokens_np.tolist(),
                input_batch.num_scheduled_tokens.tolist(),
                strict=True,
            ):
                video = self._videos[name]
                if video is None:
                    rows.append(Row(None, computed, scheduled))
                    continue
                layout = video.retention.layout
                if scheduled > 1 and layout.frame_of(computed) != layout.frame_of(computed + scheduled - 1):
                    raise RuntimeError(
                        f"tokens {computed} to {computed + scheduled} of a video are run in one step, and they are of "
                        "several frames: the scheduler did not end the chunk where the first one ends"
                    )
                rows.append(Row(video.retention, computed, scheduled, video.positions))
            return rows

        def _key_rotation(self) -> KeyRotation:
            if self._rotation is None:
                self._rotation = KeyRotation.of(rotary_of(self.model), map(cached_keys, self._layers))
            return self._rotation

    RetainingModelState.__qualname__ = f"Retaining{base.__qualname__}"
    return RetainingModelState
