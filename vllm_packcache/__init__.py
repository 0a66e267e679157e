"""Serve autoregressive video models through vLLM with a KV cache that stays bounded.

What is here is what the author of a cache policy needs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_packcache.core.blocks import BlockIndices, BlockMap
    from vllm_packcache.core.layout import FrameLayout, VideoLayout
    from vllm_packcache.core.policies.base import Policy, check_range
    from vllm_packcache.core.policies.selection import Selection, keep_fraction, select
    from vllm_packcache.core.retention import Retention

    __version__: str

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

_HOMES = {
    "core.blocks": ("BlockIndices", "BlockMap"),
    "core.layout": ("FrameLayout", "VideoLayout"),
    "core.policies.base": ("Policy", "check_range"),
    "core.policies.selection": ("Selection", "keep_fraction", "select"),
    "core.retention": ("Retention",),
}


def __getattr__(name: str) -> Any:
    # Every process of every vLLM server imports this package, with a policy or without: what is not asked for waits.
    if name == "__version__":
        # A bare checkout works without being installed.
        from importlib.metadata import version

        return version("vllm-packcache")
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
