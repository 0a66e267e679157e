"""The model of the world to play, computed where somebody asks: what its heads look at, set once and never trained.

RoPE does the looking. The frequencies are harmonics of a frame of 64 tokens, so a head can ask for the same place of
any frame, whichever it is; slower ones tell new from old, and the slowest, which hardly turn, what a token is.

* Most heads look at one distance: the tiles around the next one, a frame ago, and the two doors, seen from the action.
* One looks at the place of the next tile in the newest picture of the room that the last tile is of. That is memory:
  it finds what lies in a room wherever in the past the room was seen last.
* One looks there in the oldest picture of that room, which is the condition's: walls that were mistaken are put right.
* One reads the newest action.

So what the model says of a tile depends on sixteen tokens, and training computes nothing else.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.training.llama import Llama, LlamaSize, rotary_frequencies
from vllm_packcache.demo.play.world import (
    ACTION_IDS,
    COLUMNS,
    DOOR_ROW,
    FRAME_TOKENS,
    PICTURE_ID,
    ROOM_OF,
    ROOMS,
    VOCABULARY,
)

HARMONICS = 4
"""Rotary frequencies that turn by whole turns in a frame: 8, 4, 2 and 1 of them; each other turns half as fast as the
one before."""
HEAD_DIM = 32
SIZE = LlamaSize(
    vocab_size=VOCABULARY,
    hidden_size=180,
    intermediate_size=1024,
    num_hidden_layers=1,
    num_attention_heads=15,
    num_key_value_heads=5,
    head_dim=HEAD_DIM,
    rope_theta=2.0 ** (HEAD_DIM // 2),
    rope_factor=FRAME_TOKENS / (2 * math.pi * 2 ** (HARMONICS - 1)),
    max_position_embeddings=8192,
)


def _around(rows: int, columns: int) -> int:
    """How far behind a token lies, a frame ago, what is so many rows and columns from the next token's place."""
    return FRAME_TOKENS - 1 - rows * COLUMNS - columns


def _door(column: int) -> int:
    """How far behind an action lies a door of the picture before."""
    return FRAME_TOKENS - 1 - (DOOR_ROW * COLUMNS + column)


LOOKS: tuple[int, ...] = (
    *(_around(rows, columns) for rows in (-1, 0, 1) for columns in (-1, 0, 1)),
    _door(0),
    _door(COLUMNS - 1),
    1,
)
"""Distances of the heads that look at one, in tokens."""
SAME_PLACE = _around(0, 0)
"""Distance of the place of the next tile, a frame ago."""
CONTENT_HEADS = 3
"""The newest picture of the room, its oldest one, the newest action; they share a key."""

