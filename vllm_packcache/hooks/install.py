"""The functions of vLLM's that the plugin wraps: what each is for, and how they are put in place, all or none.

A hook names what it wraps and its wrapper, so that reading the table imports neither. What parameters vLLM's function
must have says `vllm_packcache.hooks.contract`.
"""

from __future__ import annotations

import inspect
import logging
import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import requires
from pkgutil import resolve_name
from typing import Any, NamedTuple

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from vllm_packcache.config.server import POLICY_FLAG
from vllm_packcache.hooks.contract import RELIANCES

ORIGINAL = "_packcache_original"
"""Attribute of a wrapper: what it wraps."""

logger = logging.getLogger("vllm.packcache")


@dataclass(frozen=True)
class Hook:
    """One function of vLLM's that is wrapped.

    Args:
        module: of vLLM's.
        symbol: the function, or ``Class.method``.
        wrapper: ``module:function`` of ours, which takes the function and returns what takes its place.
        why: what for.
    """

    module: str
    symbol: str
    wrapper: str
    why: str

    @property
    def file(self) -> str:
        """Of the module, relative to the folder of the ``vllm`` package; a package is its ``__init__.py``."""
        path = self.module.removeprefix("vllm.").replace(".", "/")
        return next(
            reliance.file
            for reliance in RELIANCES
            if reliance.symbol == self.symbol and reliance.file in (f"{path}.py", f"{path}/__init__.py")
        )


COMMAND_LINE: tuple[Hook, ...] = (
    Hook(
        "vllm.engine.arg_utils",
        "EngineArgs.add_cli_args",
        "vllm_packcache.hooks.flags:add_flags",
        "the flags, kept in additional_config while the command line is parsed",
    ),
    Hook(
        "vllm.engine.arg_utils",
        "EngineArgs.create_engine_config",
        "vllm_packcache.hooks.startup:check_engine_config",
        "what cannot be right is refused before anything loads",
    ),
)
"""By these a policy is asked for. They are there whenever they can be, so that a policy is never ignored."""

