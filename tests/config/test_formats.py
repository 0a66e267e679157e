"""Formats of the KV cache: what is said of them is what vLLM's own source says."""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
import vllm
from vllm.config.cache import CacheDType
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import FullAttentionSpec, get_kv_quant_mode

from vllm_packcache.config import formats
from vllm_packcache.config.errors import ConfigError
from vllm_packcache.config.formats import CANVAS_BACKENDS, ELSEWHERE, FORMATS, Format, Machine
from vllm_packcache.worker.keys.layout import BACKENDS

KEEPERS = sorted({keeper.backend for own in FORMATS.values() for keeper in own.keepers})
CARDS = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)]


def each_format() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("own", FORMATS.values(), ids=FORMATS)


def source_of(module: str) -> ast.Module:
    path = Path(vllm.__file__).parents[1] / (module.replace(".", "/") + ".py")
    return ast.parse(path.read_text(encoding="utf-8"))


def class_of(backend: str) -> ast.ClassDef:
    """Read, not imported: those of GPUs need packages that are not here."""
    module, _, name = AttentionBackendEnum[backend].value.rpartition(".")
    return next(node for node in source_of(module).body if isinstance(node, ast.ClassDef) and node.name == name)


def text_of(backend: str, method: str) -> str:
    """A method of a backend without comments."""
    body = class_of(backend).body
    return ast.unparse(next(node for node in body if isinstance(node, ast.FunctionDef) and node.name == method))


def _on(name: str, backend: str, card: tuple[int, int]) -> bool:
    return any(keeper.backend == backend and keeper.runs_on(Machine(card)) for keeper in FORMATS[name].keepers)


# --------------------------------------------------------------------------- what vLLM says


def test_every_format_of_vllm_is_known() -> None:
    assert {*FORMATS, *ELSEWHERE} == set(get_args(CacheDType))
    assert not set(FORMATS) & set(ELSEWHERE)


@pytest.mark.parametrize("backend", KEEPERS)
def test_backends_keep_what_they_say(backend: str) -> None:
    said = next(
        node.value
        for node in class_of(backend).body
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "supported_kv_cache_dtypes"
    )
    kept = {own.name for own in FORMATS.values() if any(keeper.backend == backend for keeper in own.keepers)}
    assert kept == set(ast.literal_eval(said))  # type: ignore[arg-type]


@each_format()
@pytest.mark.parametrize("head_size", [64, 96, 128, 256])
def test_bytes_are_those_of_a_page(own: Format, head_size: int) -> None:
    """With the backend's own packing; FlashInfer's class does not import here, and its formula is read."""
    from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype

    for dtype in (torch.bfloat16, torch.float32):
        stored: Any = kv_cache_dtype_str_to_dtype(own.name, SimpleNamespace(dtype=dtype))
        spec: Any = FullAttentionSpec(
            block_size=16, num_kv_heads=3, head_size=head_size, dtype=stored, kv_quant_mode=get_kv_quant_mode(own.name)
        )
        backend = own.keepers[-1].backend
        if own.name.startswith("nvfp4"):
            assert "num_head_slots=2 * spec.num_kv_heads" in text_of(backend, "customize_spec")
            assert "state_content_bytes=hs_k * get_dtype_size(spec.dtype)" in text_of(backend, "customize_spec")
            utils: Any = import_module("vllm.utils.torch_utils")
            pair = 2 * utils.nvfp4_kv_cache_full_dim(head_size) * stored.itemsize
        elif backend in ("TRITON_ATTN", "TURBOQUANT"):
            spec = AttentionBackendEnum[backend].get_class().customize_spec(spec)
            pair = spec.page_size_bytes // (3 * 16)
        else:
            pair = spec.page_size_bytes // (3 * 16)
        assert own.pair_bytes(head_size, dtype.itemsize) == pair


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 5, 28])
def test_turboquant_spares_the_first_and_the_last_layers(layers: int) -> None:
    from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig

    config = SimpleNamespace(is_hybrid=False, hf_text_config=SimpleNamespace(num_hidden_layers=layers))
    spared = len(TurboQuantConfig.get_boundary_skip_layers(config))  # type: ignore[arg-type]
    own = FORMATS["turboquant_4bit_nc"]
    assert own.token_bytes(layers, 3, 128, 2) == 3 * (spared * 512 + (layers - spared) * own.pair_bytes(128, 2))


