"""Lumos-1 with its whole history, the method applied as masks and positions.

The architecture of Chameleon with MM-RoPE. What `vllm_packcache.reference.llama` says of keys and of what a query sees
holds here too; how a video is made with it is in `vllm_packcache.reference.masked_video`.

Source: Lumos-1, arXiv 2507.08801, and its public inference code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from vllm_packcache.core.positions import mm_rope_axes
from vllm_packcache.families.checkpoint import read_config
from vllm_packcache.families.lumos import HEAD_NORM_EPS, VISUAL_BEGIN, LumosConfig
from vllm_packcache.reference.decoder import Decoder, read_weights


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

    def run(
        self, token_ids: Tensor, start: int, cache: Tensor, at: Tensor, mask: Tensor, some: Tensor | None = None
    ) -> Tensor:
        """Compute the tokens ``[start, start + n)``, write their keys and values to ``cache``.

        Args:
            token_ids: [n].
            start: index of the first.
            cache: of `new_cache`.
            at: [axes, start + n], the positions of these and all earlier tokens while they are computed.
            mask: bool, [n, start + n]: which key each of them sees.
            some: int64, [m], which of the n tokens are computed; of the others is seen what ``cache`` has. None: all.

        Returns:
            float32, [m, hidden]: for `visual_logits`.
        """
        stop = start + len(token_ids)
        rows = torch.arange(len(token_ids)) if some is None else some
        return self.hidden_states(
            token_ids[rows],
            start,
            cache,
            lambda queries, cached: self.attention(queries, at[:, start + rows], cached[:, :stop], at, mask[rows]),
            start + rows,
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
