"""What serving a causal model takes: one that makes its frames token by token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import cache
from typing import TYPE_CHECKING, Any

from vllm_packcache.config.errors import ConfigError
from vllm_packcache.config.guidance import GUIDANCE_KEY
from vllm_packcache.config.precision import PRECISION_KEY
from vllm_packcache.config.server import (
    CONFIG_FLAG,
    POLICY_FLAG,
    REQUEST_PREFIX,
    ServerConfig,
    read_config,
)
from vllm_packcache.core.grammar import LARGEST_ID, IdRange, VideoGrammar
from vllm_packcache.core.layout import VideoLayout
from vllm_packcache.core.plan import VideoRequest
from vllm_packcache.core.policies import PAPER
from vllm_packcache.hooks.roles import Serving, held_blocks, pool_blocks, steps_ahead

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.kv_cache_interface import AttentionSpec


class CausalServing(Serving):
    """vLLM's own, with block tables and positions changed."""

    def finish(self, vllm_config: VllmConfig) -> None:
        """Have what is sampled restricted, where the layout says which ids may stand where."""
        config = read_config(vllm_config)
        if config is None or config.layout is None or not config.layout.has_ids:
            return
        own = f"vllm_packcache.worker.frame_ids:FrameIds{'V2' if vllm_config.use_v2_model_runner else 'V1'}"
        model = vllm_config.model_config
        model.logits_processors = [*(model.logits_processors or ()), own]

    def check_model(self, vllm_config: VllmConfig, config: ServerConfig) -> None:
        """See `Serving.check_model`."""
        model = vllm_config.model_config
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
        if config.precision.encodes:
            raise ConfigError(
                f"{CONFIG_FLAG}: {PRECISION_KEY}.history is for models that make frames in passes, and {model.model} "
                "reads its cache with every token, where all blocks have one format: choose one with --kv-cache-dtype"
            )
        if config.layout is not None and config.layout.axis_scale is not None and not model.uses_mrope:
            raise ConfigError(
                f"{CONFIG_FLAG}: layout: axis_scale is for positions with three axes, and {model.model} has one: leave "
                "axis_scale out"
            )
        grammar = None if config.layout is None else config.layout.grammar()
        largest = -1 if grammar is None else max((own for own in grammar.last.tolist() if own < LARGEST_ID), default=-1)
        if largest >= model.get_vocab_size():
            raise ConfigError(
                f"{CONFIG_FLAG}: layout: id {largest} is beyond the {model.get_vocab_size()} ids of {model.model}: "
                "give ids of this model"
            )
        if config.guidance:
            check_guidance(vllm_config)
            negative = [own for own in config.guidance.negative_prompt_ids or () if isinstance(own, int)]
            if max(negative, default=-1) >= model.get_vocab_size():
                raise ConfigError(
                    f"{CONFIG_FLAG}: {GUIDANCE_KEY}: negative_prompt_ids has id {max(negative)}, and the model has "
                    f"{model.get_vocab_size()}: give ids of this model"
                )

    def backend(self, backend: Any, vllm_config: VllmConfig, config: ServerConfig) -> Any:
        """See `Serving.backend`."""
        from vllm_packcache.worker.attention import retaining_backend

        # What a GPU's backend sets aside for rows is of max_num_seqs, and so are the V2 runner's captured graphs.
        frame_by_frame = vllm_config.use_v2_model_runner or backend.get_name() != "CPU_ATTN"
        return retaining_backend(backend, _spec_maker(config, steps_ahead(vllm_config), frame_by_frame))

    def model_state(self, state: Any, config: ServerConfig) -> Any:
        """See `Serving.model_state`."""
        # They need Triton, which is there when the V2 runner is.
        if config.guidance:
            from vllm_packcache.worker.guidance import guiding_model_state

            return guiding_model_state(state)
        from vllm_packcache.worker.runner_v2 import retaining_model_state

        return retaining_model_state(state)

    def check_request(
        self, request: EngineCoreRequest, config: ServerConfig, vllm_config: VllmConfig, *, length_given: bool
    ) -> None:
        """See `Serving.check_request`."""
        if request.sampling_params is not None:
            _check_request(request, config, vllm_config, length_given=length_given)


