"""Runs `masked_checks.py` on vLLM's V2 runner, which needs a process of its own. See `tests.runner`."""

from __future__ import annotations

import pytest

from tests.runner import check_on_v2


@pytest.mark.parametrize(
    "which",
    [
        pytest.param("not long", marks=pytest.mark.timeout(1800)),
        pytest.param("long", marks=[pytest.mark.long, pytest.mark.timeout(3600)]),
    ],
)
def test_a_masked_model_makes_what_the_published_loop_makes(which: str) -> None:
    check_on_v2(["tests/serving/masked_checks.py"], which)
