"""Which weights a result was measured with: the bundled models are trained anew now and then."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from vllm_packcache.demo.masked import bundle
from vllm_packcache.demo.tokenizer import MODEL_DIR

CAUSAL, MASKED = "the bundled one", "the bundled masked one"

_FILES = {
    CAUSAL: MODEL_DIR / "model.safetensors",
    MASKED: bundle.MODEL_DIR / bundle.WEIGHTS,
    # As `vllm-packcache calibrate` names them.
    "demo": MODEL_DIR / "model.safetensors",
    bundle.PRESET: bundle.MODEL_DIR / bundle.WEIGHTS,
}


def identity(name: str) -> dict[str, str]:
    """A bundled model, as a result names it."""
    return {"name": name, "sha256": hashlib.sha256(_FILES[name].read_bytes()).hexdigest()}


def outdated(result: Mapping[str, Any]) -> bool:
    """Whether a result was measured with a bundled model whose weights are others today."""
    model = result.get("model")
    name, weights = (
        (model.get("name"), model.get("sha256")) if isinstance(model, Mapping) else (model, result.get("weights"))
    )
    return name in _FILES and weights != identity(name)["sha256"]
