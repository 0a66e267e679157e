"""Triton kernels without a GPU: compiled for GPUs that are not here, in a process where Triton does not interpret."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from importlib import import_module
from multiprocessing import get_context
from typing import Any


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
