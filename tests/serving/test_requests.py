"""What is checked of a request before it reaches the engine; without an engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.entrypoints.openai.chat_completion.protocol import BatchChatCompletionRequest, ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest
from vllm.exceptions import VLLMValidationError
from vllm.plugins import load_general_plugins
from vllm.v1.engine.parallel_sampling import ParentRequest

from tests.serving.test_masked_tokens import CANVAS, CONTINUED, IMAGE_TO_VIDEO, Case
from vllm_packcache.config.errors import SHOWN_CHARACTERS, ConfigError
from vllm_packcache.config.server import POLICY_KEY, ServerConfig
from vllm_packcache.config.sources import CONFIG_KEY
from vllm_packcache.core.forks import FORK_OPTION
from vllm_packcache.families import lumos
from vllm_packcache.hooks import canvas as plugin_masked
from vllm_packcache.hooks import requests as plugin_requests

FRAME = 45
PROMPT = 70
CAUSAL = {"layout": {"grid": [5, 9]}}
MASKED = {"layout": {"grid": [4, 6]}}


def processor(
    config: dict[str, Any] | None, *, is_masked: bool = False, max_model_len: int = 2000, **model: Any
) -> SimpleNamespace:
    """What stands for vLLM's ``InputProcessor``."""
    architectures = list(lumos.ARCHITECTURES) if is_masked else ["LlamaForCausalLM"]
    model_config = SimpleNamespace(
        hf_config=SimpleNamespace(architectures=architectures),
        max_model_len=max_model_len,
        override_generation_config={},
        logits_processors=None,
        get_vocab_size=lambda: lumos.VISUAL_BEGIN + 64,
        **{},
    )
    vars(model_config).update(model)
    vllm_config = SimpleNamespace(
        model_config=model_config,
        cache_config=SimpleNamespace(num_gpu_blocks=None, block_size=32),
        diffusion_config=SimpleNamespace(canvas_length=CANVAS),
        additional_config=None if config is None else {POLICY_KEY: "packcache", CONFIG_KEY: config},
    )
    return SimpleNamespace(vllm_config=vllm_config)


def admitted(on: SimpleNamespace, params: SamplingParams, prompt: list[int], **of_request: Any) -> SamplingParams:
    """The sampling parameters that reach the engine."""

    def process_inputs(self: Any, request_id: str, prompt: Any, params: Any) -> Any:
        own = params.clone()
        own.max_tokens = own.max_tokens or on.vllm_config.model_config.max_model_len - len(prompt)
        request = {"sampling_params": own, "prompt_token_ids": prompt, "prompt_embeds": None}
        return SimpleNamespace(**{**request, "resumable": False, "mm_features": None, **of_request})

    return plugin_requests.check_request(process_inputs)(on, "a", prompt, params).sampling_params


def of_client(on: SimpleNamespace, request: Any, body: dict[str, Any]) -> SamplingParams:
    """The sampling parameters of a request that came over HTTP."""

    async def json() -> dict[str, Any]:
        return body

    async def serve(serving: Any, request: Any, raw_request: Any = None) -> Any:
        return request

    serving = SimpleNamespace(input_processor=on, create_error_response=refuse)
    asyncio.run(plugin_requests.read_body(serve)(serving, request, SimpleNamespace(json=json)))
    if isinstance(request, GenerateRequest):
        return request.sampling_params
    if isinstance(request, BatchChatCompletionRequest):
        request = request.to_chat_completion_request(body["messages"][0])
    length = next((n for n in map(request.__dict__.get, plugin_requests.LENGTHS) if n is not None), None)
    return request.to_sampling_params(1500 if length is None else length, {"repetition_penalty": 1.3, "top_k": 7})


def refuse(message: str) -> None:
    raise VLLMValidationError(message)


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises((VLLMValidationError, ConfigError)) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    return message


def completion(**body: Any) -> tuple[CompletionRequest, dict[str, Any]]:
    body = {"model": "m", "prompt": [5] * PROMPT, **body}
    return CompletionRequest.model_validate(body), body


def test_options_of_a_video_are_refused_where_no_policy_is_on() -> None:
    on = processor(None)
    for name in ("packcache_grid", "packcache_nonsense"):
        message = refusal(lambda name=name: admitted(on, SamplingParams(extra_args={name: 1, "mine": 2}), [5] * PROMPT))
        assert message == (
            f"{name} is an option of a video, and this server was started without --kv-cache-policy: start it with "
            "that, or leave the option out"
        )
    assert admitted(on, SamplingParams(max_tokens=7, extra_args={"mine": 2}), [5] * PROMPT).max_tokens == 7


