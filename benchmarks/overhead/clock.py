"""Time inside our own functions, wherever vLLM calls them.

Nothing is named here, so that nothing must be kept up with the plugin: what is ours is found by the file that a
function was written in. A clock runs from where vLLM's code calls ours to where ours returns; it stands still while
ours calls the function of vLLM that it wraps or overrides, and while Triton's interpreter runs a kernel.
"""

from __future__ import annotations

import functools
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.engine_process import Burst, Engine, EngineSettings
from vllm_packcache.tools import interpreted

PACKAGE = str(Path(interpreted.__file__).parents[1])

Function = Callable[..., Any]


class HostClock:
    """Counts nanoseconds inside our own functions, by the function that vLLM called."""

    def __init__(self) -> None:
        self.nanoseconds: dict[str, int] = {}
        self._stack: list[str | None] = [None]
        self._since = 0

    def ours(self, function: Function) -> Function:
        """``function``, which is ours."""
        return self._switching(function, function.__qualname__)

    def theirs(self, function: Function) -> Function:
        """``function``, which is not, although ours calls it."""
        return self._switching(function, None)

    def take(self) -> dict[str, int]:
        """What was counted since this was last called."""
        taken, self.nanoseconds = self.nanoseconds, {}
        return taken

    def _switching(self, function: Function, name: str | None) -> Function:
        stack = self._stack

        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            outer = stack[-1]
            # Ours within ours is part of what vLLM called; vLLM's within vLLM's is none of our business.
            if (outer is None) is (name is None):
                return function(*arguments, **options)
            self._switch(outer)
            stack.append(name)
            try:
                return function(*arguments, **options)
            finally:
                stack.pop()
                self._switch(name)

        return call

    def _switch(self, running: str | None) -> None:
        """Count for ``running``, which no longer runs, from when it last began."""
        now = time.perf_counter_ns()
        if running is not None:
            self.nanoseconds[running] = self.nanoseconds.get(running, 0) + now - self._since
        self._since = now


def install(clock: HostClock) -> None:
    """Have ``clock`` watch every function of ours that vLLM calls, and every one of vLLM's that ours calls in turn."""
    for kind in _classes(object, set()):
        theirs = _of(kind, "vllm")
        if not theirs and not _of(kind, "vllm_packcache"):
            continue
        above = [base for base in kind.__mro__[1:] if _of(base, "vllm")]
        for name, function in list(vars(kind).items()):
            if not isinstance(function, types.FunctionType) or not _is_ours(function):
                continue
            if theirs:
                _watch_wrapped(clock, function)
            elif above:
                _watch_overridden(clock, above, name)
            else:
                continue
            setattr(kind, name, clock.ours(function))
    _watch_kernels(clock)


def _classes(kind: type, seen: set[int]) -> Iterator[type]:
    derived: list[type] = type.__subclasses__(kind)
    for own in derived:
        if id(own) not in seen:
            seen.add(id(own))
            yield own
            yield from _classes(own, seen)


def _of(kind: type, package: str) -> bool:
    # Some classes call other things so.
    return str(vars(kind).get("__module__")).startswith(f"{package}.")


def _is_ours(function: types.FunctionType) -> bool:
    return function.__code__.co_filename.startswith(PACKAGE)


def _watch_wrapped(clock: HostClock, function: types.FunctionType) -> None:
    """Of a hook, the function of vLLM that it was put around: it holds it as a free variable."""
    wrapped = getattr(function, "__wrapped__", None)
    for cell in function.__closure__ or ():
        if wrapped is not None and cell.cell_contents is wrapped and not _is_ours(wrapped):
            cell.cell_contents = clock.theirs(wrapped)


def _watch_overridden(clock: HostClock, above: list[type], name: str) -> None:
    """Of a subclass, the method that it overrides."""
    for base in above:
        overridden = vars(base).get(name)
        if isinstance(overridden, types.FunctionType):
            if not hasattr(overridden, _WATCHED):
                watched = clock.theirs(overridden)
                setattr(watched, _WATCHED, True)
                setattr(base, name, watched)
            return


_WATCHED = "_packcache_watched"


def _watch_kernels(clock: HostClock) -> None:
    try:
        from triton.runtime.interpreter import InterpretedFunction
    except ImportError:
        return
    InterpretedFunction.run = clock.theirs(InterpretedFunction.run)


class WatchedEngine(Engine):
    """What the process obeys: an engine that tells, when it is asked to, the time inside our own functions."""

    def __init__(self, settings: EngineSettings) -> None:
        if settings.environment()["VLLM_USE_V2_MODEL_RUNNER"] == "1":
            interpreted.prepare()
        super().__init__(settings)
        self._clock: HostClock | None = None

    def watch(self, steps: int) -> tuple[Burst, list[dict[str, int]]]:
        """Decode ``steps`` tokens of each request; with nanoseconds by function, of each step."""
        if self._clock is None:
            self._clock = HostClock()
            install(self._clock)
        self._clock.take()
        counted = []
        bursts = []
        for _ in range(steps):
            bursts.append(self.decode(1))
            counted.append(self._clock.take())
        joined = Burst(
            *([value for burst in bursts for value in getattr(burst, name)] for name in Burst.__dataclass_fields__)
        )
        return joined, counted
