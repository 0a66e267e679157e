"""The entry point: what is installed into vLLM, and what of it concerns command line, start-up and requests.

vLLM calls `register` in every process (API server, engine core, workers), before any configuration is known and
possibly more than once. What is installed therefore asks for the configuration each time it is used, where there
is one at hand, and is the original in every respect when the policy is not switched on.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, wraps
from importlib.metadata import version
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from vllm_packcache import families
from vllm_packcache.config.errors import ConfigError
from vllm_packcache.config.formats import check_kept, check_turned
from vllm_packcache.config.server import (
    CONFIG_FLAG,
    POLICY_FLAG,
    POLICY_KEY,
    POSITION_LIMIT_KEY,
    PositionMode,
    ServerConfig,
    family_of,
    read_config,
)
from vllm_packcache.config.sources import CONFIG_KEY, load_mapping
from vllm_packcache.hooks import canvas
from vllm_packcache.hooks import install as hooks
from vllm_packcache.hooks.flags import CommandLine
from vllm_packcache.hooks.roles import serving_of

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.kv_cache_interface import AttentionSpec

_REBASED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Types whose angles grow in proportion to the position, at the same rate for every length."""

_NORM_AFTER_ROPE = ("hunyuan", "hunyuan_v1_dense", "hunyuan_v1_moe", "hunyuan_vl")
"""Models that store something else than a rotated key."""


logger = logging.getLogger("vllm.packcache")


@dataclass
class _Lengths:
    """What is found out about lengths while an engine's configuration is made.

    Args:
        beyond_positions: sequences may be longer than the model has positions, because those of videos are re-based.
        position_limit: positions that the model has.
    """

    beyond_positions: bool
    position_limit: int | None = None


_lengths: ContextVar[_Lengths | None] = ContextVar("packcache_lengths", default=None)


def register() -> None:
    """Install the plugin into this process: all of it, or nothing but what refuses a policy. Idempotent."""
    hooks.install_all(_register_with_vllm)


def _register_with_vllm() -> None:
    """What vLLM has registries for. None of its own looks these up, so they may be there without the hooks."""
    from transformers import AutoConfig
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.v1.kv_cache_interface import FullAttentionSpec
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from vllm_packcache.engine.manager import LaterStreamManager, RetentionManager
    from vllm_packcache.engine.spec import STREAM_SPECS, RetentionSpec

    # The registry skips the built-in specs once anything is registered.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(RetentionSpec, RetentionManager, uniform_type_base_spec=FullAttentionSpec)
    for spec in STREAM_SPECS:
        KVCacheSpecRegistry.register(spec, LaterStreamManager if spec.stream > 0 else RetentionManager)
    supported = ModelRegistry.get_supported_archs()
    for architecture, family in families.with_models():
        if family.role == "canvas":
            MODELS_CONFIG_MAP.setdefault(architecture, canvas.model_config())
        if family.config is not None:
            config = resolve_name(family.config)
            AutoConfig.register(config.model_type, config, exist_ok=True)
        # Last, because by this such a model can be served.
        if architecture not in supported:
            ModelRegistry.register_model(architecture, family.model)


def check_engine(vllm_config: VllmConfig) -> None:
    """Refuse, before the model loads, what cannot be right under a policy.

    Raises:
        ConfigError: naming the option or the property of the model, and the remedy.
    """
    model = vllm_config.model_config
    _check_options(vllm_config, POLICY_FLAG)
    config = read_config(vllm_config)
    assert config is not None, "only a server that is switched on is checked"
    _check_backends(vllm_config, config.positions)
    if config.positions == "rebase":
        _check_rebasing(vllm_config)
    serving_of(model).check_model(vllm_config, config)
    if config.sessions.pictures is not None:
        # It imports what an operator names, which nothing else of a server's start does before the model is there.
        resolve_name("vllm_packcache.sessions.house:check_names")(config)
    if config.videos.store is not None:
        resolve_name("vllm_packcache.videos.jobs:check")(config)