# --------------------------------------------------------------------------- the length of a video

MESSAGES = [{"role": "user", "content": "a"}]
ENDPOINTS: dict[str, tuple[type, dict[str, Any], str]] = {
    "completions": (CompletionRequest, {"prompt": [5]}, "max_tokens"),
    "chat": (ChatCompletionRequest, {"messages": MESSAGES}, "max_tokens"),
    "chat, new": (ChatCompletionRequest, {"messages": MESSAGES}, "max_completion_tokens"),
    "batch": (BatchChatCompletionRequest, {"messages": [MESSAGES]}, "max_completion_tokens"),
    "responses": (ResponsesRequest, {"input": "a"}, "max_output_tokens"),
}


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize(
    ("options", "given", "made"),
    [
        ({"packcache_policy": "packcache"}, None, FRAME),
        ({"packcache_frames": 3}, None, 3 * FRAME),
        ({"packcache_frames": 3}, 3 * FRAME, 3 * FRAME),
        ({"packcache_window": 2}, 50, 50),
        # vLLM's own default of completions, given.
        ({"packcache_window": 2}, 16, 16),
        ({"packcache_frames": 2, "packcache_condition_tokens": 20}, None, 2 * FRAME - 5),
        ({"packcache_condition_tokens": 20}, None, FRAME - 5),
        ({"packcache_tokens_per_frame": 16, "packcache_frames": 1}, None, 16),
    ],
    ids=str,
)
def test_a_video_is_of_whole_frames_unless_the_client_gives_its_tokens(
    endpoint: str, options: dict[str, Any], given: int | None, made: int
) -> None:
    kind, body, length = ENDPOINTS[endpoint]
    body = {"model": "m", **body, "vllm_xargs": options, **({} if given is None else {length: given})}
    on = processor(CAUSAL)
    params = admitted(on, of_client(on, kind.model_validate(body), body), [5] * PROMPT)
    assert params.max_tokens == made
    assert params.ignore_eos == (given is None or "packcache_frames" in options)
    assert params.extra_args == options


@pytest.mark.parametrize(
    ("sampling", "made"),
    [({}, 2 * FRAME), ({"max_tokens": None}, 2 * FRAME), ({"max_tokens": 2 * FRAME}, 2 * FRAME)],
    ids=str,
)
def test_tokens_in_tokens_out(sampling: dict[str, Any], made: int) -> None:
    on = processor(CAUSAL)
    body = {"token_ids": [5] * PROMPT, "sampling_params": {**sampling, "extra_args": {"packcache_frames": 2}}}
    params = of_client(on, GenerateRequest.model_validate(body), body)
    assert admitted(on, params, [5] * PROMPT).max_tokens == made


@pytest.mark.parametrize("max_tokens", [16, None, 3 * FRAME])
def test_in_python_the_default_length_counts_as_left_out(max_tokens: int | None) -> None:
    params = SamplingParams(max_tokens=max_tokens, extra_args={"packcache_frames": 3}, repetition_penalty=1.2)
    own = admitted(processor(CAUSAL), params, [5] * PROMPT)
    assert own.max_tokens == 3 * FRAME
    assert own.repetition_penalty == 1.2
    # What the caller has stays as it was.
    assert (params.max_tokens, params.ignore_eos) == (max_tokens, False)


def test_a_text_is_as_it_was() -> None:
    on = processor(CAUSAL)
    request, body = completion(vllm_xargs={"other": 1})
    params = of_client(on, request, body)
    assert admitted(on, params, [5] * PROMPT) == params
    assert (params.max_tokens, params.repetition_penalty, params.extra_args) == (16, 1.3, {"other": 1})
    off = processor(None)
    request, body = completion(vllm_xargs={"other": 1}, packcache_grid=1, use_beam_search=True)
    params = of_client(off, request, body)
    assert (params.max_tokens, params.extra_args) == (16, {"other": 1})
    assert admitted(off, params, [5] * PROMPT) == params


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (
            {"max_tokens": 44, "vllm_xargs": {"packcache_frames": 1}},
            "max_tokens is 44, and packcache_frames (1) makes 45",
        ),
        (
            {"vllm_xargs": {"packcache_frames": 50}},
            "packcache_frames is 50, which takes 2250 tokens, and the server makes",
        ),
        ({"min_tokens": 91, "vllm_xargs": {"packcache_frames": 2}}, "min_tokens is 91"),
        ({"vllm_xargs": {"packcache_frames": 0}}, "packcache_frames: input should be greater than or equal to 1"),
        ({"vllm_xargs": {"packcache_frames": 2**20 + 1}}, "packcache_frames: input should be less than or equal to"),
        ({"vllm_xargs": {"packcache_frames": 1.0}}, "packcache_frames: input should be a valid integer"),
    ],
    ids=str,
)
def test_lengths_that_cannot_be_are_refused(body: dict[str, Any], sentence: str) -> None:
    on = processor(CAUSAL)
    request, body = completion(**body)
    assert sentence in refusal(lambda: admitted(on, of_client(on, request, body), [5] * PROMPT))


