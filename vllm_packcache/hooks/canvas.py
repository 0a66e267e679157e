"""What serving canvases takes (Lumos-1): how a server of such a model is configured, and what its requests may be.

`vllm_packcache.hooks.startup` installs it. A masked model is served with and without a policy; either way an operator
names the checkpoint, and what discrete diffusion needs to be told follows from its configuration.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import ValidationError

from vllm_packcache.config.errors import ConfigError, named, shown
from vllm_packcache.config.formats import CANVAS_BACKENDS, check_masked
from vllm_packcache.config.precision import PRECISION_KEY
from vllm_packcache.config.server import CANVAS_OPTION, REQUEST_PREFIX, ServerConfig, read_config
from vllm_packcache.config.sources import CONFIG_KEY
from vllm_packcache.core.encoded import EncodedRetention
from vllm_packcache.core.forks import FORK_OPTION
from vllm_packcache.core.layout import VideoLayout
from vllm_packcache.core.policies import Policy
from vllm_packcache.families import LUMOS, lumos
from vllm_packcache.families.lumos import CanvasRequest
from vllm_packcache.hooks.roles import Serving, encoding_in, held_blocks, pool_blocks, steps_ahead

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.models.config import VerifyAndUpdateConfig
    from vllm.v1.engine import EngineCoreRequest

LARGEST_GRID = (60, 96)
"""The largest published one, 768 x 480 pixels: frames of a server that is told of none are no larger."""

USUAL_FRAMES = 16
"""Frames of the longest video, conditioning images included, where the operator gives no length."""

TEXT_TOKENS = 1024
"""Room for the text of a prompt, where the operator gives no length."""

MASK_BYTES = 2**29
"""vLLM sets aside a bit for every token of a frame and every id, though such a model has no structured output."""

FRAMES_AT_ONCE = 4
"""Frames that a step has room for, where the operator gives no token budget."""

logger = logging.getLogger("vllm.packcache")


class Given(NamedTuple):
    """What an operator has given of an engine whose configuration is being made; the rest vLLM fills in.

    Attributes:
        additional_config: where the policy is.
        requests: whether ``max_num_seqs`` is given.
        tokens: whether ``max_num_batched_tokens`` is given.
    """

    additional_config: object
    requests: bool
    tokens: bool


_EVERYTHING = Given(None, True, True)
_given: ContextVar[Given] = ContextVar("packcache_given", default=_EVERYTHING)


@contextmanager
def knowing(engine_args: EngineArgs) -> Iterator[None]:
    """While an engine's configuration is made, remember what its operator has given.

    Raises:
        ConfigError: `configure` refuses it. vLLM's configuration is a pydantic model, which wraps what is raised in it.
    """
    token = _given.set(
        Given(
            engine_args.additional_config,
            engine_args.max_num_seqs is not None,
            engine_args.max_num_batched_tokens is not None,
        )
    )
    try:
        yield
    except ValidationError as error:
        for own in (details.get("ctx", {}).get("error") for details in error.errors()):
            if isinstance(own, ConfigError):
                raise own from None
        raise
    finally:
        _given.reset(token)


@cache
def model_config() -> type[VerifyAndUpdateConfig]:
    """What vLLM asks when the configuration of an engine with such a model is made."""
    from vllm.model_executor.models.config import VerifyAndUpdateConfig

    class CanvasConfig(VerifyAndUpdateConfig):
        @staticmethod
        def verify_and_update_config(vllm_config: VllmConfig) -> None:
            configure(vllm_config)

    return CanvasConfig


def largest_frame(config: ServerConfig) -> int:
    """Tokens of the largest frame that a server makes."""
    grid = config.layout.grid if config.layout else None
    return lumos.frame_layout(grid or LARGEST_GRID).tokens_per_frame


def requests_at_once(canvas: int, vocabulary: int) -> int:
    """How many requests may run at a time, for what vLLM sets aside for each to stay within `MASK_BYTES`.

    Args:
        canvas: tokens of the largest frame.
        vocabulary: ids of the model.
    """
    return max(1, MASK_BYTES // (canvas * -(-vocabulary // 32) * 4))


def configure(vllm_config: VllmConfig) -> None:
    """Set what follows from the model, and refuse what cannot be right with it, before it loads.

    Raises:
        ConfigError: naming the option and the remedy.
    """
    from vllm.config import CompilationMode, CUDAGraphMode
    from vllm.config.diffusion import DiffusionConfig

    model = vllm_config.model_config
    if not vllm_config.use_v2_model_runner:
        raise ConfigError(
            f"{model.model} makes whole frames in passes, which vLLM's Model Runner V2 does and V1 does not: leave "
            "VLLM_USE_V2_MODEL_RUNNER=0 out; on a machine without a GPU start the server with "
            "python -m vllm_packcache.tools.interpreted serve ..."
        )
    check_masked(vllm_config.cache_config.cache_dtype)
    config = read_config(vllm_config)
    assert config is not None, "a family of canvases is always on"
    frame = largest_frame(config)
    if vllm_config.diffusion_config is None:
        vllm_config.diffusion_config = DiffusionConfig(canvas_length=frame)
    canvas = vllm_config.diffusion_config.canvas_length
    if canvas < frame:
        raise ConfigError(
            f"--diffusion-config: canvas_length is {canvas}, and a frame has {frame} tokens: leave the option out"
        )
    check_precision(config, vllm_config)
    # By this vLLM knows a model that denoises.
    model.hf_config.canvas_length = canvas

    scheduler = vllm_config.scheduler_config
    most = requests_at_once(canvas, model.get_vocab_size())
    if scheduler.max_num_seqs > most:
        logger.log(
            logging.WARNING if _given.get().requests else logging.INFO,
            "--max-num-seqs is lowered from %d to %d: for each request vLLM sets aside a bit for every token of a "
            "frame (%d) and every id (%d), and more would take more than %d MiB",
            scheduler.max_num_seqs,
            most,
            canvas,
            model.get_vocab_size(),
            MASK_BYTES >> 20,
        )
        scheduler.max_num_seqs = most
    if not _given.get().tokens:
        room = canvas * min(scheduler.max_num_seqs, FRAMES_AT_ONCE)
        scheduler.max_num_batched_tokens = max(scheduler.max_num_batched_tokens, room)
    for value, option in (
        (scheduler.max_num_batched_tokens, "--max-num-batched-tokens"),
        (scheduler.max_num_scheduled_tokens, "--max-num-scheduled-tokens"),
        (scheduler.long_prefill_token_threshold, "--long-prefill-token-threshold"),
    ):
        if value and value < canvas:
            raise ConfigError(
                f"{option} is {value}, and a frame of {canvas} tokens is computed whole or not at all: give at least "
                f"{canvas}, or leave the option out"
            )
    if vllm_config.cache_config.enable_prefix_caching:
        logger.info(
            "Prefix caching is off: keys and values of a frame depend on how a request masks what it commits, and on "
            "the stream"
        )
        vllm_config.cache_config.enable_prefix_caching = False
    if not model.enforce_eager:
        logger.info("CUDA graphs and torch.compile are off: a step has rows of its own for every stream and picture")
        model.enforce_eager = True
    vllm_config.compilation_config.mode = CompilationMode.NONE
    vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
    # Where the operator names no backend, one that lets a frame see all of itself.
    vllm_config.attention_config.use_non_causal = True
    # What a checkpoint recommends for sampling is for decoders, and vLLM would refuse it in every request.
    model.generation_config = "vllm"
    for value, option in (
        (model.override_generation_config, "--override-generation-config"),
        (model.logits_processors, "--logits-processors"),
    ):
        if value:
            raise ConfigError(
                f"{option} has no effect on {model.model}, whose frames are made as a request's {REQUEST_PREFIX}* "
                "options say: leave it out"
            )
    installed = sorted(found.name for found in entry_points(group="vllm.logits_processors"))
    if installed:
        logger.warning("Logits processors that are installed have no effect on this model: %s", ", ".join(installed))


def check_precision(config: ServerConfig, vllm_config: VllmConfig) -> None:
    """Check that older frames can be encoded.

    Raises:
        ConfigError: the cache has another format already, or the policy drops parts of frames.
    """
    if not config.precision.encodes:
        return
    cache_dtype = vllm_config.cache_config.cache_dtype
    if cache_dtype not in ("auto", "float16", "bfloat16", "float32"):
        raise ConfigError(
            f"{CONFIG_KEY}: {PRECISION_KEY}.history encodes what is in the model's precision, and --kv-cache-dtype is "
            f"{shown(cache_dtype)}: leave one of the two out"
        )
    if config.grid is not None:
        check_whole(VideoLayout(lumos.frame_layout(config.grid), 0), config.policy, vllm_config, config)


def check_whole(layout: VideoLayout, policy: Policy, vllm_config: VllmConfig, config: ServerConfig) -> None:
    """Check that a policy keeps older frames whole or not at all, where they are encoded.

    Raises:
        ConfigError: it does not.
    """
    encoding = encoding_in(vllm_config, config)
    if encoding is None:
        return
    try:
        EncodedRetention(layout, policy, vllm_config.cache_config.block_size, encoding).check()
    except ValueError as error:
        raise ConfigError(str(error)) from None


SEED = f"give {REQUEST_PREFIX}seed"
DRAWN = "tokens of a frame are drawn in several passes, all that are uncertain anew"
WHOLE = f"frames are made whole: a video ends after {REQUEST_PREFIX}frames"

REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "temperature": ((1,), f"give {REQUEST_PREFIX}temperature"),
    "seed": ((None,), SEED),
    "top_k": ((0, -1), DRAWN),
    "top_p": ((1,), DRAWN),
    "min_p": ((0,), DRAWN),
    "repetition_penalty": ((1,), DRAWN),
    "presence_penalty": ((0,), DRAWN),
    "frequency_penalty": ((0,), DRAWN),
    "logit_bias": ((None, {}), DRAWN),
    "allowed_token_ids": ((None, []), DRAWN),
    "bad_words": ((None, []), DRAWN),
    "structured_outputs": ((None,), DRAWN),
    "logprobs": ((None,), DRAWN),
    "logprob_token_ids": ((None, []), DRAWN),
    "prompt_logprobs": ((None,), "frames are not predicted token by token"),
    "prompt_logprob_token_ids": ((None,), "frames are not predicted token by token"),
    "min_tokens": ((0,), WHOLE),
    "stop": ((None, []), WHOLE),
    "stop_token_ids": ((None, []), WHOLE),
    "repetition_detection": ((None,), WHOLE),
    "thinking_token_budget": ((None,), WHOLE),
    "trace_decode_token_ids": ((None, []), DRAWN),
}
"""Sampling parameters that frames are not made by: the values with which they say nothing, and a reason or a remedy."""

DIFFUSION_PREFIX = "diffusion_"
"""Of vLLM's options for models that denoise canvases of text."""


