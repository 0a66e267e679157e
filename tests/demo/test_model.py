"""The bundled weights, the way they are trained, and the way they are measured."""

import numpy as np
import pytest
import torch

from benchmarks.training import evaluate, train
from benchmarks.training import loop as training
from benchmarks.training.llama import Llama, LlamaSize, load_pretrained, rotary_table
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


def test_batches_mark_what_changes_and_keep_targets_clean(tokenizer):
    clips = training.Clips(4, 3)
    clean = train.make_batch(tokenizer, training.FIRST_TRAINING_SEED, clips, corrupt=False)
    assert clean.inputs.shape == (3, 288 + 4 * FRAME_TOKENS - 1)
    assert (clean.inputs[:, 288:] == clean.targets[:, :-1]).all()
    assert 0.005 < clean.changed.float().mean() < 0.3
    assert (clean.weights[clean.changed] >= 0).all()
    assert (clean.weights == training.CHANGED_WEIGHT).any()
    big = training.Clips(4, 20)
    noisy = train.make_batch(tokenizer, training.FIRST_TRAINING_SEED, big, corrupt=True)
    pure = train.make_batch(tokenizer, training.FIRST_TRAINING_SEED, big, corrupt=False)
    assert (noisy.targets == pure.targets).all()
    assert (noisy.inputs != pure.inputs).any()
    assert (noisy.inputs[:, :289] == pure.inputs[:, :289]).all()


def test_looking_heads_find_their_distance_and_are_held(tokenizer):
    size = LlamaSize(vocab_size=tokenizer.vocab_size)
    model = Llama(size)
    train.initialise(model, torch.Generator().manual_seed(0))
    ids = torch.tensor(video_ids(tokenizer, make_world(7), 9))[None]
    attention = model.model.layers[0].self_attn
    x = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))
    cos, sin = rotary_table(size, 0, ids.shape[1])
    half = size.head_dim // 2

    def head(projection, number):
        y = projection(x)[0, :, number * size.head_dim : (number + 1) * size.head_dim]
        return y * cos + torch.cat([-y[:, half:], y[:, :half]], -1) * sin

    distances = train._LOOKS[0]
    assert distances[0] == FRAME_TOKENS - 1
    for number, distance in enumerate(distances):
        scores = head(attention.k_proj, number) @ head(attention.q_proj, number)[-1]
        assert int(scores.argmax()) == len(scores) - 1 - distance
    model.logits(model.hidden(ids[:, :400])).square().mean().backward()
    assert not attention.q_proj.weight.grad[: len(distances) * size.head_dim].any()
    assert attention.o_proj.weight.grad[1:].any()
    assert not attention.o_proj.weight.grad[0].any()
    assert not model.model.embed_tokens.weight.grad[:, 0].any()


def test_training_writes_a_model_and_goes_on(tmp_path, monkeypatch):
    small = training.Stage(1.0, (training.Clips(1, 1),))
    monkeypatch.setattr(train, "STAGES", (small,))
    monkeypatch.setattr(train, "LlamaSize", lambda vocab_size: LlamaSize(vocab_size, 32, 32, 2, 1))
    monkeypatch.setattr(train, "_LOOKS", ((256,), ()))
    monkeypatch.setattr(train, "_CONSTANT_SEEN", (12.0, 5.0))
    train.train(training.Run(tmp_path, 0.003))
    first = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert (tmp_path / "model.safetensors").is_file()
    assert (tmp_path / "tokenizer.json").is_file()
    # However long the first took: a slow machine may have overrun its time.
    train.train(training.Run(tmp_path, first["elapsed"] / 60 + 0.003))
    second = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert second["step"] > first["step"]
    assert second["next_seed"] > first["next_seed"]
    assert load_pretrained(tmp_path).size.hidden_size == 32
