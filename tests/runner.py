"""Which of vLLM's model runners the tests use: V1, or V2 with ``VLLM_USE_V2_MODEL_RUNNER=1`` in the environment.

V2 needs Triton. On a CPU Triton's interpreter runs its kernels, 20 ms a step.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

V2 = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"

T = TypeVar("T")


def shorter(usual: T, on_v2: T) -> T:
    """``usual``, or what takes fewer steps where steps are interpreted."""
    return on_v2 if V2 else usual


def check_on_v2(files: Sequence[str], which: str) -> None:
    """Run tests on the V2 runner, in a process of its own; none may be skipped.

    Args:
        files: paths from the root of the repository.
        which: their markers.
    """
    outcome = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", which, "-rs", *files],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "VLLM_USE_V2_MODEL_RUNNER": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stdout[-5000:] + outcome.stderr[-2000:]
    assert "SKIPPED" not in outcome.stdout, outcome.stdout[-5000:]