def check_guidance(vllm_config: VllmConfig) -> None:
    """Refuse a server whose second streams could not be run as its first ones are.

    Raises:
        ConfigError: naming the option or the property of the model.
    """
    subject, model, parallel = f"{CONFIG_FLAG}: {GUIDANCE_KEY}", vllm_config.model_config, vllm_config.parallel_config
    if not vllm_config.use_v2_model_runner:
        raise ConfigError(
            f"{subject} needs vLLM's Model Runner V2, which runs rows that its scheduler does not know of: leave "
            "VLLM_USE_V2_MODEL_RUNNER=0 out; on a machine without a GPU start the server with "
            "python -m vllm_packcache.tools.interpreted serve ..."
        )
    if model.is_multimodal_model or model.uses_mrope:
        raise ConfigError(
            f"{subject} is for models of token ids with one axis of positions, and {model.model} is none: leave it out"
        )
    for given, option, reason in (
        (vllm_config.lora_config is not None, "--enable-lora", "adapters are chosen for the rows of first streams"),
        (
            parallel.enable_expert_parallel or (parallel.data_parallel_size > 1 and parallel.is_moe_model is not False),
            "--enable-expert-parallel or --data-parallel-size of a model with experts",
            "ranks without a guided request would not take part in its pass",
        ),
        (
            bool(parallel.enable_batch_sharded_sampling),
            "--enable-batch-sharded-sampling",
            "a rank would not have the logits of both streams",
        ),
    ):
        if given:
            raise ConfigError(f"{subject} cannot be combined with {option}, because {reason}: leave one of them out")


def check_guided(request: EngineCoreRequest, made: VideoRequest, vllm_config: VllmConfig, total: int) -> None:
    """Refuse a guided video that has no condition of its own, or whose second stream is too long.

    Raises:
        ConfigError: naming the option.
    """
    params, second = request.sampling_params, made.streams[1]
    assert params is not None
    option = f"{REQUEST_PREFIX}guidance"
    if request.prompt_token_ids is None:
        raise ConfigError(f"{option} is for prompts of token ids, and this one is of embeddings: send token ids")
    for given, name, reason in (
        (params.structured_outputs is not None, "structured outputs", "they would be applied to one of two streams"),
        (params.prompt_logprobs is not None, "prompt_logprobs", "they would be those of one of two streams"),
        (params.prompt_logprob_token_ids is not None, "prompt_logprob_token_ids", "as prompt_logprobs"),
    ):
        if given:
            raise ConfigError(f"{option} cannot be combined with {name}: {reason}: leave one of them out")
    vocabulary, most = vllm_config.model_config.get_vocab_size(), vllm_config.model_config.max_model_len
    if max(second.condition) >= vocabulary:
        raise ConfigError(
            f"{REQUEST_PREFIX}negative_prompt_ids has id {max(second.condition)}, and the model has {vocabulary}: give "
            "ids of this model"
        )
    if second.own_tokens(total) > most:
        raise ConfigError(
            f"this video has {second.own_tokens(total)} tokens with its negative prompt, and the server takes {most}: "
            f"shorten {REQUEST_PREFIX}negative_prompt_ids, ask for fewer tokens, or start it with a larger "
            "--max-model-len"
        )


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
    made = config.request_of(params, request.prompt_token_ids, len(prompt))
    plan = None if made is None or made.as_stock else made.streams[0].plan
    turn = None if made is None else made.turn
    if made is not None and (turn is not None or request.resumable):
        _check_turn(request, made, vllm_config)
    length = len(prompt) + (0 if made is None else _counted_before(made))
    whole = None
    if made is not None and turn is None:
        whole = _whole_frames(made, len(prompt), params, vllm_config, length_given)
    if plan is None or plan.positions.window is None:
        _end_within(config.position_limit, "the model has", "positions", length, params)
    if plan is None:
        blocks = pool_blocks(vllm_config)
        tokens = None if blocks is None else blocks * vllm_config.cache_config.block_size
        _end_within(tokens, "the KV cache has room for", "tokens", length, params)
    if whole is not None and (params.max_tokens or 0) < whole:
        raise ConfigError(
            f"this video has {len(prompt) + whole} tokens with its prompt, and keeps them all, but there is room for "
            f"{len(prompt) + (params.max_tokens or 0)}: ask for fewer frames ({REQUEST_PREFIX}frames), or let the "
            "policy drop some"
        )
    if made is not None and made.grammar is not None:
        _check_grammar(request, made, made.grammar, len(prompt))
    if made is None or plan is None:
        return
    if plan.positions.scale is not None and request.mm_features:
        raise ConfigError(
            "this server positions the tokens of a video itself (layout: axis_scale), and a picture that the model's "
            f"own processor places has other positions: send token ids, or leave the {REQUEST_PREFIX}* options out"
        )
    if plan.policy.reads_tokens:
        _check_ids(request, plan.layout, length)
    total = min(length + (params.max_tokens or 0), vllm_config.model_config.max_model_len)
    if len(made.streams) > 1:
        check_guided(request, made, vllm_config, total)
    _check_size(made, total, config.position_limit, vllm_config)