def _check_options(vllm_config: VllmConfig, subject: str) -> None:
    """Refuse what cannot be combined with ``subject``."""
    from vllm.platforms import current_platform

    if not (current_platform.is_cpu() or current_platform.is_cuda()):
        raise ConfigError(
            f"{subject} needs a CPU or an NVIDIA GPU, and this platform is {current_platform.device_name}, on which "
            "nothing has been tried: start on one of those"
        )
    parallel = vllm_config.parallel_config
    option_reasons = (
        (vllm_config.speculative_config is not None, "--speculative-config", "it rolls tokens back"),
        (
            vllm_config.cache_config.kv_offloading_size is not None,
            "--kv-offloading-size",
            "it moves blocks that may be freed",
        ),
        (
            vllm_config.kv_transfer_config is not None,
            "--kv-transfer-config",
            "it moves blocks that may be freed",
        ),
        (
            parallel.pipeline_parallel_size > 1,
            "--pipeline-parallel-size",
            "it keeps steps in flight on ranks that hold different layers, which has not been shown to be right",
        ),
        (
            parallel.decode_context_parallel_size > 1,
            "--decode-context-parallel-size",
            "it splits blocks over ranks",
        ),
        (
            parallel.prefill_context_parallel_size > 1,
            "--prefill-context-parallel-size",
            "it splits blocks over ranks",
        ),
        (parallel.use_ubatching, "--enable-dbo", "it splits a step's requests"),
        (
            vllm_config.cache_config.kv_sharing_fast_prefill,
            "--kv-sharing-fast-prefill",
            "it runs some layers on fewer rows than the block tables have",
        ),
    )
    for given, option, reason in option_reasons:
        if given:
            raise ConfigError(f"{subject} cannot be combined with {option}, because {reason}: leave one of them out")
    if os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"):
        raise ConfigError(
            f"{subject} cannot be combined with VLLM_USE_RUST_FRONTEND=1, because that front end neither knows the "
            "option nor checks what requests ask for: unset the variable"
        )


def _check_backends(vllm_config: VllmConfig, positions: PositionMode) -> None:
    """Refuse the attention backend that the operator names; one that vLLM chooses is looked at in the workers."""
    from vllm_packcache.worker.keys.layout import layout_of

    attention = vllm_config.attention_config
    named = {attention.backend, *attention.backend_per_kind.values()} - {None}
    for name in sorted(backend.name for backend in named if backend is not None):
        serving_of(vllm_config.model_config).check_backend(name)
        if positions == "rebase":
            layout_of(name)


def _check_tables(vllm_config: VllmConfig) -> None:
    from vllm_packcache.hooks.admission import check_tables

    config = read_config(vllm_config)
    assert config is not None, "only a server that is switched on is checked"
    check_tables(vllm_config, groups=config.streams)


def _check_rebasing(vllm_config: VllmConfig) -> None:
    """Refuse what cached keys cannot be rotated in."""
    try:
        check_turned(vllm_config.cache_config.cache_dtype)
    except ConfigError as error:
        raise ConfigError(f"{CONFIG_FLAG}: {error}") from None
    model = vllm_config.model_config
    text_config = model.hf_text_config
    rope = getattr(text_config, "rope_parameters", None) or {}
    rope_type = rope.get("rope_type", "default")
    # A list of 0 and 1 for the layers, or else every n-th one.
    rotated = getattr(text_config, "no_rope_layers", None)
    unrotated = 0 in rotated if rotated else bool(getattr(text_config, "no_rope_layer_interval", None))
    reasons = (
        (
            rope_type not in _REBASED_ROPE_TYPES,
            f"has RoPE of type {rope_type!r} (known are {', '.join(_REBASED_ROPE_TYPES)})",
        ),
        (unrotated, "has layers without RoPE"),
        (text_config.model_type in _NORM_AFTER_ROPE, "normalises keys after rotating them"),
        (model.using_transformers_backend(), "rotates them in Transformers' own code (--model-impl)"),
    )
    for unsupported, reason in reasons:
        if unsupported:
            raise ConfigError(
                f"{CONFIG_FLAG}: positions: rebase rotates cached keys as the model does, and {model.model} {reason}: "
                "set positions: absolute"
            )


