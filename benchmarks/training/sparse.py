"""The demo model computed where somebody asks, and nowhere else.

In the first layer most heads look at one fixed distance: the same place one frame back, where an object was that is
here now, the row above. All other heads read the words of the prompt. So what the model says after one token depends
on a few tokens' embeddings and on the words, whatever the length of the video, and training need not compute the
rest. What attention gives beside that is below a hundredth; the whole model is compared with this in a test.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.training.llama import Layer, Llama, LlamaSize, rotary_frequencies, rotary_table, rotate
from vllm_packcache.demo.tokenizer import CONDITION_TOKENS, FRAME_TOKENS, TEXT_TOKENS, VideoTokenizer
from vllm_packcache.demo.world import GRID


def _cell(back: int, columns: int) -> int:
    """How far behind a token lies what was so many columns right of the next token's place, some frames earlier."""
    return back * FRAME_TOKENS - 1 - columns


# What moves by one column a frame, and was somewhere else when a pillar of 5 to 8 columns began to hide it: that many
# frames back and one more, or two more, so that where it went tells which way. What covers a place leaves it within
# five frames, a turn at the wall included. Whether the wall is near tells of a turn.
LOOKS: tuple[int, ...] = (
    *(_cell(1, columns) for columns in (0, -1, 1, 4)),
    *(_cell(2, columns) for columns in (0, -2, 2)),
    *(_cell(back, columns) for back in range(6, 11) for columns in (-back, back)),
    *(_cell(back, 0) for back in (4, 6)),
    *(GRID - 1, 1),
)
"""Distances of the first layer's heads, in tokens; all but the last `LlamaSize.num_key_value_heads`-th part."""

_STRENGTHS = (24.0, 21.6, 19.2, 16.8, 14.4, 12.0, 9.6, 7.2, 6.0, 4.8)
"""Of the rotary frequencies, highest first: how much less a head sees of what is not at its distance."""
NOTHING = 6.0
"""How much less than the token at its distance a head sees the first token: it reads that where there is none."""
_READING, _READING_DEEPER = 40.0, 200.0
"""How much more of a word a head of words sees than of any other token, were inputs no longer than embeddings. Those of
deeper layers are, several times."""

_UNREAD = 2e4
"""How much louder a key says that it is none of a word. Nobody reads what is not a word, however small norms make that;
half precision reaches three times as far."""

_ANY, _WORD, _FIRST, _OTHER = 0, 1, 2, 3
"""Dimensions of the embedding that are constants: of all tokens but the first, of words, of the first, of no words."""
CONSTANTS = 4
_ANY_VALUE, _WORD_VALUE = 160.0, 80.0
_LEFT_SQUARED = 512.0
"""Of the rest of every embedding: all have one length, so that scores hang on nothing but what a token is.

The constants are most of it, or what layers write would drown them; norms make the rest as large again."""
_GAIN = 8.0


class Asked(NamedTuple):
    """Tokens to predict, of V videos.

    Args:
        video: which video, int64 [A].
        place: index of the token in the sequence, int64 [A].
    """

    video: Tensor
    place: Tensor


class Past(Protocol):
    """What tokens of V videos can see of what was before."""

    def slide(self, rows: Asked) -> Tensor:
        """By how many tokens the window has come nearer to the condition while tokens are computed, int64 [R]."""

    def there(self, rows: Asked, at: Tensor) -> Tensor:
        """Whether tokens can see those with the indices ``at``, [R, looks], of their videos, bool [R, looks]."""

    def words(self) -> Tensor | None:
        """Which of the words can be seen, bool [V, L]; None: all."""