def _counted_before(made: VideoRequest) -> int:
    """Tokens of a session before a turn that are still counted when it has begun; 0: it is no session."""
    if made.turn is None:
        return 0
    return made.turn.tokens - made.turn.forget_frames * made.streams[0].plan.layout.tokens_per_frame


def _check_turn(request: EngineCoreRequest, made: VideoRequest, vllm_config: VllmConfig) -> None:
    """Refuse what cannot be a turn of a session, and see that nothing but its length ends it.

    With any other end a step would be in flight which may have slid the window already.

    Raises:
        ConfigError: naming the option, or what there is not enough of.
    """
    turn, params = made.turn, request.sampling_params
    assert params is not None
    if turn is None or not request.resumable:
        raise ConfigError(
            f"{REQUEST_PREFIX}session_tokens is for requests with streamed input, which need it in every turn to know "
            "where the turn begins: give it there and only there"
        )
    if request.mm_features:
        raise ConfigError("a turn of a session is token ids: send pictures as such")
    if params.stop_token_ids or params.min_tokens:
        raise ConfigError("a turn of a session ends with its max_tokens: leave stop_token_ids and min_tokens out")
    params.ignore_eos = True
    begin, length = _counted_before(made), len(request.prompt_token_ids or ())
    plan, most = made.streams[0].plan, vllm_config.model_config.max_model_len
    if begin < (plan.layout.condition_tokens if turn.tokens else 0):
        raise ConfigError(
            f"{REQUEST_PREFIX}forget_frames is {turn.forget_frames}, which is more than the session has made: its "
            f"turn begins at token {turn.tokens}"
        )
    if begin + length + (params.max_tokens or 0) > most:
        raise ConfigError(
            f"this session has {begin + length + (params.max_tokens or 0)} tokens with this turn, and the server makes "
            f"{most}: forget more of its oldest frames ({REQUEST_PREFIX}forget_frames), or start it with a larger "
            "--max-model-len"
        )


_COMPARES_NONE = (
    f"ask for the paper's rule, {REQUEST_PREFIX}selection: {PAPER.selection} and {REQUEST_PREFIX}window: {PAPER.window}"
)


def _check_grammar(request: EngineCoreRequest, made: VideoRequest, grammar: VideoGrammar, prompt_tokens: int) -> None:
    """Refuse a video whose tokens cannot all have ids that its frames' grammar allows.

    Raises:
        ConfigError: a frame misses what a client gives, or something else would decide.
    """
    params, layout, ids = request.sampling_params, grammar.layout, request.prompt_token_ids
    assert params is not None
    if ids is None:
        raise ConfigError(
            "frames of this server have ids of their own, and a prompt of embeddings has none: send token ids"
        )
    if params.structured_outputs is not None:
        raise ConfigError(
            "what may stand in a frame is said by the layout of this server: leave structured outputs out of a video"
        )
    begin = _counted_before(made)
    if made.turn is not None and len(grammar.frame.given):
        stop = begin + prompt_tokens + (params.max_tokens or 0)
        chosen = layout.offsets(begin + prompt_tokens, stop)
        if not set(grammar.frame.given.tolist()).isdisjoint(chosen):
            raise ConfigError(
                "a turn of a session ends before ids that the client gives, which begin the next one: lower "
                "max_tokens, or give them in this turn"
            )
    elif params.max_tokens and len(grammar.frame.given):
        frames = layout.frame_of(prompt_tokens + params.max_tokens - 1) + 1 - grammar.first_frame
        own, wanted = (len(grammar.frame.given) * count for count in (len(grammar.given), frames))
        if own != wanted:
            raise ConfigError(
                f"{REQUEST_PREFIX}given_ids must have {len(grammar.frame.given)} ids for each frame that is made, "
                f"{wanted} for {frames} of them, not {own}"
            )
    wrong = grammar.first_wrong(ids, begin)
    if wrong is not None:
        raise ConfigError(
            f"token {wrong} of the prompt is in a frame, where it must be {_ids_in_words(grammar.allowed(wrong))}, not "
            f"{ids[wrong - begin]}: see layout, and {REQUEST_PREFIX}condition_tokens"
        )