def test_frames_of_a_video_that_keeps_everything_must_fit() -> None:
    on = processor(CAUSAL, max_model_len=2000)
    on.vllm_config.additional_config["kv_cache_position_limit"] = 200
    whole = SamplingParams(extra_args={"packcache_policy": "full", "packcache_frames": 2})
    assert admitted(on, whole, [5] * PROMPT).max_tokens == 2 * FRAME
    more = SamplingParams(extra_args={"packcache_policy": "full", "packcache_frames": 3})
    assert "there is room for 200" in refusal(lambda: admitted(on, more, [5] * PROMPT))


def test_frames_without_their_size_are_refused() -> None:
    params = SamplingParams(extra_args={"packcache_policy": "full", "packcache_frames": 2})
    assert "packcache_frames needs packcache_grid" in refusal(lambda: admitted(processor({}), params, [5] * PROMPT))


def test_the_operators_most_tokens_hold_for_frames() -> None:
    on = processor(CAUSAL, override_generation_config={"max_new_tokens": 100})
    params = SamplingParams(extra_args={"packcache_frames": 3})
    assert "max_new_tokens in --override-generation-config" in refusal(lambda: admitted(on, params, [5] * PROMPT))


# --------------------------------------------------------------------------- frames without ids


def test_frames_without_ids_cannot_be_compared() -> None:
    on = processor(CAUSAL)
    own = {"packcache_condition_tokens": 60, "packcache_window": 4}
    params, spatial = (
        SamplingParams(extra_args={**own, "packcache_selection": name}) for name in ("changed", "spatial")
    )
    embeddings = {"prompt_token_ids": None, "prompt_embeds": [[0.0]] * PROMPT}
    assert (
        "those of a prompt of embeddings have none: send token ids, or ask for the paper's rule, packcache_s"
        in refusal(lambda: admitted(on, params, [5] * PROMPT, **embeddings))
    )
    assert admitted(on, spatial, [5] * PROMPT, **embeddings).max_tokens == FRAME - 10
    # A prompt that is condition alone has no frames.
    alone = SamplingParams(extra_args={"packcache_selection": "changed"})
    assert admitted(on, alone, [5] * PROMPT, **embeddings).max_tokens == FRAME

    def picture(offset: int) -> dict[str, Any]:
        return {"mm_features": [SimpleNamespace(mm_position=SimpleNamespace(offset=offset, length=30))]}

    assert "a picture that the model's own processor places has none" in refusal(
        lambda: admitted(on, params, [5] * PROMPT, **picture(31))
    )
    # One of the condition is not compared.
    assert admitted(on, params, [5] * PROMPT, **picture(30)).max_tokens == FRAME - 10
    assert admitted(on, spatial, [5] * PROMPT, **picture(31)).max_tokens == FRAME - 10


# --------------------------------------------------------------------------- penalties, places, names


@pytest.mark.parametrize(
    ("body", "override", "penalty"),
    [({}, {}, 1.0), ({"repetition_penalty": 1.3}, {}, 1.3), ({}, {"repetition_penalty": 1.1}, 1.1)],
)
def test_a_checkpoints_penalties_are_not_for_videos(
    body: dict[str, Any], override: dict[str, Any], penalty: float
) -> None:
    on = processor(CAUSAL, override_generation_config=override)
    request, body = completion(**body, vllm_xargs={"packcache_frames": 1})
    params = admitted(on, of_client(on, request, body), [5] * PROMPT)
    assert (params.repetition_penalty, params.top_k) == (penalty, 7)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"packcache_grid": [5, 9]}, "must stand in vllm_xargs, and packcache_grid stands beside them"),
        (
            {"packcachehistory_frames": 1, "vllm_xargs": {"packcache_frames": 1}},
            "packcachehistory_frames stands beside",
        ),
        ({"extra_body": {"vllm_xargs": {"packcache_grid": [5, 9]}}}, "packcache_grid stands in extra_body.vllm_xargs"),
        ({"sampling_params": {"extra_args": {"packcache_grid": 1}}}, "stands in sampling_params.extra_args"),
        ({"use_beam_search": True, "vllm_xargs": {"packcache_grid": [5, 9]}}, "use_beam_search is not for videos"),
        ({"vllm_xargs": {"grid": [5, 9]}}, "for a video give packcache_grid"),
        ({"grid": [5, 9], "vllm_xargs": {"packcache_frames": 1}}, "give packcache_grid in vllm_xargs"),
        ({"vllm_xargs": {"PackCache-Grid": [5, 9]}}, "PackCache-Grid is no known option"),
        ({"vllm_xargs": {"packcache": "packcache"}}, "packcache is no known option"),
    ],
    ids=str,
)
def test_what_would_be_ignored_is_refused(body: dict[str, Any], sentence: str) -> None:
    on = processor(CAUSAL)
    request, body = completion(**body)
    assert sentence in refusal(lambda: admitted(on, of_client(on, request, body), [5] * PROMPT))


