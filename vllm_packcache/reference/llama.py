"""A Llama that keeps its whole history and applies the method as masks and positions.

One request at a time, float32, on the CPU. Keys are stored un-rotated and rotated whenever they are read, so
that a position may depend on the frame being made. Nothing is evicted, compacted or paged: a dropped token
is one that a mask hides. Keys and values are computed once, from hidden states that saw what was visible
then; later evictions do not change them, exactly as in a cache.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import linear, silu

from vllm_packcache.config import VideoPlan
from vllm_packcache.layout import CONDITION, Segment
from vllm_packcache.reference.visibility import positions, visibility


@dataclass(frozen=True)
class LlamaConfig:
    """The part of a checkpoint's ``config.json`` that the computation needs.

    Args:
        layers: number of decoder layers.
        heads: H, query heads.
        kv_heads: G, key-value heads; divides H.
        head_dim: D, numbers of a head.
        rope_theta: base of the rotary frequencies.
        rope_sections: how many of the D/2 frequencies turn with each axis of a position; empty: there is one axis.
        rope_interleaved: the axes take turns, the first taking what is left over; otherwise each has a run.
        norm_eps: epsilon of RMSNorm.
        tied: the output layer is the token embedding.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float
    rope_sections: tuple[int, ...]
    rope_interleaved: bool
    norm_eps: float
    tied: bool

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> LlamaConfig:
        """Read a Hugging Face ``config.json``, as transformers 5 or an earlier version writes it.

        Raises:
            ValueError: the checkpoint is no plain Llama.
        """
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        required = {
            "model_type": (config.get("model_type"), "llama"),
            "hidden_act": (config.get("hidden_act", "silu"), "silu"),
            "attention_bias": (config.get("attention_bias", False), False),
            "mlp_bias": (config.get("mlp_bias", False), False),
            "rope_type": (rope.get("rope_type", rope.get("type", "default")), "default"),
        }
        for name, (value, supported) in required.items():
            if value != supported:
                raise ValueError(f"the reference supports {name} = {supported!r} only, not {value!r}")
        heads = config["num_attention_heads"]
        return cls(
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            rope_theta=rope.get("rope_theta") or config.get("rope_theta") or 10000.0,
            rope_sections=tuple(rope.get("mrope_section", ())),
            rope_interleaved=rope.get("mrope_interleaved", False),
            norm_eps=config.get("rms_norm_eps", 1e-6),
            tied=config.get("tie_word_embeddings", False),
        )


@dataclass(frozen=True)
class Generation:
    """What one greedy request produced.

    Args:
        token_ids: n generated tokens.
        logits: float32, [n, vocabulary]: the logits of which each token is the argmax.
    """

    token_ids: list[int]
    logits: Tensor

    @property
    def gaps(self) -> Tensor:
        """[n], by how much the best logit exceeds the second: a tie that rounding may turn is near 0."""
        best = self.logits.topk(2, dim=-1).values
        return best[:, 0] - best[:, 1]


