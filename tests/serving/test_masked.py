"""Runs `masked_checks.py` on vLLM's V2 runner, which needs a process of its own. See `tests.runner`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(900)
def test_a_masked_model_makes_what_the_published_loop_makes() -> None:
    outcome = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", "tests/serving/masked_checks.py"],
        cwd=ROOT,
        env={**os.environ, "VLLM_USE_V2_MODEL_RUNNER": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stdout[-5000:] + outcome.stderr[-2000:]
    assert "SKIPPED" not in outcome.stdout, outcome.stdout[-5000:]