def _ids_in_words(allowed: IdRange) -> str:
    return str(allowed.first) if allowed.fixed else f"from {allowed.first} to {allowed.last}"


def _check_ids(request: EngineCoreRequest, layout: VideoLayout, prompt_tokens: int) -> None:
    """Refuse frames without ids to a policy that compares them: all of them would look alike.

    Raises:
        ConfigError: the prompt is embeddings, or has pictures, behind its condition.
    """
    if request.prompt_embeds is not None and layout.condition_tokens < prompt_tokens:
        raise ConfigError(
            "what this video keeps depends on the ids of its frames, and those of a prompt of embeddings have none: "
            f"send token ids, or {_COMPARES_NONE}"
        )
    pictures = [feature.mm_position for feature in request.mm_features or ()]
    if any(picture.offset + picture.length > layout.condition_tokens for picture in pictures):
        raise ConfigError(
            "what this video keeps depends on the ids of its frames, and a picture that the model's own processor "
            f"places has none: send frames as token ids, or {_COMPARES_NONE}"
        )


def _whole_frames(
    made: VideoRequest, prompt_tokens: int, params: SamplingParams, vllm_config: VllmConfig, length_given: bool
) -> int | None:
    """Set the length of a video that ends with a frame.

    Returns:
        Its tokens after the prompt; None: the client's ``max_tokens`` says where it ends.

    Raises:
        ConfigError: the client's ``max_tokens`` says something else, or the video is too long.
    """
    frames = made.frames
    if frames is None:
        if length_given:
            return None
        frames = 1
    wanted = made.streams[0].plan.layout.tokens_to_end(prompt_tokens, frames)
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


def _check_size(made: VideoRequest, total: int, position_limit: int | None, vllm_config: VllmConfig) -> None:
    """Hold a video of ``total`` tokens to the positions of the model and to the blocks of the KV cache.

    Raises:
        ConfigError: it needs more.
    """
    positions = 0
    for stream in made.streams:
        own, of_stream = stream.own_tokens(total), stream.plan.positions
        positions = max(positions, of_stream.limit(own), of_stream.window_tokens(own))
    if position_limit is not None and positions > position_limit:
        raise ConfigError(
            f"this video needs {positions} positions, and the model has {position_limit}: lower {REQUEST_PREFIX}window "
            "or the size of a frame, or shorten the condition"
        )
    available = pool_blocks(vllm_config)
    if available is None:
        return
    block_size = vllm_config.cache_config.block_size
    blocks = held_blocks(made.streams, total, block_size, steps_ahead(vllm_config))
    if blocks > available:
        policy = made.streams[0].plan.policy
        options = ", ".join(f"{REQUEST_PREFIX}{field.name}" for field in fields(policy)) or "it keeps all"
        raise ConfigError(
            f"this video holds {blocks} blocks of {block_size} tokens, and the KV cache has {available}: let the "
            f"policy keep less ({options}), make frames or the condition smaller, or start the server with a larger "
            "KV cache"
        )


@cache
def _spec_maker(
    config: ServerConfig, steps_ahead: int, frame_by_frame: bool
) -> Callable[[AttentionSpec], AttentionSpec]:
    """One function for each configuration: the layers of a model must get the same backend class."""
    from vllm_packcache.engine.spec import RetentionSpec

    return lambda spec: RetentionSpec.retaining(spec, config, steps_ahead, frame_by_frame)
