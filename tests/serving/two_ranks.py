"""An engine of two tensor-parallel ranks, in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SCRIPT = """
import json, sys
from tests.runner import V2
from vllm_packcache.tools import interpreted

# Every process that runs a part of the engine imports this file.
if V2:
    interpreted.prepare()

from vllm import LLM, SamplingParams
from tests.serving.conftest import run

if __name__ == "__main__":
    options, requests = json.loads(sys.argv[1]), json.loads(sys.argv[2])
    llm = LLM(
        skip_tokenizer_init=True, dtype="float32", enforce_eager=True, tensor_parallel_size=2, block_size=32, **options
    )
    params = [SamplingParams(detokenize=False, **wanted) for _, wanted in requests]
    print("TOKENS" + json.dumps(run(llm, [ids for ids, _ in requests], params)))
"""


def run_on_two_ranks(
    folder: Path, requests: Sequence[tuple[list[int], dict[str, Any]]], **options: Any
) -> list[list[int]]:
    """Generated tokens of a batch.

    Args:
        folder: to put a script into.
        requests: prompts, and fields of their sampling parameters.
        options: of the engine.
    """
    script = folder / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    cores = sorted(os.sched_getaffinity(0))
    environment = {
        **os.environ,
        # A process a rank: what schedules them needs none of its own, which would import all of vLLM once more.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # One core a rank: otherwise the second finds none left.
        "VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    outcome = subprocess.run(
        [sys.executable, str(script), json.dumps(options), json.dumps(requests)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    told = [line for line in outcome.stdout.splitlines() if line.startswith("TOKENS")]
    assert told, outcome.stdout[-3000:] + outcome.stderr[-3000:]
    return json.loads(told[0].removeprefix("TOKENS"))
