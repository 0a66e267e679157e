"""Full CUDA graphs without a GPU: what is captured is run again in every decode step, with nothing but its own tensors.

A captured graph reads the tensors that it was captured with, wherever the arguments of a later step point. On a CPU
nothing can be captured; here the model is called instead, with the inputs and the metadata of the capture.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from vllm.config import VllmConfig
from vllm.platforms.cpu import CpuPlatform

from tests.margins import Tie
from tests.runner import needs_v2
from tests.serving.conftest import generate, prompt, run, sampling
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.reference import LlamaReference

# The V1 runner leaves attention out of graphs.
pytestmark = needs_v2

CONFIG = {"window": 2, "history_frames": 1.5}
SIZES = (1, 2, 4)


class Replaying:
    """In place of a runner's ``ModelCudaGraphManager``, with a graph for decode steps of each of `SIZES` requests."""

    def __init__(self, runner: Any) -> None:
        from vllm.v1.worker.gpu.cudagraph_utils import prepare_inputs_to_capture

        self.runner = runner
        self.replayed: list[tuple[int, int]] = []
        self.graphs = {}
        self.sizes = [size for size in SIZES if size <= runner.max_num_reqs]
        for size in self.sizes:
            inputs = {
                "input_ids": runner.input_buffers.input_ids[:size],
                "positions": runner.input_buffers.positions[:size],
                "intermediate_tensors": None,
                "inputs_embeds": None,
                **runner.model_state.prepare_dummy_inputs(size, size),
            }
            state = prepare_inputs_to_capture(
                size,
                size,
                runner.model_state,
                runner.input_buffers,
                runner.block_tables,
                runner.attn_groups,
                runner.kv_cache_config,
                full_cudagraph=True,
                max_query_len=1,
            )
            self.graphs[size] = inputs, state
        self.of_step: dict[str, Any] = {}
        prepare_attn = runner.model_state.prepare_attn

        def remembering(*args: Any, **kwargs: Any) -> Any:
            self.of_step = prepare_attn(*args, **kwargs)
            return self.of_step

        runner.model_state.prepare_attn = remembering

    def dispatch(self, num_reqs: int, num_tokens: int, uniform_token_count: int | None, **kwargs: Any) -> Any:
        from vllm.config.compilation import CUDAGraphMode
        from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

        size = next((size for size in self.sizes if size >= num_reqs), None)
        if uniform_token_count != 1 or size is None:
            return BatchExecutionDescriptor(CUDAGraphMode.NONE, num_tokens, num_reqs)
        self.replayed.append((size, num_reqs))
        return BatchExecutionDescriptor(CUDAGraphMode.FULL, size, size, uniform_token_count)

    def run_fullgraph(self, desc: Any) -> Any:
        from vllm.forward_context import set_forward_context
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata

        inputs, state = self.graphs[desc.num_reqs]
        metadata = dict(state.attn_metadata)
        for name, now in self.of_step.items():
            if isinstance(now, CPUAttentionMetadata):
                # Its plan of work is the one thing that is not kept in place: why that backend supports no graphs.
                metadata[name] = replace(metadata[name], scheduler_metadata=now.scheduler_metadata)
            for field in ("block_table", "seq_lens", "query_start_loc", "slot_mapping"):
                assert getattr(metadata[name], field).data_ptr() == getattr(now, field).data_ptr(), field
        with set_forward_context(
            metadata, self.runner.vllm_config, num_tokens=desc.num_tokens, slot_mapping=state.slot_mappings
        ):
            return self.runner.model(**inputs)


@pytest.mark.parametrize("mode", ["rebase", "absolute"])
def test_what_was_captured_serves_every_decode_step(engine: Any, reference: Any, mode: str) -> None:
    config = {**CONFIG, "positions": mode}
    llm = engine("packcache", config, variant="graphs", max_num_seqs=4)
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    graphs = Replaying(runner)
    runner.cudagraph_manager = graphs
    server = ServerConfig.parse("packcache", config)
    requests = [
        (prompt(50, seed=1), 60, {"tokens_per_frame": 11}),
        (prompt(40, seed=2), 45, {}),
        (prompt(80 + 4 * 40, seed=3), 30, {"tokens_per_frame": 40, "condition_tokens": 80}),
    ]
    answers = run(llm, [ids for ids, _, _ in requests], [sampling(count, **options) for _, count, options in requests])
    for (ids, count, options), tokens in zip(requests, answers, strict=True):
        plan = server.plan({f"packcache_{name}": value for name, value in options.items()}, len(ids))
        reference.check(ids, tokens, count, plan)
    assert {(4, 3), (2, 2), (1, 1)} <= set(graphs.replayed)


