"""The entry point: the only place that installs anything into vLLM.

vLLM calls `register` in every process (API server, engine core, workers), before any configuration is known and
possibly more than once. What is installed therefore asks for the configuration each time it is used, where there
is one at hand, and is the original in every respect when the policy is not switched on.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import cache, wraps
from importlib.metadata import requires
from typing import TYPE_CHECKING, Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from vllm_packcache import policies
from vllm_packcache.config import (
    CONFIG_KEY,
    POLICY_KEY,
    REQUEST_PREFIX,
    ConfigError,
    ServerConfig,
    config_of,
    load_mapping,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import AttentionSpec

POLICY_FLAG = "--" + POLICY_KEY.replace("_", "-")
CONFIG_FLAG = "--" + CONFIG_KEY.replace("_", "-")

_INSTALLED = "_packcache_original"


def register() -> None:
    """Install the plugin into this process. Idempotent."""
    from vllm.engine.arg_utils import EngineArgs

    _wrap(EngineArgs, "add_cli_args", _adding_flags, staticmethod)
    _wrap(EngineArgs, "from_cli_args", _reading_flags, classmethod)
    _wrap(EngineArgs, "create_engine_config", _checking_engine)
    if version_error() is None:
        _install_engine_hooks()


def _install_engine_hooks() -> None:
    """Everything that touches more of vLLM than its command line."""
    from vllm.model_executor.layers.attention import attention
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.kv_cache_interface import FullAttentionSpec
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from vllm_packcache.engine.manager import RetentionManager, capping_hits
    from vllm_packcache.engine.spec import RetentionSpec
    from vllm_packcache.worker.runner_v1 import publishing_step

    # The registry skips the built-in specs once anything is registered.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(RetentionSpec, RetentionManager, uniform_type_base_spec=FullAttentionSpec)
    _wrap(InputProcessor, "process_inputs", _checking_request)
    _wrap(KVCacheManager, "get_computed_blocks", capping_hits)
    _wrap(attention, "get_attn_backend", _choosing_backend)
    _wrap(GPUModelRunner, "_build_attention_metadata", publishing_step)


def installed_hooks() -> list[str]:
    """Names of what `register` has wrapped in this process."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.attention import attention
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    owners = (EngineArgs, InputProcessor, KVCacheManager, attention, GPUModelRunner)
    return [
        f"{owner.__name__}.{name}"
        for owner in owners
        for name, value in vars(owner).items()
        if _INSTALLED in getattr(getattr(value, "__func__", value), "__dict__", {})
    ]


@cache
def version_error() -> str | None:
    """Why the installed vLLM is not supported, in one sentence; None: it is."""
    import vllm

    supported = supported_vllm()
    installed = Version(vllm.__version__)
    if supported.contains(installed.public, prereleases=True):
        return None
    return f"{POLICY_FLAG}: vLLM {installed} is not supported: install vllm{supported}, or start without {POLICY_FLAG}"


def supported_vllm() -> SpecifierSet:
    """The versions of vLLM that this distribution requires."""
    for line in requires("vllm-packcache") or ():
        requirement = Requirement(line)
        if requirement.name == "vllm":
            return requirement.specifier
    raise RuntimeError("the metadata of vllm-packcache names no version of vllm: install it again")