@dataclass(frozen=True)
class Windows:
    """A `Past` of whole frames, or of some of their rows.

    Args:
        window: frames that are kept, int64 [V]; what is older is not there, and the condition follows on the window.
        dropped: of each frame, of which rows nothing is left once it is older than the last one, bool [V, T, 16].
    """

    window: Tensor
    dropped: Tensor

    def slide(self, rows: Asked) -> Tensor:
        """As `Past`."""
        return (_frame(rows.place) - self.window[rows.video]).clamp(min=0) * FRAME_TOKENS

    def there(self, rows: Asked, at: Tensor) -> Tensor:
        """As `Past`."""
        inside = (at - CONDITION_TOKENS).clamp(min=0)
        older = inside // FRAME_TOKENS
        row = ((inside % FRAME_TOKENS - 1).clamp(min=0)) // GRID
        gone = self.dropped[rows.video[:, None], older.clamp(max=self.dropped.shape[1] - 1), row]
        return ~(gone & (at >= CONDITION_TOKENS) & (older < _frame(rows.place)[:, None] - 1))

    def words(self) -> None:
        """All."""


class Known(NamedTuple):
    """What videos say whatever is asked of them.

    Args:
        keys: of the words, of each layer [V, heads, L, head_dim].
        values: the same.
        said: what each token says to heads that look at it, [vocabulary, heads, head_dim].
    """

    keys: list[Tensor]
    values: list[Tensor]
    said: Tensor


def looking_heads(size: LlamaSize) -> int:
    """Heads of the first layer that look at a distance; the last shared key is that of the words."""
    return size.num_attention_heads * (size.num_key_value_heads - 1) // size.num_key_value_heads


@torch.no_grad()
def initialise(model: Llama, tokenizer: VideoTokenizer, generator: torch.Generator) -> None:
    """Random weights where training may change them; `pin` does the rest."""
    torch.nn.init.normal_(model.model.embed_tokens.weight, generator=generator)
    # The embedding is the output layer too; small final states start near uniform.
    model.model.norm.weight.fill_(0.1 * _GAIN)
    for layer in model.layers:
        layer.input_layernorm.weight.fill_(_GAIN)
        layer.post_attention_layernorm.weight.fill_(_GAIN)
        attention, mlp = layer.self_attn, layer.mlp
        inner = (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj)
        for module in (*inner, attention.o_proj, mlp.down_proj):
            torch.nn.init.normal_(module.weight, std=module.in_features**-0.5, generator=generator)
        for module in (attention.o_proj, mlp.down_proj):
            module.weight *= 0.2
    pin(model, tokenizer)


@torch.no_grad()
def pin(model: Llama, tokenizer: VideoTokenizer) -> None:
    """Put back what training must not change: constants of the embedding, and where heads look.

    A query is a fixed vector and a key the same vector turned by the rotary angle of the distance: their product peaks
    there.
    """
    size = model.size
    half, slowest = size.head_dim // 2, size.head_dim // 2 - 1
    words = torch.zeros(size.vocab_size, dtype=torch.bool)
    words[: tokenizer.visual_offset] = True
    words[[tokenizer.bos_id, tokenizer.eos_id, tokenizer.image_id, tokenizer.frame_id]] = False
    embedding = model.model.embed_tokens.weight
    embedding[:, :CONSTANTS] = 0
    embedding[:, _ANY] = _ANY_VALUE
    embedding[words, _WORD], embedding[~words, _OTHER] = _WORD_VALUE, _WORD_VALUE
    embedding[tokenizer.bos_id, :CONSTANTS] = torch.tensor([0.0, 0.0, _ANY_VALUE, _WORD_VALUE])
    free = embedding[:, CONSTANTS:]
    free *= (_LEFT_SQUARED / free.square().sum(1)).sqrt()[:, None]
    norm = float(embedding[0].square().mean().sqrt())
    model.model.norm.weight[:CONSTANTS] = 0
    seen = _ANY_VALUE / norm
    scale = size.head_dim**0.5 / seen**2
    strength = torch.zeros(half)
    strength[: len(_STRENGTHS)] = torch.tensor(_STRENGTHS)
    amplitude = (strength * scale).sqrt()
    for number, layer in enumerate(model.layers):
        attention = layer.self_attn
        layer.input_layernorm.weight[:CONSTANTS] = 1
        layer.post_attention_layernorm.weight[:CONSTANTS] = 0
        for module in (attention.o_proj, layer.mlp.down_proj):
            module.weight[:CONSTANTS] = 0
        query, key = attention.q_proj.weight, attention.k_proj.weight
        looking = looking_heads(size) if number == 0 else 0
        looked = size.num_key_value_heads - 1 if number == 0 else 0
        query[: looking * size.head_dim], key[: looked * size.head_dim] = 0, 0
        queries, keys = query.view(-1, size.head_dim, size.hidden_size), key.view(-1, size.head_dim, size.hidden_size)
        keys[:looked, :half, _ANY] = amplitude
        keys[:looked, slowest, _FIRST] = 1.0
        for head, distance in enumerate(LOOKS[:looking]):
            angle = rotary_frequencies(size) * distance
            queries[head, :half, _ANY] = amplitude * angle.cos()
            queries[head, half:, _ANY] = -amplitude * angle.sin()
            queries[head, slowest, _ANY] = (sum(_STRENGTHS) - NOTHING) * scale
        # A pair of channels says what kind of token this is, and nothing else: what layers have written is a hundred
        # times as long as a constant, and may point anywhere.
        pair = [slowest, half + slowest]
        keys[looked:, pair], queries[looking:, pair] = 0, 0
        keys[looked:, slowest, _WORD], keys[looked:, slowest, _OTHER] = 1, -_UNREAD
        reading = (_READING_DEEPER if number else _READING) * size.head_dim**0.5 / (seen * _WORD_VALUE / norm)
        queries[looking:, slowest, _ANY] = reading


