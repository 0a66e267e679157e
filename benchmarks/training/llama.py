"""A minimal Llama in PyTorch, equal in parameters and result to ``LlamaForCausalLM`` of transformers.

It exists for training and evaluation on a CPU: no masks, no cache classes, one fused attention call.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class LlamaSize:
    """What the demo model's size depends on; names as in the config file of transformers."""

    vocab_size: int
    # transformers wants a whole number for each head, although heads have their own size.
    hidden_size: int = 196
    intermediate_size: int = 512
    num_hidden_layers: int = 3
    num_attention_heads: int = 28
    num_key_value_heads: int = 4
    head_dim: int = 32
    rope_theta: float = 1000000.0
    # Positions are divided by it: RoPE of type linear, unless it is 1.
    rope_factor: float = 1.0
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 20480


class Widths(Protocol):
    """What norms and feed-forward layers need to know of a model's size."""

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""

    @property
    def intermediate_size(self) -> int:
        """Width inside a feed-forward layer."""

    @property
    def rms_norm_eps(self) -> float:
        """Epsilon of `RMSNorm`."""


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a learned gain."""

    def __init__(self, size: Widths) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size.hidden_size))
        self.eps = size.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def rotary_table(size: LlamaSize, start: int, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions ``start`` to ``start + length``, each float32 [length, head_dim]."""
    frequencies = rotary_frequencies(size)
    angles = torch.arange(start, start + length).float()[:, None] * frequencies[None]
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def rotary_frequencies(size: LlamaSize) -> Tensor:
    """Radians per position of each rotated pair, float32 [head_dim / 2]."""
    return size.rope_theta ** (-torch.arange(0, size.head_dim, 2).float() / size.head_dim) / size.rope_factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn [..., T, head_dim] by the angles of a `rotary_table`."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class KeyValueCache:
    """Keys and values of up to ``capacity`` positions of one sequence, all kept."""

    def __init__(self, size: LlamaSize, capacity: int) -> None:
        shape = (size.num_hidden_layers, 1, size.num_key_value_heads, capacity, size.head_dim)
        self.keys, self.values = torch.empty(shape), torch.empty(shape)
        self.length = 0

    @property
    def next_position(self) -> int:
        """Position of the token that comes next."""
        return self.length

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store [1, heads, n, head_dim] after the kept positions; all keys and values of the layer."""
        end = self.length + keys.shape[2]
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class Attention(nn.Module):
    """Causal self-attention with rotary positions; several heads share a key and a value."""

    def __init__(self, size: LlamaSize) -> None:
        super().__init__()
        width = size.num_attention_heads * size.head_dim
        self.head_dim = size.head_dim
        self.q_proj = nn.Linear(size.hidden_size, width, bias=False)
        shared = size.num_key_value_heads * size.head_dim
        self.k_proj = nn.Linear(size.hidden_size, shared, bias=False)
        self.v_proj = nn.Linear(size.hidden_size, shared, bias=False)
        self.o_proj = nn.Linear(width, size.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KeyValueCache | None, layer: int) -> Tensor:
        """Map [B, T, hidden] to the same shape; with a cache (B = 1), its positions are seen too."""
        batch, length, _ = x.shape

        def heads(y: Tensor) -> Tensor:
            return y.view(batch, length, -1, self.head_dim).transpose(1, 2)

        q, k, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        if cache is None or cache.length == 0:
            if cache is not None:
                k, v = cache.write(layer, k, v)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            k, v = cache.write(layer, k, v)
            # Faster than a boolean one.
            mask = torch.full((length, k.shape[2]), float("-inf")).triu(k.shape[2] - length + 1)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    """Gated feed-forward layer."""

    def __init__(self, size: Widths) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size.hidden_size, size.intermediate_size, bias=False)
        self.up_proj = nn.Linear(size.hidden_size, size.intermediate_size, bias=False)
        self.down_proj = nn.Linear(size.intermediate_size, size.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, T, hidden] to the same shape, each token by itself."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention and feed-forward, each after a norm and added to its input."""

    def __init__(self, size: LlamaSize) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(size), MLP(size)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(size), RMSNorm(size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KeyValueCache | None, layer: int) -> Tensor:
        """Map [B, T, hidden] to the same shape."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, layers and final norm; a class of its own for the parameter names."""

    def __init__(self, size: LlamaSize) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(size.vocab_size, size.hidden_size)
        self.layers = nn.ModuleList(Layer(size) for _ in range(size.num_hidden_layers))
        self.norm = RMSNorm(size)


class Llama(nn.Module):
    """The model; parameter names are those of ``LlamaForCausalLM`` with tied embeddings."""

    def __init__(self, size: LlamaSize) -> None:
        super().__init__()
        self.size = size
        self.model = Decoder(size)

    @property
    def layers(self) -> list[Layer]:
        """The layers, first to last."""
        return cast(list[Layer], list(self.model.layers))

    def hidden(self, ids: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Final hidden states [B, T, hidden] of ids [B, T]; with a cache, ids follow what it holds."""
        start = cache.next_position if cache else 0
        cos, sin = rotary_table(self.size, start, ids.shape[1])
        x = self.model.embed_tokens(ids)
        for number, layer in enumerate(self.layers):
            x = layer(x, cos, sin, cache, number)
        if cache:
            cache.length += ids.shape[1]
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores [..., vocab] of the next token."""
        return F.linear(hidden, self.model.embed_tokens.weight)


def save_pretrained(model: Llama, directory: Path, special_ids: Mapping[str, int | None]) -> None:
    """Write config.json, generation_config.json and model.safetensors (bfloat16) as transformers reads them.

    ``special_ids`` are ``bos_token_id``, ``eos_token_id`` and ``pad_token_id``.
    """
    size = asdict(model.size)
    theta, factor = size.pop("rope_theta"), size.pop("rope_factor")
    scaling = {"rope_type": "default"} if factor == 1 else {"rope_type": "linear", "factor": factor}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **size,
        "rope_theta": theta,
        "rope_parameters": {**scaling, "rope_theta": theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        **special_ids,
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {"do_sample": False, **special_ids}
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    weights = {name: value.to(torch.bfloat16).contiguous() for name, value in model.state_dict().items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def load_pretrained(directory: Path) -> Llama:
    """The model that ``save_pretrained`` wrote, in float32 and evaluation mode."""
    config = json.loads((Path(directory) / "config.json").read_text())
    factor = config["rope_parameters"].get("factor", 1.0)
    names = set(LlamaSize.__dataclass_fields__) - {"rope_factor"}
    model = Llama(LlamaSize(**{name: config[name] for name in names}, rope_factor=factor))
    weights = load_file(Path(directory) / "model.safetensors")
    model.load_state_dict({name: value.float() for name, value in weights.items()})
    return model.eval()
