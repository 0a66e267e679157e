"""The masked demo model: what it is trained on, what a checkpoint of it is, and how good the bundled one is."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from benchmarks.training import loop as training
from benchmarks.training import masked_bundle
from benchmarks.training import masked_evaluate as evaluate
from benchmarks.training import masked_train as train
from benchmarks.training.masked_model import LumosSize, _rotate
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.demo import scores
from vllm_packcache.demo.masked import bundle
from vllm_packcache.demo.masked.tokenizer import (
    FRAME,
    GRID_SHAPE,
    RATE,
    build_text_tokenizer,
    prompt,
    used_ids,
    world_frame,
)
from vllm_packcache.demo.tokenizer import WORDS, VideoTokenizer
from vllm_packcache.demo.world import make_world, palette
from vllm_packcache.families import LUMOS, lumos
from vllm_packcache.reference.lumos import LumosReference
from vllm_packcache.reference.masked_video import MaskedVideo

F = FRAME.tokens_per_frame
SMALL = LumosSize(hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
OFFSETS = lumos.visual_offsets(GRID_SHAPE)


def small_model(monkeypatch: pytest.MonkeyPatch) -> train.Lumos:
    """Two layers with random norms: queries and keys depend on what they are."""
    monkeypatch.setattr(train, "LumosSize", lambda: SMALL)
    monkeypatch.setattr(train, "_LOOKS", ([train._STATIC, train._cell(1, -1)], [train._AROUND]))
    monkeypatch.setattr(train, "_READ", ((), (("right", "left"),)))
    model = train.new_model()
    train.initialise(model, torch.Generator().manual_seed(0))
    return model


def rounded(model: train.Lumos) -> train.Lumos:
    """As the model is after its bundle was written."""
    state = model.state_dict()
    state[masked_bundle.LAST_NORM] = masked_bundle.SHARPNESS * state[masked_bundle.LAST_NORM]
    model.load_state_dict({name: value.bfloat16().float() for name, value in state.items()})
    return model


@pytest.fixture
def saved(tmp_path, monkeypatch) -> tuple[train.Lumos, LumosReference]:
    model = small_model(monkeypatch)
    masked_bundle.save_bundle(model, tmp_path / "bundle")
    path = bundle.write_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle")
    return rounded(model), LumosReference.load(path)


def clip_that(clipper: train.Clipper, frames: int, wanted) -> train.Clip:
    seeds = range(training.FIRST_TRAINING_SEED, training.FIRST_TRAINING_SEED + 400, 2)
    return next(clip for clip in (clipper.clip(seed, frames) for seed in seeds) if wanted(clip.sequence))


def start(sequence) -> int:
    return len(sequence.text) + len(sequence.image)


def drops_history(sequence) -> bool:
    return len(sequence.seen[-1]) < start(sequence) + sequence.committed.numel()


@pytest.mark.parametrize(
    ("what", "wanted"),
    [
        ("image to video, all seen", lambda s: len(s.text) > 10 and len(s.image) and not drops_history(s)),
        ("image to video, packcache", lambda s: len(s.image) and drops_history(s)),
        ("no text", lambda s: len(s.text) == lumos.VIDEO_START_TOKENS and len(s.image)),
        ("text to video", lambda s: not len(s.image) and drops_history(s)),
    ],
)
@torch.inference_mode()
def test_all_frames_in_one_pass_are_what_the_reference_makes_of_each(saved, what, wanted):
    model, reference = saved
    sequence = clip_that(train.Clipper(model), 4, wanted).sequence
    logits = model.logits(model.hidden(sequence))

    ids, first, text = torch.from_numpy(model.ids), start(sequence), len(sequence.text)
    cache = reference.new_cache(first + 4 * F)

    def run(rows, begin, seen):
        end = begin + len(rows)
        return reference.run(ids[rows], begin, cache, sequence.positions[:, :end], seen)

    run(sequence.text, 0, torch.ones(text, text, dtype=torch.bool).tril())
    if first > text:
        run(sequence.image, text, torch.ones(F, first, dtype=torch.bool))
    for frame, past in enumerate(sequence.seen):
        begin = first + frame * F
        seen = torch.zeros(begin + F, dtype=torch.bool)
        seen[past] = True
        seen[begin:] = True
        expected = reference.visual_logits(run(sequence.denoised[frame], begin, seen.expand(F, -1)))
        torch.testing.assert_close(logits[frame], expected, atol=2e-4, rtol=1e-4)
        if frame < 3:
            run(sequence.committed[frame], begin, seen.expand(F, -1))


@torch.inference_mode()
def test_fused_attention_is_that_of_the_reference(saved):
    _, reference = saved
    fused = evaluate.FusedLumos(reference.config, reference._weights)
    world = make_world(3)
    ids = prompt(world.prompt, 4, build_text_tokenizer()) + world_frame(world, 0).tolist()
    request = bundle.request_options(6, lumos.MaskedOptions(steps=2, guidance=2.0), policy="packcache")
    plan = ServerConfig.parse("packcache", bundle.PRESET, family=LUMOS).request(request, ids)
    videos = [
        MaskedVideo(model, ids, 6, plan.conditional, plan.options, evaluate.BLOCK_SIZE) for model in (reference, fused)
    ]
    for frame in range(6):
        empty = torch.from_numpy(lumos.masked_frame(GRID_SHAPE))
        one, two = (video._guided_logits(frame, empty) for video in videos)
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)
        for video in videos:
            video.commit(frame, torch.from_numpy(world_frame(world, frame + 1)))


def test_a_checkpoint_has_every_row_and_only_used_ones_are_not_zero(saved):
    model, reference = saved
    rows = reference._weights["model.embed_tokens.weight"]
    assert rows.shape == (lumos.VISUAL_BEGIN + len(palette().patches), SMALL.hidden_size)
    assert np.array_equal(rows.any(1).nonzero()[:, 0].numpy(), model.ids)
    assert torch.equal(rows[torch.from_numpy(model.ids)], model.model.embed_tokens.weight)
    assert reference.config.rope_theta == SMALL.rope_theta
    assert reference.config.tied


def test_words_have_low_ids_and_what_lumos_asks_around_a_caption_is_taken_off(tmp_path, monkeypatch):
    masked_bundle.save_bundle(small_model(monkeypatch), tmp_path)
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


def test_clips_ask_for_masked_tokens_only_and_commit_as_published(monkeypatch):
    model = small_model(monkeypatch)
    clipper = train.Clipper(model)
    mask = int(model.rows(np.array([lumos.MASK])))
    content = F - lumos.FRAME_START_TOKENS - lumos.FRAME_END_TOKENS
    published = np.zeros(F, bool)
    published[lumos.FRAME_START_TOKENS + lumos.remasked(content, train.PUBLISHED_REMASK)] = True
    clips = [clipper.clip(training.FIRST_TRAINING_SEED + 2 * i, 6) for i in range(40)]
    for clip in clips:
        sequence = clip.sequence
        unknown = (sequence.denoised == mask)[:, OFFSETS]
        assert not clip.weights[~unknown].any()
        assert not clip.changed[~unknown].any()
        assert unknown.any(1).all()
        assert clip.targets.min() >= 0
        assert clip.targets.max() < model.codes
        assert not (sequence.image == mask).any()
        assert sequence.positions.shape == (3, start(sequence) + 6 * F)
        text = len(sequence.text)
        assert (sequence.positions[:, :text] == torch.arange(text)).all()
        if text == lumos.VIDEO_START_TOKENS:
            assert model.ids[sequence.text[0]] == lumos.VIDEO_BEGIN
        else:
            assert model.ids[sequence.text[0]] == lumos.BOS
    as_published = [((clip.sequence.committed == mask).numpy() == published).all() for clip in clips]
    assert 0.4 < np.mean(as_published) < 0.9
    assert {len(clip.sequence.image) for clip in clips} == {0, F}
    all_masked = [(clip.sequence.denoised == mask)[:, OFFSETS].all(1).float().mean() for clip in clips]
    assert 0.2 < np.mean(all_masked) < 0.6


def test_looking_heads_find_their_place():
    model = train.new_model()
    train.initialise(model, torch.Generator().manual_seed(0))
    sequence = train.Clipper(model).clip(training.FIRST_TRAINING_SEED, 4).sequence
    at = sequence.positions
    attention = model.layers[0].self_attn
    angles = (at[model.size.axes].T.float() * model.size.frequencies)[:, None]
    turn = angles.cos(), angles.sin()
    keys = _rotate(attention.k_norm.bias.expand(at.shape[1], -1, -1), *turn)
    queries = _rotate(attention.q_norm.bias.expand(at.shape[1], -1, -1), *turn)
    place = lumos.FRAME_START_TOKENS + 7 * (GRID_SHAPE[1] + 1) + 9
    last = start(sequence) + 3 * F + place

    def found(head, query):
        return int((keys[:, head] @ queries[query, head]).argmax())

    static, right, left, shape, colour, around = range(6)
    assert (found(static, last) - last) % F == 0
    assert found(right, last) == last - F - 1
    assert found(left, last) == last - F + 1
    assert found(shape, 8) == 6
    assert found(colour, 8) == 5
    assert found(around, last) == last


def test_training_writes_a_bundle_and_goes_on(tmp_path, monkeypatch):
    small_model(monkeypatch)
    monkeypatch.setattr(train, "STAGES", (training.Stage(1.0, (training.Clips(2, 1),)),))
    train.train(training.Run(tmp_path, 0.003))
    first = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert LumosReference.load(bundle.write_checkpoint(tmp_path / "checkpoint", tmp_path)).config.layers == 2
    # However long the first took: a slow machine may have overrun its time.
    train.train(training.Run(tmp_path, first["elapsed"] / 60 + 0.003))
    second = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert second["step"] > first["step"]
    assert second["next_seed"] > first["next_seed"]


def test_shows_finds_an_object_wherever_it_is():
    world = make_world(4)
    for number in range(len(world.objects)):
        assert evaluate.shows(world.frame_ids(0), world, number)
        assert not evaluate.shows(world.background, world, number)


def test_the_bundle_is_as_good_as_its_evaluation_says(loaded):
    """One short video with the recorded options, and the sentence that decides which way things go."""
    recorded = json.loads((bundle.MODEL_DIR / "evaluation.json").read_text(encoding="utf-8"))
    assert recorded["options"] == dataclasses.asdict(bundle.OPTIONS)
    assert recorded["trained_frames"] == bundle.TRAINED_FRAMES
    world = make_world(scores.FIRST_HELD_OUT_SEED)
    codes = evaluate.generate(loaded, world, 2, "packcache", bundle.OPTIONS)
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
            codes = evaluate.generate(loaded, world, 1, "full", bundle.OPTIONS, text=text)
            right.append((codes[0] == true)[true != before].mean())
    assert np.mean(said) > 0.8
    assert np.mean(contradicted) < 0.6