@pytest.mark.parametrize("name", [name for name in FORMATS if any(_on(name, "TRITON_ATTN", card) for card in CARDS)])
@pytest.mark.parametrize("card", CARDS, ids=str)
def test_tritons_cards(name: str, card: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether its implementation lets itself be made, and what an 8-bit float is to it."""
    module: Any = import_module("vllm.v1.attention.backends.triton_attn")
    number = 10 * card[0] + card[1]
    platform = SimpleNamespace(
        is_cuda=lambda: True,
        is_xpu=lambda: False,
        fp8_dtype=lambda: torch.float8_e4m3fn,
        get_device_name=lambda: "a card",
        get_device_capability=lambda: SimpleNamespace(as_version_str=lambda: str(card), to_int=lambda: number),
        has_device_capability=lambda wanted: number >= wanted,
    )
    monkeypatch.setattr(module, "current_platform", platform)
    try:
        made = module.TritonAttentionImpl(4, 64, 1.0, 4, None, None, name)
    except ValueError:
        made = None
    assert (made is not None) == _on(name, "TRITON_ATTN", card)
    if made is not None and name in ("fp8", "fp8_e4m3", "fp8_e5m2"):
        stored = FORMATS[name].numbers_in("TRITON_ATTN")
        assert stored is not None
        assert made.fp8_dtype == getattr(torch, stored)


def test_tritons_platform_prefers_e4m3() -> None:
    """On every platform that the plugin serves, whatever the format's name says."""
    from vllm.platforms.interface import Platform

    assert Platform.fp8_dtype() == torch.float8_e4m3fn
    text = ast.unparse(source_of("vllm.platforms.cuda")) + ast.unparse(source_of("vllm.platforms.cpu"))
    assert "def fp8_dtype" not in text


@pytest.mark.parametrize("card", CARDS, ids=str)
def test_flash_attentions_cards(card: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """With the version that vLLM takes of itself on each."""
    module: Any = import_module("vllm.v1.attention.backends.fa_utils")
    version = {9: 3, 10: 4}.get(card[0], 2)
    monkeypatch.setattr(module, "get_flash_attn_version", lambda **_: version)
    platform = SimpleNamespace(is_xpu=lambda: False, is_device_capability_family=lambda family: card[0] == family // 10)
    monkeypatch.setattr(module, "current_platform", platform)
    least = "return capability >= DeviceCapability(8, 0)"
    assert least in text_of("FLASH_ATTN", "supports_compute_capability")
    for own in FORMATS.values():
        for keeper in own.keepers:
            if keeper.backend == "FLASH_ATTN":
                can = card >= (8, 0) and (own.numbers is None or module.flash_attn_supports_kv_cache_dtype(own.name))
                assert keeper.runs_on(Machine(card)) == can
    assert not module.flash_attn_supports_kv_cache_dtype("fp8_e5m2")


def test_flashinfers_cards() -> None:
    limits = "return capability >= DeviceCapability(8, 0) and capability <= DeviceCapability(12, 1)"
    assert limits in text_of("FLASHINFER", "supports_compute_capability")
    text = ast.unparse(source_of("vllm.v1.attention.backends.flashinfer"))
    assert "any((current_platform.is_device_capability_family(f) for f in (80, 90, 120)))" in text
    four = text_of("FLASHINFER", "supports_kv_cache_dtype")
    assert "if _nvfp4_kv_on_fa2():\n            return kv_cache_dtype == 'nvfp4'" in four
    assert "return current_platform.is_device_capability_family(100) and" in four
    cards = {
        name: [card for card in CARDS if _on(name, "FLASHINFER", card)] for name in ("fp8", "nvfp4", "nvfp4_4over6")
    }
    assert cards == {"fp8": CARDS[1:], "nvfp4": CARDS[1:], "nvfp4_4over6": [(10, 0), (10, 3)]}


@pytest.mark.parametrize("wide", [True, False])
def test_cpus(wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = import_module("vllm.v1.attention.backends.cpu_attn")
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: wide)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for own in FORMATS.values():
        for keeper in own.keepers:
            if keeper.backend != "CPU_ATTN":
                assert not keeper.runs_on(Machine(None, wide))
                continue
            try:
                module._get_attn_isa(torch.float32, 32, 64, own.name)
                can = True
            except NotImplementedError:
                can = False
            assert keeper.runs_on(Machine(None, wide)) == can


def test_four_bits_of_triton_are_causal_only() -> None:
    text = ast.unparse(source_of("vllm.v1.attention.ops.triton_unified_attention"))
    assert "INT4_PER_TOKEN_HEAD only supports causal attention" in text
    assert "supports_non_causal" not in ast.unparse(class_of("TURBOQUANT"))


# --------------------------------------------------------------------------- what the plugin makes of it


def test_backends_of_models_under_a_policy_are_known() -> None:
    assert {keeper.backend for own in FORMATS.values() if not own.loses for keeper in own.keepers} == set(BACKENDS)
    assert set(CANVAS_BACKENDS) < set(BACKENDS)


def test_triton_stores_e4m3_under_either_name() -> None:
    assert FORMATS["fp8_e5m2"].numbers_in("TRITON_ATTN") == "float8_e4m3fn"
    assert FORMATS["fp8_e5m2"].numbers_in("CPU_ATTN") == FORMATS["fp8_e5m2"].numbers_in("FLASHINFER") == "float8_e5m2"


def test_an_a40_has_integers() -> None:
    """And no 8-bit floats but FlashInfer's."""
    here = {
        own.name: [keeper.backend for keeper in own.keepers if keeper.runs_on(Machine((8, 6)))]
        for own in FORMATS.values()
        if own.numbers
    }
    assert here == {
        "fp8": ["FLASHINFER"],
        "fp8_e4m3": ["FLASHINFER"],
        "fp8_e5m2": ["FLASHINFER"],
        "int8_per_token_head": ["TRITON_ATTN"],
        "fp8_per_token_head": [],
    }


@each_format()
def test_keys_of_eight_bits_or_more_are_turned(own: Format) -> None:
    eight = own.key_bits is None or own.key_bits >= 8
    if own.name == "turboquant_k8v4":
        eight = False  # Where its keys lie is not known.
    assert eight == (not own.loses)
    if eight:
        formats.check_turned(own.name)
        return
    with pytest.raises(ConfigError) as refused:
        formats.check_turned(own.name)
    much = "not known" if own.loses == formats.UNKNOWN else f"too much, an error of {own.loses} after the first"
    assert str(refused.value).startswith(
        "positions: rebase turns cached keys in place, and what each turn would lose of a key of "
        f"'{own.name}' is {much}: choose auto or 8 bits (fp8, "
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("int4_per_token_head", "vLLM reads it with causal attention only, and a frame sees all of itself"),
        ("turboquant_k8v4", "vLLM reads it with causal attention only, and a frame sees all of itself"),
        ("nvfp4", "none of CPU_ATTN, FLASH_ATTN, TRITON_ATTN keeps it"),
        ("ultraquant_4bit", "none of CPU_ATTN, FLASH_ATTN, TRITON_ATTN keeps it"),
    ],
)
def test_formats_that_masked_models_cannot_read(name: str, words: str) -> None:
    with pytest.raises(
        ConfigError, match=f"^--kv-cache-dtype '{name}' is not for models that make whole frames: {words}"
    ):
        formats.check_masked(name)


def test_formats_that_masked_models_can_read() -> None:
    for name in ("auto", "bfloat16", "fp8_e4m3", "fp8_e5m2", "int8_per_token_head", "fp8_per_token_head"):
        formats.check_masked(name)


def test_what_a_backend_does_not_keep_is_refused() -> None:
    with pytest.raises(ConfigError) as refused:
        formats.check_kept("int8_per_token_head", "CPU_ATTN")
    assert str(refused.value) == (
        "--kv-cache-dtype 'int8_per_token_head' is none of attention backend CPU_ATTN: choose one of auto, fp8, "
        "fp8_e4m3, fp8_e5m2, or another backend with --attention-backend on a GPU"
    )
    formats.check_kept("int8_per_token_head", "TRITON_ATTN")
    formats.check_kept("int8_per_token_head", "ANOTHER")


@pytest.mark.parametrize(
    ("name", "words"),
    [("fp8_inc", r"not 'fp8_inc': it is for Gaudi$"), ("x" * 99, "must be one of auto, float16, .*, not 'x+…")],
)
def test_other_names_are_refused(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        formats.find(name)
    assert len(str(refused.value)) < 400
