"""Triton kernels without a GPU: they run under Triton's interpreter, and are compiled for GPUs that are not here.

The interpreter must be chosen before anything is imported, so it runs in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def check(module: str, *, interpreted: bool) -> None:
    """Run all tests of a file that pytest does not collect by itself, and none may be skipped.

    Args:
        module: path of the file from the root of the repository.
        interpreted: with Triton's interpreter, on the CPU; otherwise on the GPU.
    """
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}
    environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if interpreted else {}
    outcome = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--color=no", module],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    summary = outcome.stdout.strip().rpartition("\n")[2]
    assert outcome.returncode == 0, outcome.stdout[-5000:] + outcome.stderr[-2000:]
    assert "passed" in summary, summary
    assert "skipped" not in summary, summary


def compiled(
    kernel: Any, capability: int, signature: Mapping[str, str], constants: Mapping[str, Any], **options: int
) -> str:
    """The PTX of a kernel for a GPU of compute capability ``capability`` / 10, which need not be here.

    Pointers and numbers are taken to be multiples of 16, as those of a KV cache are; ``ptxas`` accepts the result.
    """
    name = kernel.fn.__module__, kernel.fn.__name__
    return _compiler().submit(_compile, name, capability, dict(signature), dict(constants), options).result()


@cache
def _compiler() -> ProcessPoolExecutor:
    """A process in which Triton compiles, whatever it does in this one."""
    return ProcessPoolExecutor(1, get_context("spawn"), _compile_from_now_on)


def _compile_from_now_on() -> None:
    os.environ.pop("TRITON_INTERPRET", None)


def _compile(
    name: tuple[str, str],
    capability: int,
    signature: dict[str, str],
    constants: dict[str, Any],
    options: dict[str, int],
) -> str:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    module, function = name
    kernel = getattr(import_module(module), function)
    attributes = {
        (index,): [["tt.divisibility", 16]] for index, type in enumerate(signature.values()) if type != "fp32"
    }
    types = {**signature, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(kernel, signature=types, constexprs=constants, attrs=attributes)
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]
