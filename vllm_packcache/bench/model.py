"""A Llama with random weights, made on the fly: the cost of a step does not depend on what was learnt."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A small Llama; every attention head has keys and values of its own.

    Args:
        layers: transformer layers.
        heads: attention heads, and as many KV heads.
        head_size: elements of a head.
        hidden: width of the residual stream, and of the MLP.
        vocab: number of tokens.
        dtype: of weights and KV cache.
        bytes_per_element: of that dtype.
    """

    layers: int
    heads: int
    head_size: int
    hidden: int
    vocab: int
    dtype: str
    bytes_per_element: int

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that one token adds to the cache."""
        return 2 * self.layers * self.heads * self.head_size * self.bytes_per_element


def write_model(folder: Path, shape: ModelShape, max_positions: int, seed: int) -> None:
    """Write ``config.json`` and ``model.safetensors`` of a random model into ``folder``."""
    attention = shape.heads * shape.head_size
    matrices = {
        "model.embed_tokens": (shape.vocab, shape.hidden),
        "lm_head": (shape.vocab, shape.hidden),
    }
    norms = ["model.norm"]
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        matrices |= {f"{prefix}.self_attn.{name}_proj": (attention, shape.hidden) for name in "qkv"}
        matrices[f"{prefix}.self_attn.o_proj"] = (shape.hidden, attention)
        matrices |= {f"{prefix}.mlp.{name}_proj": (shape.hidden, shape.hidden) for name in ("gate", "up", "down")}
        norms += [f"{prefix}.input_layernorm", f"{prefix}.post_attention_layernorm"]
    generator = np.random.default_rng(seed)
    weights = {f"{name}.weight": np.ones(shape.hidden, dtype=np.float32) for name in norms}
    for name, size in matrices.items():
        weights[f"{name}.weight"] = generator.standard_normal(size, dtype=np.float32) / np.float32(size[1] ** 0.5)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "head_dim": shape.head_size,
        "vocab_size": shape.vocab,
        "max_position_embeddings": max_positions,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
