"""What the plugin checks of a request, in the process that receives it: options, places, lengths, sizes.

`vllm_packcache.hooks.startup` installs it. `read_body` looks at a request as it came, before vLLM fills in what a
client left out; `check_request` at what is sent to the engine, whatever way it came.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from functools import cache, wraps
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from vllm_packcache.config.errors import ConfigError, named
from vllm_packcache.config.server import (
    POLICY_FLAG,
    REQUEST_PREFIX,
    ServerConfig,
    config_of,
    is_video_key,
    masked_config_of,
)
from vllm_packcache.core.plan import Asked, VideoPlan
from vllm_packcache.core.retention import PolicyError, Retention
from vllm_packcache.hooks import masked as plugin_masked

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig
    from vllm.v1.engine import EngineCoreRequest

GIVEN_KEY = "_packcache_given"
"""Key of ``extra_args`` under which `read_body` tells `check_request` what the client itself has given."""

PENALTIES = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""Sampling options that a checkpoint may recommend for its text, and what they are where they do nothing."""

LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
"""What the endpoints call the length of an answer."""

PLACES = {"GenerateRequest": ("sampling_params", "extra_args")}
"""Where a request has its options, by the class of the request."""

PLACE = ("vllm_xargs",)
"""The same for all other classes."""

DEEPEST_PLACE = 4
"""Mappings inside each other that are looked into for options in the wrong place."""

logger = logging.getLogger("vllm.packcache")


