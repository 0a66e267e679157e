"""The bundled weights, the way they are trained, and the way they are measured."""

import json

import numpy as np
import pytest
import torch

from benchmarks.training import evaluate
from benchmarks.training.llama import load_pretrained
from vllm_packcache.demo import scores
from vllm_packcache.demo.tokenizer import MODEL_DIR, VideoTokenizer, video_ids
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


def test_it_is_as_good_as_its_evaluation_says(model, tokenizer):
    recorded = json.loads((MODEL_DIR / "evaluation.json").read_text(encoding="utf-8"))["lengths"]["16"]
    found = evaluate.evaluate(model, tokenizer, 2, 16)
    assert recorded["teacher_forced"]["model"]["changed_token_accuracy"] > 0.99
    assert found["teacher_forced"]["model"]["changed_token_accuracy"] > 0.98
    assert found["generated"]["frame_token_accuracy"] == 1
    assert found["generated"]["model"]["token_accuracy"] > 0.97


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
