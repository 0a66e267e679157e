"""What the oracles share: a decoder of the Llama family that keeps its keys un-rotated, computed plainly in float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import linear, silu

from vllm_packcache.families.checkpoint import DecoderConfig

QUERIES_AT_ONCE = 512
"""Scores of so many queries are held at a time: a frame of thousands of tokens sees tens of thousands."""


class Decoder:
    """Embedding, layers, output: everything but what a query sees and where.

    Args:
        config: the config.
        weights: tensors by their Hugging Face names; they are converted to float32.
        axis_of: [D/2], the axis of a position that each rotary frequency turns with.
    """

    def __init__(self, config: DecoderConfig, weights: Mapping[str, Tensor], axis_of: Tensor) -> None:
        self.config = config
        self._weights = {name: tensor.float() for name, tensor in weights.items()}
        halves = torch.arange(0, config.head_dim, 2, dtype=torch.float32)
        self._frequencies = config.rope_theta ** (-halves / config.head_dim)
        self._axis_of = axis_of
        self.watch: Callable[[Tensor], None] | None = None
        """Is shown the weights of attention, [H, n, m], of some queries after the others, layer after layer."""

    def new_cache(self, length: int) -> Tensor:
        """Un-rotated keys and values, [layers, 2, T, G, D]."""
        config = self.config
        return torch.zeros(config.layers, 2, length, config.kv_heads, config.head_dim)

    def hidden_states(
        self,
        token_ids: Sequence[int] | Tensor,
        start: int,
        cache: Tensor,
        attend: Callable[[Tensor, Tensor], Tensor],
        places: Tensor | None = None,
    ) -> Tensor:
        """Compute the tokens ``[start, start + n)``, write their keys and values to ``cache``.

        Args:
            token_ids: n tokens.
            start: index of the first.
            cache: of `new_cache`.
            attend: from queries [n, H, D], un-rotated, and the cache of a layer [2, T, G, D] to what the queries read,
                [n, H, D].
            places: int64, [n], indices of the tokens where they do not follow each other.

        Returns:
            float32, [n, hidden], after the last norm.
        """
        config = self.config
        where = torch.arange(start, start + len(token_ids)) if places is None else places
        hidden = self._weights["model.embed_tokens.weight"][torch.as_tensor(token_ids)]

        def attention(normed: Tensor, prefix: str, cached: Tensor) -> Tensor:
            queries, keys, values = (
                self._linear(normed, f"{prefix}.{name}_proj").unflatten(-1, (-1, config.head_dim)) for name in "qkv"
            )
            queries, keys = self._head_norm(queries, f"{prefix}.q_norm"), self._head_norm(keys, f"{prefix}.k_norm")
            cached[0, where] = keys
            cached[1, where] = values
            return self._linear(attend(queries, cached).flatten(1), f"{prefix}.o_proj")

        def mlp(normed: Tensor, prefix: str) -> Tensor:
            gate = silu(self._linear(normed, f"{prefix}.gate_proj"))
            return self._linear(gate * self._linear(normed, f"{prefix}.up_proj"), f"{prefix}.down_proj")

        for layer in range(config.layers):
            prefix = f"model.layers.{layer}"
            attended = partial(attention, prefix=f"{prefix}.self_attn", cached=cache[layer])
            hidden = self._add(hidden, f"{prefix}.input_layernorm", attended)
            hidden = self._add(hidden, f"{prefix}.post_attention_layernorm", partial(mlp, prefix=f"{prefix}.mlp"))
        return self._norm(hidden, "model.norm")

    def output(self, hidden: Tensor, first_id: int = 0) -> Tensor:
        """Logits of the ids from ``first_id`` on, [n, vocabulary - first_id], of `hidden_states`."""
        name = "model.embed_tokens" if self.config.tied else "lm_head"
        return linear(hidden, self._weights[f"{name}.weight"][first_id:])

    def attention(self, queries: Tensor, queries_at: Tensor, cached: Tensor, keys_at: Tensor, mask: Tensor) -> Tensor:
        """Masked softmax attention.

        Args:
            queries: [n, H, D], un-rotated.
            queries_at: [axes, n], their positions.
            cached: [2, m, G, D]: un-rotated keys, and values.
            keys_at: [axes, m].
            mask: bool, [n, m]: which key each query sees.

        Returns:
            [n, H, D].
        """
        config = self.config
        keys, values = self.rotate(cached[0], keys_at), cached[1]
        # Query head h reads key-value head h // (H / G).
        grouped = self.rotate(queries, queries_at).unflatten(1, (config.kv_heads, -1))
        read = []
        for some, seen in zip(grouped.split(QUERIES_AT_ONCE), mask.split(QUERIES_AT_ONCE), strict=True):
            scores = torch.einsum("ngrd,mgd->grnm", some, keys) * config.head_dim**-0.5
            scores = scores.masked_fill(~seen, float("-inf"))
            weights = scores.softmax(-1)
            if self.watch is not None:
                self.watch(weights.flatten(0, 1))
            read.append(torch.einsum("grnm,mgd->ngrd", weights, values))
        return torch.cat(read).flatten(1, 2)

    def rotate(self, heads: Tensor, at: Tensor) -> Tensor:
        """Rotary embedding of ``heads`` [n, heads, D] at the positions ``at`` [axes, n]; i paired with i + D/2.

        A position on one axis is the same on all.
        Source: RoFormer, arXiv 2104.09864, in the pairing of GPT-NeoX.
        """
        axes = at.expand(int(self._axis_of.max()) + 1, -1)
        angles = (axes[self._axis_of].T.float() * self._frequencies)[:, None, :]
        cos, sin = angles.cos(), angles.sin()
        left, right = heads.chunk(2, dim=-1)
        return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)

    def _add(self, hidden: Tensor, norm: str, part: Callable[[Tensor], Tensor]) -> Tensor:
        """The residual stream after a part of a layer: normed on its way in."""
        return hidden + part(self._norm(hidden, norm))

    def _head_norm(self, heads: Tensor, name: str) -> Tensor:
        """What is done to queries or keys, [n, heads, D], before they are rotated: nothing."""
        del name
        return heads

    def _norm(self, hidden: Tensor, name: str) -> Tensor:
        """RMSNorm over the last dimension. Source: arXiv 1910.07467."""
        scale = (hidden.square().mean(-1, keepdim=True) + self.config.norm_eps).rsqrt()
        return hidden * scale * self._weights[f"{name}.weight"]

    def _linear(self, hidden: Tensor, name: str) -> Tensor:
        return linear(hidden, self._weights[f"{name}.weight"])


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint's folder by their names.

    Raises:
        FileNotFoundError: it has no ``*.safetensors``.
    """
    files = sorted(Path(path).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{path} has no *.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}
