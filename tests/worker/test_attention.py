"""The wrapped attention backend: the platform's own but for the spec and the block tables it reads."""

from __future__ import annotations

from dataclasses import fields
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec
from vllm.v1.worker.utils import AttentionGroup

from vllm_packcache.config.server import ServerConfig
from vllm_packcache.core.layout import FrameLayout, VideoLayout
from vllm_packcache.core.policies import SlidingWindow
from vllm_packcache.core.retention import Retention
from vllm_packcache.engine.spec import RetentionSpec
from vllm_packcache.worker.attention import HostCompaction, compact_metadata, retaining_backend, retaining_builder
from vllm_packcache.worker.blocks.batch import BatchReads
from vllm_packcache.worker.blocks.compaction import compact
from vllm_packcache.worker.step import Row, Step, current_compaction, publish

BLOCK = 4
SPEC = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=32, dtype=torch.float32)
CONFIG = ServerConfig.parse("sliding_window", {"window": 1})


def make_spec(spec: AttentionSpec) -> AttentionSpec:
    return RetentionSpec.retaining(spec, CONFIG, 0)


def make_step() -> Step:
    """A chunk over the condition's end and three frames, and a decoding text request."""
    retention = Retention(VideoLayout(FrameLayout(8), 10), SlidingWindow(window=1), BLOCK)
    table = np.stack([np.arange(1, 10), np.arange(11, 20)]).astype(np.int32)
    return Step([Row(retention, 6, 24), Row(None, 16, 1)], table, BLOCK)


def make_common(**changes: Any) -> CommonAttentionMetadata:
    """What vLLM builds for `make_step`."""
    query_start_loc = torch.tensor([0, 24, 25], dtype=torch.int32)
    values: dict[str, Any] = {
        "query_start_loc": query_start_loc,
        "query_start_loc_cpu": query_start_loc.clone(),
        "seq_lens": torch.tensor([30, 17], dtype=torch.int32),
        "seq_lens_cpu_upper_bound": torch.tensor([30, 17], dtype=torch.int32),
        "num_reqs": 2,
        "num_actual_tokens": 25,
        "max_query_len": 24,
        "max_seq_len": 30,
        "block_table_tensor": torch.from_numpy(make_step().block_table.copy()),
        "slot_mapping": torch.arange(100, 125),
        "positions": torch.cat([torch.arange(6, 30), torch.tensor([16])]),
        "is_prefilling": torch.tensor([True, False]),
        "req_idx": np.array([7, 3]),
        "_num_computed_tokens_cache": torch.tensor([6, 16]),
        "_token_to_req_indices_cache": torch.zeros(25, dtype=torch.int32),
    }
    return CommonAttentionMetadata(**{**values, **changes})


# --------------------------------------------------------------------------- compact_metadata


def test_metadata_describes_the_compacted_batch() -> None:
    step, common = make_step(), make_common()
    batch = compact(step, BLOCK)
    new = compact_metadata(common, compact(step, BLOCK))

    assert new.block_table_tensor.tolist() == batch.block_table.tolist()
    assert new.query_start_loc.tolist() == new.query_start_loc_cpu.tolist() == [0, 4, 12, 20, 24, 25]
    assert new.seq_lens.tolist() == new.seq_lens_cpu_upper_bound.tolist() == [10, 18, 26, 26, 17]
    assert new.num_reqs == new.batch_size() == 5
    assert new.max_query_len == 8
    assert new.max_seq_len == 26
    assert new.is_prefilling.tolist() == [True, True, True, True, False]
    assert new.req_idx.tolist() == [7, 7, 7, 7, 3]
    for name in ("query_start_loc", "query_start_loc_cpu", "seq_lens", "block_table_tensor"):
        assert getattr(new, name).dtype == getattr(common, name).dtype == torch.int32
    # What vLLM derives and remembers is derived anew.
    assert new.compute_num_computed_tokens().tolist() == [6, 10, 18, 22, 16]


def test_what_is_computed_and_written_stays() -> None:
    common = make_common()
    new = compact_metadata(common, compact(make_step(), BLOCK))
    assert new.slot_mapping is common.slot_mapping
    assert new.positions is common.positions
    assert new.num_actual_tokens == common.num_actual_tokens
    assert new.causal is True


def test_the_metadata_given_is_left_as_it_was() -> None:
    common, untouched = make_common(), make_common()
    compact_metadata(common, compact(make_step(), BLOCK))
    for field in fields(common):
        before, after = getattr(untouched, field.name), getattr(common, field.name)
        assert np.array_equal(before, after), field.name


def test_optional_fields_may_be_missing() -> None:
    new = compact_metadata(make_common(is_prefilling=None, req_idx=None), compact(make_step(), BLOCK))
    assert new.is_prefilling is None
    assert new.req_idx is None


# --------------------------------------------------------------------------- retaining_backend


@pytest.fixture(
    params=[
        "cpu_attn.CPUAttentionBackend",
        "flash_attn.FlashAttentionBackend",
        "triton_attn.TritonAttentionBackend",
        "flashinfer.FlashInferBackend",
        "flex_attention.FlexAttentionBackend",
    ]
)
def backend(request: pytest.FixtureRequest) -> type[AttentionBackend]:
    module, name = request.param.split(".")
    try:
        return getattr(import_module(f"vllm.v1.attention.backends.{module}"), name)
    except ImportError as error:
        pytest.skip(f"{name} cannot be imported here: {error}")


