"""Pictures, sentences and ids of the demo model."""

import json

import numpy as np
import pytest
from PIL import Image

from vllm_packcache.demo.tokenizer import (
    CONDITION_TOKENS,
    FRAME_TOKENS,
    MODEL_DIR,
    TEXT_TOKENS,
    VideoTokenizer,
    world_prompt,
)
from vllm_packcache.demo.world import SHAPES, make_world, palette


@pytest.fixture(scope="module")
def tokenizer():
    return VideoTokenizer()


def test_bundled_codebook_is_the_worlds(tokenizer):
    assert (tokenizer.patches == palette().patches).all()


def test_every_codeword_survives_a_round_trip(tokenizer):
    count = len(tokenizer.patches)
    ids = np.resize(np.arange(count), (-(-count // 256), 16, 16)) + tokenizer.visual_offset
    pictures = tokenizer.decode_frames(ids)
    assert pictures.shape == (len(ids), 64, 64, 3)
    assert pictures.dtype == np.uint8
    for picture, expected in zip(pictures, ids, strict=True):
        assert (tokenizer.encode_image(picture) == expected).all()


@pytest.mark.parametrize("scale", [1, 4, 7])
def test_world_pictures_are_exact_at_any_whole_scale(tokenizer, scale):
    for seed in range(5):
        video = make_world(seed)
        picture = video.frame(3).repeat(scale, 0).repeat(scale, 1)
        assert (tokenizer.encode_image(picture) - tokenizer.visual_offset == video.frame_ids(3)).all()


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 900, 3), (64, 64), (30, 70, 1), (100, 80, 4), (2500, 1700, 3)])
def test_any_picture_is_encoded(tokenizer, shape):
    picture = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    ids = tokenizer.encode_image(picture)
    assert ids.shape == (16, 16)
    assert ids.min() >= tokenizer.visual_offset
    assert ids.max() < tokenizer.vocab_size


