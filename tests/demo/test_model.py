"""The bundled weights, the way they are trained, and the way they are measured."""

import numpy as np
import pytest
import torch

from benchmarks.training import evaluate
from benchmarks.training.llama import load_pretrained
from vllm_packcache.demo import scores
from vllm_packcache.demo.tokenizer import FRAME_TOKENS, MODEL_DIR, VideoTokenizer, video_ids, world_prompt
from vllm_packcache.demo.world import make_world


@pytest.fixture(scope="module")
def tokenizer():
    return VideoTokenizer()


@pytest.fixture(scope="module")
def model():
    return load_pretrained(MODEL_DIR)


@torch.inference_mode()
def test_transformers_gives_the_same_scores(model, tokenizer):
    from transformers import AutoModelForCausalLM

    other = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    assert type(other).__name__ == "LlamaForCausalLM"
    ids = torch.tensor(video_ids(tokenizer, make_world(5), 2))[None]
    expected = other(ids).logits
    assert torch.allclose(model.logits(model.hidden(ids)), expected, atol=2e-3, rtol=1e-3)


def test_next_frames_of_held_out_worlds(model, tokenizer):
    for seed in (scores.FIRST_HELD_OUT_SEED, scores.FIRST_HELD_OUT_SEED + 1):
        video = make_world(seed)
        truth = scores.true_frames(tokenizer, video, 16)
        best = evaluate.predict_next_frames(model, tokenizer, video, 16)
        hits = best[:, 1:].reshape(truth[1:].shape) == truth[1:]
        changed = truth[1:] != truth[:-1]
        assert (best[:, 0] == tokenizer.frame_id).all()
        assert hits.mean() > 0.99
        assert hits[changed].mean() > 0.9


def test_generation_does_not_depend_on_the_draft(model, tokenizer):
    video = make_world(scores.FIRST_HELD_OUT_SEED)
    prompt = world_prompt(tokenizer, video)
    truth = scores.true_frames(tokenizer, video, 2)[1:]
    good = np.concatenate([np.r_[tokenizer.frame_id, frame.reshape(-1)] for frame in truth])
    bad = good.copy()
    bad[::40] = tokenizer.pad_id
    one, two = evaluate.generate(model, prompt, good), evaluate.generate(model, prompt, bad)
    assert one == two
    assert len(one) == 2 * FRAME_TOKENS
    with torch.inference_mode():
        plain = model.logits(model.hidden(torch.tensor([prompt + one[:-1]])))[0, len(prompt) - 1 :].argmax(-1)
    assert plain.tolist() == one


def test_object_score_knows_right_from_wrong():
    video = make_world(0)
    truth = np.stack([video.frame_ids(k) for k in range(1, 17)])
    score = scores.score_objects(video, truth)
    assert score.right == score.seen > 0
    assert score.after_right == score.after_seen > 0
    assert score.returns == score.returns_right > 0
    score = scores.score_objects(video, np.repeat(video.frame_ids(0)[None], 16, 0))
    assert score.right < score.seen / 2


def test_psnr():
    black = np.zeros((2, 4, 4, 3), np.uint8)
    assert (scores.psnr(black, black) == scores.MAX_PSNR).all()
    assert np.allclose(scores.psnr(black, black + 255), 0)
