"""The wrappers of `vllm_packcache.hooks.table` are put in place: all of them, or none."""

from __future__ import annotations

import inspect
import logging
import multiprocessing
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, requires
from pkgutil import resolve_name
from typing import Any, NamedTuple

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from vllm_packcache.config.server import POLICY_FLAG
from vllm_packcache.hooks.table import HOOKS, Hook, Kind

ORIGINAL = "_packcache_original"
"""Attribute of a wrapper: what it wraps."""

logger = logging.getLogger("vllm.packcache")


COMMAND_LINE: tuple[Hook, ...] = tuple(hook for hook in HOOKS if hook.kind is Kind.WRAPPED and hook.asks)
"""By these a policy is asked for. They are there whenever they can be, so that a policy is never ignored."""

ENGINE: tuple[Hook, ...] = tuple(hook for hook in HOOKS if hook.kind is Kind.WRAPPED and not hook.asks)
"""What touches more of vLLM than its command line."""


class HookError(Exception):
    """A hook cannot be put in place. The message says what moved."""


class _Replacement(NamedTuple):
    owner: Any
    name: str
    replacement: Any


_moved: str | None = None
"""What of vLLM has moved, so that this process has no hooks."""


def install_all(register: Callable[[], None]) -> None:
    """Put every hook in place, or none but those of the command line, which then refuse a policy.

    What is wrong is logged once: by the process that the others are children of.

    Args:
        register: what is to be done besides.
    """
    global _moved
    _moved = None
    for hook in COMMAND_LINE:
        try:
            install(_of_this_vllm([hook]))
        except HookError as error:
            # The other one still refuses.
            _moved = str(error)
    if _moved is None and version_error() is None:
        try:
            install(_of_this_vllm(ENGINE), register)
        except HookError as error:
            _moved = str(error)
    why = fault()
    if why is not None and multiprocessing.parent_process() is None:
        logger.warning("%s", why)


def _of_this_vllm(hooks: Sequence[Hook]) -> list[Hook]:
    import vllm

    try:
        installed = Version(vllm.__version__)
    except InvalidVersion:
        # It is not supported, and rows of any version may be right.
        return list(hooks)
    return [hook for hook in hooks if hook.true_of(installed)]


def fault() -> str | None:
    """Why vLLM runs without the plugin in this process, in one sentence; None: it does not."""
    error = version_error()
    if error is None and _moved is not None:
        error = (
            f"vllm-packcache does not fit this build of vLLM ({_moved}): run `vllm-packcache doctor`, install "
            f"another vllm{supported_vllm()}, or start without {POLICY_FLAG}"
        )
    return error


@cache
def version_error() -> str | None:
    """Why the installed vLLM is not supported, in one sentence; None: it is."""
    import vllm

    try:
        supported = supported_vllm()
    except (PackageNotFoundError, RuntimeError):
        return (
            "vllm-packcache is not installed properly, its metadata names no vllm: install it again, or start without "
            f"{POLICY_FLAG}"
        )
    installed = vllm.__version__
    try:
        if supported.contains(Version(installed).public, prereleases=True):
            return None
    except InvalidVersion:
        # A checkout that does not know its version calls itself "dev".
        pass
    return f"vllm-packcache does not support vLLM {installed}: install vllm{supported}, or start without {POLICY_FLAG}"


def supported_vllm() -> SpecifierSet:
    """The versions of vLLM that this distribution requires."""
    for line in requires("vllm-packcache") or ():
        requirement = Requirement(line)
        if requirement.name == "vllm":
            return requirement.specifier
    raise RuntimeError("the metadata of vllm-packcache names no version of vllm: install it again")


def install(hooks: Sequence[Hook], register: Callable[[], None] = lambda: None) -> None:
    """Put ``hooks`` in place: all of them, or none. Those that are there stay.

    Args:
        hooks: what to wrap.
        register: what is to be done besides, once it is known that all of them can be.

    Raises:
        HookError: something cannot be done; nothing of vLLM's has been replaced.
    """
    places = [place for hook in hooks if (place := _prepare(hook)) is not None]
    try:
        register()
    except Exception as error:  # It imports and calls what it needs of vLLM.
        raise HookError(_in_a_line(error)) from error
    replaced: list[_Replacement] = []
    try:
        for owner, name, replacement in places:
            value = vars(owner)[name]
            setattr(owner, name, replacement)
            replaced.append(_Replacement(owner, name, value))
    except Exception as error:  # A class may refuse to be changed.
        for owner, name, value in reversed(replaced):
            setattr(owner, name, value)
        raise HookError(f"{places[len(replaced)].name} cannot be replaced ({_in_a_line(error)})") from error


def installed() -> list[str]:
    """Modules and symbols of the hooks that are in place in this process."""
    names = []
    for hook in (*COMMAND_LINE, *ENGINE):
        try:
            _, _, function = _locate(hook)
        except HookError:
            continue
        if hasattr(function, ORIGINAL):
            names.append(f"{hook.module}.{hook.symbol}")
    return names


def _prepare(hook: Hook) -> _Replacement | None:
    """Make what is to be put where; None: it is there."""
    owner, name, function = _locate(hook)
    if hasattr(function, ORIGINAL):
        return None
    _check_parameters(hook, function)
    try:
        wrapper: Callable[[Any], Any] = resolve_name(hook.wrapper)
    except Exception as error:  # It imports what it needs of vLLM.
        raise HookError(f"{hook.wrapper.partition(':')[0]} cannot be imported ({_in_a_line(error)})") from error
    try:
        replacement = wrapper(function)
        setattr(replacement, ORIGINAL, function)
    except Exception as error:
        raise HookError(f"{hook.module}: {hook.symbol} cannot be wrapped ({_in_a_line(error)})") from error
    value = vars(owner)[name]
    return _Replacement(
        owner, name, type(value)(replacement) if isinstance(value, staticmethod | classmethod) else replacement
    )


def _locate(hook: Hook) -> tuple[Any, str, Any]:
    """The class or module that has the function, its name there, and the function."""
    *path, name = hook.symbol.split(".")
    try:
        owner = resolve_name(":".join([hook.module, ".".join(path)]))
        value = vars(owner)[name]
    except Exception as error:  # Whatever importing a module raises.
        raise HookError(f"{hook.module}: {hook.symbol} is gone ({_in_a_line(error)})") from error
    function = getattr(value, "__func__", value)
    if not callable(function):
        raise HookError(f"{hook.module}: {hook.symbol} is no function")
    return owner, name, function


def _check_parameters(hook: Hook, function: Callable[..., Any]) -> None:
    """The parameters must be those that the table states."""
    (place,) = hook.places()
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError) as error:  # Compiled code may not say what it takes.
        raise HookError(f"{hook.module}: {hook.symbol} does not say what it takes ({_in_a_line(error)})") from error
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        # Another plugin's wrapper, which passes on what it is given.
        return
    missing = set(place.parameters) - set(parameters)
    if missing:
        raise HookError(f"{hook.module}: {hook.symbol} no longer takes {', '.join(sorted(missing))}")
    added = set(parameters) - set(place.parameters)
    if place.exact and added:
        raise HookError(f"{hook.module}: {hook.symbol} takes more than it did: {', '.join(sorted(added))}")


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
