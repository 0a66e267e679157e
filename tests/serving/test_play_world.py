"""The bundled world to play, served with its preset: the pictures are those that evaluation makes."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.training.llama import load_pretrained
from benchmarks.training.play_evaluate import Player, plan_of
from tests.runner import shorter
from tests.serving.conftest import run, sampling
from tests.serving.turns import Played, finish
from vllm_packcache.config.sources import load_mapping
from vllm_packcache.demo.play.world import (
    FRAME_TOKENS,
    LEFT,
    MODEL_DIR,
    RIGHT,
    THINGS,
    Action,
    make_world,
    random_actions,
)


def test_a_play_is_served_as_it_is_evaluated(engine: Any) -> None:
    """Longer than the window, through doors; two at a time."""
    frames = shorter(24, 2)
    worlds = [make_world(seed) for seed in (1, 2)]
    through = [Action(side, jump) for side in (LEFT, RIGHT) for jump in [False, False, True] * 4]
    actions = [through[:frames], random_actions(np.random.default_rng(0), frames)]
    llm = engine("packcache", "play", model=MODEL_DIR, max_model_len=2048, num_gpu_blocks_override=200)
    params = [
        sampling(frames * FRAME_TOKENS, frames=frames, given_ids=[action.id for action in own]) for own in actions
    ]
    answers = run(llm, [world.condition_ids() for world in worlds], params)
    served = np.array(answers).reshape(2, frames, FRAME_TOKENS)
    assert (served[:, :, 0] == [[action.id for action in own] for own in actions]).all()
    made = Player(load_pretrained(MODEL_DIR), plan_of("packcache", "play")).made(worlds, actions)
    assert (served[:, :, 1:] == made).all()


def test_what_was_left_in_a_room_is_there_when_the_engine_has_forgotten_the_way(engine: Any) -> None:
    """A session with room for fewer frames than are played equals the world itself."""
    frames, longest = shorter(70, 4), 27 * FRAME_TOKENS
    world = make_world(1)
    llm = engine("packcache", "play", model=MODEL_DIR, max_model_len=2048, num_gpu_blocks_override=200)
    condition = world.condition_ids()
    session = Played(llm, "world", load_mapping("play"), condition, len(condition), longest)
    left = [Action(move=RIGHT), Action(drop=THINGS["gem"]), *[Action(move=RIGHT)] * 12, *[Action(move=LEFT)] * 30]
    actions = [*left, *random_actions(np.random.default_rng(1), frames)][:frames]
    for action in actions:
        session.begin([action.id])
        finish([session])
        world = world.step(action)
        assert session.made[-1] == list(world.frame_ids())
    session.end()
    assert session.forgotten == max(0, frames - 24)
