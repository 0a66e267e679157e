"""The bundled models computed where somebody asks, under policies, against the reference, which computes everything."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.memory.plan import SHAPE
from benchmarks.quality.generators import Causal, Masked
from benchmarks.quality.live_lumos import LiveLumos
from benchmarks.quality.variants import BLOCK_SIZE, Variant
from benchmarks.training import masked_sparse_video, sparse_video
from benchmarks.training.llama import Llama, load_pretrained
from benchmarks.training.masked_bundle import load_bundle
from benchmarks.training.masked_model import Lumos
from benchmarks.training.masked_sparse_video import Request
from vllm_packcache.core.plan import Plan
from vllm_packcache.demo.masked import bundle
from vllm_packcache.demo.masked.tokenizer import FRAME, GRID_SHAPE, build_text_tokenizer, prompt, world_frame
from vllm_packcache.demo.scores import FIRST_HELD_OUT_SEED, sequence, true_frames
from vllm_packcache.demo.tokenizer import CONDITION_TOKENS, MODEL_DIR, VideoTokenizer, world_prompt
from vllm_packcache.demo.world import make_film, make_world
from vllm_packcache.families import lumos
from vllm_packcache.reference import GuidedVideo, LlamaReference, generate_masked

NEAR = 0.1
"""By how much less likely a token may be than the likeliest, in logits, of which the model is sure by many."""

FRAMES = 6
F = FRAME.tokens_per_frame


def _variant(policy: str, **options: Any) -> Variant:
    return Variant(SHAPE, policy, policy, options)


SHORT = {"history_frames": 1.5, "window": 2}
PAPER = {**SHORT, "selection": "spatial"}
CAUSAL = (
    _variant("full"),
    _variant("packcache", **PAPER),
    _variant("packcache", **PAPER, positions="absolute"),
    _variant("packcache", **SHORT, selection="changed"),
    _variant("packcache", history_frames=2, window=12, selection="changed", episodes=1),
    _variant("packcache", **{**PAPER, "window": 3}, gamma_condition=0.3),
    _variant("sliding_window", window=1, positions="rebase"),
    _variant("sliding_window", window=1),
    _variant("attention_sink", sink_tokens=32, recent_tokens=300),
)


@pytest.fixture(scope="module")
def tokenizer() -> VideoTokenizer:
    return VideoTokenizer()


@pytest.fixture(scope="module")
def model() -> Llama:
    return load_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def reference() -> LlamaReference:
    return LlamaReference.load(MODEL_DIR)


def said_of(reference: LlamaReference, ids: list[int], variant: Variant, frames: int) -> np.ndarray:
    """Logits of the reference for every token of the frames, [T, F, vocabulary]."""
    logits = reference.logits(ids[:-1], variant.plan(), BLOCK_SIZE)[CONDITION_TOKENS - 1 :].numpy()
    return logits.reshape(frames, -1, logits.shape[-1])


def behind(logits: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """By how much less likely than the likeliest tokens are."""
    return logits.max(-1) - np.take_along_axis(logits, chosen[..., None], -1)[..., 0]


@pytest.mark.parametrize("variant", CAUSAL, ids=lambda variant: str(variant.options))
def test_a_causal_video_is_what_the_reference_finds_likeliest(model, tokenizer, reference, variant: Variant):
    worlds = [make_world(FIRST_HELD_OUT_SEED + number) for number in (3, 4)]
    prompts = np.array([world_prompt(tokenizer, world) for world in worlds])
    plan = variant.plan()
    assert sparse_video.is_computable(plan, BLOCK_SIZE, FRAMES)
    made = sparse_video.generate(model, tokenizer, plan, BLOCK_SIZE, prompts, FRAMES)
    for own, condition in zip(made, prompts, strict=True):
        logits = said_of(reference, [*condition.tolist(), *own.reshape(-1).tolist()], variant, FRAMES)
        assert behind(logits, own).max() < NEAR


@pytest.mark.parametrize(
    ("variant", "scale"), [(CAUSAL[1], 0.3), (CAUSAL[3], 3)], ids=lambda own: str(getattr(own, "options", own))
)
def test_a_guided_video_is_what_the_reference_finds_likeliest(model, tokenizer, reference, variant: Variant, scale):
    frames, plan = 3, variant.plan()
    worlds = [make_world(FIRST_HELD_OUT_SEED + number) for number in (3, 4)]
    prompts = np.array([world_prompt(tokenizer, world) for world in worlds])
    made = sparse_video.generate(model, tokenizer, plan, BLOCK_SIZE, prompts, frames, scale)
    # Both streams may be that far away.
    near, swapped_is_near = NEAR * (scale + abs(scale - 1)), []
    for own, condition, world in zip(made.reshape(2, -1), prompts.tolist(), worlds, strict=True):
        negative = tokenizer.build_prompt_from_ids("", world.frame_ids(0) + tokenizer.visual_offset)
        video = GuidedVideo(CONDITION_TOKENS, negative, scale, plan, plan, BLOCK_SIZE)
        logits = video.logits(reference, [*condition, *own.tolist()[:-1]]).numpy()
        assert behind(logits, own).max() < near
        swapped = video._replace(negative_ids=condition).logits(reference, [*negative, *own.tolist()[:-1]]).numpy()
        swapped_is_near.append(behind(swapped, own).max() < near)
    assert not all(swapped_is_near), "or the test could not tell the streams apart"


@pytest.fixture(scope="module")
def films(tokenizer) -> np.ndarray:
    """Of which the model is sure of less than of a world."""
    return np.stack(
        [
            np.concatenate(
                [world_prompt(tokenizer, film), sequence(tokenizer, true_frames(tokenizer, film, FRAMES)[1:])]
            )
            for film in (make_film(FIRST_HELD_OUT_SEED + number, (2, 5)) for number in (0, 1))
        ]
    )


def test_the_likeliest_after_true_tokens_are_those_of_the_reference(model, tokenizer, reference, films):
    every = np.ones((len(films), FRAMES, 256), bool)
    found = [sparse_video.likeliest(model, tokenizer, own.plan(), BLOCK_SIZE, films, every) for own in CAUSAL]
    for variant, own in zip(CAUSAL, found, strict=True):
        logits = said_of(reference, films[0].tolist(), variant, FRAMES)[:, 1:]
        # Behind a cut, which it was not trained on, the model may turn a small difference into another token.
        assert (behind(logits, own[0]) > NEAR).mean() < 0.002, variant.options
    assert len({own.tobytes() for own in found}) == len(CAUSAL), "or the test could not tell them apart"
    asked = np.zeros_like(every)
    asked[0, 1, 3] = asked[1, 4, [0, 255]] = True
    some = sparse_video.likeliest(model, tokenizer, CAUSAL[1].plan(), BLOCK_SIZE, films, asked)
    assert (some == np.where(asked, found[1], sparse_video.NOT_ASKED)).all()


@pytest.mark.parametrize(
    "variant",
    [
        _variant("packcache", **PAPER, gamma_text=0.5),
        _variant("packcache", history_frames=2, window=2, selection="changed", episodes=1),
    ],
    ids=["a part of the text", "an anchor in sight"],
)
def test_what_heads_would_read_by_mistake_is_not_computed(variant: Variant):
    assert not sparse_video.is_computable(variant.plan(), BLOCK_SIZE, 8)
    assert Causal().at_once(variant, 8) < Causal().at_once(CAUSAL[0], 8)


MASKED = Masked().variants.named


@pytest.fixture(scope="module")
def small() -> Lumos:
    return load_bundle()


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> LiveLumos:
    return LiveLumos.load(bundle.write_checkpoint(tmp_path_factory.mktemp("masked")))


def request(seed: int, frames: int, variant: Variant, *, image: bool = True, **options: Any) -> Request:
    world, text = make_world(seed), build_text_tokenizer()
    ids = prompt(world.prompt, frames, text) + (world_frame(world, 0).tolist() if image else [])
    plan = variant.plan(len(ids) if image else len(ids) + F)
    if not image:
        plan = of_layout(plan, condition_tokens=len(ids), condition_image_tokens=0)
    return Request(ids, plan, replace(bundle.OPTIONS, **{"seed": seed, "steps": 3, **options}))


def same(small: Lumos, published: LiveLumos, own: Request, frames: int) -> float:
    """Share of the tokens that the reference makes too."""
    # Another video beside it, with a text of another length, changes nothing.
    longer = of_layout(own.plan, condition_tokens=len(own.prompt) + 1)
    other = replace(own, prompt=[own.prompt[0], 5, *own.prompt[1:]], plan=longer)
    made = masked_sparse_video.generate(small, [other, own], BLOCK_SIZE, frames)[1]
    expected = generate_masked(published, own.prompt, frames, own.plan, own.options, BLOCK_SIZE).frames.numpy()
    return float((made == np.stack([lumos.codes_of_frame(ids, GRID_SHAPE) for ids in expected])).mean())


def of_layout(plan: Plan, **changed: int) -> Plan:
    layout = replace(plan.layout, **changed)
    return replace(plan, layout=layout, positions=replace(plan.positions, layout=layout))


@pytest.mark.parametrize("variant", MASKED[::2], ids=lambda variant: variant.name)
def test_a_masked_video_is_that_of_the_reference(small, published, variant: Variant):
    frames = 6
    own = request(FIRST_HELD_OUT_SEED + 3, frames, variant)
    assert masked_sparse_video.is_computable(own.plan, BLOCK_SIZE, frames)
    # One in a thousand is drawn near an edge.
    assert same(small, published, own, frames) > 0.995


@pytest.mark.parametrize(
    ("image", "options"),
    [(False, {}), (True, {"guidance": 1.0}), (True, {"share_history": False}), (True, {"remask": 0.5})],
    ids=["text to video", "one stream", "a history of its own", "masked again"],
)
@torch.inference_mode()
def test_a_masked_video_is_that_of_the_reference_whatever_its_options(small, published, image, options):
    assert same(small, published, request(FIRST_HELD_OUT_SEED, 3, MASKED[1], image=image, **options), 3) > 0.995


LESS: tuple[dict[str, Any], ...] = (
    {"refresh": 3},
    {"guidance_from": 0.3, "guidance_until": 0.8},
    {"refresh": 2, "reuse": 0.15, "guidance_interval": 2},
)


@pytest.mark.parametrize("less", LESS, ids=str)
@torch.inference_mode()
def test_what_is_left_out_is_as_stale_as_the_references(small, published, less):
    # Of much guidance, so that what is stale is another token.
    frames, how = 2, {"guidance": 3.0, "steps": 6}
    own = request(FIRST_HELD_OUT_SEED + 3, frames, MASKED[1], **how, **less)
    assert same(small, published, own, frames) > 0.995
    everything = request(FIRST_HELD_OUT_SEED + 3, frames, MASKED[1], **how)
    whole, made = (masked_sparse_video.generate(small, [one], BLOCK_SIZE, frames) for one in (everything, own))
    # The model's keys and values say what a token is and nothing that it sees: settled rows are never stale.
    assert (made.tolist() == whole.tolist()) == (set(less) == {"refresh"}), "or the test could not tell them apart"


def test_a_masked_video_without_its_whole_text_is_not_computed():
    variant = replace(MASKED[-1], options={"sink_tokens": 16, "recent_tokens": 300})
    assert variant.policy == "attention_sink"
    assert not masked_sparse_video.is_computable(request(0, 4, variant).plan, BLOCK_SIZE, 4)
    assert Masked().at_once(variant, 4) < Masked().at_once(MASKED[0], 4)
