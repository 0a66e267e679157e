"""Which of vLLM's model runners the tests use: V1, or V2 with ``VLLM_USE_V2_MODEL_RUNNER=1`` in the environment.

V2 needs Triton. On a CPU Triton's interpreter runs its kernels, 20 ms a step.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any, TypeVar

V2 = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"

T = TypeVar("T")


def shorter(usual: T, on_v2: T) -> T:
    """``usual``, or what takes fewer steps where steps are interpreted."""
    return on_v2 if V2 else usual


def use_triton_on_a_cpu() -> None:
    """Make vLLM see Triton, and Triton interpret. To be called before either is imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    # Where vLLM compiles a function, PyTorch would ask Triton for a compiler.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    import triton.backends

    driver: Any = SimpleNamespace(is_active=lambda: True, get_active_torch_device=lambda: "cpu")
    triton.backends.backends["cpu"] = SimpleNamespace(driver=driver, compiler=None)  # type: ignore[assignment]