class CanvasServing(Serving):
    """Frames made in passes by vLLM's discrete diffusion."""

    every_request = True

    def longest(self, max_model_len: int | None) -> int:
        """Tokens of the longest sequence.

        The positions of text and pictures follow from a formula, and what a checkpoint says of their number does not
        bound them.

        Args:
            max_model_len: what the operator has given.
        """
        if max_model_len is not None and max_model_len > 0:
            return max_model_len
        config = ServerConfig.from_additional_config(_given.get().additional_config, LUMOS)
        assert config is not None, "a family of canvases is always on"
        return TEXT_TOKENS + USUAL_FRAMES * largest_frame(config)

    def finish(self, vllm_config: VllmConfig) -> None:
        """Put our scheduler in place of vLLM's own for discrete diffusion, once it is known which that is.

        Raises:
            ConfigError: the operator has chosen another one.
        """
        scheduler = vllm_config.scheduler_config
        own = {"DiffusionScheduler": "CanvasScheduler", "DiffusionAsyncScheduler": "CanvasAsyncScheduler"}
        chosen = str(scheduler.scheduler_cls).rpartition(".")[2]
        if chosen not in own:
            raise ConfigError(f"--scheduler-cls {scheduler.scheduler_cls} cuts frames into parts: leave the option out")
        scheduler.scheduler_cls = f"vllm_packcache.engine.scheduler.{own[chosen]}"

    def check_backend(self, name: str) -> None:
        """Refuse an attention backend that cannot read what a step's rows are.

        Raises:
            ConfigError: naming those that can.
        """
        if name not in CANVAS_BACKENDS:
            raise ConfigError(
                f"--attention-backend {name} is not for a model that makes whole frames: it is causal, or has room for "
                "as many rows as --max-num-seqs only, while a prompt's text is a row a token: choose one of "
                f"{', '.join(CANVAS_BACKENDS)}, or leave the option out"
            )

    def backend(self, backend: Any, vllm_config: VllmConfig, config: ServerConfig) -> Any:
        """The same: the model state compacts, and the layers make specs of their own."""
        del vllm_config, config
        return backend

    def model_state(self, state: Any, config: ServerConfig) -> Any:
        """The same: it is the model's own."""
        del config
        return state

    def check_request(
        self, request: EngineCoreRequest, config: ServerConfig, vllm_config: VllmConfig, *, length_given: bool
    ) -> None:
        """See `Serving.check_request`."""
        params = request.sampling_params
        if params is None or request.prompt_token_ids is None:
            raise ConfigError(f"this model makes videos: send the prompt as token ids (see {lumos.__name__})")
        if request.resumable:
            raise ConfigError("a session with streamed input cannot be a video: send the whole prompt at once")
        if request.mm_features:
            raise ConfigError(
                "pictures are token ids to this model: send them in the prompt (see vllm_packcache.families.lumos)"
            )
        plan = config.request(params.extra_args, request.prompt_token_ids)
        assert isinstance(plan, CanvasRequest), "every request of such a model is one"
        frame = plan.conditional.layout.tokens_per_frame
        canvas = vllm_config.diffusion_config.canvas_length
        if frame > canvas:
            raise ConfigError(
                f"{REQUEST_PREFIX}grid makes frames of {frame} tokens, and this server makes them of {canvas} at most: "
                f"ask for a smaller one, or start the server with its grid in {CONFIG_KEY}"
            )
        vocabulary = vllm_config.model_config.get_vocab_size()
        if max(request.prompt_token_ids) >= vocabulary:
            raise ConfigError(f"the prompt has ids beyond the model's {vocabulary}: its visual codes are too large")
        length = params.max_tokens if length_given else None
        frames = 1 if plan.frames is None and length is None else plan.frames
        wanted = length or 0 if frames is None else frames * frame
        total, most = len(request.prompt_token_ids) + wanted, vllm_config.model_config.max_model_len
        if total > most:
            raise ConfigError(
                f"this video has {total} tokens with its prompt, and the server takes {most}: ask for fewer frames "
                f"({REQUEST_PREFIX}frames), or start it with a larger --max-model-len"
            )
        if length not in (None, wanted):
            raise ConfigError(
                f"max_tokens is {length}, and {REQUEST_PREFIX}frames ({frames}) makes {wanted} tokens: give one of the "
                "two, or make them agree"
            )
        if wanted % frame:
            raise ConfigError(
                f"max_tokens is {wanted}, and a frame has {frame} tokens: give {REQUEST_PREFIX}frames, or a multiple "
                "of it"
            )
        for stream in plan.streams:
            check_whole(stream.plan.layout, stream.plan.policy, vllm_config, config)
        _check_blocks(plan, total, vllm_config, config)
        params.max_tokens = wanted
        params.extra_args = {**(params.extra_args or {}), CANVAS_OPTION: frame}
        if params.n > 1:
            if plan.options.seed + params.n > 2**64:
                raise ConfigError(
                    f"n is {params.n}, and the seeds of so many videos count up from {REQUEST_PREFIX}seed "
                    f"({plan.options.seed}), to 2^64 - 1 at most: give a smaller one"
                )
            # It has no name yet.
            params.extra_args[FORK_OPTION] = ""

    def check_sampling(self, params: SamplingParams) -> None:
        """Refuse what would have no effect; it is asked before vLLM is, which names no remedy.

        Raises:
            ConfigError: naming the option.
        """
        for option, (silent, reason) in REFUSED.items():
            value = getattr(params, option)
            if not any(value is own or (value is not None and own is not None and value == own) for own in silent):
                raise ConfigError(f"{option} is not for videos of this model: {reason}")
        for option in params.extra_args or {}:
            if str(option).startswith(DIFFUSION_PREFIX):
                raise ConfigError(
                    f"{named(option)} is not for videos of this model: their {REQUEST_PREFIX}* options say how they "
                    "are made"
                )
        # Ids of a frame's special tokens may be those that end a text.
        params.ignore_eos = True


def _check_blocks(plan: CanvasRequest, total: int, vllm_config: VllmConfig, config: ServerConfig) -> None:
    available = pool_blocks(vllm_config)
    if available is None:
        return
    block_size = vllm_config.cache_config.block_size
    ahead = steps_ahead(vllm_config) * vllm_config.diffusion_config.canvas_length
    blocks = held_blocks(plan.streams, total, block_size, ahead, encoding_in(vllm_config, config))
    if blocks > available:
        options = ", ".join(f"{REQUEST_PREFIX}{field.name}" for field in fields(plan.conditional.policy))
        raise ConfigError(
            f"this video holds {blocks} blocks of {block_size} tokens in its streams, and the KV cache has "
            f"{available}: let the policy keep less ({options or 'it keeps all'}), ask for smaller frames, or start "
            "the server with a larger KV cache"
        )
