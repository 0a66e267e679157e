"""Which of vLLM's model runners the tests use: V1, or V2 with ``VLLM_USE_V2_MODEL_RUNNER=1`` in the environment.

V2 needs Triton. On a CPU Triton's interpreter runs its kernels, 20 ms a step.
"""

from __future__ import annotations

import os
from typing import TypeVar

V2 = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"

T = TypeVar("T")


def shorter(usual: T, on_v2: T) -> T:
    """``usual``, or what takes fewer steps where steps are interpreted."""
    return on_v2 if V2 else usual
