"""Two tensor-parallel ranks: each holds half of the heads of every key, and rotates them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.runner import shorter
from tests.serving.conftest import prompt, video
from tests.serving.two_ranks import run_on_two_ranks
from vllm_packcache.config.server import ServerConfig

CONFIG = {"window": 2, "history_frames": 1.5}
FRAME, GIVEN = shorter((67, 8), (50, 6))

Request = tuple[list[int], int, dict[str, Any]]
"""Prompt, tokens to generate, options."""


def requests() -> dict[str, Request]:
    """What is served together. Other prompts in every attempt of a test: see `tests.margins`."""
    return {
        "a video": (prompt(70, seed=1), shorter(400, 60), {"packcache_tokens_per_frame": shorter(37, 11)}),
        "text": (prompt(50, seed=2), shorter(200, 30), {}),
        "a video of a shorter window": (
            prompt(33, seed=3),
            shorter(400, 60),
            {
                "packcache_tokens_per_frame": shorter(50, 17),
                "packcache_window": 1,
                "packcache_history_frames": 1,
            },
        ),
        "a video kept by what changed": (
            video(33, FRAME, GIVEN, seed=4),
            shorter(200, 20),
            {
                "packcache_tokens_per_frame": FRAME,
                "packcache_condition_tokens": 33,
                "packcache_window": 4,
                "packcache_selection": "changed",
            },
        ),
    }


@pytest.fixture(scope="module")
def serve(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[Request]], list[list[int]]]:
    """``serve(requests)``: what each generates. The same are served once."""
    served: dict[str, list[list[int]]] = {}

    def answer(batch: list[Request]) -> list[list[int]]:
        key = repr(batch)
        if key not in served:
            served[key] = run_on_two_ranks(
                tmp_path_factory.mktemp("ranks"),
                [
                    (ids, {"temperature": 0, "max_tokens": count, "ignore_eos": True, "extra_args": extra_args})
                    for ids, count, extra_args in batch
                ],
                model=str(checkpoint),
                max_model_len=2048,
                max_num_batched_tokens=256,
                additional_config={"kv_cache_policy": "packcache", "kv_cache_policy_config": CONFIG},
            )
        return served[key]

    return answer


@pytest.mark.parametrize("name", requests())
def test_two_ranks_equal_the_reference(
    name: str, serve: Callable[[list[Request]], list[list[int]]], reference: Any
) -> None:
    batch = requests()
    tokens = dict(zip(batch, serve(list(batch.values())), strict=True))[name]
    ids, count, extra_args = batch[name]
    plan = ServerConfig.parse("packcache", CONFIG).plan(extra_args, len(ids))
    reference.check(ids, tokens, count, plan)
