"""The loop of two sequences: against transformers without a plan, against its own two paths with one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from vllm_packcache.core.layout import FrameLayout, VideoLayout
from vllm_packcache.core.plan import Plan
from vllm_packcache.core.policies import PackCache
from vllm_packcache.core.positions import Positions
from vllm_packcache.reference import GuidedVideo, LlamaReference, generate_guided, make_random_llama


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def plan(condition: int) -> Plan:
    layout, policy = (
        VideoLayout(FrameLayout(11), condition),
        PackCache(history_frames=1.5, window=2, selection="spatial"),
    )
    return Plan(layout, policy, Positions(layout, 2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_llama(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("scale", [3.0, 1.5])
def test_without_a_plan_it_is_guidance_of_transformers(folder: Path, scale: float) -> None:
    """``generate(guidance_scale=...)``, as Emu3's public code calls it."""
    ids, negative = prompt(20, 1), prompt(33, 2)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = model.generate(
        torch.tensor([ids]),
        negative_prompt_ids=torch.tensor([negative]),
        guidance_scale=scale,
        max_new_tokens=25,
        min_new_tokens=25,
        do_sample=False,
        pad_token_id=0,
    )[0, len(ids) :]
    made = generate_guided(LlamaReference.load(folder), ids, 25, GuidedVideo(len(ids), negative, scale))
    assert made.token_ids == expected.tolist()


def test_with_a_plan_it_goes_on_as_it_says_itself(folder: Path) -> None:
    model, ids, negative = LlamaReference.load(folder), prompt(20 + 30, 3), prompt(7, 4)
    video = GuidedVideo(20, negative, 2.0, plan(20), plan(7), 32)
    made = generate_guided(model, ids, 20, video)
    logits = video.logits(model, [*ids, *made.token_ids[:-1]])[-20:]
    assert logits.argmax(-1).tolist() == made.token_ids
    torch.testing.assert_close(logits, made.logits, atol=1e-4, rtol=0)


def test_a_scale_of_one_is_the_model_itself(folder: Path) -> None:
    model, ids = LlamaReference.load(folder), prompt(40, 5)
    made = generate_guided(model, ids, 15, GuidedVideo(20, prompt(9, 6), 1.0, plan(20), plan(9)))
    assert made.token_ids == model.generate(ids, 15, plan(20)).token_ids
