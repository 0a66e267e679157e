"""The check that the model runner which runs is one that our hooks reach.

A platform or a package may bring a runner of its own. Where it replaces what is wrapped without calling it, blocks
would be freed and never left out of what attention reads.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from vllm_packcache.config.errors import ConfigError

V1 = "vllm.v1.worker.gpu_model_runner"
V2 = "vllm.v1.worker.gpu.model_runner"

RELIED_ON = {
    V1: (
        "initialize_kv_cache",
        "_update_states",
        "_update_streaming_request",
        "execute_model",
        "_build_attention_metadata",
        "_preprocess",
        "sample_tokens",
    ),
    # All of them ask the model state, which is ours.
    V2: (
        "load_model",
        "initialize_kv_cache",
        "add_requests",
        "update_requests",
        "finish_requests",
        "prepare_attn",
        "execute_model",
    ),
}
"""Methods of either ``GPUModelRunner`` that are wrapped, or that call what is ours."""


def check_runner(runner: object) -> None:
    """Refuse a model runner that our hooks do not reach.

    Raises:
        ConfigError: naming the runner and what it replaces.
    """
    kind = type(runner)
    own = next((cls for cls in kind.__mro__ if cls.__module__ in RELIED_ON and cls.__name__ == "GPUModelRunner"), None)
    replaced = ["vLLM's GPUModelRunner"] if own is None else list(_replaced(kind, own))
    if replaced:
        raise ConfigError(
            f"vllm-packcache needs vLLM's own model runner, and {kind.__module__}.{kind.__qualname__} replaces "
            f"{', '.join(replaced)}: start without a policy, or without the package that brings that runner"
        )


def _replaced(kind: type, own: type) -> Iterator[str]:
    """Methods that are relied on and that ``kind`` has others for, which do not call them."""
    for name in RELIED_ON[own.__module__]:
        for cls in kind.__mro__[: kind.__mro__.index(own)]:
            if name in vars(cls) and not _calls_super(vars(cls)[name], name):
                yield name
                break


def _calls_super(method: Any, name: str) -> bool:
    code = getattr(inspect.unwrap(method), "__code__", None)
    return code is not None and {"super", name} <= set(code.co_names)
