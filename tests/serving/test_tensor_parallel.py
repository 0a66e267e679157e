"""Two tensor-parallel ranks: each holds half of the heads of every key, and rotates them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.runner import shorter
from tests.serving.conftest import prompt
from tests.serving.two_ranks import run_on_two_ranks
from vllm_packcache.config.server import ServerConfig

CONFIG = {"window": 2, "history_frames": 1.5}


def test_two_ranks_equal_the_reference(checkpoint: Path, reference: Any, tmp_path: Path) -> None:
    requests = [
        (prompt(70, seed=1), shorter(400, 60), {"packcache_tokens_per_frame": shorter(37, 11)}),
        (prompt(50, seed=2), shorter(200, 30), {}),
        (
            prompt(33, seed=3),
            shorter(400, 60),
            {
                "packcache_tokens_per_frame": shorter(50, 17),
                "packcache_window": 1,
                "packcache_history_frames": 1,
            },
        ),
    ]
    served = run_on_two_ranks(
        tmp_path,
        [
            (ids, {"temperature": 0, "max_tokens": count, "ignore_eos": True, "extra_args": extra_args})
            for ids, count, extra_args in requests
        ],
        model=str(checkpoint),
        max_model_len=2048,
        max_num_batched_tokens=256,
        additional_config={"kv_cache_policy": "packcache", "kv_cache_policy_config": CONFIG},
    )
    server = ServerConfig.parse("packcache", CONFIG)
    for tokens, (ids, count, extra_args) in zip(served, requests, strict=True):
        plan = server.plan(extra_args, len(ids))
        reference.check(ids, tokens, count, plan)
