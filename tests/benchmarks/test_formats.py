"""Caches of fewer bits in the benchmarks' own model: against the oracle, and at as many bytes as they say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.formats import BFLOAT16, EIGHT_BITS, FLOAT32, FORMATS
from benchmarks.quality.cached import BUDGET_STEP, all_in_formats, held_bytes, kept_in
from benchmarks.quality.decoder import VideoCache, likeliest
from benchmarks.quality.variants import BLOCK_SIZE, CHANGED, Shape, Variant, of_any_budget
from benchmarks.training.llama import Llama, load_pretrained
from tests.margins import Tie, numbers
from tests.serving.conftest import video
from vllm_packcache.core.layout import FrameLayout, VideoLayout
from vllm_packcache.core.plan import Plan
from vllm_packcache.core.policies import PackCache
from vllm_packcache.core.positions import Positions
from vllm_packcache.core.retention import Retention, some_tokens
from vllm_packcache.demo.tokenizer import CONDITION_TOKENS
from vllm_packcache.reference import LlamaReference, QuantisedReference, make_random_llama
from vllm_packcache.reference.quantised import Rounding

CONDITION, FRAME, FRAMES, BLOCK = 20, 25, 8, 16
TIE = 0.01
SHAPE = Shape("demo", CONDITION_TOKENS)


def to_nearest(dtype: torch.dtype) -> Rounding:
    return lambda own: own.to(dtype).float()


def scaled(levels: float, dtype: torch.dtype | None = None) -> Rounding:
    """A scale for every token and head; without a type halves are rounded away from zero."""

    def written(own: torch.Tensor) -> torch.Tensor:
        scales = own.abs().amax(-1, keepdim=True) / levels
        numbers = own / scales
        whole = (numbers.abs() + 0.5).floor() * numbers.sign() if dtype is None else numbers.to(dtype).float()
        return whole * scales

    return written


ROUNDINGS = {
    "bfloat16": to_nearest(torch.bfloat16),
    "int8_per_token_head": scaled(127),
    "fp8_per_token_head": scaled(448, torch.float8_e4m3fn),
    "fp8_e4m3": to_nearest(torch.float8_e4m3fn),
    "fp8_e5m2": to_nearest(torch.float8_e5m2),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whose base of rotary frequencies stands where both look for it."""
    folder = make_random_llama(tmp_path_factory.mktemp("llama"), tied=True)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Llama:
    return load_pretrained(folder)


def test_there_is_an_oracle_for_every_format() -> None:
    assert ROUNDINGS.keys() == FORMATS.keys() - {FLOAT32.name}


@pytest.mark.parametrize("selection", ["spatial", "changed"])
@pytest.mark.parametrize("name", ROUNDINGS)
def test_a_rounded_cache_says_what_the_oracle_says(folder: Path, model: Llama, name: str, selection: str) -> None:
    """Of every token of a video whose window has slid several times, the likeliest."""
    policy = PackCache(window=2, history_frames=1.5, selection=selection)  # type: ignore[arg-type]
    layout = VideoLayout(FrameLayout(FRAME), CONDITION)
    plan = Plan(layout, policy, Positions(layout, policy.window))
    ids = video(CONDITION, FRAME, FRAMES, seed=4)

    def said(stored: str) -> list[int]:
        cache = VideoCache(model.size, plan, BLOCK, FRAMES, FORMATS[stored])
        return likeliest(model, cache, np.array(ids), FRAMES).reshape(-1).tolist()

    stock = LlamaReference.load(folder)
    oracle = QuantisedReference(stock.config, stock._weights, ROUNDINGS[name], ROUNDINGS[name])
    logits = oracle.logits(ids, plan, BLOCK)[CONDITION:].unflatten(0, (FRAMES, FRAME))[:, :-1].flatten(0, 1)
    best, second = logits.topk(2).values.unbind(-1)
    sure = (best - second > TIE).tolist()
    wanted = logits.argmax(-1).tolist()
    pairs = [(a, b) for a, b, certain in zip(said(name), wanted, sure, strict=True) if certain]
    assert len(pairs) > 0.9 * len(wanted)
    if all(a == b for a, b in zip(said(FLOAT32.name), wanted, strict=True)):
        raise Tie("numbers that rounding changes nothing of")
    assert [a for a, _ in pairs] == [b for _, b in pairs]


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_what_is_rounded_once_stays(name: str) -> None:
    own = torch.from_numpy(numbers(1).normal(size=(3, 5, 32))).float()
    once = FORMATS[name].rounded(own)
    assert not torch.equal(once, own)
    assert torch.allclose(FORMATS[name].rounded(once), once, rtol=1e-6, atol=0)
    assert torch.equal(FORMATS["fp8_e4m3"].rounded(torch.tensor([1e6, -1e6])), torch.tensor([448.0, -448.0]))


def test_bytes_are_those_of_vllms_pages() -> None:
    keys = {name: own.bytes_of_key(128) for name, own in FORMATS.items()}
    assert keys == {
        **{"float32": 512, "bfloat16": 256, "int8_per_token_head": 132, "fp8_per_token_head": 132},
        **{"fp8_e4m3": 128, "fp8_e5m2": 128},
    }


def test_equal_bytes_is_the_longest_history_that_takes_no_more() -> None:
    formats = ("int8_per_token_head", "fp8_e4m3")
    for own, of_budget in zip(all_in_formats(SHAPE, formats), of_any_budget(SHAPE), strict=True):
        room = held_bytes(own.base)
        assert own.base.cache == BFLOAT16.name
        for same, larger in zip(own.same, own.larger, strict=True):
            assert (same.cache, same.options) == (larger.cache, own.base.options)
            assert held_bytes(same) < held_bytes(larger) <= room
            assert larger.budget is not None
            more = kept_in(of_budget(larger.budget + BUDGET_STEP), larger.cache)
            assert held_bytes(more) > room
        assert all(name.startswith(base.rpartition(",")[0]) and name != base for name, base in own.pairs)


def test_bytes_of_a_video_are_its_blocks() -> None:
    """Three layers of four heads of 32 channels, and no more than a short video has."""
    variant = Variant(SHAPE, CHANGED, "packcache", {"history_frames": 2.0}, cache="int8_per_token_head")
    plan = variant.plan()
    most = Retention(plan.layout, plan.policy, BLOCK_SIZE, some_tokens).most_blocks()
    assert most is not None
    assert held_bytes(variant) == most * BLOCK_SIZE * 3 * 4 * 2 * (32 + 4)
    assert held_bytes(variant, 1) == -(-(288 + 257) // BLOCK_SIZE) * BLOCK_SIZE * 3 * 4 * 2 * (32 + 4)
