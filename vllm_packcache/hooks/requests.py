"""What the plugin checks of a request, in the process that receives it: options, places, lengths, sizes.

`vllm_packcache.hooks.startup` installs it. `read_body` looks at a request as it came, before vLLM fills in what a
client left out; `check_request` at what is sent to the engine, whatever way it came.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
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
)
from vllm_packcache.core.retention import PolicyError
from vllm_packcache.hooks.roles import Serving, serving_of

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig

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
        config = config_of(processor)
        if config is not None:
            body = None if raw_request is None else await raw_request.json()
            every = serving_of(processor.vllm_config.model_config).every_request
            try:
                _read(request, body if isinstance(body, Mapping) else {}, config.request_options, every)
            except ConfigError as error:
                return serving.create_error_response(str(error))
        return await serve(serving, request, raw_request, *args, **kwargs)

    return wrapper


def _read(request: Any, body: Mapping[str, Any], names: list[str], every: bool) -> None:
    """Check a request as it came, and note in its options what the client has given.

    Args:
        request: vLLM's.
        body: the JSON that it was read from; empty: there was none.
        names: of the options of videos, without prefix.
        every: whether every request is a video.

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
    if not every and not any(map(is_video_key, options)):
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
        serving, config = serving_of(vllm_config.model_config), config_of(processor)
        length_given = True
        try:
            if config is None:
                _refuse_options(params)
                return process_inputs(processor, request_id, prompt, params, *args, **kwargs)
            if isinstance(params, SamplingParams):
                _check_names(params.extra_args or {}, config.request_options, vllm_config)
                params, length_given = _as_given(params, config, vllm_config, serving)
            request = process_inputs(processor, request_id, prompt, params, *args, **kwargs)
            serving.check_request(request, config, vllm_config, length_given=length_given)
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
    params: SamplingParams, config: ServerConfig, vllm_config: VllmConfig, serving: Serving
) -> tuple[SamplingParams, bool]:
    """Sampling parameters of a video without what nobody has asked for, and whether its length is the client's.

    A visual code repeats, so the penalties that a checkpoint recommends for text are left out where neither the client
    nor the operator gives them. In Python nothing tells what was given: vLLM's default length counts as left out.

    Returns:
        Others than ``params`` for a video, the same for a text.

    Raises:
        ConfigError: one of them has no effect on such a video.
    """
    options = params.extra_args or {}
    if not serving.every_request and not any(map(is_video_key, options)):
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
    serving.check_sampling(params)
    frame = any(f"{REQUEST_PREFIX}{name}" in options for name in ("grid", "tokens_per_frame"))
    if (frame or config.layout is not None) and (not length_given or f"{REQUEST_PREFIX}frames" in options):
        # So many whole frames: an id that ends a text ends none.
        params.ignore_eos = True
    return params, length_given