def test_options_of_tokens_in_tokens_out_stand_in_extra_args() -> None:
    body = {"token_ids": [5], "sampling_params": {}, "vllm_xargs": {"packcache_grid": [5, 9]}}
    request = GenerateRequest.model_validate(body)
    message = refusal(lambda: of_client(processor(CAUSAL), request, body))
    assert "must stand in sampling_params.extra_args, and packcache_grid stands in vllm_xargs" in message


def test_names_that_another_package_may_read_are_warned_of_once(logged: list[str]) -> None:
    on = processor(CAUSAL, logits_processors=["a.b:C"])
    plugin_requests._warn_of.cache_clear()
    for _ in range(2):
        params = SamplingParams(max_tokens=3, extra_args={"window": 3})
        assert admitted(on, params, [5] * PROMPT) == params
    assert len(set(logged)) == 1
    assert "give packcache_window" in logged[0]


@pytest.mark.parametrize(
    "value",
    ["x" * 5000, [7] * 5000, [[[["a" * 500]]]], {"a" * 900: 1}, "\ud800" * 90, 10**300, [[[[[1]]]]]],
    ids=["text", "list", "nested", "mapping", "surrogates", "number", "deep"],
)
def test_a_message_repeats_little_of_what_was_given(value: Any) -> None:
    server = ServerConfig.parse("packcache", CAUSAL)
    known = ", ".join(f"packcache_{name}" for name in server.request_options)
    for options in ({"packcache_window": value}, {f"packcache_{value}": 1}, {"packcache_policy": value}):
        message = refusal(lambda options=options: server.plan(options, PROMPT))
        assert len(message.replace(known, "")) < 100 + SHOWN_CHARACTERS
        message.encode()


def test_what_is_too_deep_is_refused() -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    message = refusal(lambda: ServerConfig.parse("packcache", CAUSAL).plan({"packcache_grid": deep}, PROMPT))
    assert message == "packcache_grid is nested too deeply: give numbers, or lists of them"


# --------------------------------------------------------------------------- masked models


def masked_params(case: Case, **sampling: Any) -> SamplingParams:
    return SamplingParams(extra_args=case.extra_args, detokenize=False, **sampling)


def without_frames(case: Case) -> Case:
    return replace(case, options=tuple(option for option in case.options if option[0] != "frames"))


@pytest.mark.parametrize(
    ("case", "sampling", "made"),
    [
        (IMAGE_TO_VIDEO, {}, 5 * CANVAS),
        (IMAGE_TO_VIDEO, {"max_tokens": 5 * CANVAS}, 5 * CANVAS),
        (without_frames(IMAGE_TO_VIDEO), {}, CANVAS),
        (without_frames(IMAGE_TO_VIDEO), {"max_tokens": 2 * CANVAS}, 2 * CANVAS),
    ],
)
def test_masked_lengths(case: Case, sampling: dict[str, Any], made: int) -> None:
    params = admitted(processor(MASKED, is_masked=True), masked_params(case, **sampling), case.ids)
    assert params.max_tokens == made
    assert params.ignore_eos
    assert params.extra_args == {**case.extra_args, "diffusion_canvas_length": CANVAS}


