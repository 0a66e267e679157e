"""Random checkpoints to compare implementations on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

SCORE_STD = 2.0
"""Standard deviation of an attention score."""

VALUE_STD = 3.0
"""Standard deviation of an element of a value."""


def make_random_llama(
    path: str | Path,
    *,
    vocab: int = 256,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    max_positions: int = 8192,
    seed: int = 0,
    rope_theta: float = 10000.0,
    tied: bool = False,
    rope: Mapping[str, Any] | None = None,
) -> Path:
    """Write a Hugging Face ``LlamaForCausalLM`` checkpoint with random float32 weights and no tokenizer.

    The scales are chosen so that what is cached decides what is generated. Every matrix keeps the variance
    of its input, with two exceptions. Query and key projections give attention scores a standard deviation
    of `SCORE_STD`: of N keys about N exp(-SCORE_STD^2) carry the softmax, so that a query reads some tens of
    tokens and not the mean of all. Values are enlarged to `VALUE_STD`, because an average over that many is
    smaller than what it averages, and would otherwise vanish beside the token's own embedding.

    Args:
        path: folder to write ``config.json`` and ``model.safetensors`` to; it is created.
        vocab: vocabulary size.
        hidden: width of the residual stream.
        layers: number of decoder layers.
        heads: query heads.
        kv_heads: key-value heads; divides ``heads``.
        head_dim: numbers of a head, even.
        max_positions: longest sequence.
        seed: of the random numbers.
        rope_theta: base of the rotary frequencies.
        tied: the output layer is the token embedding.
        rope: further entries of ``rope_parameters``, such as ``mrope_section``.

    Returns:
        The folder.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    intermediate = 2 * hidden
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": max_positions,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta, **(rope or {})},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    generator = torch.Generator().manual_seed(seed)

    def matrix(outputs: int, inputs: int, gain: float = 1.0) -> Tensor:
        return torch.randn(outputs, inputs, generator=generator) * gain / math.sqrt(inputs)

    # A score is q . k / sqrt(D), whose deviation is the product of the deviations of the elements of q and k.
    score_gain = math.sqrt(SCORE_STD)
    weights = {
        "model.embed_tokens.weight": torch.randn(vocab, hidden, generator=generator),
        "model.norm.weight": torch.ones(hidden),
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        weights |= {
            f"{prefix}.input_layernorm.weight": torch.ones(hidden),
            f"{prefix}.self_attn.q_proj.weight": matrix(heads * head_dim, hidden, score_gain),
            f"{prefix}.self_attn.k_proj.weight": matrix(kv_heads * head_dim, hidden, score_gain),
            f"{prefix}.self_attn.v_proj.weight": matrix(kv_heads * head_dim, hidden, VALUE_STD),
            f"{prefix}.self_attn.o_proj.weight": matrix(hidden, heads * head_dim),
            f"{prefix}.post_attention_layernorm.weight": torch.ones(hidden),
            f"{prefix}.mlp.gate_proj.weight": matrix(intermediate, hidden),
            f"{prefix}.mlp.up_proj.weight": matrix(intermediate, hidden),
            f"{prefix}.mlp.down_proj.weight": matrix(hidden, intermediate),
        }
    if not tied:
        weights["lm_head.weight"] = matrix(vocab, hidden)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
