"""How the masked demo model is trained: what it is asked, and that training computes what the model says."""

import dataclasses

import numpy as np
import pytest
import torch

from benchmarks.training import loop, masked_bundle, masked_lessons, masked_sparse, masked_train, pool
from benchmarks.training.loop import FIRST_TRAINING_SEED, Run
from benchmarks.training.masked_model import Lumos, LumosSize
from vllm_packcache.core.layout import VideoLayout
from vllm_packcache.core.policies import PackCache
from vllm_packcache.core.positions import Positions
from vllm_packcache.core.retention import Retention
from vllm_packcache.demo.masked import bundle
from vllm_packcache.demo.masked.tokenizer import FRAME, GRID_SHAPE
from vllm_packcache.demo.world import GRID, make_world, opening
from vllm_packcache.families import lumos
from vllm_packcache.reference.lumos import LumosReference

F = FRAME.tokens_per_frame
OFFSETS = lumos.visual_offsets(GRID_SHAPE).copy()
FRAMES = 9
WINDOW = 2


@pytest.fixture(scope="module")
def model() -> Lumos:
    """Untrained, and every head and every layer says something; rounded as a bundle is."""
    model = masked_train.new_model()
    masked_sparse.initialise(model, torch.Generator().manual_seed(0))
    for layer in model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data *= 2
    masked_sparse.pin(model)
    return model


@pytest.fixture(scope="module")
def reference(model: Lumos, tmp_path_factory: pytest.TempPathFactory) -> LumosReference:
    """The same model; its logits are as many times larger as a bundle's."""
    folder = tmp_path_factory.mktemp("untrained")
    masked_bundle.save_bundle(model, folder / "bundle")
    own = LumosReference.load(bundle.write_checkpoint(folder / "checkpoint", folder / "bundle"))
    rounded = {name: value.bfloat16().float() for name, value in model.state_dict().items()}
    model.load_state_dict(rounded)
    return own


def lesson_that(wanted) -> masked_lessons.MaskedLesson:
    seeds = range(FIRST_TRAINING_SEED, FIRST_TRAINING_SEED + 400, 2)
    found = next(own for own in (masked_lessons.make_lesson(seed, FRAMES) for seed in seeds) if wanted(own))
    found.window, found.dropped[:] = FRAMES, False
    return found


@pytest.mark.parametrize("window", [FRAMES, WINDOW])
@pytest.mark.parametrize(
    ("image", "text"), [(True, True), (True, False), (False, True)], ids=["text and image", "image", "text"]
)
@torch.inference_mode()
def test_training_computes_what_the_reference_says(model, reference, image, text, window):
    """Every visual token of early and late frames, and where a window of whole frames has slid."""
    lesson = lesson_that(lambda own: own.image == image and (len(own.text) > lumos.VIDEO_START_TOKENS) == text)
    lesson.window = window
    masked = lesson.masked()
    videos = masked_train.videos_of(model, [lesson], masked[None])
    length = len(lesson.text)
    first = length + F * image
    layout = VideoLayout(FRAME, first, F * image)
    positions = Positions(layout, scale=lumos.MM_ROPE_SCALE)
    cache = reference.new_cache(first + FRAMES * F)
    rows, columns = (torch.from_numpy(own.ravel().copy()) for own in np.indices(GRID_SHAPE))
    policy = PackCache(history_frames=window, window=window, decay=1.0, selection="spatial")
    retention = Retention(layout, policy, 1)
    differences = []
    for frame in range(FRAMES):
        slid = max(0, frame - window)
        at = torch.from_numpy(positions.of(np.arange(layout.frame_start(frame + 1)), slid))
        if frame == 0:
            reference.run(torch.tensor(lesson.text), 0, cache, at[:, :length], torch.ones(length, length).bool().tril())
            if image:
                ids = torch.from_numpy(lumos.frame_of_codes(lesson.seen[0]))
                reference.run(ids, length, cache, at[:, :first], torch.ones(F, first).bool())
        begin = layout.frame_start(frame)
        seen = torch.zeros(begin + F, dtype=torch.bool)
        seen[torch.from_numpy(retention.live_blocks(begin))] = True
        seen[begin:] = True
        ids = torch.from_numpy(lumos.frame_of_codes(lesson.seen[1 + frame]))
        denoised = ids.clone()
        denoised[OFFSETS[masked[frame].ravel()]] = lumos.MASK
        said = reference.visual_logits(reference.run(denoised, begin, cache, at, seen.expand(F, -1)))[OFFSETS]
        asked = masked_sparse.Asked(torch.zeros_like(rows), torch.full_like(rows, frame), rows, columns)
        expected = model.logits(masked_sparse.hidden(model, videos, asked)) * masked_bundle.SHARPNESS
        assert expected.std() > 1
        differences.append((said - expected).abs().max())
        committed = ids.clone()
        committed[OFFSETS[lesson.remasked.ravel()]] = lumos.MASK
        reference.run(committed, begin, cache, at, seen.expand(F, -1))
    assert max(differences) < 0.5, differences


