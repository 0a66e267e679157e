"""Which benchmarks there are: a folder with a ``benchmark.py`` is one, or several that are alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

from benchmarks.protocol import Benchmark


def folders() -> list[str]:
    """Folders of benchmarks."""
    return sorted(path.parent.name for path in Path(__file__).parent.glob("*/benchmark.py"))


@cache
def benchmarks() -> tuple[Benchmark, ...]:
    """Every `Benchmark` that a ``benchmark.py`` has, in the order of the report."""
    modules = [import_module(f"benchmarks.{folder}.benchmark") for folder in folders()]
    found = [own for module in modules for own in vars(module).values() if isinstance(own, Benchmark)]
    return tuple(sorted(found, key=lambda benchmark: benchmark.place))


def commands() -> Iterator[tuple[str, Callable[..., None]]]:
    """Name and function of the commands, for folders that have one; what they measure is not imported."""
    for folder in folders():
        command = getattr(import_module(f"benchmarks.{folder}"), "command", None)
        if command is not None:
            yield folder.replace("_", "-"), command