def _frame(place: Tensor) -> Tensor:
    """The frame that is being made behind the token at a place; of the condition, the first."""
    return (place + 1 - CONDITION_TOKENS).div(FRAME_TOKENS, rounding_mode="floor").clamp(min=0)


def looked_at(ids: Tensor, past: Past, rows: Asked, first: int) -> Tensor:
    """The tokens at the distances of `LOOKS` before the next token, [R, looks]; ``first`` where there is none.

    Args:
        ids: of the videos, [V, T].
        past: what there is of them.
        rows: tokens that are looked from.
        first: the id that stands for nothing.
    """
    at = rows.place[:, None] - torch.tensor(LOOKS)
    slide = past.slide(rows)[:, None]
    # The condition follows on the window, wherever that has got to.
    at = torch.where(at - slide >= CONDITION_TOKENS, at, at - slide)
    own = at.clamp(min=0)
    there = (at >= 0) & past.there(rows, own)
    return torch.where(there, ids[rows.video[:, None], own], first)


def learn_words(model: Llama, tokenizer: VideoTokenizer, ids: Tensor) -> Known:
    """Compute the words of V videos, which all that comes later reads.

    Args:
        model: whose heads look as `pin` has them look.
        tokenizer: of the ids.
        ids: of the videos, [V, T].
    """
    size, videos = model.size, len(ids)
    group = size.num_attention_heads // size.num_key_value_heads
    # Words begin behind the first token.
    at = torch.arange(1, 1 + TEXT_TOKENS)
    back = at[:, None] - torch.tensor(LOOKS)
    seen = torch.where(back >= 0, ids[:, back.clamp(min=0)], tokenizer.bos_id).flatten(0, 1)
    turn = rotary_table(size, 1, TEXT_TOKENS)
    said = _said(model)
    x = model.model.embed_tokens(ids[:, at]).flatten(0, 1)
    keys, values = [], []
    for number, layer in enumerate(model.layers):
        looking = looking_heads(size) if number == 0 else 0
        normed = layer.input_layernorm(x)
        query, key, value = (
            F.linear(normed, module.weight[heads * size.head_dim :])
            .view(videos, TEXT_TOKENS, -1, size.head_dim)
            .transpose(1, 2)
            for module, heads in (
                (layer.self_attn.q_proj, looking),
                (layer.self_attn.k_proj, looking // group),
                (layer.self_attn.v_proj, looking // group),
            )
        )
        query, key = rotate(query, *turn), rotate(key, *turn)
        keys.append(key)
        values.append(value)
        read = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        read = read.transpose(1, 2).flatten(0, 1).flatten(1)
        x = _after(layer, x, torch.cat([_look(said, seen, tokenizer.bos_id, size), read], 1) if looking else read)
    return Known(keys, values, said)


def hidden(
    model: Llama, tokenizer: VideoTokenizer, ids: Tensor, past: Past, asked: Asked, known: Known | None = None
) -> Tensor:
    """Final hidden states before the asked tokens, [A, hidden]: `Llama.hidden` there, as far as heads see their own.

    Args:
        model: whose heads look as `pin` has them look.
        tokenizer: of the ids.
        ids: of the videos, [V, T].
        past: what there is of them.
        asked: the tokens.
        known: of `learn_words` of these videos, if that is done already.
    """
    size = model.size
    known = known or learn_words(model, tokenizer, ids)
    rows = Asked(asked.video, asked.place - 1)
    seen = looked_at(ids, past, rows, tokenizer.bos_id)
    position = rows.place - past.slide(rows)
    first = int(position.min())
    cos, sin = (
        values[position - first][:, None] for values in rotary_table(size, first, int(position.max()) + 1 - first)
    )
    # Videos are asked differently often: each token's number among those of its video.
    order = torch.argsort(asked.video, stable=True)
    counts = torch.bincount(asked.video, minlength=len(ids))
    slot = torch.empty_like(order)
    slot[order] = torch.arange(len(order)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    own, most = (asked.video, slot), int(counts.max())
    words = past.words()
    mask = None if words is None else words[:, None, None]
    x = model.model.embed_tokens(ids[rows.video, rows.place])
    for number, layer in enumerate(model.layers):
        looking = looking_heads(size) if number == 0 else 0
        query = F.linear(layer.input_layernorm(x), layer.self_attn.q_proj.weight[looking * size.head_dim :])
        query = rotate(query.view(len(x), -1, size.head_dim), cos, sin)
        found = _read(query.new_zeros(len(ids), most, *query.shape[1:]).index_put(own, query), known, number, mask)
        read = found[own].flatten(1)
        x = _after(layer, x, torch.cat([_look(known.said, seen, tokenizer.bos_id, size), read], 1) if looking else read)
    return model.model.norm(x)


def _read(query: Tensor, known: Known, layer: int, mask: Tensor | None) -> Tensor:
    """What heads read of the words, [V, n, heads, head_dim], of queries of the same shape.

    Heads that share a key are queries of one head: many small products become few large ones.
    """
    keys, values = known.keys[layer], known.values[layer]
    grouped = query.unflatten(2, (keys.shape[1], -1)).transpose(1, 2)
    found = F.scaled_dot_product_attention(grouped.flatten(2, 3), keys, values, attn_mask=mask)
    return found.unflatten(2, grouped.shape[2:4]).transpose(1, 2).flatten(2, 3)


def _after(layer: Layer, x: Tensor, read: Tensor) -> Tensor:
    """The residual stream behind a layer, [R, hidden], of what its heads read, [R, heads * head_dim]."""
    x = x + layer.self_attn.o_proj(read)
    return x + layer.mlp(layer.post_attention_layernorm(x))


def _said(model: Llama) -> Tensor:
    """What each token says to the heads that look at it: see `Known`."""
    layer = model.layers[0]
    values = layer.self_attn.v_proj(layer.input_layernorm(model.model.embed_tokens.weight))
    return values.unflatten(1, (-1, model.size.head_dim))


def _look(said: Tensor, seen: Tensor, first: int, size: LlamaSize) -> Tensor:
    """What the looking heads read, [R, heads * head_dim]."""
    shared = torch.arange(looking_heads(size)) // (size.num_attention_heads // size.num_key_value_heads)
    read = said[seen, shared]
    of_nothing = 1 / (1 + torch.tensor(NOTHING).exp())
    return (read + of_nothing * (said[first, shared] - read)).flatten(1)
