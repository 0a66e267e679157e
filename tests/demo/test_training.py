"""How the demo model is trained: what it is asked, what it sees of the past, and what its heads look at."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from benchmarks.training import lessons, pool, sparse, train
from benchmarks.training.llama import Llama, LlamaSize, load_pretrained
from benchmarks.training.loop import FIRST_TRAINING_SEED, Run
from vllm_packcache.demo.tokenizer import CONDITION_TOKENS, FRAME_TOKENS, TEXT_TOKENS, VideoTokenizer, video_ids
from vllm_packcache.demo.world import GRID, PHOTO, make_world

FRAMES = 12


@pytest.fixture(scope="module")
def tokenizer() -> VideoTokenizer:
    return VideoTokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: VideoTokenizer) -> Llama:
    """Untrained, and every head reads and says something."""
    model = Llama(LlamaSize(vocab_size=tokenizer.vocab_size))
    sparse.initialise(model, tokenizer, torch.Generator().manual_seed(0))
    for layer in model.layers:
        for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
            module.weight.data *= 5
    return model


@pytest.fixture(scope="module")
def ids(tokenizer: VideoTokenizer) -> torch.Tensor:
    return torch.from_numpy(np.stack([video_ids(tokenizer, make_world(seed), FRAMES) for seed in (3, 4)]))


def whole_past(videos: int) -> sparse.Windows:
    return sparse.Windows(torch.full((videos,), FRAMES), torch.zeros(videos, FRAMES, GRID, dtype=torch.bool))


@torch.inference_mode()
def test_the_whole_model_says_what_training_computes(model: Llama, tokenizer: VideoTokenizer, ids: torch.Tensor):
    """Early frames, where heads look before the video began, late ones, and the ends of frames."""
    random = torch.Generator().manual_seed(0)
    place = torch.cat(
        [
            torch.tensor([CONDITION_TOKENS, CONDITION_TOKENS + 1, CONDITION_TOKENS + FRAME_TOKENS]),
            torch.randint(CONDITION_TOKENS, ids.shape[1], (200,), generator=random),
        ]
    )
    video = torch.randint(2, place.shape, generator=random)
    some = model.logits(sparse.hidden(model, tokenizer, ids, whole_past(2), sparse.Asked(video, place)))
    every = model.logits(model.hidden(ids))[video, place - 1]
    scale = float(every.std())
    assert scale > 1
    torch.testing.assert_close(some, every, atol=0.02 * scale, rtol=0.0)
    # Without words, or with another past, it says something else.
    mute = ids.clone()
    mute[:, 1 : 1 + TEXT_TOKENS] = tokenizer.pad_id
    forgetful = dataclasses.replace(whole_past(2), window=torch.tensor([1, 1]))
    for changed, past in ((mute, whole_past(2)), (ids, forgetful)):
        other = model.logits(sparse.hidden(model, tokenizer, changed, past, sparse.Asked(video, place)))
        assert (other - every).abs().max() > 0.3 * scale


def test_heads_look_at_their_distance_or_at_nothing(tokenizer: VideoTokenizer, ids: torch.Tensor):
    place = torch.tensor([CONDITION_TOKENS + 11 * FRAME_TOKENS + 100])
    asked = sparse.Asked(torch.tensor([1]), place)
    whole = sparse.looked_at(ids, whole_past(2), asked, tokenizer.bos_id)[0]
    assert whole.tolist() == [int(ids[1, place[0] - distance]) for distance in sparse.LOOKS]
    back = (place + 1 - CONDITION_TOKENS) // FRAME_TOKENS - (place - torch.tensor(sparse.LOOKS) - CONDITION_TOKENS).div(
        FRAME_TOKENS, rounding_mode="floor"
    )
    # A window of two frames, and the condition straight before it.
    window = dataclasses.replace(whole_past(2), window=torch.tensor([2, 2]))
    seen = sparse.looked_at(ids, window, asked, tokenizer.bos_id)[0]
    assert (seen[back <= 2] == whole[back <= 2]).all()
    assert not (back == 3).any()
    far = back > 3
    assert far.any()
    assert (seen[far] == tokenizer.bos_id).all()
    # All rows of older frames dropped: only the last frame, and the one being made.
    dropped = dataclasses.replace(whole_past(2), dropped=torch.ones(2, FRAMES, GRID, dtype=torch.bool))
    seen = sparse.looked_at(ids, dropped, asked, tokenizer.bos_id)[0]
    assert (seen[back <= 1] == whole[back <= 1]).all()
    assert (seen[back > 1] == tokenizer.bos_id).all()


def test_pinning_changes_nothing_that_is_pinned(model: Llama, tokenizer: VideoTokenizer):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sparse.pin(model, tokenizer)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], msg=name)
    lengths = model.model.embed_tokens.weight.detach().square().sum(1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, float(lengths[0])))


def test_lessons_ask_for_what_changes_and_keep_what_is_true(tokenizer: VideoTokenizer):
    taught = [lessons.make_lesson(tokenizer, FIRST_TRAINING_SEED + 2 * i, 16) for i in range(60)]
    shares = []
    for lesson in taught:
        places = lesson.asked() - CONDITION_TOKENS
        shares.append(lesson.changed.flat[places].mean())
        assert len(np.unique(places)) == len(places)
        assert (lesson.weights.flat[places] > 0).all()
        assert (lesson.seen[: CONDITION_TOKENS + 1] == lesson.true[: CONDITION_TOKENS + 1]).all()
        assert (lesson.frames[:, 0] == tokenizer.frame_id).all()
        assert (lesson.frames[:, 1:] >= tokenizer.visual_offset).all()
        assert (lesson.near | ~lesson.changed).all()
    assert 0.2 < np.mean(shares) < 0.6
    wrong = np.array([(lesson.seen != lesson.true).mean() for lesson in taught])
    assert 0.3 < (wrong > 0).mean() < 0.95
    assert wrong.max() < lessons.MOST_NOISE
    mute = [(lesson.true[1 : 1 + TEXT_TOKENS] == tokenizer.pad_id).all() for lesson in taught]
    assert 0 < np.mean(mute) < 0.3
    assert {lesson.window < 16 or lesson.dropped.any() for lesson in taught} == {True, False}
    worlds = [make_world(lesson.seed, lessons.PHOTO_SHARE) for lesson in taught]
    assert any(world.scene == PHOTO for world in worlds)
    again = lessons.make_lesson(tokenizer, taught[3].seed, 16)
    assert (again.seen == taught[3].seen).all()
    assert (again.asked() == taught[3].asked()).all()


def test_what_was_said_is_what_is_seen_next(tokenizer: VideoTokenizer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lessons, "MENDED", 0.5)
    lesson = lessons.make_lesson(tokenizer, FIRST_TRAINING_SEED, 16)
    places = lesson.asked()
    said = np.full(len(places), tokenizer.visual_offset + 7)
    true = lesson.true.copy()
    lesson.visited(places, said)
    assert (lesson.true == true).all()
    frame = (places - CONDITION_TOKENS) // FRAME_TOKENS
    inner = (places - CONDITION_TOKENS) % FRAME_TOKENS > 0
    kept = np.array([(lesson.seen[places[(frame == k) & inner]] == said[0]).all() for k in range(16)])
    mended = np.array([(lesson.frames[k] == true[CONDITION_TOKENS:].reshape(16, -1)[k]).all() for k in range(16)])
    asked = np.array([((frame == k) & inner).any() for k in range(16)])
    assert (kept | mended)[asked].all()
    assert kept[asked].any()
    assert mended.any()
    assert (lesson.asked() != places[: len(lesson.asked())]).any() or len(lesson.asked()) != len(places)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(train, "LlamaSize", lambda vocab_size: LlamaSize(vocab_size, 196, 32, 2, 28))
    monkeypatch.setattr(pool, "POOL", 20)
    monkeypatch.setattr(pool, "VISITS", 2)
    monkeypatch.setattr(train, "TRAINED_FRAMES", 2)
    yield
    torch.use_deterministic_algorithms(False)


def test_training_goes_on_and_comes_to_the_same(tmp_path, small, monkeypatch: pytest.MonkeyPatch):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    train.main(Run(straight, steps=6))

    class Stop(Exception):
        pass

    settle = train.VideoCourse.settle
    steps = []

    def stop_in_the_middle(course: train.VideoCourse) -> None:
        settle(course)
        steps.append(1)
        if len(steps) == 5:
            raise Stop

    monkeypatch.setattr(train.VideoCourse, "settle", stop_in_the_middle)
    monkeypatch.setattr("benchmarks.training.loop.SECONDS_BETWEEN_SAVES", 0)
    with pytest.raises(Stop):
        train.main(Run(stopped, steps=6))
    assert torch.load(stopped / "checkpoint.pt", weights_only=True)["step"] == 4
    train.main(Run(stopped, steps=6))
    one, two = (load_pretrained(folder).state_dict() for folder in (straight, stopped))
    assert all(torch.equal(one[name], two[name]) for name in one)
    train.main(Run(tmp_path / "other", steps=6, seed=1))
    other = load_pretrained(tmp_path / "other").state_dict()
    assert any(not torch.equal(one[name], other[name]) for name in one)
    assert (straight / "tokenizer.json").is_file()
