"""The attention backend of a model under a policy: the platform's own, reading compacted block tables.

A subclass is made for whatever backend vLLM has chosen, so there is nothing here about any one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_packcache.worker.blocks.batch import BatchReads
from vllm_packcache.worker.blocks.compaction import CompactedBatch
from vllm_packcache.worker.step import Step, current_compaction


@cache
def retaining_backend(
    base: type[AttentionBackend], make_spec: Callable[[AttentionSpec], AttentionSpec]
) -> type[AttentionBackend]:
    """A subclass of ``base`` whose layers get the spec of ``make_spec`` and read compacted block tables."""

    class RetainingBackend(base):
        @classmethod
        def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
            return make_spec(super().customize_spec(spec))

        @staticmethod
        def get_builder_cls() -> type[AttentionMetadataBuilder]:
            return retaining_builder(base.get_builder_cls())

    RetainingBackend.__qualname__ = f"Retaining{base.__qualname__}"
    return RetainingBackend


@cache
def retaining_builder(base: type[AttentionMetadataBuilder]) -> type[AttentionMetadataBuilder]:
    """A subclass of the metadata builder ``base`` that compacts what it is given."""

    class RetainingBuilder(base):
        # Metadata of another group of layers has another group's blocks: it is built anew, from compacted ones.
        supports_update_block_table = False

        @classmethod
        def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
            if vllm_config.use_v2_model_runner:
                return super().get_cudagraph_support(vllm_config, kv_cache_spec)
            # With the V1 runner a compacted block table is a new tensor each step, and the rows of a step are more
            # than its requests when a chunk spans frames: neither can be replayed from a captured graph.
            return AttentionCGSupport.NEVER

        def build(
            self,
            common_prefix_len: int,
            common_attn_metadata: CommonAttentionMetadata,
            fast_build: bool = False,
            **kwargs: Any,
        ) -> Any:
            compaction = current_compaction()
            if compaction is not None:
                common_attn_metadata = compaction(common_attn_metadata, self)
            return super().build(common_prefix_len, common_attn_metadata, fast_build, **kwargs)

    RetainingBuilder.__qualname__ = f"Retaining{base.__qualname__}"
    return RetainingBuilder


@dataclass(frozen=True, slots=True)
class HostCompaction:
    """Compacts a step with what is known on the host, rows that span frames included."""

    batch: BatchReads

    @property
    def step(self) -> Step:
        """The step, request by request."""
        return self.batch.step

    def __call__(
        self, common: CommonAttentionMetadata, builder: AttentionMetadataBuilder[Any]
    ) -> CommonAttentionMetadata:
        """See `vllm_packcache.worker.step.Compaction`."""
        if self.batch.reads_everything:
            return common
        return compact_metadata(common, self.batch.compact(builder.kv_cache_spec.block_size))


def compact_metadata(common: CommonAttentionMetadata, batch: CompactedBatch) -> CommonAttentionMetadata:
    """``common`` with live blocks and live lengths only.

    Slot mapping, positions and the number of tokens stay: where keys are written and what is computed does not
    change, only what is read.
    """
    device = common.block_table_tensor.device
    seq_lens = torch.from_numpy(batch.seq_lens)
    compacted = replace(
        common,
        seq_lens=async_tensor_h2d(seq_lens, device=device),
        seq_lens_cpu_upper_bound=seq_lens,
        max_seq_len=int(batch.seq_lens.max()),
        block_table_tensor=async_tensor_h2d(batch.block_table, device=device),
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )
    if len(batch.seq_lens) == common.num_reqs:
        # Decoding, as a rule: no chunk spans frames, and the queries are those of the requests.
        return compacted
    query_start_loc = torch.from_numpy(batch.query_start_loc)
    query_lens = batch.query_start_loc[1:] - batch.query_start_loc[:-1]
    is_prefilling = common.is_prefilling
    return replace(
        compacted,
        query_start_loc=async_tensor_h2d(query_start_loc, device=device),
        query_start_loc_cpu=query_start_loc,
        num_reqs=len(batch.seq_lens),
        max_query_len=int(query_lens.max()),
        is_prefilling=None if is_prefilling is None else is_prefilling[torch.from_numpy(batch.source_rows)],
        req_idx=None if common.req_idx is None else common.req_idx[batch.source_rows],
    )
