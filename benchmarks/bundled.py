"""Which weights a result was measured with: the bundled models are trained anew now and then."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_packcache.calibrate.command import BUNDLED, DEMO, MASKED_DEMO
from vllm_packcache.tools.machine import sha256

CAUSAL, MASKED = "the bundled one", "the bundled masked one"

# `vllm-packcache calibrate` has names of its own for them.
_FILES = {CAUSAL: BUNDLED[DEMO], MASKED: BUNDLED[MASKED_DEMO], **BUNDLED}


def identity(name: str) -> dict[str, str]:
    """A bundled model, as a result names it."""
    return {"name": name, "sha256": sha256(_FILES[name])}


def outdated(result: Mapping[str, Any]) -> bool:
    """Whether a result was measured with a bundled model whose weights are others today."""
    model = result.get("model")
    name, weights = (
        (model.get("name"), model.get("sha256")) if isinstance(model, Mapping) else (model, result.get("weights"))
    )
    return name in _FILES and weights != identity(name)["sha256"]
