"""How the model of the world to play is trained: what it is asked, what its heads see, and that it can be repeated."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from benchmarks.training import play_evaluate, play_lessons, play_sparse, play_train
from benchmarks.training.llama import Llama, load_pretrained
from benchmarks.training.loop import Run
from vllm_packcache.demo.play.tokenizer import build_tokenizer
from vllm_packcache.demo.play.world import (
    CONDITION_TOKENS,
    FRAME_TOKENS,
    KIND_OF,
    LEFT,
    PLAYER_IN,
    RIGHT,
    ROOMS,
    SKY,
    VISUAL_IDS,
    VOCABULARY,
    WALL,
    Action,
    World,
    make_world,
    play,
    random_actions,
    sequence_ids,
)


@pytest.fixture(scope="module")
def model() -> Llama:
    """Untrained: what every head sees makes a difference."""
    model = Llama(play_sparse.SIZE)
    play_sparse.initialise(model, torch.Generator().manual_seed(0))
    return model.eval()


def room_to_room(seed: int) -> tuple[World, list[Action]]:
    """A play of nine frames, as many as a window and the frame that is made have, through a door and back."""
    for attempt in range(1000):
        world = make_world(seed * 1000 + attempt)
        actions = random_actions(np.random.default_rng((seed, attempt)), 9)
        rooms = [world.player.room, *(own.player.room for own in play(world, actions))]
        if len(set(rooms)) > 1 and rooms[-1] == rooms[0]:
            return world, actions
    raise AssertionError


@pytest.mark.parametrize("seed", range(3))
@torch.inference_mode()
def test_the_whole_model_says_what_training_computes(model: Llama, seed: int) -> None:
    """There and back again: the newest picture of a room is now the last, now one before, now the condition's."""
    world, actions = room_to_room(seed)
    ids = sequence_ids(world, actions)
    whole = model.logits(model.hidden(torch.from_numpy(ids)[None]))[0]
    condition = np.stack(
        [world.frame_ids() if room == world.player.room else world.room_ids(room) for room in range(ROOMS)]
    )
    newest, worlds = condition.copy(), [world, *play(world, actions)]
    scale = float(whole[CONDITION_TOKENS:].std())
    assert scale > 1
    for frame, action in enumerate(actions):
        first = CONDITION_TOKENS + frame * FRAME_TOKENS
        line = ids[first - 2 * FRAME_TOKENS : first]
        past = play_lessons.Past(condition, world.player.room, newest, worlds[frame].player.room, line)
        own, seen = past.seen(action.id, ids[first + 1 : first + FRAME_TOKENS])
        some = model.logits(play_sparse.hidden(model, torch.from_numpy(own), torch.from_numpy(seen)))
        torch.testing.assert_close(some, whole[first : first + FRAME_TOKENS - 1], atol=0.03 * scale, rtol=0.0)
        after = worlds[frame + 1]
        newest[after.player.room] = after.frame_ids()
    # What is newest makes a difference.
    assert (newest != condition).any()


def test_a_batch_asks_for_all_kinds_of_things() -> None:
    batches = [play_lessons.make_batch(seed) for seed in range(12)]
    targets, changed = (np.concatenate([batch[field] for batch in batches]) for field in (2, 3))
    assert all(len(batch.own) == len(batch.seen) == len(batch.targets) for batch in batches)
    assert batches[0].seen.shape[1] == play_sparse.SIZE.num_attention_heads
    assert 0.1 < changed.mean() < 0.9
    assert targets.max() <= VISUAL_IDS[1]
    # Nearly every pose before nearly everything that may be behind it: there are 99.
    assert len(np.unique(targets)) > 80
    assert PLAYER_IN[targets].mean() > 0.02
    again = play_lessons.make_batch(0)
    assert all((one == other).all() for one, other in zip(batches[0], again, strict=True))
    assert len(play_lessons.make_batch(1).own) != len(again.own) or (play_lessons.make_batch(1).own != again.own).any()