def read_body(serve: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap what answers an endpoint: refuse what it would ignore, and note what the client has given.

    vLLM fills in what a client leaves out before it makes sampling parameters of a request.
    """

    @wraps(serve)
    async def wrapper(serving: Any, request: Any, raw_request: Any = None, *args: Any, **kwargs: Any) -> Any:
        processor = serving.input_processor
        is_masked = plugin_masked.is_masked(processor.vllm_config.model_config)
        config = masked_config_of(processor) if is_masked else config_of(processor)
        if config is not None:
            body = None if raw_request is None else await raw_request.json()
            names = config.masked_request_options if is_masked else config.request_options
            try:
                _read(request, body if isinstance(body, Mapping) else {}, names, is_masked)
            except ConfigError as error:
                return serving.create_error_response(str(error))
        return await serve(serving, request, raw_request, *args, **kwargs)

    return wrapper


def _read(request: Any, body: Mapping[str, Any], names: list[str], is_masked: bool) -> None:
    """Check a request as it came, and note in its options what the client has given.

    Args:
        request: vLLM's.
        body: the JSON that it was read from; empty: there was none.
        names: of the options of videos, without prefix.
        is_masked: whether it is to a masked model.

    Raises:
        ConfigError: an option stands where it is not read, or beam search is asked for.
    """
    place = PLACES.get(type(request).__name__, PLACE)
    for where, name in _ours(body, ()):
        if where != place:
            stands = f"in {'.'.join(where)}" if where else "beside them"
            raise ConfigError(
                f"options of a video must stand in {'.'.join(place)}, and {named(name)} stands {stands}: move it"
            )
    holder, attribute = (request.sampling_params, "extra_args") if len(place) > 1 else (request, "vllm_xargs")
    options = getattr(holder, attribute, None) or {}
    bare = [name for name in body if name in names and name not in type(request).model_fields]
    if not is_masked and not any(map(is_video_key, options)):
        # It may mean something to somebody else.
        for name in bare:
            _warn_of(name)
        return
    if bare:
        raise ConfigError(f"{bare[0]} is read by nobody: give {REQUEST_PREFIX}{bare[0]} in {'.'.join(place)}")
    if getattr(request, "use_beam_search", False):
        raise ConfigError("use_beam_search is not for videos, whose cache would differ from beam to beam: leave it out")
    setattr(holder, attribute, {**options, GIVEN_KEY: _given(request, body)})


def _ours(body: Mapping[str, Any], where: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Options of ours in a request, or names that are all but theirs, and where they stand."""
    for name, value in body.items():
        if _resembles_ours(name):
            yield where, name
        elif isinstance(value, Mapping) and len(where) < DEEPEST_PLACE:
            yield from _ours(value, (*where, named(name)))


def _given(request: Any, body: Mapping[str, Any]) -> list[str]:
    """Of ``max_tokens`` and `PENALTIES`, those that the client has given."""
    if hasattr(request, "is_sampling_param_provided"):
        params = request.sampling_params
        names = ["max_tokens", *PENALTIES]
        return [n for n in names if request.is_sampling_param_provided(n) and getattr(params, n) is not None]
    given = [name for name in PENALTIES if getattr(request, name, None) is not None]
    lengths = {name: getattr(request, name, None) for name in LENGTHS}
    field = type(request).model_fields.get("max_tokens")
    if field is not None and field.default is not None and lengths["max_tokens"] == field.default:
        # Completions: what is left out is already filled in, and vLLM goes on to use it.
        lengths["max_tokens"] = body.get("max_tokens")
        if lengths["max_tokens"] is None:
            request.max_tokens = max(field.default, request.min_tokens)
    if any(length is not None for length in lengths.values()):
        given.append("max_tokens")
    return given


def check_request(process_inputs: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``InputProcessor.process_inputs``: every request to an engine goes through it."""

    @wraps(process_inputs)
    def wrapper(processor: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm import SamplingParams
        from vllm.exceptions import VLLMValidationError

        vllm_config = processor.vllm_config
        is_masked = plugin_masked.is_masked(vllm_config.model_config)
        config = masked_config_of(processor) if is_masked else config_of(processor)
        length_given = True
        try:
            if config is None:
                _refuse_options(params)
                return process_inputs(processor, request_id, prompt, params, *args, **kwargs)
            if isinstance(params, SamplingParams):
                names = config.masked_request_options if is_masked else config.request_options
                _check_names(params.extra_args or {}, names, vllm_config)
                params, length_given = _as_given(params, config, vllm_config, is_masked)
            request = process_inputs(processor, request_id, prompt, params, *args, **kwargs)
            if is_masked:
                blocks = _pool_blocks(vllm_config)
                plugin_masked.check_request(processor, request, blocks, length_given=length_given)
            elif request.sampling_params is not None:
                _check_request(request, config, vllm_config, length_given=length_given)
        except (ConfigError, PolicyError) as error:
            raise VLLMValidationError(str(error)) from None
        return request

    return wrapper


def _refuse_options(params: Any) -> None:
    """Refuse a video where no policy is on: it would be served as text.

    Raises:
        ConfigError: it has options of a video.
    """
    options = getattr(params, "extra_args", None) or {}
    name = next(filter(is_video_key, options), None)
    if name is not None:
        raise ConfigError(
            f"{named(name)} is an option of a video, and this server was started without {POLICY_FLAG}: start it "
            "with that, or leave the option out"
        )


def _check_names(options: Mapping[str, Any], names: list[str], vllm_config: VllmConfig) -> None:
    """Refuse names that are all but ours; where somebody else may read them, warn once.

    Raises:
        ConfigError: naming the option.
    """
    for name in options:
        if name in names:
            if not _others_read_options(vllm_config):
                raise ConfigError(f"{name} is read by nobody on this server: for a video give {REQUEST_PREFIX}{name}")
            _warn_of(name)
        elif not is_video_key(name) and _resembles_ours(name):
            raise ConfigError(
                f"{named(name)} is no known option: those of a video begin with {REQUEST_PREFIX}: known are "
                + ", ".join(names)
            )


def _resembles_ours(name: object) -> bool:
    """Whether a name begins as those of our options do, but for how it is written."""
    return name != GIVEN_KEY and str(name).lower().translate(_STROKES).startswith(REQUEST_PREFIX.translate(_STROKES))


_STROKES = dict.fromkeys(map(ord, "-_."))
"""What is left out to compare names."""


def _others_read_options(vllm_config: VllmConfig) -> bool:
    """Whether logits processors of somebody else are loaded: they read the same options."""
    return bool(vllm_config.model_config.logits_processors) or _has_installed_processors()


@cache
def _has_installed_processors() -> bool:
    return bool(entry_points(group="vllm.logits_processors"))


@cache
def _warn_of(name: str) -> None:
    logger.warning(
        "A request has the option %s, which is not for videos: if it is meant so, give %s%s", name, REQUEST_PREFIX, name
    )


def _as_given(
    params: SamplingParams, config: ServerConfig, vllm_config: VllmConfig, is_masked: bool
) -> tuple[SamplingParams, bool]:
    """Sampling parameters of a video without what nobody has asked for, and whether its length is the client's.

    A visual code repeats, so the penalties that a checkpoint recommends for text are left out where neither the client
    nor the operator gives them. In Python nothing tells what was given: vLLM's default length counts as left out.

    Returns:
        Others than ``params`` for a video, the same for a text.

    Raises:
        ConfigError: a masked model does not know one of them.
    """
    options = params.extra_args or {}
    if not is_masked and not any(map(is_video_key, options)):
        return params, True
    params = copy.copy(params)
    params.extra_args = {name: value for name, value in options.items() if name != GIVEN_KEY}
    given = options.get(GIVEN_KEY)
    if given is None:
        default = type(params)().max_tokens
        length_given = params.max_tokens not in (None, default)
    else:
        length_given = "max_tokens" in given
        override = vllm_config.model_config.override_generation_config
        for name, neutral in PENALTIES.items():
            if name not in given:
                setattr(params, name, override.get(name, neutral))
    if is_masked:
        plugin_masked.check_sampling(params)
        return params, length_given
    frame = any(f"{REQUEST_PREFIX}{name}" in options for name in ("grid", "tokens_per_frame"))
    if (frame or config.layout is not None) and (not length_given or f"{REQUEST_PREFIX}frames" in options):
        # So many whole frames: an id that ends a text ends none.
        params.ignore_eos = True
    return params, length_given


def _check_request(
    request: EngineCoreRequest, config: ServerConfig, vllm_config: VllmConfig, *, length_given: bool
) -> None:
    """Check the options of a request, and hold it to the positions of the model and to the blocks of the KV cache.

    Args:
        request: its length is set where its frames say it.
        config: of the server.
        vllm_config: of the engine.
        length_given: whether the request's ``max_tokens`` is the client's.

    Raises:
        ConfigError: an option is wrong, or the request needs more than there is.
    """
    params = request.sampling_params
    assert params is not None
    prompt = request.prompt_token_ids if request.prompt_token_ids is not None else request.prompt_embeds
    assert prompt is not None
    asked = config.asked(params.extra_args, len(prompt))
    plan = None if asked is None else config.plan_of(asked)
    whole = None if asked is None else _whole_frames(asked, len(prompt), params, vllm_config, length_given)
    if plan is None or plan.positions.window is None:
        _end_within(config.position_limit, "the model has", "positions", len(prompt), params)
    if plan is None:
        blocks = _pool_blocks(vllm_config)
        tokens = None if blocks is None else blocks * vllm_config.cache_config.block_size
        _end_within(tokens, "the KV cache has room for", "tokens", len(prompt), params)
    if whole is not None and (params.max_tokens or 0) < whole:
        raise ConfigError(
            f"this video has {len(prompt) + whole} tokens with its prompt, and keeps them all, but there is room for "
            f"{len(prompt) + (params.max_tokens or 0)}: ask for fewer frames ({REQUEST_PREFIX}frames), or let the "
            "policy drop some"
        )
    if plan is None:
        return
    if request.resumable:
        raise ConfigError(
            f"a session with streamed input cannot be a video, because its condition would grow: leave the "
            f"{REQUEST_PREFIX}* options out, or send the whole prompt at once"
        )
    if plan.positions.scale is not None and request.mm_features:
        raise ConfigError(
            "this server positions the tokens of a video itself (layout: axis_scale), and a picture that the model's "
            f"own processor places has other positions: send token ids, or leave the {REQUEST_PREFIX}* options out"
        )
    total = min(len(prompt) + (params.max_tokens or 0), vllm_config.model_config.max_model_len)
    _check_size(plan, total, config.position_limit, vllm_config)


def _whole_frames(
    asked: Asked, prompt_tokens: int, params: SamplingParams, vllm_config: VllmConfig, length_given: bool
) -> int | None:
    """Set the length of a video that ends with a frame.

    Returns:
        Its tokens after the prompt; None: the client's ``max_tokens`` says where it ends, or nobody knows its frames.

    Raises:
        ConfigError: the client's ``max_tokens`` says something else, or the video is too long.
    """
    frames = asked.frames
    if frames is None:
        if length_given or not asked.has_frames:
            return None
        frames = 1
    wanted = asked.layout.tokens_to_end(prompt_tokens, frames)
    model = vllm_config.model_config
    for most, option in (
        (model.max_model_len - prompt_tokens, "--max-model-len"),
        (model.override_generation_config.get("max_new_tokens"), "max_new_tokens in --override-generation-config"),
    ):
        if most is not None and wanted > most:
            raise ConfigError(
                f"{REQUEST_PREFIX}frames is {frames}, which takes {wanted} tokens, and the server makes {most} after "
                f"this prompt: ask for fewer, or start it with a larger {option}"
            )
    if length_given and params.max_tokens != wanted:
        raise ConfigError(
            f"max_tokens is {params.max_tokens}, and {REQUEST_PREFIX}frames ({frames}) makes {wanted} tokens: give one "
            "of the two, or make them agree"
        )
    if params.min_tokens > wanted:
        raise ConfigError(
            f"min_tokens is {params.min_tokens}, and {REQUEST_PREFIX}frames ({frames}) makes {wanted} tokens: lower it"
        )
    params.max_tokens = wanted
    return wanted


def _end_within(limit: int | None, whose: str, what: str, prompt_tokens: int, params: SamplingParams) -> None:
    """End a request that keeps its whole cache as vLLM does at its own limit, with finish_reason "length".

    Raises:
        ConfigError: its prompt alone is beyond ``limit``.
    """
    if limit is None:
        return
    if prompt_tokens >= limit:
        raise ConfigError(
            f"the prompt has {prompt_tokens} tokens, and {whose} {limit} {what}: only videos, of which the policy "
            f"drops what is old, may be longer (see the {REQUEST_PREFIX}* options)"
        )
    params.max_tokens = min(params.max_tokens or 0, limit - prompt_tokens)


def _check_size(plan: VideoPlan, total: int, position_limit: int | None, vllm_config: VllmConfig) -> None:
    """Hold a video of ``total`` tokens to the positions of the model and to the blocks of the KV cache.

    Raises:
        ConfigError: it needs more.
    """
    positions = max(plan.positions.limit(total), plan.positions.window_tokens(total))
    if position_limit is not None and positions > position_limit:
        raise ConfigError(
            f"this video needs {positions} positions, and the model has {position_limit}: lower {REQUEST_PREFIX}window "
            "or the size of a frame, or shorten the condition"
        )
    available = _pool_blocks(vllm_config)
    if available is None:
        return
    block_size = vllm_config.cache_config.block_size
    blocks = -(-total // block_size)
    most = Retention(plan.layout, plan.policy, block_size).most_blocks(steps_ahead(vllm_config))
    blocks = blocks if most is None else min(blocks, most)
    if blocks > available:
        options = ", ".join(f"{REQUEST_PREFIX}{field.name}" for field in fields(plan.policy)) or "it keeps all"
        raise ConfigError(
            f"this video holds {blocks} blocks of {block_size} tokens, and the KV cache has {available}: let the "
            f"policy keep less ({options}), make frames or the condition smaller, or start the server with a larger "
            "KV cache"
        )


def steps_ahead(vllm_config: VllmConfig) -> int:
    """Steps that may be scheduled before the one in flight has been processed."""
    return vllm_config.max_concurrent_batches - 1


def _pool_blocks(vllm_config: VllmConfig) -> int | None:
    """Blocks that one engine can give to requests; None: no engine has said yet."""
    blocks = vllm_config.cache_config.num_gpu_blocks
    if not blocks:
        return None
    parallel = vllm_config.parallel_config
    engines = parallel.data_parallel_size_local if parallel.local_engines_only else parallel.data_parallel_size
    if parallel.data_parallel_rank_local is not None:
        engines = 1
    # A front end adds up what its engines report, and one block of each is the null block.
    return blocks // engines - 1
