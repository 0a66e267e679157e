"""What cannot be right is refused before a model loads, in one sentence that names the option."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_packcache.config.errors import ConfigError
from vllm_packcache.hooks import install as hooks
from vllm_packcache.hooks import startup as plugin

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 256,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "torch_dtype": "float32",
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "sliding-window": {**LLAMA, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 64},
    "mla": {
        **LLAMA, "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "kv_lora_rank": 32,
        "q_lora_rank": None, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32,
        "first_k_dense_replace": 2, "n_routed_experts": 4, "num_experts_per_tok": 2,
    },
    "mamba": {
        "architectures": ["MambaForCausalLM"], "model_type": "mamba", "hidden_size": 64, "state_size": 16,
        "num_hidden_layers": 2, "vocab_size": 256, "conv_kernel": 4, "expand": 2, "intermediate_size": 128,
    },
    "longrope": {**LLAMA, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
    "unrotated-layers": {
        **LLAMA, "architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "no_rope_layers": [1, 0],
    },
    "normed-after-rope": {
        **LLAMA, "architectures": ["HunYuanDenseV1ForCausalLM"], "model_type": "hunyuan_v1_dense",
    },
    "three-axes": {
        **LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
    },
    "learned-positions": {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4,
        "n_positions": 512, "vocab_size": 256,
    },
}  # fmt: skip


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Any]:
    """``start(model, additional_config, **options)``: make the engine's configuration; nothing is loaded."""
    from vllm.engine.arg_utils import EngineArgs

    plugin.register()

    def make(model: str = "llama", additional: dict[str, Any] | None = None, **options: Any) -> Any:
        (tmp_path / "config.json").write_text(json.dumps(MODELS[model]))
        additional = {"kv_cache_policy": "packcache"} if additional is None else additional
        arguments = EngineArgs(
            model=str(tmp_path),
            skip_tokenizer_init=True,
            enforce_eager=True,
            additional_config=additional,
            **options,
        )
        return arguments.create_engine_config()

    return make


def test_a_llama_starts(start: Callable[..., Any]) -> None:
    assert start().additional_config == {"kv_cache_policy": "packcache", "kv_cache_position_limit": 2048}


def test_a_file_is_read_once(start: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text("window: 3\n")
    config = start(additional={"kv_cache_policy": "packcache", "kv_cache_policy_config": str(file)})
    assert config.additional_config["kv_cache_policy_config"] == {"window": 3}


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("sliding-window", "has layers without full attention"),
        ("mla", "caches MLA latents, not keys and values"),
        ("mamba", "has layers that are not attention"),
        ("learned-positions", "has no rotary position embedding"),
    ],
)
def test_unsupported_models(start: Callable[..., Any], model: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"--kv-cache-policy: .* {reason}: serve a decoder"):
        start(model)
    start(model, additional={})


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "--speculative-config"),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "--kv-transfer-config",
        ),
        ({"kv_offloading_size": 1.0}, "--kv-offloading-size"),
        ({"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}, "--pipeline-parallel-size"),
    ],
)
def test_unsupported_options(start: Callable[..., Any], options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=f"cannot be combined with {named}, because"):
        start(**options)


