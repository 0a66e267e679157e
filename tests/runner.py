"""Which of vLLM's model runners the tests use: V1, or V2 with ``VLLM_USE_V2_MODEL_RUNNER=1`` in the environment.

The runner is chosen before anything is imported, so each has a run of pytest of its own; ``make test`` makes both. V2
needs Triton. On a CPU Triton's interpreter runs its kernels, 20 ms a step.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

import pytest

V2 = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"

ON_BOTH = frozenset(
    f"serving/test_{name}.py"
    for name in (
        "tokens",
        "changed",
        "episodes",
        "positions",
        "emu3",
        "async",
        "schedules",
        "failures",
        "interruptions",
        "tensor_parallel",
        "frame_ids",
        "sessions",
        "quantised",
    )
)
"""Files whose tests are run on both runners, relative to this folder."""

ON_V2 = frozenset(
    {
        "benchmarks/test_gpu_kernels.py",
        "serving/test_graphs.py",
        "serving/test_guidance.py",
        "serving/test_guided_emu3.py",
        "serving/test_guided_sessions.py",
        "serving/test_forks.py",
        "serving/test_history.py",
        "serving/test_masked_tokens.py",
        "worker/test_canvas.py",
        "worker/test_key_layout_triton.py",
        "worker/test_runner_v2.py",
    }
)
"""Those that need V2, or what is interpreted with it. All other files are for V1 or for none."""

needs_v2 = pytest.mark.skipif(not V2, reason="needs the V2 runner: run it with VLLM_USE_V2_MODEL_RUNNER=1")

T = TypeVar("T")


def is_for_this_runner(file: Path) -> bool:
    """Whether a test file has something to show on the runner that is used."""
    name = file.relative_to(Path(__file__).parent).as_posix()
    return name in ON_V2 | ON_BOTH if V2 else name not in ON_V2


def shorter(usual: T, on_v2: T) -> T:
    """``usual``, or what takes fewer steps where steps are interpreted."""
    return on_v2 if V2 and os.environ.get("TRITON_INTERPRET") == "1" else usual