def test_pinning_changes_nothing_that_is_pinned(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    masked_sparse.pin(model)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0.01, atol=0.01, msg=name)


def test_lessons_ask_for_masked_tokens_and_keep_what_is_true():
    taught = [masked_lessons.make_lesson(FIRST_TRAINING_SEED + 2 * i, 6) for i in range(60)]
    whole = []
    for lesson in taught:
        masked = lesson.masked()
        asked = lesson.asked(masked)
        assert not (asked & ~masked).any()
        assert (lesson.weights[asked] > 0).all()
        assert masked.any((1, 2)).all()
        assert (lesson.seen[0] == lesson.true[0]).all()
        assert (lesson.near | ~lesson.changed).all()
        whole.append(masked.all((1, 2)).mean())
        if not lesson.image:
            assert (lesson.true[0] == lesson.true[1]).all()
    assert 0.3 < np.mean(whole) < 0.7
    assert {lesson.image for lesson in taught} == {True, False}
    assert {len(lesson.text) == lumos.VIDEO_START_TOKENS for lesson in taught} == {True, False}
    assert {bool(lesson.remasked.any()) for lesson in taught} == {True, False}
    again = masked_lessons.make_lesson(taught[5].seed, 6)
    assert (again.seen == taught[5].seen).all()


def test_what_was_said_is_what_is_seen_next(monkeypatch):
    monkeypatch.setattr(masked_lessons, "MENDED", 0.5)
    lesson = masked_lessons.make_lesson(FIRST_TRAINING_SEED, 8)
    asked = lesson.asked(lesson.masked())
    lesson.visited(asked, np.full(asked.sum(), 7))
    kept = np.array([(lesson.seen[1 + k][asked[k]] == 7).all() for k in range(8)])
    mended = np.array([(lesson.seen[1 + k] == lesson.true[1 + k]).all() for k in range(8)])
    assert (kept | mended).all()
    assert kept.any()
    assert mended.any()


def test_an_opening_follows_from_the_sentence_alone():
    for seed in range(30):
        world = make_world(seed)
        opened = opening(world)
        assert opened.prompt == world.prompt
        assert opening(opened) == opened
        again = opening(dataclasses.replace(world, background=np.zeros((GRID, GRID), np.int64)))
        assert (again.frame_ids(0) == opened.frame_ids(0)).all()
        for i, thing in enumerate(opened.objects):
            assert len(opened.object_cells(i, 0)) == len(opened.object_cells(i, 22))
            assert thing.column(0) == (1 if thing.direction(0) == "right" else GRID - 4)


def test_training_writes_a_bundle_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(masked_train, "LumosSize", lambda: LumosSize(intermediate_size=32))
    monkeypatch.setattr(masked_train, "TRAINED_FRAMES", 2)
    monkeypatch.setattr(pool, "POOL", 20)
    monkeypatch.setattr(loop, "_learning_rate", lambda fraction: 1e-3)
    try:
        masked_train.main(Run(tmp_path / "straight", steps=3))
        masked_train.main(Run(tmp_path / "stopped", steps=2))
        masked_train.main(Run(tmp_path / "stopped", steps=3))
    finally:
        torch.use_deterministic_algorithms(False)
    one, two = (
        LumosReference.load(bundle.write_checkpoint(tmp_path / "checkpoint" / name, tmp_path / name))._weights
        for name in ("straight", "stopped")
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
