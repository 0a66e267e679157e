"""Older frames in fewer bits, in the real engine on vLLM's V2 runner.

What is rounded to few bits may be rounded to the other side by noise of float32. So the oracle begins with the engine's
own bytes: what the engine encodes must be what the loop would, and the loop goes on with what a plain decoder makes of
the engine's bytes. From there on every token must be equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.margins import refuse_masked_ties
from tests.runner import needs_v2
from tests.serving.conftest import schedule_asynchronously
from tests.serving.test_masked_tokens import BLOCK, CODES, Case, generate, params, plan_of, scheduler_of, staggered
from vllm_packcache.config.errors import ConfigError
from vllm_packcache.core.encoded import retention_of
from vllm_packcache.core.packing import HISTORY_FORMATS, Packing
from vllm_packcache.families import lumos
from vllm_packcache.reference import LumosReference, generate_masked, make_random_lumos
from vllm_packcache.reference.history import decode_reference

pytestmark = needs_v2

GRID = (4, 7)
FRAME = lumos.frame_layout(GRID).tokens_per_frame
ROUNDED = 1e-5
"""As `tests.margins.DRAWING`: what the engine's keys and the loop's differ by is decoded, and read by every layer."""

KEPT: dict[str, Any] = {
    "layout": {"grid": list(GRID)},
    "window": 3,
    "history_frames": 3,
    "selection": "spatial",
}


def config(history: str, **options: Any) -> dict[str, Any]:
    return {**KEPT, **options, "precision": {"history": history}}


# The oldest frames that are read have been moved twice since they were encoded.
TEXT_TO_VIDEO = Case(20, GRID).having(frames=5, steps=2, guidance=2, seed=1)
IMAGE_TO_VIDEO = Case(5, GRID, given=1).having(frames=4, steps=2, guidance=2, seed=2)
CONTINUED = Case(9, GRID, 5).having(frames=1, steps=2, guidance=2, seed=4, condition_frames=1)
UNGUIDED = Case(1, GRID).having(frames=5, steps=2, guidance=1, seed=6)
CASES = [TEXT_TO_VIDEO, IMAGE_TO_VIDEO, CONTINUED, UNGUIDED]


@pytest.fixture(scope="module")
def lumos_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_lumos(tmp_path_factory.mktemp("lumos"), visual_codes=CODES)


@pytest.fixture(scope="module")
def masked_engine(engine: Callable[..., Any], lumos_model: Path) -> Callable[..., Any]:
    def make(settings: dict[str, Any], **options: Any) -> Any:
        defaults = {
            "model": lumos_model,
            "max_model_len": 1024,
            "max_num_batched_tokens": 4 * FRAME,
            "max_num_seqs": 4,
            "num_gpu_blocks_override": 200,
        }
        return engine("packcache", settings, **{**defaults, **options})

    return make


class Encoded(NamedTuple):
    keys: Tensor
    values: Tensor
    data: Tensor


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Encoded]]:
    """What the engine encodes."""
    from vllm_packcache.worker.history import store

    seen: list[Encoded] = []
    encode = store.encode

    def spy(packing: Packing, keys: Tensor, values: Tensor) -> Tensor:
        seen.append(Encoded(keys.clone(), values.clone(), encode(packing, keys, values)))
        return seen[-1].data

    monkeypatch.setattr(store, "encode", spy)
    return seen


def expected(
    model: LumosReference, case: Case, settings: dict[str, Any], encoded: list[Encoded], block_size: int = BLOCK
) -> list[int]:
    """What the loop makes of a case, whose older frames are what the engine's bytes say."""
    history, heads, channels = settings["precision"]["history"], model.config.kv_heads, model.config.head_dim

    apart: list[float] = []

    def fade(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        wanted = keys.transpose(0, 1), values.transpose(0, 1)
        like = [own for own in encoded if own.keys.shape == wanted[0].shape]
        distances = [
            max((own.keys - wanted[0]).abs().max().item(), (own.values - wanted[1]).abs().max().item()) for own in like
        ]
        apart.append(min(distances))
        own = like[distances.index(apart[-1])]
        left = decode_reference(history, heads, channels, own.data.numpy().tobytes(), len(keys))
        return torch.from_numpy(left[0]), torch.from_numpy(left[1])

    plan = plan_of(case, repr(("packcache", settings)))
    assert plan.frames is not None
    made = generate_masked(model, case.ids, plan.frames, plan.conditional, plan.options, block_size, fade)
    # Where a tie has turned a token, what is encoded after it is something else.
    refuse_masked_ties(made, ROUNDED)
    assert max(apart) < 1e-4
    return made.token_ids


def nothing_is_held(llm: Any) -> bool:
    pool = scheduler_of(llm).kv_cache_manager.block_pool
    return pool.get_num_free_blocks() == pool.num_gpu_blocks - 1


@pytest.mark.parametrize("history", HISTORY_FORMATS)
def test_alone(history: str, masked_engine: Any, lumos_model: Path, encoded: list[Encoded]) -> None:
    settings = config(history)
    (tokens,) = generate(masked_engine(settings), TEXT_TO_VIDEO)
    model = LumosReference.load(lumos_model)
    assert tokens == expected(model, TEXT_TO_VIDEO, settings, encoded)
    # Each frame but the last two, in both streams, and the first where it has a block of its own.
    assert len(encoded) >= 2 * model.config.layers * 2


@pytest.mark.parametrize("ahead", [False, True], ids=["sync", "async"])
def test_staggered_in_one_batch(
    ahead: bool, masked_engine: Any, lumos_model: Path, encoded: list[Encoded], monkeypatch: Any
) -> None:
    schedule_asynchronously(monkeypatch, ahead)
    settings = config("int2")
    llm = masked_engine(settings, variant=ahead)
    tokens = staggered(llm, CASES, 3)
    model = LumosReference.load(lumos_model)
    assert tokens == [expected(model, case, settings, encoded) for case in CASES]
    assert nothing_is_held(llm)


@pytest.mark.parametrize("ahead", [False, True], ids=["sync", "async"])
def test_preempted(
    ahead: bool,
    masked_engine: Any,
    lumos_model: Path,
    encoded: list[Encoded],
    preemptions: list[int],
    monkeypatch: Any,
) -> None:
    """A replay encodes what was encoded before to the same bytes."""
    schedule_asynchronously(monkeypatch, ahead)
    settings = config("int4", positions="absolute")
    llm = masked_engine(settings, num_gpu_blocks_override=36, variant=("crowded", ahead))
    cases = [TEXT_TO_VIDEO, IMAGE_TO_VIDEO, CONTINUED.having(frames=2)]
    tokens = staggered(llm, cases, 2)
    model = LumosReference.load(lumos_model)
    assert tokens == [expected(model, case, settings, encoded) for case in cases]
    assert preemptions
    assert nothing_is_held(llm)
    # Equal up to noise: a replay computes in other batches.
    again = [
        (one.data, other.data)
        for index, one in enumerate(encoded)
        for other in encoded[:index]
        if one.keys.shape == other.keys.shape
        and torch.allclose(one.keys, other.keys, atol=1e-4)
        and torch.allclose(one.values, other.values, atol=1e-4)
    ]
    assert again
    assert all((one != other).float().mean() < 0.01 for one, other in again)


def test_whatever_a_block_held_before(masked_engine: Any, lumos_model: Path, encoded: list[Encoded]) -> None:
    """Bytes of a frame that was encoded may be no numbers, read as the model's."""
    settings = config("int8")
    llm = masked_engine(settings)
    context = scheduler_of(llm).vllm_config.compilation_config.static_forward_context
    for layer in context.values():
        layer.kv_cache.fill_(float("nan"))
    cases = [TEXT_TO_VIDEO, CONTINUED]
    tokens = generate(llm, *cases)
    model = LumosReference.load(lumos_model)
    assert tokens == [expected(model, case, settings, encoded) for case in cases]


def test_nothing_encoded_is_as_before(masked_engine: Any) -> None:
    cases = [TEXT_TO_VIDEO, IMAGE_TO_VIDEO]
    assert generate(masked_engine(config("auto")), *cases) == generate(masked_engine(KEPT), *cases)


def test_a_video_holds_fewer_blocks(masked_engine: Any, lumos_model: Path) -> None:
    """As many as its condition, its newest frame and what the others take when they are encoded."""
    held: dict[str, int] = {}
    case = Case(20, (8, 14)).having(frames=6, steps=1, guidance=2, seed=3)
    for history in ("auto", *HISTORY_FORMATS):
        settings = {**config(history), "layout": {"grid": [8, 14]}}
        llm = masked_engine(settings, max_num_batched_tokens=None)
        manager = scheduler_of(llm).kv_cache_manager
        engine = llm.llm_engine
        engine.add_request(history, {"prompt_token_ids": case.ids}, params(case))
        most = 0
        while engine.has_unfinished_requests():
            engine.step()
            most = max(most, manager.block_pool.num_gpu_blocks - 1 - manager.block_pool.get_num_free_blocks())
        held[history] = most
        plan = plan_of(case, repr(("packcache", settings)))
        spec = manager.coordinator.single_type_managers[0].kv_cache_spec
        bounds = [
            retention_of(own.plan.layout, own.plan.policy, BLOCK, spec.encoding).most_blocks() for own in plan.streams
        ]
        assert most <= sum(bounds)
    # Two older frames of each stream have 3 or 4 blocks, of which 8 bits of 32 leave 2, and fewer 1.
    assert held["auto"] - held["int8"] >= 2 * 2
    assert held["int2"] == held["int4"] < held["int8"]


def test_a_video_that_keeps_all_of_its_frames_needs_no_more_room_than_it_takes(
    engine: Callable[..., Any], lumos_model: Path
) -> None:
    """Encoded it has room, at start and when it comes, in a pool that is too small for its frames as written."""
    case = Case(20, (8, 14)).having(frames=8, steps=1, guidance=2, seed=3)
    shape = {"layout": {"grid": [8, 14]}}
    options = {"model": lumos_model, "max_model_len": 1056, "max_num_batched_tokens": None, "max_num_seqs": 4}
    with pytest.raises(ValueError, match="max seq len"):
        engine("full", shape, num_gpu_blocks_override=48, **options)
    small, roomy = (
        engine("full", {**shape, "precision": {"history": "int2"}}, num_gpu_blocks_override=blocks, **options)
        for blocks in (48, 200)
    )
    # Two of them have room when they begin, and one is preempted when they grow.
    assert generate(small, case, case) == generate(roomy, case) * 2


@pytest.mark.parametrize(
    ("settings", "options", "sentence"),
    [
        (
            {**KEPT, "layout": {"grid": [8, 14]}, "history_frames": 1, "precision": {"history": "int2"}},
            {},
            "whole or dropped",
        ),
        ({**KEPT, "selection": "changed", "precision": {"history": "int2"}}, {}, "keep whole frames"),
        (config("int3"), {}, "precision.history"),
        ({**KEPT, "precision": {"newest": "int8"}}, {}, "precision.newest is no known option"),
        ({**KEPT, "precision": "int8"}, {}, "precision must be a mapping"),
        (config("int8"), {"kv_cache_dtype": "fp8_e4m3"}, "--kv-cache-dtype is 'fp8_e4m3': leave one of the two out"),
    ],
    ids=str,
)
def test_refused_before_the_model_loads(
    settings: dict[str, Any], options: dict[str, Any], sentence: str, masked_engine: Any
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        masked_engine(settings, **options)


def test_a_request_that_keeps_parts_of_frames_is_refused(masked_engine: Any) -> None:
    from vllm.exceptions import VLLMValidationError

    llm = masked_engine(config("int8"))
    with pytest.raises(VLLMValidationError, match="is kept whole or dropped"):
        generate(llm, TEXT_TO_VIDEO.having(history_frames=2))


def test_a_gpu_backend(backend: str, lumos_model: Path, masked_engine: Any, encoded: list[Encoded]) -> None:
    """Keys and values in rows, and blocks of 16 tokens."""
    if backend == "FLEX_ATTENTION":
        return
    settings = config("int2")
    case = Case(1, (2, 9), 4).having(frames=1, steps=1, guidance=2, seed=3, condition_frames=1)
    llm = masked_engine(settings, variant=backend, block_size=16)
    (tokens,) = generate(llm, case)
    assert tokens == expected(LumosReference.load(lumos_model), case, settings, encoded, 16)