def test_it_is_the_backend_but_for_the_two_methods(backend: type[AttentionBackend]) -> None:
    before = dict(vars(backend))
    retaining = retaining_backend(backend, make_spec)

    assert issubclass(retaining, backend)
    assert retaining is not backend
    assert dict(vars(backend)) == before
    assert retaining.get_name() == backend.get_name()
    assert retaining.get_impl_cls() is backend.get_impl_cls()
    assert retaining.get_supported_kernel_block_sizes() == backend.get_supported_kernel_block_sizes()
    own = {name for name, value in vars(retaining).items() if callable(getattr(value, "__func__", value))}
    assert own == {"customize_spec", "get_builder_cls"}


def test_vllm_can_tell_it_from_the_backend(backend: type[AttentionBackend]) -> None:
    # Layers are grouped by this name: two that share it must be the same class.
    retaining = retaining_backend(backend, make_spec)
    assert retaining.full_cls_name() != backend.full_cls_name()


def test_the_same_arguments_give_the_same_class(backend: type[AttentionBackend]) -> None:
    assert retaining_backend(backend, make_spec) is retaining_backend(backend, make_spec)
    assert retaining_backend(backend, lambda spec: spec) is not retaining_backend(backend, make_spec)
    builder = retaining_backend(backend, make_spec).get_builder_cls()
    assert builder is retaining_backend(backend, make_spec).get_builder_cls()
    assert issubclass(builder, backend.get_builder_cls())


def test_two_backends_have_two_names() -> None:
    class Other(CPUAttentionBackend):
        pass

    names = {retaining_backend(base, make_spec).full_cls_name() for base in (CPUAttentionBackend, Other)}
    assert len(names) == 2


def test_layers_get_the_spec_of_the_policy_on_top_of_the_backends_own() -> None:
    class Customizing(CPUAttentionBackend):
        @classmethod
        def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
            return spec.copy_with_new_block_size(64)

    spec = retaining_backend(Customizing, make_spec).customize_spec(SPEC)
    assert isinstance(spec, RetentionSpec)
    assert spec.block_size == 64
    assert spec.server_config == CONFIG
    assert type(CPUAttentionBackend.customize_spec(SPEC)) is FullAttentionSpec


# --------------------------------------------------------------------------- the metadata builder


class RecordingBuilder(AttentionMetadataBuilder[Any]):
    """Hands back what it is given to build from."""

    _cudagraph_support = AttentionCGSupport.ALWAYS
    supports_update_block_table = True

    def __init__(self, kv_cache_spec: Any, layer_names: Any, vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
        **kwargs: Any,
    ) -> Any:
        return common_prefix_len, common_attn_metadata, fast_build, kwargs


class SmallBlockBackend(CPUAttentionBackend):
    """A backend whose kernel wants blocks of one size: vLLM splits the manager's for it."""

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [2]

    @staticmethod
    def get_builder_cls() -> type[AttentionMetadataBuilder]:
        return RecordingBuilder


class Reads(BatchReads):
    """Of one step, put together by hand."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self._spans = True


def test_the_builder_compacts_what_the_current_step_publishes() -> None:
    builder = retaining_builder(RecordingBuilder)(SPEC, ["layer"], None, torch.device("cpu"))
    with publish(HostCompaction(Reads(make_step()))):
        prefix, built, fast, kwargs = builder.build(0, make_common(), True, extra=1)
    assert built.seq_lens.tolist() == [10, 18, 26, 26, 17]
    assert (prefix, fast, kwargs) == (0, True, {"extra": 1})


def test_without_a_step_the_builder_is_the_original() -> None:
    builder = retaining_builder(RecordingBuilder)(SPEC, ["layer"], None, torch.device("cpu"))
    common = make_common()
    assert current_compaction() is None
    assert builder.build(0, common)[1] is common


@pytest.mark.parametrize("support", AttentionCGSupport)
def test_graph_support_is_the_backends_own_where_rows_are_requests(support: AttentionCGSupport) -> None:
    class Supporting(RecordingBuilder):
        _cudagraph_support = support

    builder = retaining_builder(Supporting)
    v1, v2 = (SimpleNamespace(use_v2_model_runner=v2) for v2 in (False, True))
    assert builder.get_cudagraph_support(v2, SPEC) is support
    assert builder.get_cudagraph_support(v1, SPEC) is AttentionCGSupport.NEVER


def test_metadata_is_not_patched_with_another_block_table() -> None:
    builder = retaining_builder(RecordingBuilder)
    assert builder.supports_update_block_table is False
    assert RecordingBuilder.supports_update_block_table is True


def test_vllm_splits_blocks_for_a_kernel_as_we_do() -> None:
    """The runner's table is in the manager's blocks; vLLM's group of layers builds in the kernel's."""
    retaining = retaining_backend(SmallBlockBackend, make_spec)
    group = AttentionGroup(retaining, ["layer"], make_spec(SPEC), 0, kernel_block_size=2)
    builder = retaining.get_builder_cls()(SPEC.copy_with_new_block_size(2), ["layer"], None, torch.device("cpu"))
    group.metadata_builders = [builder]
    group.kernel_block_table = torch.zeros(1, 8, 32, dtype=torch.int32)
    group.kernel_block_offsets = torch.arange(2, dtype=torch.int32)

    stock = group.build_metadata(make_common())[1]
    text = Step([Row(None, 6, 24), Row(None, 16, 1)], make_step().block_table, BLOCK)
    with publish(HostCompaction(Reads(text))):
        ours = group.build_metadata(make_common())[1]

    # Nothing is dropped of text, so each row must read the very blocks that vLLM would have it read.
    assert ours.seq_lens.tolist() == stock.seq_lens.tolist()
    for row, length in enumerate(ours.seq_lens.tolist()):
        used = -(-length // 2)
        assert ours.block_table_tensor[row, :used].tolist() == stock.block_table_tensor[row, :used].tolist()
