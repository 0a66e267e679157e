"""The masked demo model computed where somebody asks, and nowhere else; see `benchmarks.training.sparse`.

Most heads look at one place: the same one a frame back, where an object was that is here now, the neighbours of the
frame that is being made. What they read there is what the token is, and nothing that layers made of it: a part of the
residual stream is never written. Some heads read where in its picture a token is, all others the words.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from benchmarks.training.masked_model import Attention, Layer, Lumos, LumosSize, rotate
from vllm_packcache.demo.masked.tokenizer import GRID_SHAPE
from vllm_packcache.families import lumos

ROWS, COLUMNS = GRID_SHAPE


class Place(NamedTuple):
    """Where a head looks, from where it is: frames back, rows down, columns to the right."""

    back: int
    rows: int
    columns: int


class Compass(NamedTuple):
    """A head that reads where in its picture a token is: how far from the ends of the rows, by one rotary frequency.

    Args:
        pair: of channels; its axis is the rows' or the columns'.
        phase: radians.
    """

    pair: int
    phase: float


def _passed(*frames: int) -> tuple[Place, ...]:
    """Where that was, so many frames back, which moves to the right or to the left and is here now."""
    return tuple(Place(back, 0, columns) for back in frames for columns in (-back, back))


# What comes out from behind a pillar of w tokens was last seen w + 1 frames earlier, as many columns away; one frame
# more, and one knows which way it went.
HEADS: tuple[tuple[Place | Compass, ...], ...] = (
    (
        *(Place(1, 0, columns) for columns in (0, -1, 1, 4)),
        *(Place(0, *beside) for beside in ((0, -1), (0, 1), (-1, 0), (1, 0))),
    ),
    (Place(2, 0, 0), *_passed(2, 6, 7), Place(4, 0, 0)),
    _passed(8, 9, 10),
    (
        *(Compass(10, 0.0), Compass(7, 0.0), Compass(7, math.pi / 2)),
        *(Compass(9, 0.0), Compass(8, 0.0), Compass(8, math.pi / 2)),
        Place(6, 0, 0),
    ),
    (),
)
"""What the first heads of each layer do; the others read words."""

_TIME, _ROWS, _COLUMNS = 0, 1, 2
_STRENGTHS = (20.0,) * 4 + (24.0, 24.0, 60.0, 50.0, 20.0, 20.0, 30.0, 20.0, 0.0, 0.0, 0.0, 0.0)
"""Of the rotary frequencies, highest first: how much less a head sees of what is not at its place."""
NOTHING = 5.0
"""How much less than the token at its place a head sees the video's begin: it reads that where there is none."""
_HERE = 90.0
"""How much more of an end of a row of its own picture than of any other token a compass sees."""
_SWING = 3.0
_KIND = 6.0
"""Of a word in the residual stream, which says so, and less than nothing of what is none."""
_SAYS, _ASKS = 12.0, 30.0
"""The part of a key that says that it is a word's, as many times as large; and of a query that asks for words."""
_CONTENT = 6.0
"""Weight of what else a word's key says, which that part makes small."""
_APART = 100.0
"""Of what is at the edge of a frame, against all else that its key says."""

_WORD, _BEGIN, _NEWLINE, _EDGE = 0, 1, 2, 3
FLAGS = 4
"""Dimensions of the residual stream that say what kind of token this is."""
IDENTITY = slice(0, 96)
"""Those that no layer writes, `FLAGS` included."""

_SLOWEST = 15
"""The pair of channels that turns least, with columns."""
_TEXT_TO_MIDDLE = 66
"""Positions between the video's begin and the middle of a picture, on the columns' axis."""


class Asked(NamedTuple):
    """Tokens to predict: of which video, which frame, which row and which column, int64 [A] each."""

    video: Tensor
    frame: Tensor
    row: Tensor
    column: Tensor


