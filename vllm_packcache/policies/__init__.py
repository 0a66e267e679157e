"""Cache policies: one file and one dataclass each.

An installed package adds its own through the entry-point group ``vllm_packcache.policies``: the entry's name
is the policy's name, its object a frozen dataclass that derives from `Policy`.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points

from vllm_packcache.policies.attention_sink import AttentionSink
from vllm_packcache.policies.base import Policy
from vllm_packcache.policies.full import Full
from vllm_packcache.policies.packcache import PackCache
from vllm_packcache.policies.sliding_window import SlidingWindow

__all__ = ["AttentionSink", "Full", "PackCache", "Policy", "SlidingWindow", "available", "find"]

ENTRY_POINT_GROUP = "vllm_packcache.policies"
_BUILT_IN: tuple[type[Policy], ...] = (PackCache, SlidingWindow, AttentionSink, Full)


@cache
def available() -> dict[str, type[Policy]]:
    """Every policy by name: the built-in ones and those of installed packages.

    Raises:
        TypeError: an installed entry is no subclass of `Policy`.
        ValueError: an installed entry takes a name that is in use.
    """
    policies = {policy.name: policy for policy in _BUILT_IN}
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        policy = entry.load()
        if not (isinstance(policy, type) and issubclass(policy, Policy)):
            raise TypeError(f"entry point {entry.name!r} of group {ENTRY_POINT_GROUP!r} is no Policy: {policy!r}")
        if policies.setdefault(entry.name, policy) is not policy:
            raise ValueError(f"entry point {entry.name!r} of group {ENTRY_POINT_GROUP!r}: the name is in use")
    return policies


def find(name: str) -> type[Policy]:
    """The policy called ``name``.

    Raises:
        ValueError: there is none.
    """
    policies = available()
    if name not in policies:
        raise ValueError(f"unknown policy {name!r}: choose one of {', '.join(sorted(policies))}")
    return policies[name]
