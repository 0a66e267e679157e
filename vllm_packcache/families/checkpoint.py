"""What a checkpoint's ``config.json`` says of a decoder of the Llama family.

This module is pure: it knows neither vLLM nor torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder.

    Args:
        layers: number of decoder layers.
        heads: H, query heads.
        kv_heads: G, key-value heads; divides H.
        head_dim: D, numbers of a head.
        rope_theta: base of the rotary frequencies.
        norm_eps: epsilon of RMSNorm.
        tied: the output layer is the token embedding.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float
    norm_eps: float
    tied: bool


def read_config(path: str | Path) -> Mapping[str, Any]:
    """``config.json`` of a checkpoint's folder.

    Raises:
        FileNotFoundError: there is none.
    """
    return json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))


def rope_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The rotary parameters of a ``config.json``, as transformers 5 or an earlier version writes them.

    Raises:
        ValueError: positions are scaled.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    require({"rope_type": (rope.get("rope_type", rope.get("type", "default")), "default")})
    return {"rope_theta": config.get("rope_theta") or 10000.0, **rope}


def require(options: Mapping[str, tuple[object, object]]) -> None:
    """Check (value, supported value) of options of a ``config.json``.

    Raises:
        ValueError: a value is not supported.
    """
    for name, (value, supported) in options.items():
        if value != supported:
            raise ValueError(f"vllm-packcache supports {name} = {supported!r} only, not {value!r}")
