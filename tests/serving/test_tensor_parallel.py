"""Two tensor-parallel ranks: each holds half of the heads of every key, and rotates them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.runner import shorter
from tests.serving.conftest import prompt
from vllm_packcache.config import ServerConfig

CONFIG = {"window": 2, "history_frames": 1.5}

SCRIPT = """
import json, sys
from tests.runner import V2, use_triton_on_a_cpu

# Every process that runs a part of the engine imports this file.
if V2:
    use_triton_on_a_cpu()

from vllm import LLM
from tests.serving.conftest import run, sampling

if __name__ == "__main__":
    model, config, requests = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
    llm = LLM(
        model, skip_tokenizer_init=True, dtype="float32", enforce_eager=True, tensor_parallel_size=2, block_size=32,
        max_model_len=2048, max_num_batched_tokens=256,
        additional_config={"kv_cache_policy": "packcache", "kv_cache_policy_config": config},
    )
    params = [sampling(count, **options) for _, count, options in requests]
    print("TOKENS" + json.dumps(run(llm, [ids for ids, _, _ in requests], params)))
"""


def test_two_ranks_equal_the_reference(checkpoint: Path, reference: Any, tmp_path: Path) -> None:
    requests = [
        (prompt(70, seed=1), shorter(400, 60), {"tokens_per_frame": shorter(37, 11)}),
        (prompt(50, seed=2), shorter(200, 30), {}),
        (prompt(33, seed=3), shorter(400, 60), {"tokens_per_frame": shorter(50, 17), "window": 1, "history_frames": 1}),
    ]
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    cores = sorted(os.sched_getaffinity(0))
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        # One core a rank: otherwise the second finds none left.
        "VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    outcome = subprocess.run(
        [sys.executable, str(script), str(checkpoint), json.dumps(CONFIG), json.dumps(requests)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    told = [line for line in outcome.stdout.splitlines() if line.startswith("TOKENS")]
    assert told, outcome.stdout[-3000:] + outcome.stderr[-3000:]
    served = json.loads(told[0].removeprefix("TOKENS"))
    server = ServerConfig.parse("packcache", CONFIG)
    for tokens, (ids, count, options) in zip(served, requests, strict=True):
        plan = server.plan({f"packcache_{name}": value for name, value in options.items()}, len(ids))
        assert tokens == reference.generate(ids, count, plan, 32).token_ids