class Past(Protocol):
    """What frames of V videos can see of what was before."""

    def kept(self, asked: Asked) -> Tensor:
        """How many frames lie between the conditioning image and the frame of each token, int64 [A]."""

    def there(self, asked: Asked, picture: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """Whether tokens can see those of pictures, bool [A].

        Args:
            asked: the tokens.
            picture: number of a picture of the history, int64 [A].
            row: of a token in it.
            column: the same; that of the row's end is as many as there are columns.
        """


@dataclass(frozen=True)
class Windows:
    """A `Past` of whole frames, or of some of their rows.

    Args:
        window: frames that are kept, [V]; the image follows on them.
        dropped: of each frame, of which rows nothing is left once it is older than the last one, bool [V, T, 16].
    """

    window: Tensor
    dropped: Tensor

    def kept(self, asked: Asked) -> Tensor:
        """As `Past`."""
        return torch.minimum(asked.frame, self.window[asked.video])

    def there(self, asked: Asked, picture: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """As `Past`."""
        older = (picture > 0) & (picture < asked.frame)
        return ~(self.dropped[asked.video, (picture - 1).clamp(min=0), row] & older)


@dataclass(frozen=True)
class Videos:
    """What V videos of T frames show, as rows of the embedding.

    Args:
        text: [V, L], padded at the end.
        text_length: [V].
        image: whether there is a conditioning image, bool [V].
        history: the image and the frames as they were committed, [V, 1 + T, 16, 16].
        canvas: the frames as they are while they are made, [V, T, 16, 16].
        past: what of the history can be seen.
    """

    text: Tensor
    text_length: Tensor
    image: Tensor
    history: Tensor
    canvas: Tensor
    past: Past


@torch.no_grad()
def initialise(model: Lumos, generator: torch.Generator) -> None:
    """Random weights where training may change them; `pin` does the rest."""
    torch.nn.init.normal_(model.model.embed_tokens.weight, generator=generator)
    # The embedding is the output layer too; small final states start near uniform.
    model.model.norm.weight.fill_(0.1)
    for layer in model.layers:
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                torch.nn.init.normal_(module.weight, std=module.in_features**-0.5, generator=generator)
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.fill_(0.4)
        layer.self_attn.k_norm.weight.fill_(_CONTENT)
    pin(model)


@torch.no_grad()
def pin(model: Lumos) -> None:
    """Put back what training must not change: what kind a token is, what no layer writes, and where heads look.

    The bias of a head's norm is a part of every query and of every key that no token changes: the same vector, turned
    by the rotary angle of a distance in the query's, makes scores that are highest there. The key of the video's begin
    is another: as high from everywhere.
    """
    size = model.size
    half = size.head_dim // 2
    scale = size.head_dim**0.5
    embedding = model.model.embed_tokens.weight
    embedding[:, :FLAGS] = 0
    embedding[:, _WORD] = -_KIND
    ids = torch.from_numpy(model.ids)
    words = (ids < lumos.FRAME_END) | (ids == lumos.SEPARATOR) | (ids == lumos.VIDEO_BEGIN)
    embedding[words, _WORD] = _KIND
    embedding[model.row(lumos.VIDEO_BEGIN), _BEGIN] = 1
    embedding[model.row(lumos.NEWLINE), _NEWLINE] = 1
    edges = (ids == lumos.FRAME_BEGIN) | (ids == lumos.FRAME_END) | ((ids >= lumos.NUMBER_ZERO) & (ids < lumos.MASK))
    embedding[edges, _WORD] = 0
    embedding[edges, _EDGE] = 1
    model.model.norm.weight[IDENTITY] = 0
    strength = torch.tensor(_STRENGTHS)
    amplitude = (strength * scale).sqrt()
    frequencies = size.frequencies
    slowest = frequencies[_SLOWEST] * _TEXT_TO_MIDDLE
    for number, layer in enumerate(model.layers):
        layer.input_layernorm.weight[IDENTITY] = 0
        layer.post_attention_layernorm.weight[IDENTITY] = 0
        attention = layer.self_attn
        query, key = attention.q_norm, attention.k_norm
        to_key = attention.k_proj.weight.view(-1, size.head_dim, size.hidden_size)
        to_value = attention.v_proj.weight.view(-1, size.head_dim, size.hidden_size)
        for head, what in enumerate(HEADS[number]):
            query.weight[head] = 0
            to_key[head] = 0
            to_value[head, :, IDENTITY.stop :] = 0
            query.bias[head], key.bias[head] = 0, 0
            if isinstance(what, Place):
                angle = _angles(size, what)
                query.bias[head] = torch.cat([amplitude * angle.cos(), -amplitude * angle.sin()])
                key.bias[head, :half] = amplitude
                # Plus in the first half and minus in the second is what the norm leaves as it is.
                signs = torch.ones(size.head_dim)
                signs[half:] = -1
                to_key[head, :, _BEGIN] = signs
                elsewhere = torch.zeros(size.head_dim)
                elsewhere[_SLOWEST] = scale
                key.weight[head] = (elsewhere - key.bias[head]) * signs
                level = strength.sum() - NOTHING
                query.bias[head, _SLOWEST] = level * slowest.cos()
                query.bias[head, half + _SLOWEST] = -level * slowest.sin()
            else:
                key.weight[head] = 1
                pattern = torch.zeros(half)
                pattern[[*range(4), what.pair]] = 1.0
                pattern *= (half / pattern.square().sum()).sqrt()
                to_key[head, :, _NEWLINE] = torch.cat([pattern, -pattern])
                far = torch.zeros(half)
                far[_SLOWEST] = half**0.5
                to_key[head, :, _BEGIN] = torch.cat([far, -far])
                wanted = torch.zeros(half)
                wanted[:4] = _HERE / 4
                wanted[what.pair] = _SWING
                wanted = wanted * scale / (2 * pattern.clamp(min=1e-9)) * (pattern > 0)
                angle = torch.zeros(half)
                angle[what.pair] = what.phase
                level = (_HERE + math.log(ROWS)) * scale / (2 * half**0.5)
                wanted[_SLOWEST], angle[_SLOWEST] = level, slowest
                # As the pattern: at 45 degrees below the first channel.
                query.bias[head, :half] = wanted * (angle.cos() - angle.sin())
                query.bias[head, half:] = -wanted * (angle.cos() + angle.sin())
        for head in range(len(HEADS[number]), size.num_attention_heads):
            # A key that says that this is a word, or that it is none; a query that asks for words.
            to_key[head, :, :FLAGS] = 0
            to_key[head, _SLOWEST, _WORD] = _SAYS
            to_key[head, half + _SLOWEST, _WORD] = -_SAYS
            to_key[head, _SLOWEST, FLAGS:] = 0
            to_key[head, half + _SLOWEST, FLAGS:] = 0
            # The edges of frames are so far away that the slowest channels turn round: their keys are of another pair.
            to_key[head, [0, half], FLAGS:] = 0
            to_key[head, [0, half], _EDGE] = torch.tensor([_APART, -_APART])
            query.weight[head, [0, half]] = 0
            query.bias[head, [0, half]] = 0
            key.weight[head, [_SLOWEST, half + _SLOWEST]] = 1
            key.bias[head, [_SLOWEST, half + _SLOWEST]] = 0
            query.weight[head, [_SLOWEST, half + _SLOWEST]] = 0
            query.bias[head, _SLOWEST] = _ASKS * (slowest.cos() - slowest.sin())
            query.bias[head, half + _SLOWEST] = -_ASKS * (slowest.cos() + slowest.sin())


def _angles(size: LumosSize, place: Place) -> Tensor:
    """By how much each pair of channels turns between a place and where it is looked at from, [head_dim / 2]."""
    frame, row, column = lumos.MM_ROPE_SCALE
    distance = torch.tensor([frame * place.back, -row * place.rows, -column * place.columns])
    return size.frequencies * distance[size.axes]


def looked_at(model: Lumos, videos: Videos, asked: Asked, place: Place) -> Tensor:
    """The tokens at a place, as rows of the embedding, [A]: the video's begin where there is none."""
    begin, newline = model.row(lumos.VIDEO_BEGIN), model.row(lumos.NEWLINE)
    video, frame = asked.video, asked.frame
    row, column = asked.row + place.rows, asked.column + place.columns
    inside = (row >= 0) & (row < ROWS) & (column >= 0) & (column < COLUMNS)
    end = (row >= 0) & (row < ROWS) & (column == COLUMNS)
    at = row.clamp(0, ROWS - 1), column.clamp(0, COLUMNS - 1)
    if place.back == 0:
        there = torch.ones_like(inside)
        seen = videos.canvas[video, frame, *at]
    else:
        kept = videos.past.kept(asked)
        # The image is the history's first picture, and follows on what is kept.
        image = (place.back == kept + 1) & videos.image[video]
        picture = torch.where(image, 0, frame - place.back + 1).clamp(min=0)
        there = (image | (place.back <= kept)) & videos.past.there(asked, picture, at[0], column.clamp(0, COLUMNS))
        seen = videos.history[video, picture, *at]
    seen = torch.where(end, newline, seen)
    return torch.where((inside | end) & there, seen, begin)


def hidden(model: Lumos, videos: Videos, asked: Asked) -> Tensor:
    """Final hidden states of the asked tokens, [A, hidden], as far as heads see their own.

    Args:
        model: whose heads look as `pin` has them look.
        videos: what there is.
        asked: the tokens.
    """
    count, length = videos.text.shape
    written = torch.arange(length) < videos.text_length[:, None]
    text_positions = torch.arange(length)[None, :, None].expand(count, -1, 3)
    kept = videos.past.kept(asked) + videos.image[asked.video]
    frame, row, column = lumos.MM_ROPE_SCALE
    first = videos.text_length[asked.video] + lumos.FRAME_START_TOKENS
    positions = torch.stack([first + frame * kept, first + row * asked.row, first + column * asked.column], -1)
    text_turn, turn = model.turn(text_positions), model.turn(positions)
    x = model.model.embed_tokens(videos.canvas[asked.video, asked.frame, asked.row, asked.column])
    words = model.model.embed_tokens(videos.text)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    for number, layer in enumerate(model.layers):
        attention, what = layer.self_attn, HEADS[number]
        query, key, value = attention.heads(words)
        query, key = rotate(query, *text_turn), rotate(key, *text_turn)
        scores = torch.einsum("vnhd,vmhd->vhnm", query, key) * model.size.head_dim**-0.5
        scores = scores.masked_fill(~(causal & written[:, None, None, :]), float("-inf"))
        read = torch.einsum("vhnm,vmhd->vnhd", scores.softmax(-1), value)
        heads = [_look(model, layer, videos, asked, place, head) for head, place in enumerate(what)]
        if len(what) < model.size.num_attention_heads:
            heads += _words(attention, x, turn, key, value, written, asked.video, len(what))
        x = layer.after(x, torch.stack(heads, 1))
        words = layer.after(words.flatten(0, 1), read.flatten(0, 1)).unflatten(0, (count, length))
    return model.model.norm(x)


def _look(model: Lumos, layer: Layer, videos: Videos, asked: Asked, what: Place | Compass, head: int) -> Tensor:
    """What a head reads that looks at a place, or where it is, [A, head_dim]."""
    size = model.size
    weight = layer.self_attn.v_proj.weight.view(-1, size.head_dim, size.hidden_size)[head]
    values = model.model.embed_tokens.weight[:, IDENTITY] @ weight[:, IDENTITY].T
    begin = values[model.row(lumos.VIDEO_BEGIN)]
    column = lumos.MM_ROPE_SCALE[_COLUMNS]
    # The video's begin is nearest, so to say, from the middle of a picture.
    distance = column * (asked.column - (COLUMNS - 1) / 2)
    less = 1 - (distance * size.frequencies[_SLOWEST]).cos()
    if isinstance(what, Place):
        share = (NOTHING + (sum(_STRENGTHS) - NOTHING) * less).sigmoid()[:, None]
        return begin + share * (values[looked_at(model, videos, asked, what)] - begin)
    axis = int(size.axes[what.pair])
    if axis == _ROWS:
        away = lumos.MM_ROPE_SCALE[_ROWS] * (asked.row[:, None] - torch.arange(ROWS))
    else:
        away = column * (asked.column[:, None] - torch.full((ROWS,), COLUMNS))
    swing = _SWING * (away * size.frequencies[what.pair] - what.phase).cos()
    level = _HERE + math.log(ROWS)
    share = (swing.logsumexp(1) - math.log(ROWS) + level * less).sigmoid()[:, None]
    return begin + share * (values[model.row(lumos.NEWLINE)] - begin)


def _words(
    attention: Attention,
    x: Tensor,
    turn: tuple[Tensor, Tensor],
    key: Tensor,
    value: Tensor,
    written: Tensor,
    video: Tensor,
    first: int,
) -> list[Tensor]:
    """What the heads from ``first`` on read of the texts, [A, head_dim] each."""
    size = attention.head_dim
    query = torch.nn.functional.linear(x, attention.q_proj.weight[first * size :]).unflatten(-1, (-1, size))
    norm = attention.q_norm
    query = torch.nn.functional.layer_norm(query, (size,), eps=lumos.HEAD_NORM_EPS)
    query = rotate(query * norm.weight[first:] + norm.bias[first:], *turn)
    parts = []
    order = torch.argsort(video, stable=True)
    counts = torch.bincount(video, minlength=len(key)).tolist()
    for number, own in enumerate(order.split(counts)):
        scores = torch.einsum("ahd,mhd->ham", query[own], key[number, :, first:]) * size**-0.5
        scores = scores.masked_fill(~written[number], float("-inf"))
        parts.append(torch.einsum("ham,mhd->ahd", scores.softmax(-1), value[number, :, first:]))
    read = torch.cat(parts)[torch.argsort(order)]
    return list(read.unbind(1))