def test_the_rust_front_end_is_refused(start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = start()
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(ConfigError, match=r"cannot be combined with VLLM_USE_RUST_FRONTEND=1.*: unset the variable"):
        plugin.check_engine(config)


def test_context_parallelism_is_refused(start: Callable[..., Any]) -> None:
    config = start()
    for name, option in (
        ("decode_context_parallel_size", "--decode-context-parallel-size"),
        ("prefill_context_parallel_size", "--prefill-context-parallel-size"),
    ):
        setattr(config.parallel_config, name, 2)
        with pytest.raises(ConfigError, match=option):
            plugin.check_engine(config)
        setattr(config.parallel_config, name, 1)


# --------------------------------------------------------------------------- positions


def policy(name: str = "packcache", **config: Any) -> dict[str, Any]:
    return {"kv_cache_policy": name, "kv_cache_policy_config": config}


def test_a_video_may_be_longer_than_the_model_has_positions(start: Callable[..., Any]) -> None:
    config = start(max_model_len=100_000)
    assert config.model_config.max_model_len == 100_000
    assert config.additional_config["kv_cache_position_limit"] == 2048
    assert start(max_model_len=1000).additional_config["kv_cache_position_limit"] == 2048


@pytest.mark.parametrize("additional", [{}, policy(positions="absolute"), policy("sliding_window"), policy("full")])
def test_nothing_else_may(start: Callable[..., Any], additional: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"User-specified max_model_len \(100000\) is greater"):
        start(max_model_len=100_000, additional=additional)
    # The next engine of this process is judged anew.
    start(max_model_len=100_000)
    with pytest.raises(ValueError, match=r"User-specified max_model_len \(100000\) is greater"):
        start(max_model_len=100_000, additional=additional)


def test_what_the_operator_vouches_for_is_the_limit(start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.envs

    # Once an engine runs in this process, vLLM no longer looks into the environment.
    monkeypatch.setitem(vars(vllm.envs), "VLLM_ALLOW_LONG_MAX_MODEL_LEN", True)
    assert start(max_model_len=5000).additional_config["kv_cache_position_limit"] == 5000


@pytest.mark.parametrize(
    ("model", "options", "reason"),
    [
        (
            "llama",
            {"kv_cache_dtype": "int4_per_token_head"},
            "each turn would lose of a key of 'int4_per_token_head' is",
        ),
        ("longrope", {}, r"has RoPE of type 'dynamic' \(known are default, linear, llama3, yarn\): set positions"),
        ("unrotated-layers", {}, "has layers without RoPE: set positions: absolute"),
        ("normed-after-rope", {}, "normalises keys after rotating them: set positions: absolute"),
    ],
)
def test_keys_that_cannot_be_rotated(
    start: Callable[..., Any], model: str, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(
        ConfigError, match=f"--kv-cache-policy-config: positions: rebase (rotates|turns) cached keys.* {reason}"
    ):
        start(model, **options)
    start(model, additional=policy(positions="absolute"), **options)


def test_axis_scale_needs_a_model_with_axes(start: Callable[..., Any]) -> None:
    layout = {"grid": [4, 4], "axis_scale": [4, 8, 8]}
    with pytest.raises(ConfigError, match=r"axis_scale is for positions with three axes, and .* has one: leave"):
        start(additional=policy(layout=layout))
    start("three-axes", additional=policy(layout=layout))


def test_a_decoder_encodes_no_frames(start: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"precision.history is for models that make frames in passes, and .* choose"):
        start(additional=policy(precision={"history": "int8"}))
    start(additional=policy(precision={"history": "auto"}))


def test_transformers_own_code_rotates_keys_itself(start: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"rotates them in Transformers' own code \(--model-impl\): set positions"):
        start(model_impl="transformers")
    start(model_impl="transformers", additional=policy(positions="absolute"))


def test_a_backend_that_is_named_and_of_unknown_layout(start: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"how attention backend HPC_ATTN stores them is not known: choose one of"):
        start(attention_backend="HPC_ATTN")
    start(attention_backend="HPC_ATTN", additional=policy(positions="absolute"))
    start(attention_backend="TRITON_ATTN")


@pytest.mark.parametrize(("on", "refused"), [("is_cpu", False), ("is_cuda", False), ("is_rocm", True)])
def test_platforms(start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, on: str, refused: bool) -> None:
    from vllm.platforms import current_platform

    config = start()
    for name in ("is_cpu", "is_cuda", "is_rocm"):
        monkeypatch.setattr(type(current_platform), name, lambda self, answer=name == on: answer)
    if refused:
        with pytest.raises(ConfigError, match=r"--kv-cache-policy needs a CPU or an NVIDIA GPU, and this platform is"):
            plugin.check_engine(config)
    else:
        plugin.check_engine(config)


@pytest.mark.parametrize(
    ("count", "rank", "lines"),
    [(1, 0, 1), (2, -1, 1), (2, 0, 0), (2, 1, 0)],
    ids=["alone", "parent", "first", "second"],
)
def test_one_process_says_that_it_is_on(
    start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, count: int, rank: int, lines: int
) -> None:
    logged: list[str] = []
    monkeypatch.setattr(plugin.logger, "info", lambda message, *args: logged.append(message % args))
    start(additional=policy(window=3), _api_process_count=count, _api_process_rank=rank)
    assert len(logged) == lines
    for line in logged:
        assert line.startswith(f"vllm-packcache {version('vllm-packcache')} is on: policy packcache {{")
        assert '"positions": "rebase"' in line
        assert '"window": 3' in line
    start(additional={})
    assert len(logged) == lines


def test_a_backend_of_unknown_layout_is_refused_before_weights_load(
    start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.attention import attention
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    monkeypatch.setattr(CPUAttentionBackend, "get_name", staticmethod(lambda: "ANOTHER"))
    arguments = {"head_size": 64, "dtype": torch.float32, "kv_cache_dtype": "auto"}
    with set_current_vllm_config(start()), pytest.raises(ConfigError, match="how attention backend ANOTHER stores"):
        attention.get_attn_backend(**arguments)
    with set_current_vllm_config(start(additional=policy(positions="absolute"))):
        attention.get_attn_backend(**arguments)


def test_a_format_that_the_backend_does_not_keep_is_refused_before_weights_load(start: Callable[..., Any]) -> None:
    """On a CPU vLLM takes any name, and stores something else."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.attention import attention

    arguments = {"head_size": 64, "dtype": torch.float32, "kv_cache_dtype": "int8_per_token_head"}
    for positions in ("rebase", "absolute"):
        config = start(additional=policy(positions=positions), kv_cache_dtype="int8_per_token_head")
        with (
            set_current_vllm_config(config),
            pytest.raises(ConfigError, match="is none of attention backend CPU_ATTN: choose one of auto, fp8"),
        ):
            attention.get_attn_backend(**arguments)


def test_either_runner_starts(start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = start()
    for v2 in (False, True):
        # On a GPU V2 is the default; without Triton vLLM itself would refuse to make such a configuration.
        monkeypatch.setattr(type(config), "use_v2_model_runner", property(lambda config, v2=v2: v2))
        plugin.check_engine(config)


@pytest.mark.parametrize(
    ("additional", "sentence"),
    [
        ({"kv_cache_policy": "nope"}, "kv_cache_policy: unknown policy 'nope': choose one of"),
        (
            {"kv_cache_policy_config": {"window": 3}},
            "kv_cache_policy_config is given without kv_cache_policy",
        ),
        (
            {"kv_cache_policy": "packcache", "kv_cache_policy_config": {"windows": 3}},
            "windows is no option of policy 'packcache'",
        ),
        (
            {"kv_cache_policy": "packcache", "kv_cache_policy_config": {"window": 0}},
            "window must be 1 or more",
        ),
    ],
)
def test_bad_configuration(start: Callable[..., Any], additional: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        start(additional=additional)


def test_unsupported_vllm_version(start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.40.1")
    hooks.version_error.cache_clear()
    try:
        with pytest.raises(ConfigError, match=r"vllm-packcache does not support vLLM 0\.40\.1: install vllm"):
            start()
        start(additional={})
    finally:
        hooks.version_error.cache_clear()