_PLACE = (600.0, 260.0, 140.0, 140.0)
"""How much less a head sees what is at another place of a frame, of each harmonic. The place beside, too, counts for
less than any age."""
_FRAME = 8.0
"""The same of what is in another frame, of each slower frequency."""
_AGE = 74.0
"""How much less a head sees what is older, or newer: a thirteenth of it for every frame."""
_AGE_PAIR = HARMONICS + 5
"""Turns once in 64 frames, of which a sequence has a fifth."""
_MIDDLE = 6 * FRAME_TOKENS
"""The distance in tokens around which age is told: half of a sequence."""
_KIND = 160.0
"""How much more a head sees what it looks for: more than the oldest and the newest differ."""
_KIND_PAIRS = tuple(range(HEAD_DIM // 2 - ROOMS - 1, HEAD_DIM // 2))
"""A pair of channels for each room, and one for actions: too slow to turn within a sequence."""
_ACTION_PAIR = _KIND_PAIRS[-1]

_ANY = 0
"""Dimension of the embedding that is the same for all tokens; the next ones say of which room a tile is, that it is an
action, or that it is neither."""
_ACTION, _OTHER = 1 + ROOMS, 2 + ROOMS
CONSTANTS = 3 + ROOMS
_CONSTANT = 4.0


@torch.no_grad()
def initialise(model: Llama, generator: torch.Generator) -> None:
    """Random weights where training may change them, and heads that look where they are to look."""
    torch.nn.init.normal_(model.model.embed_tokens.weight, generator=generator)
    for layer in model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for module in (attention.v_proj, attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj):
            torch.nn.init.normal_(module.weight, std=module.in_features**-0.5, generator=generator)
        for module in (attention.q_proj, attention.k_proj):
            module.weight.requires_grad_(False)
    # The embedding is the output layer too; small final states start near uniform.
    model.model.norm.weight.fill_(0.1)
    pin(model)
    _look(model)


@torch.no_grad()
def pin(model: Llama) -> None:
    """Put back what training must not change: the constants of the embedding, and its length, which scores hang on."""
    embedding = model.model.embed_tokens.weight
    embedding[:, :CONSTANTS] = 0
    embedding[:, _ANY] = _CONSTANT
    ids = torch.arange(len(embedding))
    group = torch.full_like(ids, _OTHER)
    group[: len(ROOM_OF)] = 1 + torch.from_numpy(ROOM_OF)
    group[ACTION_IDS[0] : ACTION_IDS[1] + 1] = _ACTION
    assert group[PICTURE_ID] == _OTHER
    embedding[ids, group] = _CONSTANT
    free = embedding[:, CONSTANTS:]
    free *= (free.shape[1] / free.square().sum(1)).sqrt()[:, None]
    model.layers[0].input_layernorm.weight[:CONSTANTS] = 1


def _look(model: Llama) -> None:
    """Set queries and keys: a query is a key turned by the angle of a distance, and their product peaks there."""
    size, attention = model.size, model.layers[0].self_attn
    half = size.head_dim // 2
    # What a constant of the embedding is behind the norm.
    seen = _CONSTANT / float(model.model.embed_tokens.weight[0].square().mean().add(size.rms_norm_eps).sqrt())
    scale = size.head_dim**0.5 / seen**2
    query, key = (
        module.weight.view(-1, size.head_dim, size.hidden_size) for module in (attention.q_proj, attention.k_proj)
    )
    query.zero_()
    key.zero_()
    frequencies = rotary_frequencies(size)

    def ask(head: int, pair: int, strength: float, distance: float, dimension: int = _ANY) -> None:
        angle = float(frequencies[pair]) * distance
        query[head, pair, dimension] = strength * scale * math.cos(angle)
        query[head, half + pair, dimension] = -strength * scale * math.sin(angle)

    # A key says that it is there in every pair; those that all share say what they are in the slowest ones instead.
    key[:, :half, _ANY] = 1
    key[-1, list(_KIND_PAIRS), _ANY] = 0
    for room, pair in enumerate(_KIND_PAIRS[:ROOMS]):
        key[-1, pair, 1 + room] = 1
    key[-1, _ACTION_PAIR, _ACTION] = 1

    looking = len(LOOKS)
    for head, distance in enumerate(LOOKS):
        for pair, strength in enumerate((*_PLACE, *[_FRAME] * (half - HARMONICS))):
            ask(head, pair, strength, distance)
    newest, oldest, action = range(looking, looking + CONTENT_HEADS)
    quarter = math.pi / 2 / float(frequencies[_AGE_PAIR])
    for head, towards in ((newest, -1), (oldest, 1), (action, -1)):
        # A quarter turn beside the peak, the score falls evenly with distance.
        ask(head, _AGE_PAIR, _AGE, _MIDDLE + towards * quarter)
    for head in (newest, oldest):
        for pair, strength in enumerate(_PLACE):
            ask(head, pair, strength, SAME_PLACE)
        for room, pair in enumerate(_KIND_PAIRS[:ROOMS]):
            ask(head, pair, _KIND, 0, 1 + room)
    ask(action, _ACTION_PAIR, _KIND, 0)


def hidden(model: Llama, own: Tensor, seen: Tensor) -> Tensor:
    """Final hidden states of tokens, [A, hidden]: `Llama.hidden` there, as far as heads see their own.

    Args:
        model: whose heads look as `initialise` has them look.
        own: the tokens, int64 [A].
        seen: what each head sees from there, int64 [A, heads].
    """
    size, layer = model.size, model.layers[0]
    embedding = model.model.embed_tokens.weight
    said = layer.self_attn.v_proj(layer.input_layernorm(embedding)).unflatten(1, (-1, size.head_dim))
    shared = torch.arange(size.num_attention_heads) // (size.num_attention_heads // size.num_key_value_heads)
    x = F.embedding(own, embedding) + layer.self_attn.o_proj(said[seen, shared].flatten(1))
    return model.model.norm(x + layer.mlp(layer.post_attention_layernorm(x)))