def test_a_gpu_backend_equals_the_reference(engine: Any, reference: Any, backend: str) -> None:
    """Keys in rows, and metadata builders that support every graph."""
    condition, frame, block_size = 20, 20, 16
    llm = engine(
        "packcache", CONFIG, variant=backend, block_size=block_size, max_model_len=128, max_num_batched_tokens=64,
        max_num_seqs=2, num_gpu_blocks_override=24,
    )  # fmt: skip
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    assert runner.attn_groups[0][0].backend.get_name() == backend
    graphs = Replaying(runner)
    runner.cudagraph_manager = graphs
    options = {"tokens_per_frame": frame, "condition_tokens": condition}
    plan = ServerConfig.parse("packcache", CONFIG).plan({f"packcache_{k}": v for k, v in options.items()}, condition)
    video, text = prompt(condition + 4 * frame - 5, seed=1), prompt(30, seed=2)
    made, rest = run(llm, [video, text], [sampling(10, **options), sampling(9)])
    reference.check(video, made, 10, plan, block_size)
    reference.check(text, rest, 9)
    assert reference.differs(video, made)
    assert {(2, 2), (1, 1)} <= set(graphs.replayed)


def test_chunks_end_with_frames_where_a_backend_has_rows_for_requests_only(
    engine: Any, reference: Any, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The V1 runner with a GPU's backend: a chunk of several frames would have more rows than there is memory for."""
    monkeypatch.setattr(VllmConfig, "use_v2_model_runner", False)
    condition, frame, block_size = 20, 25, 16
    config = {"window": 2, "history_frames": 1.5, "positions": "absolute"}
    llm = engine(
        "packcache", config, variant=f"V1 {backend}", block_size=block_size, max_model_len=256,
        max_num_batched_tokens=200, max_num_seqs=1, num_gpu_blocks_override=40,
    )  # fmt: skip
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    assert type(runner).__mro__[1].__module__ == "vllm.v1.worker.gpu_model_runner"
    assert runner.attn_groups[0][0].backend.get_name() == backend
    options = {"tokens_per_frame": frame, "condition_tokens": condition}
    plan = ServerConfig.parse("packcache", config).plan({f"packcache_{k}": v for k, v in options.items()}, condition)
    video = prompt(condition + 5 * frame - 3, seed=5)
    made = generate(llm, video, 6, **options)
    reference.check(video, made, 6, plan, block_size)
    assert reference.differs(video, made)


class QuantisedReference(LlamaReference):
    """Keys, once they are rotated, and values are stored as fp8."""

    def rotate(self, heads: Tensor, at: Tensor) -> Tensor:
        rotated = super().rotate(heads, at)
        return _as_fp8(rotated) if heads.shape[1] == self.config.kv_heads else rotated

    def attention(self, queries: Tensor, queries_at: Tensor, cached: Tensor, keys_at: Tensor, mask: Tensor) -> Tensor:
        stored = torch.stack([cached[0], _as_fp8(cached[1])])
        return super().attention(queries, queries_at, stored, keys_at, mask)


def _as_fp8(numbers: Tensor) -> Tensor:
    """As Triton stores them: its interpreter rounds some in its own way."""
    stored = torch.empty(numbers.shape, dtype=torch.float8_e4m3fn)
    _store[(1,)](numbers.contiguous(), stored, numbers.numel(), triton.next_power_of_2(numbers.numel()))
    return stored.to(numbers.dtype)


@triton.jit
def _store(source, target, count, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    index = tl.arange(0, TILE)
    tl.store(target + index, tl.load(source + index, mask=index < count), mask=index < count)


FP8_TIE = 0.05
"""As `tests.margins.TIE`: a sum that is rounded otherwise may become the next number of fp8."""


@pytest.mark.parametrize("backend", ["TRITON_ATTN"], indirect=True)
def test_a_quantised_cache_with_absolute_positions(
    engine: Any, reference: Any, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here, because vLLM's attention for CPUs stores fp8 only where there is AVX-512 or AMX."""
    # The kernel that writes to the cache asks whether the GPU knows fp8; what interprets it does.
    monkeypatch.setattr(CpuPlatform, "has_device_capability", classmethod(lambda cls, *args, **kwargs: True))
    condition, frame, block_size = 20, 25, 16
    config = {**CONFIG, "positions": "absolute"}
    llm = engine(
        "packcache", config, variant=f"fp8 {backend}", block_size=block_size, max_model_len=256,
        max_num_batched_tokens=64, max_num_seqs=1, num_gpu_blocks_override=40, kv_cache_dtype="fp8",
    )  # fmt: skip
    options = {"tokens_per_frame": frame, "condition_tokens": condition}
    plan = ServerConfig.parse("packcache", config).plan({f"packcache_{k}": v for k, v in options.items()}, condition)
    video = prompt(condition + 4 * frame - 3, seed=6)
    own = QuantisedReference(reference.config, reference._weights)
    made = own.generate(video, 5, plan, block_size)
    if made.gaps.min() < FP8_TIE or made.token_ids == own.generate(video, 5).token_ids:
        raise Tie("a token that fp8 may turn, or none that the policy does")
    assert generate(llm, video, 5, **options) == made.token_ids
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    layers = runner.vllm_config.compilation_config.static_forward_context.values()
    assert {layer.kv_cache.element_size() for layer in layers} == {1}