def test_what_is_mistaken_is_put_right_as_far_as_it_can_be_told() -> None:
    world = make_world(0)
    condition = world.room_ids(1)
    floor = int(np.flatnonzero(KIND_OF[condition] == SKY)[0])
    wall = int(np.flatnonzero(KIND_OF[condition] == WALL)[0])
    picture = condition.copy()
    picture[[floor, wall]] = picture[[wall, floor]]
    assert (play_lessons._mended(picture, condition) == condition).all()
    # A thing may have been left there; one of another room may not.
    picture = condition.copy()
    picture[floor] += 2
    assert (play_lessons._mended(picture, condition) == picture).all()
    picture[floor] += play_lessons.ROOM_IDS
    assert (play_lessons._mended(picture, condition) == condition).all()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(play_sparse, "SIZE", dataclasses.replace(play_sparse.SIZE, intermediate_size=32))
    monkeypatch.setattr(play_lessons, "WORLDS", 2)
    yield
    torch.use_deterministic_algorithms(False)


def test_training_goes_on_and_comes_to_the_same(tmp_path, small, monkeypatch: pytest.MonkeyPatch) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    play_train.main(Run(straight, steps=6, threads=1))

    class Stop(Exception):
        pass

    settle, steps, losses = play_train.PlayCourse.settle, [], []
    study = play_train.PlayCourse.study

    def stop_in_the_middle(course: play_train.PlayCourse) -> None:
        settle(course)
        steps.append(1)
        if len(steps) == 5:
            raise Stop

    def noting(course: play_train.PlayCourse) -> str:
        losses.append(float(study(course).split()[1].rstrip(",")))
        return ""

    monkeypatch.setattr(play_train.PlayCourse, "settle", stop_in_the_middle)
    monkeypatch.setattr(play_train.PlayCourse, "study", noting)
    monkeypatch.setattr("benchmarks.training.loop.SECONDS_BETWEEN_SAVES", 0)
    with pytest.raises(Stop):
        play_train.main(Run(stopped, steps=6, threads=1))
    play_train.main(Run(stopped, steps=6, threads=1))
    assert np.isfinite(losses).all()
    one, two = (load_pretrained(folder).state_dict() for folder in (straight, stopped))
    assert all(torch.equal(one[name], two[name]) for name in one)
    play_train.main(Run(tmp_path / "other", steps=6, seed=1, threads=1))
    other = load_pretrained(tmp_path / "other").state_dict()
    assert any(not torch.equal(one[name], other[name]) for name in one)
    assert (straight / "tokenizer.json").is_file()


@torch.inference_mode()
def test_evaluation_plays_as_the_whole_model_does(model: Llama) -> None:
    """While everything is kept, each tile is the likeliest that may stand there."""
    world, actions = room_to_room(4)
    plan = play_evaluate.plan_of("sliding_window", {"layout": "play", "window": 100})
    (made,) = play_evaluate.Player(model, plan).made([world], [actions])
    ids = np.concatenate([world.condition_ids(), np.insert(made, 0, [action.id for action in actions], axis=1).ravel()])
    logits = model.logits(model.hidden(torch.from_numpy(ids)[None]))[0, CONDITION_TOKENS - 1 : -1, : VISUAL_IDS[1] + 1]
    best = logits.unflatten(0, (*made.shape[:1], FRAME_TOKENS))[:, 1:].topk(2)
    sure = (best.values[..., 0] - best.values[..., 1] > 0.01).numpy()
    assert sure.mean() > 0.9
    assert (best.indices[..., 0].numpy() == made)[sure].all()


def test_scores_count_what_is_right() -> None:
    world = make_world(0)
    world = World(world.rooms, world.player._replace(room=1, column=1, facing=LEFT))
    actions = [Action(drop=2), Action(LEFT), Action(LEFT), Action(LEFT), Action(RIGHT), Action(RIGHT)]
    truth = play(world, actions)
    shown = np.array([own.frame_ids() for own in truth])
    result = play_evaluate.scores([world], [truth], shown[None])
    assert (result["frames_right"], result["left_things_right"], result["one_player"]) == (1, 1, 1)
    assert (result["left_things"], result["longest_away"]) == (1, 4)
    forgotten = shown.copy()
    place = int(np.flatnonzero((truth[-1].rooms[1] != world.rooms[1]).ravel())[0])
    forgotten[5:, place] = world.room_ids(1)[place]
    result = play_evaluate.scores([world], [truth], forgotten[None])
    assert result["left_things_right"] == 0
    assert result["frames_right"] == round(5 / 6, 6)
    assert result["player_right"] == result["one_player"] == 1


def test_words_are_as_many_as_the_model_knows() -> None:
    assert play_sparse.SIZE.vocab_size == VOCABULARY == build_tokenizer().get_vocab_size()
    # Transformers wants a whole number of channels for each head.
    assert play_sparse.SIZE.hidden_size % play_sparse.SIZE.num_attention_heads == 0
