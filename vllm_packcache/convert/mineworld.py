"""MineWorld's Lightning checkpoints, made into folders of a LlamaForCausalLM.

The model is a plain Llama with names of its own in front. Nothing of the file is run: what it holds beside tensors and
plain data is refused.

Source: the public code of MineWorld (classes of the model, configurations). The published files were not seen.
"""

from __future__ import annotations

import json
import pickle
import re
import shlex
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file

from vllm_packcache.config.errors import ConfigError, shown, shown_path
from vllm_packcache.tools.progress import counting

PREFIX = "transformer."
"""Of the names of the model's tensors."""
TOKENIZER = "tokenizer."
"""Of the names of the video tokenizer's, which may lie beside the model's."""

HEAD_DIM = 64
TOKENS_PER_FRAME = 347
TRAINED_FRAMES = (16, 32)
"""Of the published models, as their names say: the shapes do not tell them apart."""

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

SERVED_FRAMES = 1000
"""Of the longest video in the command that is printed."""


@dataclass(frozen=True)
class Shape:
    """The shape of a Llama, as its tensors have it.

    Args:
        vocab: ids.
        hidden: H, numbers of a token.
        heads: query heads, H / `HEAD_DIM`.
        kv_heads: key-value heads.
        mlp: numbers inside an MLP.
        layers: number of layers.
    """

    vocab: int
    hidden: int
    heads: int
    kv_heads: int
    mlp: int
    layers: int

    @classmethod
    def of(cls, weights: Mapping[str, torch.Tensor]) -> Shape:
        """The shape that tensors with a Llama's names have.

        Raises:
            ConfigError: one of those that tell is missing, or their numbers are no such model's.
        """
        layer = "model.layers.0."
        vocab, hidden = _matrix(weights, "model.embed_tokens.weight")
        keys, _ = _matrix(weights, f"{layer}self_attn.k_proj.weight")
        mlp, _ = _matrix(weights, f"{layer}mlp.gate_proj.weight")
        numbers = {int(found[1]) for name in weights if (found := re.match(r"model\.layers\.(\d{1,4})\.", name))}
        heads, kv_heads = hidden // HEAD_DIM, keys // HEAD_DIM
        if hidden % HEAD_DIM or keys % HEAD_DIM or not kv_heads or heads % kv_heads:
            raise ConfigError(
                f"the checkpoint must have heads of {HEAD_DIM} numbers, as many of queries for each of keys, not "
                f"{hidden} numbers of a token and {keys} of its keys"
            )
        return cls(vocab, hidden, heads, kv_heads, mlp, max(numbers) + 1)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all tensors."""
        hidden, keys = self.hidden, self.kv_heads * HEAD_DIM
        of_layer = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (self.mlp, hidden),
            "mlp.up_proj": (self.mlp, hidden),
            "mlp.down_proj": (hidden, self.mlp),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        return {
            "model.embed_tokens.weight": (self.vocab, hidden),
            **{
                f"model.layers.{layer}.{name}.weight": shape
                for layer in range(self.layers)
                for name, shape in of_layer.items()
            },
            "model.norm.weight": (hidden,),
            "lm_head.weight": (self.vocab, hidden),
        }

    def config(self, frames: int, dtype: str) -> dict[str, Any]:
        """The model's ``config.json``.

        Args:
            frames: of its longest position, one of `TRAINED_FRAMES`.
            dtype: of its tensors, one of `DTYPES`.
        """
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": HEAD_DIM,
            "hidden_act": "silu",
            "max_position_embeddings": frames * TOKENS_PER_FRAME,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            **_NO_SPECIAL_IDS,
            "dtype": dtype,
        }


_NO_SPECIAL_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
"""Without these a Llama has some, and each of them is a visual id of this model."""


def convert(checkpoint: Path, out: Path, *, frames: int, dtype: str = "bfloat16", console: Console) -> Shape:
    """Write a checkpoint as a folder that vLLM loads, and say how to serve it.

    Args:
        checkpoint: a .ckpt file of Lightning.
        out: the folder, new or empty.
        frames: that the model was trained on, one of `TRAINED_FRAMES`.
        dtype: of the tensors that are written, one of `DTYPES`.
        console: where progress and the command are printed.

    Returns:
        The model's shape.

    Raises:
        ConfigError: an option is wrong, or the file is no such checkpoint; then ``out`` is as it was.
        OSError: a file cannot be read or written.
    """
    if frames not in TRAINED_FRAMES:
        raise ConfigError(
            f"--frames must be {' or '.join(map(str, TRAINED_FRAMES))}, as the checkpoint's name says, not {frames}"
        )
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype must be one of {', '.join(DTYPES)}, not {shown(dtype)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"OUT must be a new or an empty folder, not {shown_path(out)}: remove it, or name another")
    weights = model_weights(read_state_dict(checkpoint))
    shape = Shape.of(weights)
    _check(weights, shape.tensors())
    made = {}
    with counting(console, "tensors") as progress:
        for name, tensor in progress.track(weights.items(), description="converting"):
            made[name] = tensor.to(DTYPES[dtype], copy=True, memory_format=torch.contiguous_format)
            if not made[name].isfinite().all():
                raise ConfigError(f"{name} must be of finite numbers, and is not in {dtype}: give another --dtype")
    out.mkdir(parents=True, exist_ok=True)
    size = sum(tensor.nbytes for tensor in made.values())
    with console.status(f"writing {size / 2**30:.1f} GiB"):
        save_file(made, out / "model.safetensors", metadata={"format": "pt"})
    _write(out / "generation_config.json", _NO_SPECIAL_IDS)
    # Last: a folder without it is none that loads.
    _write(out / "config.json", shape.config(frames, dtype))
    console.print(
        f"wrote {out}: {shape.layers} layers of {shape.hidden}, {shape.heads} heads, {shape.kv_heads} of keys and "
        f"values, {frames * TOKENS_PER_FRAME:,} positions. Serve it with videos of up to {SERVED_FRAMES:,} frames:\n"
        f"vllm serve {shlex.quote(str(out))} --kv-cache-policy packcache --kv-cache-policy-config mineworld_{frames}f "
        f"--max-model-len {SERVED_FRAMES * TOKENS_PER_FRAME} --skip-tokenizer-init",
        markup=False,
        soft_wrap=True,
    )
    return shape


def read_state_dict(checkpoint: Path) -> Mapping[str, torch.Tensor]:
    """The tensors of a Lightning checkpoint, by the names that it has.

    Raises:
        ConfigError: it is none, or holds what would run code.
        OSError: it cannot be read.
    """
    where = f"CHECKPOINT {shown_path(checkpoint)}"
    try:
        # Mapped, tensors are read when they are converted.
        loaded = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(checkpoint))
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if code is None:
            raise ConfigError(f"{where} must be a file of torch.save, and cannot be read as one") from None
        raise ConfigError(
            f"{where} must hold tensors and plain data alone, and holds {shown(code[1])}, which would run code: where "
            "you trust it, load it with weights_only=False and save {'state_dict': ...} alone"
        ) from None
    except (EOFError, RuntimeError, ValueError, LookupError):
        raise ConfigError(f"{where} must be a file of torch.save, and cannot be read as one") from None
    weights = loaded.get("state_dict") if isinstance(loaded, Mapping) else None
    if not isinstance(weights, Mapping):
        raise ConfigError(f"{where} must have a state_dict, as a Lightning checkpoint of the model has: give that file")
    for name, tensor in weights.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ConfigError(f"{where} must have names and tensors in its state_dict, not {shown(name)}")
    return weights


def model_weights(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The model's tensors with the names of a LlamaForCausalLM; those of the tokenizer are left out.

    Raises:
        ConfigError: there are others.
    """
    own = {name: tensor for name, tensor in state_dict.items() if not name.startswith(TOKENIZER)}
    _none(f"names that begin with {PREFIX} or {TOKENIZER}, not", (name for name in own if not name.startswith(PREFIX)))
    return {name.removeprefix(PREFIX): tensor for name, tensor in own.items()}


def _matrix(weights: Mapping[str, torch.Tensor], name: str) -> tuple[int, int]:
    if name not in weights or weights[name].ndim != 2:
        raise ConfigError(f"the checkpoint must have {PREFIX}{name}, a matrix: is it one of the model?")
    rows, columns = weights[name].shape
    return rows, columns


def _check(weights: Mapping[str, torch.Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    _none("all tensors of its layers, and lacks", (name for name in expected if name not in weights))
    _none("the tensors of a Llama without biases, not", (name for name in weights if name not in expected))
    for name, shape in expected.items():
        if tuple(weights[name].shape) != shape:
            raise ConfigError(
                f"the checkpoint must have {PREFIX}{name} of shape {list(shape)}, as the other tensors say, not "
                f"{list(weights[name].shape)}"
            )


def _none(must: str, names: Iterable[str]) -> None:
    found = list(names)
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise ConfigError(f"the checkpoint must have {must} {shown(found[0])}{more}")


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
