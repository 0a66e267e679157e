"""Lumos-1's architecture in PyTorch for training: its parameters, and only the embedding rows in use."""

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
    """What the model's size depends on; names as in the config file of a checkpoint.

    With ``swin_norm`` what attention and MLP give is normed, not what they get: a head reads the residual stream as it
    is.
    """

    hidden_size: int = 256
    intermediate_size: int = 384
    num_hidden_layers: int = 5
    num_attention_heads: int = 8
    # Low, so that neighbours on a grid of 16 x 16 are told apart: MM-RoPE gives rows and columns slow channels.
    rope_theta: float = 1000.0
    rms_norm_eps: float = 1e-5
    swin_norm: bool = True

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


class HeadNorm(nn.Module):
    """LayerNorm of each head for itself, with a weight and a bias of its own."""

    def __init__(self, size: LumosSize) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size.num_attention_heads, size.head_dim))
        self.bias = nn.Parameter(torch.zeros(size.num_attention_heads, size.head_dim))

    def forward(self, heads: Tensor) -> Tensor:
        """Normalise the last dimension of [tokens, heads, head_dim]."""
        return F.layer_norm(heads, heads.shape[-1:], eps=HEAD_NORM_EPS) * self.weight + self.bias


class Attention(nn.Module):
    """Projections of attention, and a LayerNorm for each head's queries and keys."""

    def __init__(self, size: LumosSize) -> None:
        super().__init__()
        width, self.head_dim = size.hidden_size, size.head_dim
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.q_norm, self.k_norm = HeadNorm(size), HeadNorm(size)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normed queries and keys before they are turned, and values, of [n, hidden]: [n, heads, head_dim] each."""
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.q_norm(q), self.k_norm(k), v


class Layer(nn.Module):
    """Attention and feed-forward, each normed and added to its input."""

    def __init__(self, size: LumosSize) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(size), MLP(size)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(size), RMSNorm(size)

    def after(self, x: Tensor, read: Tensor) -> Tensor:
        """The residual stream behind the layer, [n, hidden], of what its heads read, [n, heads, head_dim]."""
        x = x + self.input_layernorm(self.self_attn.o_proj(read.flatten(1)))
        return x + self.post_attention_layernorm(self.mlp(x))


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

    def row(self, token_id: int) -> int:
        """Row of the embedding of a token id."""
        return int(np.searchsorted(self.ids, token_id))

    def turn(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines for positions [..., 3], each [..., 1, head_dim / 2]."""
        angles = (positions[..., self.size.axes].float() * self.size.frequencies)[..., None, :]
        return angles.cos(), angles.sin()

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores [..., codes] of the visual ids."""
        return F.linear(hidden, self.model.embed_tokens.weight[-self.codes :])


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn [..., heads, head_dim] by the angles of `Lumos.turn`."""
    left, right = heads.chunk(2, -1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)
