"""Models with made-up weights: the cost of a step does not depend on what was learnt."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from vllm_packcache.families.lumos import ARCHITECTURES

EMBEDDING = "model.embed_tokens"


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A Llama, or a Lumos-1, which has the same matrices.

    Args:
        layers: transformer layers.
        heads: attention heads.
        head_size: elements of a head.
        hidden: width of the residual stream.
        vocab: number of tokens.
        dtype: of weights and KV cache.
        bytes_per_element: of that dtype.
        kv_heads: heads of the KV cache, 0: as many as attention heads.
        intermediate: width of the MLP, 0: as the residual stream.
    """

    layers: int
    heads: int
    head_size: int
    hidden: int
    vocab: int
    dtype: str
    bytes_per_element: int
    kv_heads: int = 0
    intermediate: int = 0

    def __post_init__(self) -> None:
        # A measurement writes down what was run.
        object.__setattr__(self, "kv_heads", self.kv_heads or self.heads)
        object.__setattr__(self, "intermediate", self.intermediate or self.hidden)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that one token adds to the cache."""
        return 2 * self.layers * self.kv_heads * self.head_size * self.bytes_per_element

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        matrices = sum(rows * columns for rows, columns in self.matrices().values())
        return (matrices + len(self.norms()) * self.hidden) * self.bytes_per_element

    @property
    def step_weight_bytes(self) -> int:
        """Bytes of the weights that a decode step reads: all but the embedding, of which it reads a row a token."""
        return self.weight_bytes - self.vocab * self.hidden * self.bytes_per_element

    @property
    def layer_weights(self) -> int:
        """Elements of the matrices of one layer."""
        own = f"{self._layer_prefixes()[0]}."
        return sum(rows * columns for name, (rows, columns) in self.matrices().items() if name.startswith(own))

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Every matrix: its size, [out, in]."""
        attention, kv = self.heads * self.head_size, self.kv_heads * self.head_size
        matrices = {EMBEDDING: (self.vocab, self.hidden), "lm_head": (self.vocab, self.hidden)}
        for prefix in self._layer_prefixes():
            widths = {"q": attention, "k": kv, "v": kv}
            matrices |= {f"{prefix}.self_attn.{name}_proj": (width, self.hidden) for name, width in widths.items()}
            matrices[f"{prefix}.self_attn.o_proj"] = (self.hidden, attention)
            matrices |= {f"{prefix}.mlp.{name}_proj": (self.intermediate, self.hidden) for name in ("gate", "up")}
            matrices[f"{prefix}.mlp.down_proj"] = (self.hidden, self.intermediate)
        return matrices

    def norms(self) -> list[str]:
        """Every norm, each as wide as the residual stream."""
        names = ("input_layernorm", "post_attention_layernorm")
        return ["model.norm", *(f"{prefix}.{name}" for prefix in self._layer_prefixes() for name in names)]

    def _layer_prefixes(self) -> list[str]:
        return [f"model.layers.{layer}" for layer in range(self.layers)]


def write_model(folder: Path, shape: ModelShape, max_positions: int, seed: int) -> None:
    """Write ``config.json`` and ``model.safetensors`` of a random model into ``folder``."""
    write_config(folder, shape, max_positions)
    generator = np.random.default_rng(seed)
    weights = {f"{name}.weight": np.ones(shape.hidden, dtype=np.float32) for name in shape.norms()}
    for name, size in shape.matrices().items():
        weights[f"{name}.weight"] = generator.standard_normal(size, dtype=np.float32) / np.float32(size[1] ** 0.5)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def write_config(folder: Path, shape: ModelShape, max_positions: int, *, masked: bool = False) -> None:
    """Write ``config.json`` of a Llama, or of a Lumos-1 if ``masked``, into ``folder``."""
    lumos = {"architectures": ARCHITECTURES[:1], "model_type": "chameleon", "mm_rope": True, "model_parallel_size": 1}
    config = {
        **(lumos if masked else {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}),
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
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
