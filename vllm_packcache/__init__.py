"""Serve autoregressive video models through vLLM with a KV cache that stays bounded.

What is here is what the author of a cache policy needs.
"""

from typing import Any

from vllm_packcache.core.blocks import BlockIndices, BlockMap
from vllm_packcache.core.layout import FrameLayout, VideoLayout
from vllm_packcache.core.policies.base import Policy, check_range
from vllm_packcache.core.policies.selection import Selection, keep_fraction, select
from vllm_packcache.core.retention import Retention

__all__ = [
    "BlockIndices",
    "BlockMap",
    "FrameLayout",
    "Policy",
    "Retention",
    "Selection",
    "VideoLayout",
    "__version__",
    "check_range",
    "keep_fraction",
    "select",
]


def __getattr__(name: str) -> Any:
    # Asked for only where the package is installed: a bare checkout works without.
    if name == "__version__":
        from importlib.metadata import version

        return version("vllm-packcache")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