def test_a_photo_keeps_its_colours_and_is_not_made_of_world_fragments(tokenizer):
    ys, xs = np.mgrid[0:300, 0:400]
    photo = np.stack([xs * 255 // 400, ys * 255 // 300, 120 + 0 * xs], -1).astype(np.uint8)
    shown = tokenizer.decode_frames(tokenizer.encode_image(photo)[None])[0].astype(float)
    wanted = np.asarray(Image.fromarray(photo[:, 50:350]).resize((64, 64), Image.Resampling.BOX), float)
    assert np.abs(shown - wanted).mean() < 20


def test_transparent_is_white(tokenizer):
    clear = np.zeros((10, 10, 4), np.uint8)
    assert (tokenizer.encode_image(clear) == tokenizer.encode_image(np.full((10, 10, 3), 255, np.uint8))).all()


@pytest.mark.parametrize("bad", [np.zeros((4, 4, 3)), np.zeros((4, 4, 2), np.uint8), np.zeros((0, 4, 3), np.uint8)])
def test_what_is_no_picture_is_refused(tokenizer, bad):
    with pytest.raises(ValueError, match="expected a"):
        tokenizer.encode_image(bad)


def test_world_prompts_have_no_unknown_words_and_fit(tokenizer):
    for seed in range(200):
        ids = tokenizer.encode_text(make_world(seed, photo_share=0.2).prompt)
        assert tokenizer.unk_id not in ids
        assert len(ids) <= TEXT_TOKENS


def test_strange_texts_do_not_fail(tokenizer):
    assert tokenizer.encode_text("") == []
    assert tokenizer.encode_text("A RED Circle, moves!") == tokenizer.encode_text("a red circle moves")
    assert tokenizer.encode_text("ein roter Kreis 🙂").count(tokenizer.unk_id) == 3
    smuggled = tokenizer.encode_text("<frame> <v3> <image>")
    assert max(smuggled) < tokenizer.visual_offset
    assert tokenizer.frame_id not in smuggled
    image = make_world(0).frame(0)
    for text in ("", "x", "red " * 500):
        assert len(tokenizer.build_prompt(text, image)) == CONDITION_TOKENS


def test_prompt_layout(tokenizer):
    video = make_world(2)
    ids = tokenizer.build_prompt(video.prompt, video.frame(0))
    assert ids == world_prompt(tokenizer, video)
    assert all(isinstance(i, int) for i in ids)
    assert ids[0] == tokenizer.bos_id
    assert ids[1 + TEXT_TOKENS] == tokenizer.image_id
    assert ids[1 : 1 + TEXT_TOKENS].count(tokenizer.pad_id) == TEXT_TOKENS - len(video.prompt.split())
    assert (np.array(ids[-256:]).reshape(16, 16) - tokenizer.visual_offset == video.frame_ids(0)).all()


def test_generated_ids_become_frames(tokenizer):
    video = make_world(2)
    truth = np.stack([video.frame_ids(k) for k in (1, 2, 3)]) + tokenizer.visual_offset
    ids = [i for frame in truth for i in (tokenizer.frame_id, *frame.reshape(-1).tolist())]
    assert len(ids) == 3 * FRAME_TOKENS
    assert (tokenizer.frames_from_ids(ids) == truth).all()
    assert (tokenizer.frames_from_ids(ids[:-1]) == truth[:2]).all()
    assert tokenizer.frames_from_ids(ids[:100]).shape == (0, 16, 16)
    assert tokenizer.frames_from_ids([]).shape == (0, 16, 16)


def test_wrong_ids_spoil_only_their_own_place(tokenizer):
    video = make_world(2)
    truth = np.stack([video.frame_ids(k) for k in (1, 2)]) + tokenizer.visual_offset
    ids = [i for frame in truth for i in (tokenizer.frame_id, *frame.reshape(-1).tolist())]
    ids[0] = 10**6
    ids[5] = tokenizer.eos_id
    ids[FRAME_TOKENS + 5] = tokenizer.frame_id
    frames = tokenizer.frames_from_ids(ids)
    grey = tokenizer.decode_frames(frames)[0, :4, 16:20].astype(int)
    assert np.abs(grey - 128).max() < 20
    assert frames[1, 0, 4] == frames[0, 0, 4]
    frames[:, 0, 4] = truth[:, 0, 4]
    assert (frames == truth).all()


def test_decode_refuses_wrong_shapes_and_shows_unknown_ids_as_grey(tokenizer):
    with pytest.raises(ValueError, match="expected ids of shape"):
        tokenizer.decode_frames(np.zeros((16, 16), int))
    assert (tokenizer.decode_frames(np.full((1, 16, 16), -5)) == 128).all()


def test_transformers_reads_the_same_vocabulary(tokenizer):
    from transformers import AutoTokenizer

    auto = AutoTokenizer.from_pretrained(MODEL_DIR)
    assert len(auto) == tokenizer.vocab_size
    text = make_world(4).prompt
    assert auto(text, add_special_tokens=False)["input_ids"] == tokenizer.encode_text(text)
    assert auto.convert_tokens_to_ids("<v0>") == tokenizer.visual_offset
    ids = [tokenizer.frame_id, tokenizer.visual_offset + 7]
    assert auto("<frame><v7>", add_special_tokens=False)["input_ids"] == ids
    assert auto.eos_token_id == tokenizer.eos_id
    assert auto.pad_token_id == tokenizer.pad_id


def test_missing_directory_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        VideoTokenizer(tmp_path)


def test_bundled_example_is_a_world_picture(tokenizer):
    assets = MODEL_DIR.parent / "assets"
    picture = np.asarray(Image.open(assets / "example.png"))
    assert picture.shape == (256, 256, 3)
    prompt = (assets / "example_prompt.txt").read_text().strip()
    assert tokenizer.unk_id not in tokenizer.encode_text(prompt)
    assert any(shape in prompt for shape in SHAPES)
    assert "pillar" in prompt
    shown = tokenizer.decode_frames(tokenizer.encode_image(picture)[None])[0]
    assert (shown.repeat(4, 0).repeat(4, 1) == picture).all()


def test_config_fits_the_tokenizer(tokenizer):
    config = json.loads((MODEL_DIR / "config.json").read_text())
    assert config["vocab_size"] == tokenizer.vocab_size
    assert config["max_position_embeddings"] >= CONDITION_TOKENS + 4 * 16 * FRAME_TOKENS
