"""The adapter of the V2 runner: what is uploaded and when, what positions become, and that nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.runner import needs_v2
from tests.serving.conftest import prompt, sampling
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.core.layout import FrameLayout, VideoLayout
from vllm_packcache.core.policies import SlidingWindow
from vllm_packcache.core.retention import Retention
from vllm_packcache.worker.step import Row

pytestmark = needs_v2

BLOCK = 4
CONFIG = {"window": 2, "history_frames": 1.5}


@pytest.fixture
def runner(engine: Any) -> Any:
    llm = engine("packcache", CONFIG, variant="adapter", max_num_seqs=4)
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    runner.llm = llm
    return runner


@pytest.fixture
def kept(runner: Any) -> Any:
    """Made where a CPU worker has replaced what needs pinned memory."""
    from vllm_packcache.worker.runner_v2 import KeptBlocks

    return KeptBlocks(3, 40, BLOCK, runner.device)


def retention() -> Retention:
    """Condition of 10 tokens, frames of 8, of which the last is kept: in frame 2 blocks 0-2 and 4 on."""
    return Retention(VideoLayout(FrameLayout(8), 10), SlidingWindow(window=1), BLOCK)


def test_what_a_request_keeps_is_uploaded_once_a_frame(kept: Any) -> None:
    video = retention()
    writes = []
    stage_write = kept._memory.stage_write
    kept._memory.stage_write = lambda *args: (writes.append(args), stage_write(*args))
    for computed in (0, 9, 10, 11, 17, 18, 25, 26, 27):
        kept.enter(1, Row(video, computed, 1))
        kept.apply()
    assert [write[0] for write in writes] == [1] * 4, "the condition and frames 0 to 2"
    past, first = video.past(2), video.blocks.tail_start(2)
    assert kept.memory[1, : 2 + len(past)].tolist() == [len(past), first, *past]
    assert len(past) < first
    dropped = kept.dropped_tokens(np.array([1, 0]), 4)
    assert dropped.tolist() == [(first - len(past)) * BLOCK, 0, 0, 0]


def test_who_comes_after_a_video_reads_everything(kept: Any) -> None:
    kept.enter(2, Row(retention(), 26, 1))
    kept.apply()
    assert kept.memory[2, 1] > 0
    kept.forget(2)
    kept.enter(2, Row(None, 26, 1))
    kept.apply()
    assert kept.memory[2, :2].tolist() == [0, 0]
    assert kept.dropped_tokens(np.array([2]), 1).tolist() == [0]


def generate_watched(runner: Any, ids: list[int], count: int, watch: Any, **options: int) -> list[int]:
    """Tokens of a request; ``watch`` is called after every step."""
    engine = runner.llm.llm_engine
    engine.add_request("watched", {"prompt_token_ids": ids}, sampling(count, **options))
    tokens: list[int] = []
    while engine.has_unfinished_requests():
        for output in engine.step():
            tokens = list(output.outputs[0].token_ids)
        watch()
    return tokens


def expected_tokens(reference: Any, ids: list[int], count: int, **options: int) -> list[int]:
    plan = ServerConfig.parse("packcache", CONFIG).plan({f"packcache_{k}": v for k, v in options.items()}, len(ids))
    return reference.generate(ids, count, plan, 32).token_ids


def test_only_the_model_sees_rebased_positions(runner: Any) -> None:
    """Samplers are seeded with a token's index: re-based ones would come again."""
    seen: list[tuple[int, int]] = []

    def watch() -> None:
        seen.append((int(runner.input_buffers.positions[0]), int(runner.model_state._positions[0])))

    generate_watched(runner, prompt(20, seed=1), 50, watch, tokens_per_frame=10)
    # The last step samples the last token, so it computes the one before.
    decoding = dict(seen[1:50])
    assert list(decoding) == list(range(20, 69))
    assert all(model == index - 10 * max(0, (index - 20) // 10 - 2) for index, model in decoding.items())


def test_tables_are_as_long_as_what_a_request_can_hold(runner: Any, reference: Any) -> None:
    state, config = runner.model_state, runner.kv_cache_config
    assert state._kept.memory.shape == (4, 2 + 8192 // 32), "the longest request holds less than there is"
    try:
        state.initialize_kv_cache(replace(config, num_blocks=9), runner.block_tables)
        ids, options = prompt(20, seed=4), {"tokens_per_frame": 11}
        tokens = generate_watched(runner, ids, 40, lambda: None, **options)
        # As vLLM captures: with lengths of the longest sequence.
        runner._dummy_run(4, uniform_decode=True)
        assert state._kept.memory.shape == (4, 2 + 9)
        assert {rows.block_table.shape for rows in state._compacted.values()} == {(4, 9)}
        assert tokens == expected_tokens(reference, ids, 40, **options)
    finally:
        state.initialize_kv_cache(config, runner.block_tables)


def test_warm_up_between_two_steps_changes_nothing(runner: Any, reference: Any) -> None:
    ids, options = prompt(30, seed=2), {"tokens_per_frame": 9}
    steps = iter(range(1000))

    def watch() -> None:
        # As data-parallel ranks without requests do, in the slots of requests that others have.
        if next(steps) % 10 == 5:
            runner._dummy_run(4, uniform_decode=True)

    assert generate_watched(runner, ids, 45, watch, **options) == expected_tokens(reference, ids, 45, **options)


def test_a_chunk_of_several_frames_is_an_error(runner: Any) -> None:
    state = runner.model_state
    params = SimpleNamespace(extra_args={"packcache_tokens_per_frame": 8})
    video = SimpleNamespace(req_id="a", sampling_params=params, prompt_token_ids=[0] * 10, prompt_len=10)
    text = SimpleNamespace(req_id="b", sampling_params=None, prompt_token_ids=[0] * 10, prompt_len=10)
    state.add_request(0, video)
    state.add_request(1, text)

    def rows(*chunks: tuple[str, int, int]) -> list[Row]:
        names, computed, scheduled = zip(*chunks, strict=True)
        return state._rows_of(
            SimpleNamespace(
                req_ids=list(names), num_computed_tokens_np=np.array(computed), num_scheduled_tokens=np.array(scheduled)
            )
        )

    first, second = rows(("b", 3, 90), ("a", 18, 8))
    assert first == Row(None, 3, 90)
    assert (second.computed, second.scheduled) == (18, 8)
    assert second.retention is not None
    with pytest.raises(RuntimeError, match="tokens 17 to 19 of a video are run in one step, and they are of several"):
        rows(("a", 17, 2))
    for name in ("a", "b", "unknown"):
        state.remove_request(name)
    assert not {"a", "b"} & set(state._videos)


@pytest.mark.parametrize(
    "path",
    [
        "cpu_attn.CPUAttentionMetadataBuilder",
        "flash_attn.FlashAttentionMetadataBuilder",
        "triton_attn.TritonAttentionMetadataBuilder",
        "flex_attention.FlexAttentionMetadataBuilder",
    ],
)
def test_backends_plan_with_live_lengths(runner: Any, kept: Any, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from vllm_packcache.worker.attention import retaining_builder
    from vllm_packcache.worker.runner_v2 import DeviceCompaction
    from vllm_packcache.worker.step import publish

    module_name, name = path.split(".")
    module = import_module(f"vllm.v1.attention.backends.{module_name}")
    group = runner.attn_groups[0][0]
    layout = VideoLayout(FrameLayout(100), 40)
    video = Retention(layout, SlidingWindow(window=1), group.kv_cache_spec.block_size)
    kept.block_size = group.kv_cache_spec.block_size
    computed = layout.frame_start(4) + 7
    kept.enter(2, Row(video, computed, 1))
    kept.enter(0, Row(None, 60, 1))
    kept.apply()
    # The last row fills up the batch.
    lengths = torch.tensor([computed + 1, 61, 0], dtype=torch.int32)
    starts = torch.tensor([0, 1, 2, 2], dtype=torch.int32)
    table = torch.randperm(500, dtype=torch.int32)[:60].view(3, 20)
    common = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts.clone(),
        seq_lens=lengths,
        seq_lens_cpu_upper_bound=lengths.clone(),
        num_reqs=3,
        num_actual_tokens=2,
        max_query_len=1,
        max_seq_len=int(lengths.max()),
        block_table_tensor=table.clone(),
        slot_mapping=torch.arange(2),
    )
    builder = retaining_builder(getattr(module, name))(
        group.kv_cache_spec, group.layer_names, runner.vllm_config, runner.device
    )
    planned: dict[str, Any] = {}
    if module_name == "flash_attn":
        # As FlashAttention 3 has it.
        builder.aot_schedule, builder.aot_sliding_window = True, (-1, -1)
        monkeypatch.setattr(
            module, "get_scheduler_metadata", lambda **arguments: planned.update(arguments), raising=False
        )
    live = [video.live_tokens(computed + 1), 61, 0]
    assert live[0] < computed + 1
    compaction = DeviceCompaction(kept, torch.tensor([2, 0]), np.array([2, 0]), {}, table.shape[1])
    before: list[int] = []
    for _ in range(2):
        with publish(compaction):
            metadata = builder.build(0, common)
        assert metadata.seq_lens[:3].tolist() == live
        assert metadata.max_seq_len == live[0]
        blocks = video.live_blocks(computed + 1)
        assert metadata.block_table[0, : len(blocks)].tolist() == table[0, blocks].tolist()
        assert metadata.block_table[1, :2].tolist() == table[1, :2].tolist()
        if planned:
            assert planned["cache_seqlens"].tolist() == live
            assert planned["max_seqlen_k"] == live[0]
        # In the same memory with every step.
        now = [metadata.block_table.data_ptr(), metadata.seq_lens.data_ptr()]
        assert before in ([], now)
        before = now
    assert common.seq_lens.tolist() == lengths.tolist()
    assert torch.equal(common.block_table_tensor, table)


def test_second_streams_need_layers_of_one_kind() -> None:
    """One group of a spec of ours: a block is then a place of one size in every layer's cache."""
    from vllm_packcache.config.errors import ConfigError
    from vllm_packcache.worker.guidance import check_groups

    ours, theirs = (SimpleNamespace(kv_cache_spec=spec) for spec in (SimpleNamespace(stream=0), SimpleNamespace()))
    check_groups(SimpleNamespace(kv_cache_groups=[ours]), "some/model")
    for groups in ([ours, ours], [ours, theirs], [theirs]):
        with pytest.raises(ConfigError, match=r"guidance is for a model whose layers .* those of some/model differ"):
            check_groups(SimpleNamespace(kv_cache_groups=groups), "some/model")