class LlamaReference:
    """The oracle: a Llama checkpoint, computed plainly.

    Args:
        config: the checkpoint's shape.
        weights: its tensors by their Hugging Face names; they are converted to float32.
    """

    def __init__(self, config: LlamaConfig, weights: Mapping[str, Tensor]) -> None:
        self.config = config
        self._weights = {name: tensor.float() for name, tensor in weights.items()}
        halves = torch.arange(0, config.head_dim, 2, dtype=torch.float32)
        self._frequencies = config.rope_theta ** (-halves / config.head_dim)
        self._axis_of = _axis_of(config)

    @classmethod
    def load(cls, path: str | Path) -> LlamaReference:
        """Read a folder with ``config.json`` and ``model.safetensors``.

        Raises:
            FileNotFoundError: one of the two is missing.
            ValueError: the checkpoint is no plain Llama.
        """
        folder = Path(path)
        config = LlamaConfig.from_json(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        return cls(config, load_file(folder / "model.safetensors"))

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int], plan: VideoPlan | None = None, block_size: int = 32) -> Tensor:
        """Logits of every position of a given sequence of T tokens (teacher forcing).

        Args:
            token_ids: T tokens, condition first.
            plan: layout and policy of the request; None: the whole cache is kept.
            block_size: tokens of a KV-cache block; without a plan it does not matter.

        Returns:
            float32, [T, vocabulary].

        Raises:
            ValueError: there are no tokens.
        """
        if not token_ids:
            raise ValueError("token_ids must hold at least one token")
        mask = visibility(plan, block_size, len(token_ids))
        return self._forward(token_ids, 0, self._new_cache(len(token_ids)), mask, plan, block_size)

    @torch.inference_mode()
    def generate(
        self,
        prompt_ids: Sequence[int],
        max_tokens: int,
        plan: VideoPlan | None = None,
        block_size: int = 32,
    ) -> Generation:
        """Generate greedily, token by token; no token ends the sequence early.

        Args:
            prompt_ids: the prompt: the condition, and any given frames.
            max_tokens: n, tokens to generate.
            plan: layout and policy of the request; None: the whole cache is kept.
            block_size: tokens of a KV-cache block; without a plan it does not matter.

        Raises:
            ValueError: the prompt is empty or ``max_tokens`` is below 1.
        """
        if not prompt_ids or max_tokens < 1:
            raise ValueError("prompt_ids must hold at least one token and max_tokens be at least 1")
        # The last generated token is never read.
        length = len(prompt_ids) + max_tokens - 1
        mask = visibility(plan, block_size, length)
        cache = self._new_cache(length)
        tokens = list(prompt_ids)
        logits = []
        for index in range(length):
            step = self._forward(tokens[index : index + 1], index, cache, mask, plan, block_size)
            if index >= len(prompt_ids) - 1:
                logits.append(step)
                tokens.append(int(step.argmax()))
        return Generation(tokens[len(prompt_ids) :], torch.cat(logits))

    @torch.inference_mode()
    def unrotated_keys(self, token_ids: Sequence[int], plan: VideoPlan | None = None, block_size: int = 32) -> Tensor:
        """Keys of a given sequence of T tokens before rotation: arguments as for `logits`.

        Returns:
            float32, [layers, T, G, D].
        """
        cache = self._new_cache(len(token_ids))
        mask = visibility(plan, block_size, len(token_ids))
        self._forward(token_ids, 0, cache, mask, plan, block_size)
        return cache[:, 0]

    def _new_cache(self, length: int) -> Tensor:
        """Un-rotated keys and values, [layers, 2, T, G, D]."""
        config = self.config
        return torch.zeros(config.layers, 2, length, config.kv_heads, config.head_dim)

    def _forward(
        self,
        token_ids: Sequence[int],
        start: int,
        cache: Tensor,
        mask: Tensor,
        plan: VideoPlan | None,
        block_size: int,
    ) -> Tensor:
        """Compute the tokens ``[start, start + n)``, write their keys and values to ``cache``.

        Returns:
            float32, [n, vocabulary].
        """
        config, weights = self.config, self._weights
        stop = start + len(token_ids)
        segments = [Segment(CONDITION, start, stop)]
        if plan is not None:
            segments = list(plan.layout.segments(start, stop))
        hidden = weights["model.embed_tokens.weight"][torch.tensor(token_ids)]
        for layer in range(config.layers):
            prefix = f"model.layers.{layer}"
            normed = self._norm(hidden, f"{prefix}.input_layernorm")
            queries, keys, values = (
                linear(normed, weights[f"{prefix}.self_attn.{name}_proj.weight"]).unflatten(-1, (-1, config.head_dim))
                for name in ("q", "k", "v")
            )
            cache[layer, 0, start:stop] = keys
            cache[layer, 1, start:stop] = values
            # The frame decides about positions: one attention for the queries of each.
            attended = torch.cat(
                [
                    self._attend(
                        queries[first - start : last - start],
                        first,
                        positions(plan, block_size, len(mask), frame),
                        cache[layer],
                        mask,
                    )
                    for frame, first, last in segments
                ]
            )
            hidden = hidden + linear(attended.flatten(1), weights[f"{prefix}.self_attn.o_proj.weight"])
            normed = self._norm(hidden, f"{prefix}.post_attention_layernorm")
            gate = silu(linear(normed, weights[f"{prefix}.mlp.gate_proj.weight"]))
            up = linear(normed, weights[f"{prefix}.mlp.up_proj.weight"])
            hidden = hidden + linear(gate * up, weights[f"{prefix}.mlp.down_proj.weight"])
        output = "model.embed_tokens" if config.tied else "lm_head"
        return linear(self._norm(hidden, "model.norm"), weights[f"{output}.weight"])

    def _attend(self, queries: Tensor, first: int, at: Tensor, cached: Tensor, mask: Tensor) -> Tensor:
        """Masked softmax attention of the queries ``[first, first + n)`` of one frame.

        Args:
            queries: [n, H, D], un-rotated.
            first: index of the first query's token.
            at: [axes, T], positions while that frame is made.
            cached: [2, T, G, D]: un-rotated keys, and values.
            mask: bool, [T, T]: which key each query sees.

        Returns:
            [n, H, D].
        """
        # Nothing later than the last query is visible, or computed yet.
        keys, values = cached[:, : first + len(queries)]
        query_tokens = torch.arange(first, first + len(queries))
        key_tokens = torch.arange(len(keys))
        queries = self.rotate(queries, at[:, query_tokens])
        keys = self.rotate(keys, at[:, key_tokens])
        # Query head h reads key-value head h // (H / G).
        queries = queries.unflatten(1, (self.config.kv_heads, -1))
        scores = torch.einsum("ngrd,mgd->grnm", queries, keys) * self.config.head_dim**-0.5
        scores = scores.masked_fill(~mask[query_tokens][:, key_tokens], float("-inf"))
        return torch.einsum("grnm,mgd->ngrd", scores.softmax(-1), values).flatten(1, 2)

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

    def _norm(self, hidden: Tensor, name: str) -> Tensor:
        """RMSNorm over the last dimension. Source: arXiv 1910.07467."""
        scale = (hidden.square().mean(-1, keepdim=True) + self.config.norm_eps).rsqrt()
        return hidden * scale * self._weights[f"{name}.weight"]


def _axis_of(config: LlamaConfig) -> Tensor:
    """The axis that each of the D/2 frequencies turns with, [D/2]."""
    axis_of = torch.zeros(config.head_dim // 2, dtype=torch.int64)
    start = 0
    for axis, section in enumerate(config.rope_sections):
        if config.rope_interleaved:
            axis_of[axis : 3 * section : 3] = axis
        else:
            axis_of[start : start + section] = axis
        start += section
    return axis_of
