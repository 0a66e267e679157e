"""What a model's keys and values take in bytes, for `vllm_packcache.tools.explain`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vllm_packcache.config import formats
from vllm_packcache.config.errors import ConfigError, shown, shown_path
from vllm_packcache.config.formats import Format
from vllm_packcache.families.checkpoint import read_config

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Of a number, by the names of ``--dtype``."""

MOST = 2**20
"""Layers, heads and numbers of a head: more than any model has."""


class Shape(NamedTuple):
    """Of what a model stores.

    Attributes:
        layers: of the model.
        kv_heads: of a layer.
        head_size: numbers of a key, and of a value.
    """

    layers: int
    kv_heads: int
    head_size: int


@dataclass(frozen=True)
class Storage:
    """What is stored of a token, on all GPUs together.

    Args:
        shape: of the model.
        dtype: the model's precision, as ``--dtype`` has it.
        format: of the cache.
    """

    shape: Shape
    dtype: str
    format: Format

    @property
    def token_bytes(self) -> int:
        """Of the keys and values of a token in all layers."""
        return self._token_bytes(self.format)

    @property
    def layer_bytes(self) -> int:
        """Of a key and a value in all heads of a layer."""
        return self.shape.kv_heads * self.format.pair_bytes(self.shape.head_size, ITEM_BYTES[self.dtype])

    @property
    def own_token_bytes(self) -> int:
        """The same in the model's own precision, as vLLM stores where it is told nothing."""
        return self._token_bytes(formats.FORMATS["auto"])

    def _token_bytes(self, stored: Format) -> int:
        return stored.token_bytes(*self.shape, ITEM_BYTES[self.dtype])

    @property
    def sentence(self) -> str:
        """What a token takes, and of what."""
        layers, kv_heads, head_size = self.shape
        said = f"A token takes {self.token_bytes:,} bytes: {layers} layers of {kv_heads} keys and values of {head_size}"
        if self.format.name in ("auto", self.dtype):
            return f"{said}, {self.dtype}."
        return f"{said}, {self.format.name}; in {self.dtype} {self.own_token_bytes:,}."


def storage(
    *,
    model: Path | None = None,
    layers: int | None = None,
    kv_heads: int | None = None,
    head_size: int | None = None,
    dtype: str | None = None,
    kv_cache_dtype: str | None = None,
) -> Storage | None:
    """What is stored of a token; None: nobody says of which model.

    Args:
        model: folder of a checkpoint, or its ``config.json``.
        layers: of the model, where there is no checkpoint.
        kv_heads: of a layer, likewise.
        head_size: numbers of a key, likewise.
        dtype: the model's precision; by default the checkpoint's, as vLLM serves it, or bfloat16.
        kv_cache_dtype: the format of the cache; by default the model's precision.

    Raises:
        ConfigError: a number or name is impossible, options do not go together, or there is no such checkpoint.
    """
    given: dict[str, int | None] = {"--layers": layers, "--kv-heads": kv_heads, "--head-size": head_size}
    said = [name for name, value in given.items() if value is not None]
    if model is None and not said:
        for name, value in (("--kv-cache-dtype", kv_cache_dtype), ("--dtype", dtype)):
            if value is not None:
                raise ConfigError(f"{name} is for bytes: give --model, or {', '.join(given)}, or leave it out")
        return None
    if model is not None and said:
        raise ConfigError(f"--model says what {', '.join(said)} would: leave one of the two out")
    if model is None and len(said) < len(given):
        raise ConfigError(f"{', '.join(given)} go together: give all three, or --model")
    if dtype is not None and dtype not in ITEM_BYTES:
        raise ConfigError(f"--dtype must be one of {', '.join(ITEM_BYTES)}, not {shown(dtype)}")
    for name, number in given.items():
        if number is not None and not 1 <= number <= MOST:
            raise ConfigError(f"{name} must lie between 1 and {MOST:,}, not {number}")
    stored = formats.find(kv_cache_dtype or "auto")
    if model is None:
        shape, own = Shape(*(value for value in given.values() if value is not None)), "bfloat16"
    else:
        shape, own = _served(model)
    return Storage(shape, dtype or own, stored)


def shown_bytes(count: int) -> str:
    """Bytes for people: three digits and a unit."""
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 999.5:
            break
        size, unit = size / 1024, larger
    return f"{count} B" if unit == "B" else f"{size:.{2 if size < 9.995 else 1 if size < 99.95 else 0}f} {unit}"


def _served(model: Path) -> tuple[Shape, str]:
    """Layers, heads and head size of a checkpoint, and the precision that vLLM serves it in."""
    folder = model.parent if model.name == "config.json" else model
    try:
        config: Any = read_config(folder)
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or "it is not JSON"
        raise ConfigError(f"--model: config.json of {shown_path(folder)} cannot be read: {reason}") from None
    whole = config if isinstance(config, Mapping) else {}
    text = next((whole[name] for name in ("text_config", "llm_config") if isinstance(whole.get(name), Mapping)), whole)
    if text.get("kv_lora_rank"):
        raise ConfigError(f"--model: {shown_path(folder)} caches MLA latents, not keys and values: give another model")
    heads = text.get("num_attention_heads")
    numbers: dict[str, Any] = {
        "num_hidden_layers": text.get("num_hidden_layers"),
        "num_key_value_heads": text.get("num_key_value_heads") or heads,
        "head_dim": text.get("head_dim") or _divided(text.get("hidden_size"), heads),
    }
    for name, value in numbers.items():
        if not isinstance(value, int) or not 1 <= value <= MOST:
            raise ConfigError(
                f"--model: {name} in config.json of {shown_path(folder)} must be a number of 1 or more, not "
                f"{shown(value)}: give --layers, --kv-heads and --head-size instead"
            )
    own = next(
        (found for name in ("dtype", "torch_dtype") for found in (text.get(name), whole.get(name)) if found), None
    )
    # vLLM serves weights of float32 in 16 bits where it is told nothing.
    dtype = own if own in ("bfloat16", "float16") else "bfloat16"
    return Shape(*numbers.values()), dtype


def _divided(size: Any, heads: Any) -> Any:
    return size // heads if isinstance(size, int) and isinstance(heads, int) and heads > 0 else None
