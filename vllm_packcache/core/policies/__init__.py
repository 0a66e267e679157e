"""Cache policies: one file and one dataclass each.

An installed package adds its own through the entry-point group ``vllm_packcache.policies``: the entry's name
is the policy's name, its object a frozen dataclass that derives from `Policy`. It is imported when it is asked for by
that name, so a package that cannot be imported is in nobody's way.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points

from vllm_packcache.core import plugins
from vllm_packcache.core.policies.attention_sink import AttentionSink
from vllm_packcache.core.policies.base import Policy
from vllm_packcache.core.policies.full import Full
from vllm_packcache.core.policies.packcache import PAPER, PackCache
from vllm_packcache.core.policies.reset import Reset
from vllm_packcache.core.policies.sliding_window import SlidingWindow

__all__ = ["PAPER", "AttentionSink", "Full", "PackCache", "Policy", "Reset", "SlidingWindow", "find", "names"]

ENTRY_POINT_GROUP = "vllm_packcache.policies"
_BUILT_IN = {policy.name: policy for policy in (PackCache, SlidingWindow, AttentionSink, Reset, Full)}


def names() -> list[str]:
    """Names of the built-in policies and of those of installed packages, in order; nothing is imported."""
    return sorted({*_BUILT_IN, *(entry.name for entry in _entries())})


@cache
def find(name: str) -> type[Policy]:
    """The policy called ``name``.

    Raises:
        ValueError: there is none, or several, or it cannot be loaded; the message names it and the remedy.
    """
    # A package that is installed in two places has the same entry twice.
    entries = {entry.value: entry for entry in _entries() if entry.name == name}
    offers = [plugins.package_of(entry) for entry in entries.values()]
    if len(offers) + (name in _BUILT_IN) > 1:
        raise ValueError(
            f"policy {name!r} is offered by {' and by '.join(['vllm-packcache'] * (name in _BUILT_IN) + offers)}: "
            "uninstall all but one"
        )
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    if not entries:
        raise ValueError(f"unknown policy {name!r}: choose one of {', '.join(names())}")
    (entry,) = entries.values()
    remedy = "mend or uninstall the package, or choose another policy"
    policy: type[Policy] = plugins.load(entry, Policy, f"policy {name!r}", "vllm_packcache.Policy", remedy)
    return policy


@cache
def _entries() -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=ENTRY_POINT_GROUP))
