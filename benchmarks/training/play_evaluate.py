"""Play with the model as it is served, and count what is right.

``python -m benchmarks.training.play_evaluate --model DIR --plays 10 --frames 200 --json FILE``

Worlds that it was not trained on are played at random, greedily, frame after frame, in plain PyTorch and float32.
Before each frame the tokens that the policy keeps are computed anew at the positions where the model sees them. That
equals a cache, because in a model of one layer keys hang on nothing but token and position.

Nothing is put right on the way: a picture is right if it is what the world shows after the same actions.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track

from benchmarks.training.live import live_tokens, retention_of
from benchmarks.training.llama import Llama, load_pretrained, rotary_table, rotate
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.core.plan import Plan
from vllm_packcache.demo.play.world import (
    CONDITION_TOKENS,
    FRAME_TOKENS,
    MODEL_DIR,
    PLAYER_IN,
    TILES,
    VISUAL_IDS,
    Action,
    Int64,
    World,
    make_world,
    play,
    random_actions,
)

BLOCK_SIZE = 32
"""As on a CPU. Condition and frames are whole numbers of such blocks."""
FIRST_HELD_OUT_SEED = 2**31
"""Training draws worlds with smaller seeds."""
POLICIES: dict[str, tuple[str, Any]] = {
    "play": ("packcache", "play"),
    "changed_without_episodes": ("packcache", {"layout": "play", "history_frames": 4, "window": 8}),
    "papers_rule": ("packcache", {"layout": "play", "history_frames": 4, "window": 8, "selection": "spatial"}),
    "last_four_frames": ("sliding_window", {"layout": "play", "window": 4, "positions": "rebase"}),
    "last_frame": ("sliding_window", {"layout": "play", "window": 1, "positions": "rebase"}),
}
"""The preset, and what it is compared with."""


def plan_of(policy: str, config: Any) -> Plan:
    """What a play keeps.

    Args:
        policy: its name.
        config: as the server takes it.
    """
    plan = ServerConfig.parse(policy, config).plan({"packcache_frames": 1}, CONDITION_TOKENS)
    assert plan is not None
    return plan


class Player:
    """Plays many worlds side by side with a model of one layer.

    Args:
        model: the model.
        plan: what is kept of the past.
    """

    def __init__(self, model: Llama, plan: Plan) -> None:
        assert model.size.num_hidden_layers == 1
        self._model, self._plan = model, plan
        layer = model.layers[0]
        with torch.inference_mode():
            normed = layer.input_layernorm(model.model.embed_tokens.weight)
            self._queries, self._keys, self._values = (
                module(normed).unflatten(1, (-1, model.size.head_dim))
                for module in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
            )

    @torch.inference_mode()
    def made(self, worlds: Sequence[World], actions: Sequence[Sequence[Action]]) -> Int64:
        """Tiles of the pictures that the model makes, [plays, frames, `TILES`].

        Args:
            worlds: at the beginning.
            actions: of each play one for each frame, equally many.
        """
        frames = len(actions[0])
        ids = np.zeros((len(worlds), CONDITION_TOKENS + frames * FRAME_TOKENS), dtype=np.int64)
        retentions = []
        for own, world, acts in zip(ids, worlds, actions, strict=True):
            own[:CONDITION_TOKENS] = world.condition_ids()
            own[CONDITION_TOKENS::FRAME_TOKENS] = [action.id for action in acts]
            retentions.append(retention_of(self._plan, BLOCK_SIZE, own))
        for frame in track(range(frames), "playing"):
            first = CONDITION_TOKENS + frame * FRAME_TOKENS
            past = [np.flatnonzero(live_tokens(retention, frame)[:first]) for retention in retentions]
            self._make(ids, first, past, self._plan.positions.window_start(frame))
        return ids[:, CONDITION_TOKENS:].reshape(len(worlds), frames, FRAME_TOKENS)[:, :, 1:]

    def _make(self, ids: Int64, first: int, past: Sequence[Int64], start: int) -> None:
        """Write the tiles of the frame that begins at ``first``; ``start`` is the oldest frame of the window."""
        longest = max(map(len, past))
        plays = torch.arange(len(ids))
        at = np.zeros((len(ids), longest + FRAME_TOKENS), dtype=np.int64)
        tokens = np.zeros_like(at)
        mask = torch.full(at.shape, float("-inf"))
        for row, kept in enumerate(past):
            # What has outlived the window is where the oldest frame of the window is.
            older = np.clip((kept - CONDITION_TOKENS) // FRAME_TOKENS, 0, start)
            at[row, : len(kept)] = kept - older * FRAME_TOKENS
            tokens[row, : len(kept)] = ids[row, kept]
            mask[row, : len(kept)] = 0
        at[:, longest:] = first - start * FRAME_TOKENS + np.arange(FRAME_TOKENS)
        cos, sin = (table[torch.from_numpy(at)] for table in rotary_table(self._model.size, 0, int(at.max()) + 1))
        keys = rotate(self._keys[torch.from_numpy(tokens)].transpose(1, 2), cos[:, None], sin[:, None])
        values = self._values[torch.from_numpy(tokens)].transpose(1, 2)
        layer = self._model.layers[0]
        for place in range(TILES):
            here, own = longest + place, torch.from_numpy(ids[:, first + place])
            turn = cos[:, None, here], sin[:, None, here]
            keys[:, :, here], values[:, :, here] = rotate(self._keys[own], *turn), self._values[own]
            mask[:, here] = 0
            query = rotate(self._queries[own], *turn).unflatten(1, (keys.shape[1], -1))
            scores = (
                query @ keys[:, :, : here + 1].mT / self._model.size.head_dim**0.5 + mask[:, None, None, : here + 1]
            )
            read = scores.softmax(-1) @ values[:, :, : here + 1]
            x = self._model.model.embed_tokens(own) + layer.self_attn.o_proj(read.flatten(1))
            x = self._model.model.norm(x + layer.mlp(layer.post_attention_layernorm(x)))
            ids[plays.numpy(), first + place + 1] = _likeliest(self._model.logits(x))


def _likeliest(logits: torch.Tensor) -> Int64:
    """Of the ids that may stand there, [plays]."""
    return (VISUAL_IDS[0] + logits[:, VISUAL_IDS[0] : VISUAL_IDS[1] + 1].argmax(-1)).numpy()


def scores(
    worlds: Sequence[World], truths: Sequence[Sequence[World]], pictures: Int64
) -> dict[str, float | int | None]:
    """What is right in plays.

    Args:
        worlds: at the beginning.
        truths: of each play the world after each action.
        pictures: tiles that the model made, [plays, frames, `TILES`].

    Returns:
        Shares of frames, of tiles and of players that are right; in how many frames there is one player; of the tiles
        on which something was left or taken, in the first picture of a room on return, how many are right, and how many
        there were; and the most of these returns a room was away for, in frames.
    """
    true = np.array([[world.frame_ids() for world in truth] for truth in truths])
    player_right = (np.where(PLAYER_IN[true], true, -1) == np.where(PLAYER_IN[pictures], pictures, -1)).all(-1)
    right, away = [], []
    for start, truth, own, shown in zip(worlds, truths, pictures, true, strict=True):
        last_seen: dict[int, int] = {start.player.room: -1}
        before = start.player.room
        for frame, world in enumerate(truth):
            room = world.player.room
            if room != before and room in last_seen:
                changed = (world.rooms[room] != start.rooms[room]).reshape(-1)
                right += (own[frame] == shown[frame])[changed].tolist()
                away += [frame - last_seen[room]] * int(changed.sum())
            last_seen[room] = frame
            before = room
    return {
        "frames_right": round(float((true == pictures).all(-1).mean()), 6),
        "tiles_right": round(float((true == pictures).mean()), 6),
        "player_right": round(float(player_right.mean()), 6),
        "one_player": round(float((PLAYER_IN[pictures].sum(-1) == 1).mean()), 6),
        "left_things_right": round(float(np.mean(right)), 6) if right else None,
        "left_things": len(right),
        "longest_away": max(away, default=0),
    }


def evaluate(model: Llama, policies: Mapping[str, tuple[str, Any]], count: int, frames: int) -> dict[str, Any]:
    """Play held-out worlds with each policy.

    Args:
        model: to play with.
        policies: by their labels.
        count: of worlds.
        frames: of each play.
    """
    worlds = [make_world(FIRST_HELD_OUT_SEED + number) for number in range(count)]
    actions = [random_actions(np.random.default_rng((FIRST_HELD_OUT_SEED, number)), frames) for number in range(count)]
    truths = [play(world, own) for world, own in zip(worlds, actions, strict=True)]
    return {
        label: scores(worlds, truths, Player(model, plan_of(*policy)).made(worlds, actions))
        for label, policy in policies.items()
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Play with the model of the world to play.")
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--plays", type=int, default=20)
    parser.add_argument("--frames", type=int, default=200)
    parser.add_argument("--policies", nargs="+", choices=list(POLICIES), default=list(POLICIES))
    parser.add_argument("--json", type=Path, required=True, help="file for the results")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load_pretrained(args.model)
    results = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "plays": args.plays,
        "frames": args.frames,
        "policies": evaluate(model, {name: POLICIES[name] for name in args.policies}, args.plays, args.frames),
    }
    args.json.write_text(json.dumps(results, indent=1) + "\n")
    for label, result in results["policies"].items():
        print(label, result)


if __name__ == "__main__":
    main()
