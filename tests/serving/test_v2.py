"""The same tests on vLLM's Model Runner V2, which needs a process of its own. See `tests.runner`."""

from __future__ import annotations

import pytest

from tests.runner import V2, check_on_v2

SERVING = ("test_tokens", "test_positions", "test_async", "test_schedules", "test_graphs", "test_tensor_parallel")
FILES = ["tests/worker/test_runner_v2.py", *(f"tests/serving/{name}.py" for name in SERVING)]


@pytest.mark.skipif(V2, reason="this is V2")
@pytest.mark.timeout(1800)
def test_everything_holds_on_the_v2_runner() -> None:
    check_on_v2(FILES, "not long")
