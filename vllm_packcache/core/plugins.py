"""Classes that installed packages offer through entry points.

This module is pure: it knows neither vLLM nor torch.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any


def package_of(entry: EntryPoint) -> str:
    """Who offers an entry point, for people."""
    return f"package {entry.dist.name}" if entry.dist is not None else f"entry point {entry.value}"


def load(entry: EntryPoint, base: type, what: str, public_name: str, remedy: str) -> Any:
    """The class that an entry point names.

    Args:
        entry: of a package.
        base: what it must derive from.
        what: it is, for people.
        public_name: of ``base``.
        remedy: what to do where it cannot be loaded, without the full stop.

    Raises:
        ValueError: it cannot be loaded, or is no such class; the message names package and remedy.
    """
    try:
        found = entry.load()
    except Exception as error:  # A package's code may raise anything.
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"{what} of {package_of(entry)} cannot be loaded ({reason}): {remedy}") from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(
            f"{what} of {package_of(entry)} must be a class that derives from {public_name}, and {entry.value} is "
            f"none: {remedy}"
        )
    return found