@pytest.mark.parametrize(
    ("sampling", "sentence"),
    [
        ({"temperature": 0.5}, "temperature is not for videos of this model: give packcache_temperature"),
        ({"seed": 5}, "seed is not for videos of this model: give packcache_seed"),
        ({"top_k": 5}, "top_k"),
        ({"top_p": 0.5}, "top_p"),
        ({"min_p": 0.5}, "min_p"),
        ({"repetition_penalty": 1.5}, "repetition_penalty"),
        ({"presence_penalty": 1}, "presence_penalty"),
        ({"frequency_penalty": 1}, "frequency_penalty"),
        ({"logit_bias": {5: 1.0}}, "logit_bias"),
        ({"allowed_token_ids": [5]}, "allowed_token_ids"),
        ({"bad_words": ["a"]}, "bad_words"),
        ({"logprob_token_ids": [5]}, "logprob_token_ids"),
        ({"logprobs": 0}, "logprobs"),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"min_tokens": 5}, "min_tokens"),
        ({"stop_token_ids": [5]}, "stop_token_ids"),
        ({"max_tokens": 4 * CANVAS}, "packcache_frames (5) makes"),
    ],
    ids=str,
)
def test_a_masked_model_refuses_what_it_would_ignore(sampling: dict[str, Any], sentence: str) -> None:
    on, case = processor(MASKED, is_masked=True), IMAGE_TO_VIDEO
    assert sentence in refusal(lambda: admitted(on, masked_params(case, **sampling), case.ids))


def test_each_of_several_videos_has_a_seed_of_its_own() -> None:
    """The option that says whose they are is nobody else's."""
    load_general_plugins()
    on, case = processor(MASKED, is_masked=True), IMAGE_TO_VIDEO
    params = admitted(on, masked_params(case, n=3), case.ids)
    parent = ParentRequest(SimpleNamespace(request_id="a", external_req_id="a", params=params))
    children = [parent.get_child_info(index)[1] for index in range(3)]
    seed = case.extra_args["packcache_seed"]
    assert [child.extra_args["packcache_seed"] for child in children] == [seed, seed + 1, seed + 2]
    assert {child.extra_args[FORK_OPTION] for child in children} == {"a"}
    assert {child.n for child in children} == {1}
    alone = admitted(on, masked_params(case), case.ids)
    assert FORK_OPTION not in alone.extra_args
    last = masked_params(case.having(seed=2**64 - 2), n=3)
    assert "count up from packcache_seed (18446744073709551614)" in refusal(lambda: admitted(on, last, case.ids))
    forged = SamplingParams(extra_args={**case.extra_args, FORK_OPTION: "a"}, detokenize=False)
    assert FORK_OPTION in refusal(lambda: admitted(on, forged, case.ids))


def test_every_sampling_parameter_of_a_masked_model_is_thought_of() -> None:
    """One that a later vLLM adds must be put on one of these lists."""
    served = {
        "n", "max_tokens", "extra_args", "ignore_eos", "output_kind", "stream_interval", "skip_clone", "detokenize",
        # Of text, of which there is none here.
        "skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output",
        "output_text_buffer_length",
        # They go with others that are refused.
        "flat_logprobs", "prompt_logprob_start",
        # No prefix is cached, nothing is routed; a watermark that the server does not make is vLLM's to refuse.
        "skip_reading_prefix_cache", "routed_experts_prompt_start", "watermarking",
    }  # fmt: skip
    known = {name for name in SamplingParams.__struct_fields__ if not name.startswith("_")}
    assert known == served | set(plugin_masked.REFUSED)
    silent = SamplingParams()
    assert all(getattr(silent, name) in values for name, (values, _) in plugin_masked.REFUSED.items())


@pytest.mark.parametrize(
    "options",
    [
        {"diffusion_max_steps": 3},
        {"diffusion_canvas_length": CANVAS},
        {"steps": 3},
        {"packcache_steps": 1001},
        {"packcache_guidance": 1e308},
        {"packcache_guidance": float("nan")},
        {"packcache_temperature": 1e9},
        {"packcache_seed": -1},
        {"packcache_remask": -0.1},
    ],
    ids=str,
)
def test_a_masked_model_refuses_options(options: dict[str, Any]) -> None:
    on, case = processor(MASKED, is_masked=True), IMAGE_TO_VIDEO
    params = SamplingParams(extra_args={**case.extra_args, **options}, detokenize=False)
    assert next(iter(options)) in refusal(lambda: admitted(on, params, case.ids))


def test_a_masked_model_has_no_beam_search_and_no_sessions() -> None:
    on = processor(MASKED, is_masked=True)
    request, body = completion(use_beam_search=True)
    assert "use_beam_search" in refusal(lambda: of_client(on, request, body))
    case = CONTINUED
    message = refusal(lambda: admitted(on, masked_params(case), case.ids, resumable=True))
    assert "streamed input" in message
