"""Lumos-1's architecture in PyTorch for training: whole videos in one pass, only the embedding rows in use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.training.llama import MLP, RMSNorm
from vllm_packcache.core.positions import mm_rope_axes
from vllm_packcache.families.lumos import HEAD_NORM_EPS


@dataclass(frozen=True)
class LumosSize:
    """What the model's size depends on; names as in the config file of a checkpoint."""

    hidden_size: int = 192
    intermediate_size: int = 384
    num_hidden_layers: int = 5
    num_attention_heads: int = 6
    # Low, so that neighbours on a grid of 16 x 16 are told apart: MM-RoPE gives rows and columns slow channels.
    rope_theta: float = 100.0
    rms_norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        """Numbers of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def frequencies(self) -> Tensor:
        """Radians per position of each rotated pair, float32 [head_dim / 2]."""
        return self.rope_theta ** (-torch.arange(0, self.head_dim, 2).float() / self.head_dim)

    @property
    def axes(self) -> Tensor:
        """Axis of a position that each rotated pair turns with, [head_dim / 2]."""
        return torch.from_numpy(mm_rope_axes(self.head_dim // 2))


@dataclass(frozen=True)
class Pass:
    """What is computed at once: a text, a conditioning image or none, and every frame twice.

    Args:
        text: [n], rows of the embedding.
        image: [F], or none: [0].
        committed: [T - 1, F]: frames 0 to T - 2 as later frames see them.
        denoised: [T, F]: all frames as they are while they are made, partly masked.
        positions: [3, n + len(image) + T F], of text, image and frames.
        seen: for each frame, which tokens before it it sees, text first: [m] each.
    """

    text: Tensor
    image: Tensor
    committed: Tensor
    denoised: Tensor
    positions: Tensor
    seen: tuple[Tensor, ...]

    @property
    def ids(self) -> Tensor:
        """Everything that is computed, in this order."""
        return torch.cat([self.text, self.image, self.committed.flatten(), self.denoised.flatten()])

    @property
    def all_positions(self) -> Tensor:
        """Positions of `ids`, [3, tokens]."""
        given = len(self.text) + len(self.image)
        frames = self.positions[:, given:]
        return torch.cat([self.positions[:, :given], frames[:, : self.committed.numel()], frames], 1)


class Attention(nn.Module):
    """Attention with MM-RoPE and a LayerNorm for each head's queries and keys."""

    def __init__(self, size: LumosSize) -> None:
        super().__init__()
        width, self.head_dim = size.hidden_size, size.head_dim
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.q_norm, self.k_norm = HeadNorm(size), HeadNorm(size)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], sequence: Pass, first: int) -> Tensor:
        """Map [tokens, hidden] to [tokens - first, hidden]: what the tokens from ``first`` on read."""
        (cos, sin), heads = turn, (-1, self.head_dim)
        q = _rotate(self.q_norm(self.q_proj(x[first:]).unflatten(-1, heads)), cos[first:], sin[first:])
        k = _rotate(self.k_norm(self.k_proj(x).unflatten(-1, heads)), cos, sin)
        v = self.v_proj(x).unflatten(-1, heads).float()
        text, given = len(sequence.text), len(sequence.text) + len(sequence.image)
        length, history = sequence.denoised.shape[1], given + sequence.committed.numel()
        read = []
        if first == 0:
            read.append(_attend(q[:text], k[:text], v[:text], causal=True))
            if given > text:
                read.append(_attend(q[text:given], k[:given], v[:given]))
        # The committed frames, then the denoised ones: each sees what lives before it and the whole of itself.
        for start, end in ((given, history), (history, len(x))):
            if start >= first:
                for seen, frame in zip(sequence.seen, range(start, end, length), strict=False):
                    own = slice(frame, frame + length)
                    keys, values = (torch.cat([y.index_select(0, seen), y[own]]) for y in (k, v))
                    read.append(_attend(q[frame - first : frame - first + length], keys, values))
        return self.o_proj(torch.cat(read).flatten(1))


class HeadNorm(nn.Module):
    """LayerNorm of each head for itself, with a weight and a bias of its own."""

    def __init__(self, size: LumosSize) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size.num_attention_heads, size.head_dim))
        self.bias = nn.Parameter(torch.zeros(size.num_attention_heads, size.head_dim))

    def forward(self, heads: Tensor) -> Tensor:
        """Normalise the last dimension of [tokens, heads, head_dim]."""
        return F.layer_norm(heads.float(), heads.shape[-1:], eps=HEAD_NORM_EPS) * self.weight + self.bias


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = heads.chunk(2, -1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """Attention of [n, heads, head_dim] over [m, heads, head_dim]."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    # With heads this small bfloat16 is no faster.
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)[0].transpose(0, 1)


class Layer(nn.Module):
    """Attention and feed-forward, each after a norm and added to its input."""

    def __init__(self, size: LumosSize) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(size), MLP(size)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(size), RMSNorm(size)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], sequence: Pass, first: int) -> Tensor:
        """Map [tokens, hidden] to [tokens - first, hidden]."""
        x = x[first:] + self.self_attn(self.input_layernorm(x), turn, sequence, first)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, layers and final norm; a class of its own for the parameter names."""

    def __init__(self, size: LumosSize, rows: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(rows, size.hidden_size)
        self.layers = nn.ModuleList(Layer(size) for _ in range(size.num_hidden_layers))
        self.norm = RMSNorm(size)


class Lumos(nn.Module):
    """The model; parameter names are those of a checkpoint with tied embeddings.

    Args:
        size: of it.
        ids: [rows], ascending: the ids that it can meet. It is fed their indices.
        codes: the last so many of them are visual.
    """

    def __init__(self, size: LumosSize, ids: np.ndarray, codes: int) -> None:
        super().__init__()
        self.size, self.ids, self.codes = size, ids, codes
        self.model = Decoder(size, len(ids))

    @property
    def layers(self) -> list[Layer]:
        """The layers, first to last."""
        return cast(list[Layer], list(self.model.layers))

    def rows(self, ids: np.ndarray) -> Tensor:
        """Rows of the embedding of token ids of any shape."""
        return torch.from_numpy(np.searchsorted(self.ids, ids))

    def hidden(self, sequence: Pass) -> Tensor:
        """Final hidden states of the denoised frames, [T, F, hidden]."""
        angles = (sequence.all_positions[self.size.axes].T.float() * self.size.frequencies)[:, None]
        turn = angles.cos(), angles.sin()
        x = self.model.embed_tokens(sequence.ids)
        for layer in self.layers[:-1]:
            x = layer(x, turn, sequence, 0)
        # Of the last layer nobody sees what others read.
        x = self.layers[-1](x, turn, sequence, len(x) - sequence.denoised.numel())
        return self.model.norm(x).unflatten(0, sequence.denoised.shape)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores [..., codes] of the visual ids."""
        return F.linear(hidden, self.model.embed_tokens.weight[-self.codes :])