ENGINE: tuple[Hook, ...] = (
    Hook(
        "vllm.config.model",
        "ModelConfig.get_and_verify_max_len",
        "vllm_packcache.hooks.startup:find_position_limit",
        "re-based sequences may be longer than the model has positions",
    ),
    Hook(
        "vllm.entrypoints.openai.completion.serving",
        "OpenAIServingCompletion.create_completion",
        "vllm_packcache.hooks.requests:read_body",
        "what an endpoint would ignore is HTTP 400, and what a client leaves out is known",
    ),
    Hook(
        "vllm.entrypoints.openai.chat_completion.serving",
        "OpenAIServingChat.create_chat_completion",
        "vllm_packcache.hooks.requests:read_body",
        "what an endpoint would ignore is HTTP 400, and what a client leaves out is known",
    ),
    Hook(
        "vllm.entrypoints.openai.chat_completion.batch_serving",
        "OpenAIServingChatBatch.create_batch_chat_completion",
        "vllm_packcache.hooks.requests:read_body",
        "what an endpoint would ignore is HTTP 400, and what a client leaves out is known",
    ),
    Hook(
        "vllm.entrypoints.openai.responses.serving",
        "OpenAIServingResponses.create_responses",
        "vllm_packcache.hooks.requests:read_body",
        "what an endpoint would ignore is HTTP 400, and what a client leaves out is known",
    ),
    Hook(
        "vllm.entrypoints.scale_out.token_in_token_out.serving",
        "ServingTokens.serve_tokens",
        "vllm_packcache.hooks.requests:read_body",
        "what an endpoint would ignore is HTTP 400, and what a client leaves out is known",
    ),
    Hook(
        "vllm.v1.engine.input_processor",
        "InputProcessor.process_inputs",
        "vllm_packcache.hooks.requests:check_request",
        "bad options, and what can never fit, are HTTP 400",
    ),
    Hook(
        "vllm.v1.core.kv_cache_manager",
        "KVCacheManager.get_computed_blocks",
        "vllm_packcache.engine.manager:cap_prefix_hits",
        "a prefix hit ends with the condition",
    ),
    Hook(
        "vllm.v1.core.sched.scheduler",
        "Scheduler._reserve_prefill_lookahead",
        "vllm_packcache.engine.manager:bound_chunks",
        "prefill chunks end where the policy needs it",
    ),
    Hook(
        "vllm.v1.core.sched.scheduler",
        "Scheduler._preempt_request",
        "vllm_packcache.engine.metrics:count_preemptions",
        "preemptions of videos are counted",
    ),
    Hook(
        "vllm.v1.core.sched.scheduler",
        "Scheduler._free_request",
        "vllm_packcache.engine.metrics:log_videos",
        "a line in the log for every video that ends",
    ),
    Hook(
        "vllm.v1.core.sched.scheduler",
        "Scheduler.make_stats",
        "vllm_packcache.engine.metrics:send_counts",
        "counts travel to the front end with vLLM's own",
    ),
    Hook(
        "vllm.v1.metrics.loggers",
        "StatLoggerManager.__init__",
        "vllm_packcache.engine.metrics:publish_counts",
        "and are published there",
    ),
    Hook(
        "vllm.model_executor.layers.attention.attention",
        "get_attn_backend",
        "vllm_packcache.hooks.startup:choose_backend",
        "layers get a KV cache spec with a policy, and a metadata builder that compacts block tables",
    ),
    Hook(
        "vllm.v1.worker.worker_base",
        "WorkerWrapperBase.init_device",
        "vllm_packcache.hooks.startup:check_model_runner",
        "a model runner that the other hooks do not reach is refused before the model loads",
    ),
    Hook(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner.initialize_kv_cache",
        "vllm_packcache.worker.runner_v1:find_keys",
        "V1: where cached keys lie",
    ),
    Hook(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner._build_attention_metadata",
        "vllm_packcache.worker.runner_v1:publish_step",
        "V1: metadata builders learn which requests a step has",
    ),
    Hook(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner._preprocess",
        "vllm_packcache.worker.runner_v1:position_tokens",
        "V1: cached keys are rotated and new tokens positioned before the model runs",
    ),
    Hook(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner.sample_tokens",
        "vllm_packcache.worker.runner_v1:keep_noise",
        "V1: a token that a chunk of a prefill throws away costs no random number",
    ),
    Hook(
        "vllm.v1.worker.gpu.model_states",
        "resolve_model_state_cls",
        "vllm_packcache.hooks.startup:choose_model_state",
        "V2: the model state does all of that",
    ),
)
"""What touches more of vLLM than its command line."""


class HookError(Exception):
    """A hook cannot be put in place. The message says what moved."""


class _Place(NamedTuple):
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
            install([hook])
        except HookError as error:
            # The other one still refuses.
            _moved = str(error)
    if _moved is None and version_error() is None:
        try:
            install(ENGINE, register)
        except HookError as error:
            _moved = str(error)
    why = fault()
    if why is not None and multiprocessing.parent_process() is None:
        logger.warning("%s", why)


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

    supported = supported_vllm()
    installed = Version(vllm.__version__)
    if supported.contains(installed.public, prereleases=True):
        return None
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
    for owner, name, replacement in places:
        setattr(owner, name, replacement)


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


def _prepare(hook: Hook) -> _Place | None:
    """Make what is to be put where; None: it is there."""
    owner, name, function = _locate(hook)
    if hasattr(function, ORIGINAL):
        return None
    _check_parameters(hook, function)
    try:
        wrapper: Callable[[Any], Any] = resolve_name(hook.wrapper)
    except Exception as error:  # It imports what it needs of vLLM.
        raise HookError(f"{hook.wrapper.partition(':')[0]} cannot be imported ({_in_a_line(error)})") from error
    replacement = wrapper(function)
    setattr(replacement, ORIGINAL, function)
    value = vars(owner)[name]
    return _Place(
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
    """The parameters must be those that the contract states."""
    (reliance,) = (own for own in RELIANCES if (own.file, own.symbol) == (hook.file, hook.symbol))
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        # Another plugin's wrapper, which passes on what it is given.
        return
    missing = set(reliance.parameters) - set(parameters)
    if missing:
        raise HookError(f"{hook.module}: {hook.symbol} no longer takes {', '.join(sorted(missing))}")
    added = set(parameters) - set(reliance.parameters)
    if reliance.exact and added:
        raise HookError(f"{hook.module}: {hook.symbol} takes more than it did: {', '.join(sorted(added))}")


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
