"""The bundled model of the world to play: what it makes is what the world shows, and what was left is remembered."""

import json

import numpy as np
import pytest

from benchmarks.training import play_sparse
from benchmarks.training.llama import Llama, load_pretrained
from benchmarks.training.play_evaluate import FIRST_HELD_OUT_SEED, POLICIES, Player, plan_of, scores
from vllm_packcache.demo.play.tokenizer import build_tokenizer
from vllm_packcache.demo.play.world import LEFT, MODEL_DIR, RIGHT, Action, make_world, play, random_actions


@pytest.fixture(scope="module")
def model() -> Llama:
    return load_pretrained(MODEL_DIR)


def test_the_bundle_is_what_training_writes() -> None:
    config = json.loads((MODEL_DIR / "config.json").read_text())
    assert config["vocab_size"] == play_sparse.SIZE.vocab_size
    assert config["rope_parameters"]["factor"] == play_sparse.SIZE.rope_factor >= 1
    assert (MODEL_DIR / "model.safetensors").stat().st_size < 2_000_000
    assert json.loads((MODEL_DIR / "tokenizer.json").read_text())["model"]["vocab"] == build_tokenizer().get_vocab()
    assert not (MODEL_DIR / "checkpoint.pt").exists()


def test_held_out_worlds_are_played_right(model: Llama) -> None:
    worlds = [make_world(FIRST_HELD_OUT_SEED + 1000 + number) for number in range(8)]
    actions = [random_actions(np.random.default_rng((1000, number)), 60) for number in range(8)]
    truths = [play(world, own) for world, own in zip(worlds, actions, strict=True)]
    made = Player(model, plan_of(*POLICIES["play"])).made(worlds, actions)
    result = scores(worlds, truths, made)
    assert result["left_things"] > 2
    assert result["frames_right"] > 0.98
    assert result["one_player"] == 1


def test_what_was_left_is_remembered_by_who_anchors_rooms(model: Llama) -> None:
    """A flower is left, the player waits in the next room for longer than the window is, and comes back."""
    world = next(
        own
        for own in (make_world(seed) for seed in range(FIRST_HELD_OUT_SEED, FIRST_HELD_OUT_SEED + 100))
        if own.player.room == 0 and own.rooms[0, 5, 1:].tolist() == [0] * 7 + [6]
    )
    to_the_door = [Action(RIGHT)] * (9 - world.player.column)
    actions = [Action(drop=3), *to_the_door, *[Action()] * 15, Action(LEFT), Action(LEFT)]
    truth = play(world, actions)
    assert [own.player.room for own in truth[-18:]] == [1] * 16 + [0] * 2
    place = int(np.flatnonzero((truth[-1].rooms[0] != world.rooms[0]).ravel())[0])
    shown = {
        name: Player(model, plan_of(*POLICIES[name])).made([world], [actions])[0, -1, place]
        for name in ("play", "changed_without_episodes", "last_frame")
    }
    there, gone = truth[-1].frame_ids()[place], world.room_ids(0)[place]
    assert shown == {"play": there, "changed_without_episodes": gone, "last_frame": gone}
