"""The same tests on vLLM's Model Runner V2, which needs a process of its own. See `tests.runner`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runner import V2

ROOT = Path(__file__).parents[2]
SERVING = ("test_tokens", "test_positions", "test_async", "test_schedules", "test_graphs", "test_tensor_parallel")
FILES = ["tests/worker/test_runner_v2.py", *(f"tests/serving/{name}.py" for name in SERVING)]


@pytest.mark.skipif(V2, reason="this is V2")
@pytest.mark.timeout(1800)
def test_everything_holds_on_the_v2_runner() -> None:
    outcome = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not long", "-rs", *FILES],
        cwd=ROOT,
        env={**os.environ, "VLLM_USE_V2_MODEL_RUNNER": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stdout[-5000:] + outcome.stderr[-2000:]
    assert "SKIPPED" not in outcome.stdout, outcome.stdout[-5000:]