def check_engine_config(create_engine_config: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``EngineArgs.create_engine_config`` to refuse what cannot be right before anything loads."""

    @wraps(create_engine_config)
    def wrapper(engine_args: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return _engine_config(create_engine_config, engine_args, *args, **kwargs)
        except ConfigError as error:
            if isinstance(engine_args.additional_config, CommandLine):
                raise SystemExit(f"error: {error}") from None
            raise

    return wrapper


def _engine_config(create_engine_config: Callable[..., Any], engine_args: Any, *args: Any, **kwargs: Any) -> Any:
    config = ServerConfig.from_additional_config(engine_args.additional_config)
    error = hooks.fault()
    if error is not None:
        if config is not None:
            raise ConfigError(error)
        try:
            return create_engine_config(engine_args, *args, **kwargs)
        except Exception as refusal:
            if any(architecture in str(refusal) for architecture, _ in families.with_models()):
                raise ConfigError(error) from refusal
            raise
    if config is not None:
        # Every process reads the configuration: they get what a file says now, not what it says by then.
        source = engine_args.additional_config.get(CONFIG_KEY)
        if isinstance(source, str):
            parsed = {CONFIG_KEY: dict(load_mapping(source))}
            engine_args.additional_config = {**engine_args.additional_config, **parsed}
    lengths = None if config is None else _Lengths(beyond_positions=config.positions == "rebase")
    token = _lengths.set(lengths)
    try:
        with canvas.knowing(engine_args):
            vllm_config = create_engine_config(engine_args, *args, **kwargs)
    finally:
        _lengths.reset(token)
    serving = serving_of(vllm_config.model_config)
    serving.finish(vllm_config)
    if lengths is not None:
        vllm_config.additional_config = {
            **engine_args.additional_config,
            POSITION_LIMIT_KEY: lengths.position_limit,
        }
        check_engine(vllm_config)
        _check_tables(vllm_config)
    elif read_config(vllm_config) is not None:
        _check_options(vllm_config, f"the model {vllm_config.model_config.model}")
        _check_backends(vllm_config, "absolute")
    else:
        return vllm_config
    _announce(engine_args, config, family_of(vllm_config.model_config).name)
    return vllm_config


def _announce(engine_args: EngineArgs, config: ServerConfig | None, family: str) -> None:
    """Say once for each engine that the plugin is on, and how."""
    if engine_args._api_process_count > 1 and engine_args._api_process_rank >= 0:
        # One of several API servers: the process that starts them has said so.
        return
    if config is None:
        logger.info("vllm-packcache %s is on: a %s model, without a policy", version("vllm-packcache"), family)
        return
    policy = engine_args.additional_config[POLICY_KEY]
    options = json.dumps(config.as_mapping(), sort_keys=True)
    logger.info("vllm-packcache %s is on: policy %s %s", version("vllm-packcache"), policy, options)


def find_position_limit(get_and_verify_max_len: Callable[..., int]) -> Callable[..., int]:
    """Wrap ``ModelConfig.get_and_verify_max_len``, which refuses lengths that the model has no positions for."""

    @wraps(get_and_verify_max_len)
    def wrapper(model_config: ModelConfig, max_model_len: int | None) -> int:
        longest = serving_of(model_config).longest(max_model_len)
        if longest is not None:
            return longest
        lengths = _lengths.get()
        if lengths is None:
            return get_and_verify_max_len(model_config, max_model_len)
        limit = get_and_verify_max_len(model_config, None)
        try:
            length = get_and_verify_max_len(model_config, max_model_len)
        except ValueError:
            if not lengths.beyond_positions or max_model_len is None:
                raise
            # Requests whose positions are not re-based are held to the limit one by one.
            length = max_model_len
        else:
            # What vLLM lets pass, the operator vouches for.
            limit = max(limit, length)
        lengths.position_limit = limit
        return length

    return wrapper


def choose_backend(get_attn_backend: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``get_attn_backend``, which layers ask for their backend, to give them one with a policy."""

    @wraps(get_attn_backend)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        from vllm.config import get_current_vllm_config

        from vllm_packcache.worker.keys.layout import layout_of

        backend = get_attn_backend(*args, **kwargs)
        vllm_config = get_current_vllm_config()
        serving = serving_of(vllm_config.model_config)
        serving.check_backend(backend.get_name())
        config = read_config(vllm_config)
        if config is None:
            return backend
        # Here, before any weights are loaded.
        check_kept(vllm_config.cache_config.cache_dtype, backend.get_name())
        if config.positions == "rebase":
            layout_of(backend.get_name())
        return serving.backend(backend, vllm_config, config)

    return wrapper


def check_model_runner(init_device: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``WorkerWrapperBase.init_device``, which makes the model runner, to look at it before the model loads."""

    @wraps(init_device)
    def wrapper(worker: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_packcache.worker.runner import check_runner

        made = init_device(worker, *args, **kwargs)
        vllm_config = worker.vllm_config
        if read_config(vllm_config) is not None:
            check_runner(worker.worker.model_runner)
        return made

    return wrapper


def choose_model_state(resolve_model_state_cls: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``resolve_model_state_cls``, which the V2 runner asks, to give it a model state with a policy."""

    @wraps(resolve_model_state_cls)
    def wrapper(vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> Any:
        state = resolve_model_state_cls(vllm_config, *args, **kwargs)
        config = read_config(vllm_config)
        if config is None:
            return state
        return serving_of(vllm_config.model_config).model_state(state, config)

    return wrapper


@cache
def _spec_maker(
    config: ServerConfig, steps_ahead: int, frame_by_frame: bool
) -> Callable[[AttentionSpec], AttentionSpec]:
    """One function for each configuration: the layers of a model must get the same backend class."""
    from vllm_packcache.engine.spec import RetentionSpec

    return lambda spec: RetentionSpec.retaining(spec, config, steps_ahead, frame_by_frame)