def check_engine(vllm_config: VllmConfig) -> None:
    """Refuse, before the model loads, what cannot be right under a policy.

    Raises:
        ConfigError: naming the option or the property of the model, and the remedy.
    """
    model = vllm_config.model_config
    parallel = vllm_config.parallel_config
    text_config = model.hf_text_config
    rope = any(
        getattr(text_config, name, None) for name in ("rope_parameters", "rope_theta", "rotary_dim", "rotary_pct")
    )
    layer_types = set(getattr(text_config, "layer_types", None) or ()) - {"full_attention", "attention"}
    model_reasons = (
        (model.use_mla, "caches MLA latents, not keys and values"),
        (
            model.is_hybrid or model.is_attention_free or model.has_inner_state,
            "has layers that are not attention",
        ),
        (model.is_encoder_decoder, "has an encoder"),
        (model.is_diffusion, "denoises whole canvases instead of decoding tokens"),
        (model.runner_type != "generate", "does not generate"),
        (
            model.get_sliding_window() is not None or model.rswa_window is not None or bool(layer_types),
            "has layers without full attention",
        ),
        (model.is_mm_prefix_lm, "attends in both directions inside its prompt"),
        (not rope or model.uses_alibi, "has no rotary position embedding"),
    )
    for unsupported, reason in model_reasons:
        if unsupported:
            raise ConfigError(
                f"{POLICY_FLAG}: {model.model} {reason}: serve a decoder with full attention and RoPE in every "
                f"layer, or start without {POLICY_FLAG}"
            )
    option_reasons = (
        (vllm_config.speculative_config is not None, "--speculative-config", "it rolls tokens back"),
        (
            vllm_config.kv_transfer_config is not None,
            "--kv-transfer-config",
            "it moves blocks that may be freed",
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
            raise ConfigError(
                f"{POLICY_FLAG} cannot be combined with {option}, because {reason}: leave one of them out"
            )
    if vllm_config.use_v2_model_runner:
        raise ConfigError(
            f"{POLICY_FLAG} needs vLLM's V1 model runner: set VLLM_USE_V2_MODEL_RUNNER=0 in the environment"
        )


def _wrap(
    owner: Any,
    name: str,
    wrapper: Callable[[Callable[..., Any]], Callable[..., Any]],
    kind: Callable[[Any], Any] = lambda function: function,
) -> None:
    """Replace ``owner.name`` by ``wrapper`` of it, once."""
    current = vars(owner)[name]
    function = getattr(current, "__func__", current)
    if hasattr(function, _INSTALLED):
        return
    replacement = wrapper(function)
    setattr(replacement, _INSTALLED, function)
    setattr(owner, name, kind(replacement))


def _adding_flags(add_cli_args: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(add_cli_args)
    def wrapper(parser: Any) -> Any:
        parser = add_cli_args(parser)
        group = parser.add_argument_group(
            title="PackCache",
            # Plain `vllm serve --help` shows only this of a group.
            description=f"{POLICY_FLAG}, {CONFIG_FLAG}: KV cache policy for autoregressive video models "
            "(vllm-packcache).",
        )
        group.add_argument(
            POLICY_FLAG,
            choices=sorted(policies.available()),
            default=None,
            help="Which KV-cache blocks of a video request to keep. Video requests say so themselves, with options "
            f"such as {REQUEST_PREFIX}grid in vllm_xargs; others keep their whole cache.",
        )
        group.add_argument(
            CONFIG_FLAG,
            type=_config_argument,
            default=None,
            metavar="FILE|JSON|PRESET",
            help="Options of the policy and layout of a frame: a YAML or JSON file, JSON text, or the name of a "
            "preset.",
        )
        return parser

    return wrapper


def _config_argument(text: str) -> dict[str, Any]:
    try:
        return dict(load_mapping(text))
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _reading_flags(from_cli_args: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(from_cli_args)
    def wrapper(cls: Any, args: argparse.Namespace) -> Any:
        engine_args = from_cli_args(cls, args)
        flags = {key: getattr(args, key, None) for key in (POLICY_KEY, CONFIG_KEY)}
        given = {key: value for key, value in flags.items() if value is not None}
        if given:
            engine_args.additional_config = {**(engine_args.additional_config or {}), **given}
            try:
                ServerConfig.from_additional_config(engine_args.additional_config)
            except ConfigError as error:
                # Typed on a command line: the sentence, without a traceback above it.
                raise SystemExit(f"error: {error}") from None
        return engine_args

    return wrapper


def _checking_engine(create_engine_config: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(create_engine_config)
    def wrapper(engine_args: Any, *args: Any, **kwargs: Any) -> Any:
        if ServerConfig.from_additional_config(engine_args.additional_config) is None:
            return create_engine_config(engine_args, *args, **kwargs)
        error = version_error()
        if error is not None:
            raise ConfigError(error)
        # Every process reads the configuration: they get what a file says now, not what it says by then.
        source = engine_args.additional_config.get(CONFIG_KEY)
        if isinstance(source, str):
            engine_args.additional_config = {**engine_args.additional_config, CONFIG_KEY: dict(load_mapping(source))}
        vllm_config = create_engine_config(engine_args, *args, **kwargs)
        check_engine(vllm_config)
        return vllm_config

    return wrapper


def _checking_request(process_inputs: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(process_inputs)
    def wrapper(processor: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm.exceptions import VLLMValidationError

        request = process_inputs(processor, *args, **kwargs)
        config = config_of(processor)
        if config is None or request.sampling_params is None:
            return request
        prompt = request.prompt_token_ids if request.prompt_token_ids is not None else request.prompt_embeds
        try:
            plan = config.plan(request.sampling_params.extra_args, len(prompt))
        except ConfigError as error:
            raise VLLMValidationError(str(error)) from None
        if plan is not None and request.resumable:
            raise VLLMValidationError(
                f"a session with streamed input cannot be a video, because its condition would grow: leave the "
                f"{REQUEST_PREFIX}* options out, or send the whole prompt at once"
            )
        return request

    return wrapper


def _choosing_backend(get_attn_backend: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(get_attn_backend)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        from vllm.config import get_current_vllm_config

        from vllm_packcache.worker.attention import retaining_backend

        backend = get_attn_backend(*args, **kwargs)
        config = ServerConfig.from_additional_config(get_current_vllm_config().additional_config)
        return backend if config is None else retaining_backend(backend, _spec_maker(config))

    return wrapper


@cache
def _spec_maker(config: ServerConfig) -> Callable[[AttentionSpec], AttentionSpec]:
    """One function for each configuration: the layers of a model must get the same backend class."""
    from vllm_packcache.engine.spec import RetentionSpec

    return lambda spec: RetentionSpec.retaining(spec, config)
