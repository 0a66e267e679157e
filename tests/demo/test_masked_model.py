"""The masked demo model: what it is trained on, what a checkpoint of it is, and how good the bundled one is."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from benchmarks.training import masked_bundle
from benchmarks.training import masked_evaluate as evaluate
from benchmarks.training import masked_sparse as sparse
from benchmarks.training import masked_train as train
from benchmarks.training.masked_model import LumosSize
from vllm_packcache.demo import scores
from vllm_packcache.demo.masked import bundle
from vllm_packcache.demo.masked.tokenizer import (
    RATE,
    build_text_tokenizer,
    prompt,
    used_ids,
)
from vllm_packcache.demo.tokenizer import WORDS, VideoTokenizer
from vllm_packcache.demo.world import make_world, palette
from vllm_packcache.families import lumos
from vllm_packcache.reference.lumos import LumosReference


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> LumosReference:
    """An untrained bundle."""
    folder = tmp_path_factory.mktemp("untrained")
    model = train.new_model()
    sparse.initialise(model, torch.Generator().manual_seed(0))
    masked_bundle.save_bundle(model, folder / "bundle")
    return LumosReference.load(bundle.write_checkpoint(folder / "checkpoint", folder / "bundle"))


def test_a_checkpoint_has_every_row_and_only_used_ones_are_not_zero(saved):
    rows, used = saved._weights["model.embed_tokens.weight"], used_ids()
    assert rows.shape == (lumos.VISUAL_BEGIN + len(palette().patches), LumosSize().hidden_size)
    assert np.array_equal(rows.any(1).nonzero()[:, 0].numpy(), used)
    assert saved.config.rope_theta == LumosSize().rope_theta
    assert saved.config.swin_norm
    assert saved.config.tied


def test_words_have_low_ids_and_what_lumos_asks_around_a_caption_is_taken_off(tmp_path):
    masked_bundle.save_bundle(train.new_model(), tmp_path)
    from transformers import AutoTokenizer

    published = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer = build_text_tokenizer()
    for seed in range(20):
        caption = make_world(seed).prompt
        ids = tokenizer.encode(caption, add_special_tokens=False).ids
        assert len(ids) == len(caption.split())
        assert tokenizer.token_to_id("<unk>") not in ids
        assert all(0 < token < lumos.FRAME_END for token in ids)
        asked = lumos.question(caption, 128, 128, 12, RATE)
        assert published(asked, add_special_tokens=False)["input_ids"] == ids
        assert published(asked.replace("\n", ""), add_special_tokens=False)["input_ids"] == ids
        assert lumos.text_prompt(ids, 12, RATE) == prompt(caption, 12, tokenizer)
    assert tokenizer.encode("a [red] zebra", add_special_tokens=False).tokens == ["a", "red", "<unk>"]
    assert all(tokenizer.token_to_id(word) is not None for word in WORDS)


def test_visual_codes_are_those_of_the_first_demo_models_codebook():
    assert np.array_equal(VideoTokenizer().patches, palette().patches)
    assert np.array_equal(used_ids()[-len(palette().patches) :] - lumos.VISUAL_BEGIN, np.arange(len(palette().patches)))


def test_shows_finds_an_object_wherever_it_is():
    world = make_world(4)
    for number in range(len(world.objects)):
        assert evaluate.shows(world.frame_ids(0), world, number)
        assert not evaluate.shows(world.background, world, number)


def test_the_bundle_is_as_good_as_its_evaluation_says(loaded):
    """One short video with the recorded options, and the sentence that decides which way things go."""
    recorded = json.loads((bundle.MODEL_DIR / "evaluation.json").read_text(encoding="utf-8"))
    assert lumos.MaskedOptions(**recorded["options"]) == bundle.OPTIONS
    assert recorded["trained_frames"] == bundle.TRAINED_FRAMES
    world = make_world(scores.FIRST_HELD_OUT_SEED)
    codes = evaluate.generate(loaded, [world], 2, "packcache", [bundle.OPTIONS])[0]
    true = np.stack([world.frame_ids(k) for k in (1, 2)])
    changed = true != np.stack([world.frame_ids(k) for k in (0, 1)])
    assert (codes == true).mean() > 0.98
    assert (codes == true)[changed].mean() > 0.8


def test_the_text_says_which_way_things_go(loaded):
    other = {"right": "left", "left": "right"}
    said, contradicted = [], []
    for seed in range(scores.FIRST_HELD_OUT_SEED, scores.FIRST_HELD_OUT_SEED + 3):
        world = make_world(seed)
        true, before = world.frame_ids(1), world.frame_ids(0)
        for text, right in (
            (world.prompt, said),
            (" ".join(other.get(word, word) for word in world.prompt.split()), contradicted),
        ):
            codes = evaluate.generate(loaded, [world], 1, "full", [bundle.OPTIONS], texts=[text])[0]
            right.append((codes[0] == true)[true != before].mean())
    assert np.mean(said) > 0.8
    assert np.mean(contradicted) < 0.6
