"""Lumos-1 with its whole history, the method applied as masks and positions.

The architecture of Chameleon with MM-RoPE. What `vllm_packcache.reference.llama` says of keys and of what a query sees
holds here too; how a video is made with it is in `vllm_packcache.reference.masked_video`.

Source: Lumos-1, arXiv 2507.08801, and its public inference code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from vllm_packcache.masked import ARCHITECTURES, VISUAL_BEGIN
from vllm_packcache.positions import mm_rope_axes
from vllm_packcache.reference.decoder import Decoder, DecoderConfig, read_config, read_weights, require, rope_of

HEAD_NORM_EPS = 1e-5
"""Epsilon of the norms of queries and keys, whatever the configuration says of the others."""

AXES_PERIOD = 16
"""The axis of a rotary channel repeats so often: only if it divides D/2 do both channels of a pair have one axis."""


@dataclass(frozen=True)
class LumosConfig(DecoderConfig):
    """The part of a checkpoint's ``config.json`` that the computation needs.

    Args:
        swin_norm: what attention and MLP give is normed, not what they get.
        visual_codes: V, codes of the video tokenizer: all ids from `vllm_packcache.masked.VISUAL_BEGIN` on.
    """

    swin_norm: bool
    visual_codes: int

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> LumosConfig:
        """Read a ``config.json`` as published; what it leaves out has the default of its class.

        Raises:
            ValueError: the checkpoint is no Lumos-1.
        """
        architectures = config.get("architectures") or [ARCHITECTURES[0]]
        if architectures[0] not in ARCHITECTURES:
            raise ValueError(f"the reference supports architectures {', '.join(ARCHITECTURES)}, not {architectures[0]}")
        require(
            {
                "model_type": (config.get("model_type"), "chameleon"),
                "mm_rope": (config.get("mm_rope", False), True),
                "hidden_act": (config.get("hidden_act", "silu"), "silu"),
                "attention_bias": (config.get("attention_bias", False), False),
                "mlp_bias": (config.get("mlp_bias", False), False),
            }
        )
        heads = config["num_attention_heads"]
        head_dim = config["hidden_size"] // heads
        if head_dim % (2 * AXES_PERIOD):
            raise ValueError(
                f"head_dim is {head_dim}: it must be a multiple of {2 * AXES_PERIOD}, or the two channels that rotary "
                "embedding turns together would have different axes"
            )
        visual_codes = config["vocab_size"] - VISUAL_BEGIN
        if visual_codes < 1:
            raise ValueError(f"vocab_size is {config['vocab_size']}: ids from {VISUAL_BEGIN} on are the visual ones")
        return cls(
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads", 32),
            head_dim=head_dim,
            rope_theta=rope_of(config)["rope_theta"],
            norm_eps=config.get("rms_norm_eps", 1e-5),
            tied=config.get("tie_word_embeddings", False),
            swin_norm=config.get("swin_norm", False),
            visual_codes=visual_codes,
        )


class LumosReference(Decoder):
    """The oracle: a Lumos-1 checkpoint, computed plainly.

    Args:
        config: the checkpoint's shape.
        weights: its tensors by their published names; they are converted to float32. Those of the image tokenizer that
            a checkpoint may carry (``model.vqmodel.*``) are not used.
    """

    config: LumosConfig

    def __init__(self, config: LumosConfig, weights: Mapping[str, Tensor]) -> None:
        own = {name: tensor for name, tensor in weights.items() if not name.startswith("model.vqmodel.")}
        super().__init__(config, own, torch.from_numpy(mm_rope_axes(config.head_dim // 2)))

    @classmethod
    def load(cls, path: str | Path) -> LumosReference:
        """Read a folder with ``config.json`` and ``*.safetensors``.

        Raises:
            FileNotFoundError: one of the two is missing.
            ValueError: the checkpoint is no Lumos-1.
        """
        return cls(LumosConfig.from_json(read_config(path)), read_weights(path))

    def run(self, token_ids: Tensor, start: int, cache: Tensor, at: Tensor, mask: Tensor) -> Tensor:
        """Compute the tokens ``[start, start + n)``, write their keys and values to ``cache``.

        Args:
            token_ids: [n].
            start: index of the first.
            cache: of `new_cache`.
            at: [axes, start + n], the positions of these and all earlier tokens while they are computed.
            mask: bool, [n, start + n]: which key each of them sees.

        Returns:
            float32, [n, hidden]: for `visual_logits`.
        """
        stop = start + len(token_ids)
        return self.hidden_states(
            token_ids,
            start,
            cache,
            lambda queries, cached: self.attention(queries, at[:, start:], cached[:, :stop], at, mask),
        )

    def visual_logits(self, hidden: Tensor) -> Tensor:
        """Logits of the visual ids in ascending order, [n, V]: no other id is ever drawn."""
        return self.output(hidden, VISUAL_BEGIN)

    def _add(self, hidden: Tensor, norm: str, part: Callable[[Tensor], Tensor]) -> Tensor:
        """The residual stream after a part of a layer. Source of ``swin_norm``: arXiv 2111.09883."""
        if self.config.swin_norm:
            return hidden + self._norm(part(hidden), norm)
        return super()._add(hidden, norm, part)

    def _head_norm(self, heads: Tensor, name: str) -> Tensor:
        """LayerNorm of every head [n, heads, D] for itself.

        The checkpoint has one weight and one bias for each of the ranks it was trained on, [ranks, D], each for a run
        of heads. Source: Chameleon, arXiv 2405.09818.
        """
        weight, bias = (
            self._weights[f"{name}.{kind}"].repeat_interleave(heads.shape[1] // len(self._weights[f"{name}.{kind}"]), 0)
            for kind in ("weight", "bias")
        )
        return layer_norm(heads, heads.shape[-1:], eps=HEAD_NORM_EPS) * weight + bias
