"""Emu3 and Emu3.5 for vLLM: Llama's decoder, in Emu3.5 with a norm of every query and key head.

Both are published under one name and with configurations of one kind. Their tensors tell them apart.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM
from vllm.transformers_utils.config import get_safetensors_params_metadata

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig


class NormedAttention(LlamaAttention):
    """Llama's attention whose query and key heads are normed before they are rotated, as Qwen3's are."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """What the rows [n, hidden] read."""
        qkv, _ = self.qkv_proj(hidden_states)
        queries, keys, values = qkv.split([self.q_size, self.kv_size, self.kv_size], -1)
        queries, keys = (
            norm(rows.unflatten(-1, (-1, self.head_dim))).flatten(-2)
            for norm, rows in ((self.q_norm, queries), (self.k_norm, keys))
        )
        queries, keys = self.rotary_emb(positions, queries, keys)
        read, _ = self.o_proj(self.attn(queries, keys, values))
        return read


class Emu3ForCausalLM(LlamaForCausalLM):
    """Emu3 and Emu3.5, by the names under which checkpoints are published.

    Args:
        vllm_config: of the server; ``hf_config`` is the checkpoint's ``config.json``.
        prefix: of the modules' names.

    Raises:
        ValueError: the checkpoint has layers beside the decoder's.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        model = vllm_config.model_config
        if getattr(model.hf_config, "action_experts", False):
            raise ValueError(
                f"{model.model} has action_experts, which vllm-packcache does not know: serve a checkpoint without them"
            )
        attention = NormedAttention if has_head_norms(model) else LlamaAttention
        layer: Any = partial(LlamaDecoderLayer, attn_layer_type=attention)
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layer)


def has_head_norms(model: ModelConfig) -> bool:
    """Whether a checkpoint has norms of query heads: it is Emu3.5's. One without tensors is taken for Emu3's."""
    tensors = get_safetensors_params_metadata(model.model, revision=model.revision)
    return any(name.endswith(".self_attn.q_norm.weight") for name in tensors)
