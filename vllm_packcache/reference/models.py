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

from vllm_packcache.families.lumos import ARCHITECTURES, VISUAL_BEGIN

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
    # A score is q . k / sqrt(D), whose deviation is the product of the deviations of the elements of q and k.
    weights = _Weights(seed).decoder(vocab, hidden, layers, heads, kv_heads, head_dim, math.sqrt(SCORE_STD), tied)
    return _write(path, config, weights)


def make_random_emu3(
    path: str | Path,
    *,
    architecture: str = "Emu3ForCausalLM",
    head_norms: bool = False,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    hidden: int = 64,
    max_positions: int = 8192,
    seed: int = 0,
) -> Path:
    """Write an Emu3 checkpoint with random float32 weights, names and vocabulary as published, and no tokenizers.

    Scales as of `make_random_llama`, or as of `make_random_lumos` where heads have norms.

    Args:
        path: folder to write ``config.json`` and ``model.safetensors`` to; it is created.
        architecture: name of the class in ``config.json``.
        head_norms: of Emu3.5, with its vocabulary.
        layers: number of decoder layers.
        heads: query heads.
        kv_heads: key-value heads; divides ``heads``.
        head_dim: numbers of a head, even.
        hidden: width of the residual stream.
        max_positions: longest sequence.
        seed: of the random numbers.

    Returns:
        The folder.
    """
    vocab = 282_926 if head_norms else 184_622
    config = {
        "architectures": [architecture],
        "attention_dropout": 0.1,
        "auto_map": {
            "AutoConfig": "configuration_emu3.Emu3Config",
            "AutoModelForCausalLM": "modeling_emu3.Emu3ForCausalLM",
        },
        "boi_token_id": 151852,
        "bos_token_id": 151849,
        "eof_token_id": 151847,
        "eoi_token_id": 151853,
        "eol_token_id": 151846,
        "eos_token_id": 151850,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "image_area": 518400,
        "img_token_id": 151851,
        "initializer_range": 0.02,
        "intermediate_size": 2 * hidden,
        "max_position_embeddings": max_positions,
        "model_type": "Emu3",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "pad_token_id": 151643,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.44.0",
        "use_cache": True,
        "vocab_size": vocab,
    }
    random = _Weights(seed)
    gain = 1.0 if head_norms else math.sqrt(SCORE_STD)
    weights = random.decoder(vocab, hidden, layers, heads, kv_heads, head_dim, gain, tied=False)
    for layer in range(layers if head_norms else 0):
        for name in ("q_norm", "k_norm"):
            scale = math.sqrt(SCORE_STD) * (1 + 0.2 * random.numbers(head_dim))
            weights[f"model.layers.{layer}.self_attn.{name}.weight"] = scale
    return _write(path, config, weights)


def make_random_lumos(
    path: str | Path,
    *,
    architecture: str = ARCHITECTURES[0],
    visual_codes: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    model_parallel_size: int = 2,
    max_positions: int = 8192,
    seed: int = 0,
    rope_theta: float = 10000.0,
    swin_norm: bool = False,
    tied: bool = False,
) -> Path:
    """Write a Lumos-1 checkpoint with random float32 weights and no tokenizers, names as published.

    Scales as of `make_random_llama`; the norms of queries and keys give scores their deviation.

    Args:
        path: folder to write ``config.json`` and ``model.safetensors`` to; it is created.
        architecture: name of the class in ``config.json``.
        visual_codes: V; the ids below the visual ones are as many as published.
        layers: number of decoder layers.
        heads: query heads; together they are as wide as the residual stream.
        kv_heads: key-value heads; divides ``heads``.
        head_dim: numbers of a head, a multiple of 32.
        model_parallel_size: weights of the norms of queries and keys; divides ``kv_heads``.
        max_positions: longest sequence.
        seed: of the random numbers.
        rope_theta: base of the rotary frequencies.
        swin_norm: norms after attention and MLP instead of before.
        tied: the output layer is the token embedding.

    Returns:
        The folder.
    """
    hidden = heads * head_dim
    config = {
        "architectures": [architecture],
        "model_type": "chameleon",
        "torch_dtype": "float32",
        "vocab_size": VISUAL_BEGIN + visual_codes,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": max_positions,
        "rms_norm_eps": 1e-5,
        "rope_theta": rope_theta,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "model_parallel_size": model_parallel_size,
        "swin_norm": swin_norm,
        "mm_rope": True,
        "tie_word_embeddings": tied,
    }
    random = _Weights(seed)
    weights = random.decoder(VISUAL_BEGIN + visual_codes, hidden, layers, heads, kv_heads, head_dim, 1.0, tied)
    for layer in range(layers):
        for name in ("q_norm", "k_norm"):
            prefix, shape = f"model.layers.{layer}.self_attn.{name}", (model_parallel_size, head_dim)
            weights[f"{prefix}.weight"] = math.sqrt(SCORE_STD) * (1 + 0.2 * random.numbers(*shape))
            weights[f"{prefix}.bias"] = 0.2 * random.numbers(*shape)
    return _write(path, config, weights)


class _Weights:
    """Random matrices that keep the variance of what they multiply, or scale its deviation by a gain."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def numbers(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator)

    def matrix(self, outputs: int, inputs: int, gain: float = 1.0) -> Tensor:
        return self.numbers(outputs, inputs) * gain / math.sqrt(inputs)

    def decoder(
        self, vocab: int, hidden: int, layers: int, heads: int, kv_heads: int, head_dim: int, gain: float, tied: bool
    ) -> dict[str, Tensor]:
        """Tensors of a decoder; ``gain`` is that of queries and of keys."""
        intermediate = 2 * hidden
        weights = {"model.embed_tokens.weight": self.numbers(vocab, hidden), "model.norm.weight": torch.ones(hidden)}
        for layer in range(layers):
            prefix = f"model.layers.{layer}"
            weights |= {
                f"{prefix}.input_layernorm.weight": torch.ones(hidden),
                f"{prefix}.self_attn.q_proj.weight": self.matrix(heads * head_dim, hidden, gain),
                f"{prefix}.self_attn.k_proj.weight": self.matrix(kv_heads * head_dim, hidden, gain),
                f"{prefix}.self_attn.v_proj.weight": self.matrix(kv_heads * head_dim, hidden, VALUE_STD),
                f"{prefix}.self_attn.o_proj.weight": self.matrix(hidden, heads * head_dim),
                f"{prefix}.post_attention_layernorm.weight": torch.ones(hidden),
                f"{prefix}.mlp.gate_proj.weight": self.matrix(intermediate, hidden),
                f"{prefix}.mlp.up_proj.weight": self.matrix(intermediate, hidden),
                f"{prefix}.mlp.down_proj.weight": self.matrix(hidden, intermediate),
            }
        if not tied:
            weights["lm_head.weight"] = self.matrix(vocab, hidden)
        return weights


def _write(path: str | Path, config: Mapping[str, Any], weights: dict[str, Tensor]) -> Path:
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
