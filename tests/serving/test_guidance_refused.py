"""Servers that could not guide a video are refused before anything loads, in one sentence with the remedy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.serving.conftest import PAPERS, prompt, run, sampling
from vllm_packcache.config.errors import ConfigError
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.hooks.causal import check_guidance, check_guided


def test_on_the_v1_runner(engine: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"guidance needs vLLM's Model Runner V2, .*: leave VLLM_USE_V2_MODEL_RUNNER=0"
    ):
        engine("packcache", {**PAPERS, "guidance": True})


def test_a_request_on_the_v1_runner(engine: Any) -> None:
    options = {"tokens_per_frame": 20, "guidance": 2, "negative_prompt_ids": [1, 2]}
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match="start it on vLLM's Model Runner V2 with guidance: true"):
        run(engine("packcache", PAPERS), [prompt(40)], [sampling(5, **options)])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lora_config": object()}, "cannot be combined with --enable-lora"),
        ({"parallel_config.enable_expert_parallel": True}, "cannot be combined with --enable-expert-parallel"),
        (
            {"parallel_config.data_parallel_size": 2, "parallel_config.is_moe_model": True},
            "cannot be combined with --enable-expert-parallel or --data-parallel-size of a model with experts",
        ),
        (
            {"parallel_config.enable_batch_sharded_sampling": True},
            "cannot be combined with --enable-batch-sharded-sampling",
        ),
        ({"model_config.is_multimodal_model": True}, "is for models of token ids with one axis of positions"),
        ({"model_config.uses_mrope": True}, "is for models of token ids with one axis of positions"),
        ({"parallel_config.data_parallel_size": 2}, None),
    ],
)
def test_what_a_server_cannot_guide(changed: dict[str, Any], message: str | None) -> None:
    model = SimpleNamespace(model="a", is_multimodal_model=False, uses_mrope=False)
    parallel = SimpleNamespace(
        enable_expert_parallel=False, data_parallel_size=1, is_moe_model=False, enable_batch_sharded_sampling=None
    )
    vllm_config: Any = SimpleNamespace(
        use_v2_model_runner=True, lora_config=None, model_config=model, parallel_config=parallel
    )
    for path, value in changed.items():
        owner, _, name = path.rpartition(".")
        setattr(getattr(vllm_config, owner) if owner else vllm_config, name, value)
    if message is None:
        check_guidance(vllm_config)
        return
    with pytest.raises(ConfigError, match=message):
        check_guidance(vllm_config)


def test_what_is_not_for_a_guided_request() -> None:
    server = ServerConfig.parse("packcache", {**PAPERS, "guidance": True})
    params = sampling(5, tokens_per_frame=20, guidance=2, negative_prompt_ids=[1, 2])
    made = server.request(params.extra_args, 40)
    assert made is not None
    model = SimpleNamespace(get_vocab_size=lambda: 256, max_model_len=100)
    vllm_config: Any = SimpleNamespace(model_config=model)
    request: Any = SimpleNamespace(sampling_params=params, prompt_token_ids=[0] * 40)
    check_guided(request, made, vllm_config, 45)
    params.structured_outputs = object()
    with pytest.raises(ConfigError, match="packcache_guidance cannot be combined with structured outputs"):
        check_guided(request, made, vllm_config, 45)
    request.prompt_token_ids = None
    with pytest.raises(ConfigError, match="packcache_guidance is for prompts of token ids"):
        check_guided(request, made, vllm_config, 45)
