"""The model class of Lumos-1 against its oracle, without an engine: attention reads the rows that it is given."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from vllm import ModelRegistry
from vllm.config import CacheConfig, DeviceConfig, ModelConfig, ParallelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_packcache.core.positions import Positions, mm_rope_axes
from vllm_packcache.families import lumos
from vllm_packcache.families.lumos import ARCHITECTURES
from vllm_packcache.models.lumos import LumosForConditionalGeneration, MMRotary, StreamAttention, rotate
from vllm_packcache.reference import LumosReference, make_random_lumos

ROUNDING = 1e-5
"""Relative to the largest number compared: what sums in another order may change in float32."""

SHAPES: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "swin_norm": {"swin_norm": True},
    "tied": {"tied": True},
    "one rank, three layers": {"model_parallel_size": 1, "layers": 3},
    "a norm for every head": {"kv_heads": 4, "model_parallel_size": 4},
    "one key-value head": {"kv_heads": 1, "model_parallel_size": 1, "rope_theta": 500_000.0},
    "codes that fill no shard": {"visual_codes": 70, "tied": True, "swin_norm": True},
}


class Stream(NamedTuple):
    """Rows of a batch that see each other."""

    ids: Tensor
    at: Tensor


def stream(grid: tuple[int, int], frame: int, seed: int) -> Stream:
    """A whole frame, its positions those of frame ``frame`` of a video."""
    codes = np.random.default_rng(seed).integers(0, 64, grid)
    layout = lumos.video_layout(lumos.text_prompt([7] * (20 + seed), 2, 12), grid)
    start = layout.frame_start(frame)
    tokens = np.arange(start, start + layout.tokens_per_frame)
    at = Positions(layout, scale=(4, 8, 8)).of(tokens, 0)
    return Stream(torch.from_numpy(lumos.frame_of_codes(codes)), torch.from_numpy(at))


CONDITIONAL = stream((5, 6), 900, seed=1)
UNCONDITIONAL = stream((4, 3), 2, seed=2)


def configured(folder: Path, dtype: str = "float32", ranks: int = 1) -> VllmConfig:
    for name in ARCHITECTURES:
        ModelRegistry.register_model(name, LumosForConditionalGeneration)
    # Where an engine has run in this process the plugin is there, which wants a runner for such a model.
    with patch.dict(MODELS_CONFIG_MAP, dict.fromkeys(ARCHITECTURES, VerifyAndUpdateConfig)):
        return VllmConfig(
            model_config=ModelConfig(model=str(folder), skip_tokenizer_init=True, dtype=dtype, max_model_len=4096),
            cache_config=CacheConfig(block_size=32),
            parallel_config=ParallelConfig(tensor_parallel_size=ranks),
            device_config=DeviceConfig("cpu"),
        )


def load(config: VllmConfig) -> Any:
    """What vLLM's loader does to a model, but for what needs a worker."""
    with set_current_vllm_config(config), set_default_torch_dtype(config.model_config.dtype):
        model = initialize_model(config)
        get_model_loader(config.load_config).load_weights(model, config.model_config)
        process_weights_after_loading(model, config.model_config, torch.device("cpu"))
    return model


def among_themselves(attention: StreamAttention, *rows: Tensor) -> Tensor:
    """Instead of `Attention.forward`: every row sees all rows of this call."""
    queries, keys, values = (part.reshape(len(part), -1, attention.head_size).transpose(0, 1) for part in rows)
    read = scaled_dot_product_attention(queries, keys, values, scale=attention.impl.scale, enable_gqa=True)
    return read.transpose(0, 1).flatten(1)


def both_streams(model: Any, config: VllmConfig) -> tuple[Tensor, Tensor]:
    """Hidden states and logits of `CONDITIONAL` and `UNCONDITIONAL` in one batch."""
    ids = torch.cat([CONDITIONAL.ids, UNCONDITIONAL.ids])
    at = torch.cat([CONDITIONAL.at, UNCONDITIONAL.at], 1)
    with set_current_vllm_config(config), torch.inference_mode():
        hidden = model(ids, at, conditional_rows=len(CONDITIONAL.ids))
        return hidden, model.visual_logits(model.compute_logits(hidden))


def expected(folder: Path) -> tuple[Tensor, Tensor]:
    """The same of the oracle, a stream after the other."""
    model = LumosReference.load(folder)
    with torch.inference_mode():
        parts = []
        for ids, at in (CONDITIONAL, UNCONDITIONAL):
            seen = torch.ones(len(ids), len(ids), dtype=torch.bool)
            parts.append(model.run(ids, 0, model.new_cache(len(ids)), at, seen))
        hidden = torch.cat(parts)
        return hidden, model.visual_logits(hidden)


def assert_rounded(actual: Tensor, wanted: Tensor) -> None:
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, wanted, rtol=0, atol=ROUNDING * float(wanted.abs().max()))


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """Models are gone with their test: on the way out vLLM's linear layers ask tensors, and while torch traces they
    must not."""
    yield
    gc.collect()


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> None:
    """vLLM's process groups; engines of the same process use them too, so they stay."""
    os.environ.setdefault("VLLM_DIST_IDENT", "tests_models")
    with set_current_vllm_config(VllmConfig(device_config=DeviceConfig("cpu"))):
        init_distributed_environment(1, 0, f"file://{tmp_path_factory.mktemp('groups')}/one", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)


@pytest.fixture
def plain_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StreamAttention, "forward", among_themselves)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_lumos(tmp_path_factory.mktemp("lumos"))


@pytest.fixture
def changed(folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """``changed(config, weights)`` -> a copy with other entries; a weight that is None is left out."""

    def change(config: dict[str, Any] | None = None, weights: dict[str, Tensor | None] | None = None) -> Path:
        entries = json.loads((folder / "config.json").read_text()) | (config or {})
        (tmp_path / "config.json").write_text(json.dumps(entries))
        tensors = load_file(folder / "model.safetensors") | (weights or {})
        save_file(
            {name: tensor for name, tensor in tensors.items() if tensor is not None}, tmp_path / "model.safetensors"
        )
        return tmp_path

    return change


# --------------------------------------------------------------------------- what is computed


@pytest.mark.usefixtures("plain_attention")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_both_streams_are_the_oracles(tmp_path: Path, shape: dict[str, Any]) -> None:
    folder = make_random_lumos(tmp_path, seed=3, architecture=ARCHITECTURES[len(shape) % 2], **shape)
    config = configured(folder)

    for actual, wanted in zip(both_streams(load(config), config), expected(folder), strict=True):
        assert_rounded(actual, wanted)


@pytest.mark.usefixtures("plain_attention")
def test_a_batch_of_one_stream_asks_only_that(folder: Path) -> None:
    config = configured(folder)
    model = load(config)
    unconditional = [layer.self_attn.unconditional_attn for layer in model.model.layers]
    for attention in unconditional:
        attention.forward = None  # to call it would be an error
    (ids, at), rows = CONDITIONAL, len(CONDITIONAL.ids)

    with set_current_vllm_config(config), torch.inference_mode():
        default = model(ids, at)
        told = model(None, at, inputs_embeds=model.embed_input_ids(ids), conditional_rows=rows)

    assert_rounded(default, expected(folder)[0][:rows])
    assert torch.equal(default, told)


@pytest.mark.usefixtures("plain_attention")
@pytest.mark.parametrize("tied", [False, True])
def test_bfloat16_is_close(tmp_path: Path, tied: bool) -> None:
    """Of the hidden states eight bits are left; the logits of these are exact."""
    folder = make_random_lumos(tmp_path, tied=tied)
    config = configured(folder, "bfloat16")
    model = load(config)

    hidden, logits = both_streams(model, config)

    assert {parameter.dtype for name, parameter in model.named_parameters() if "qk_norm" not in name} == {
        torch.bfloat16
    }
    assert hidden.dtype == torch.bfloat16
    wanted, _ = expected(folder)
    assert (hidden.float() - wanted).norm() < 0.05 * wanted.norm()
    source = load_file(folder / "model.safetensors")["model.embed_tokens.weight" if tied else "lm_head.weight"]
    assert_rounded(logits, hidden.float() @ source[lumos.VISUAL_BEGIN :].bfloat16().float().T)


# --------------------------------------------------------------------------- rotation


@pytest.mark.parametrize(("head_dim", "theta"), [(32, 10_000.0), (128, 500_000.0)])
def test_heads_turn_as_the_oracles_to_the_last_bit(tmp_path: Path, head_dim: int, theta: float) -> None:
    """Also far into a video, where a frequency that is off by one bit turns by another angle."""
    folder = make_random_lumos(tmp_path, head_dim=head_dim, rope_theta=theta, layers=1)
    torch.manual_seed(0)
    heads, at = torch.randn(50, 4, head_dim), torch.randint(0, 100_000, (3, 50))

    assert torch.equal(rotate(heads, MMRotary(head_dim, theta)(at)), LumosReference.load(folder).rotate(heads, at))


def test_the_model_says_how_keys_are_turned(folder: Path) -> None:
    """Turned on by ``shift * frequencies`` a key is where it would be at its new position."""
    frequencies, axis_of = load(configured(folder)).rotary
    assert frequencies.dtype == np.float64
    assert axis_of.tolist() == mm_rope_axes(16).tolist()
    heads, at, shift = torch.randn(1, 1, 32), torch.tensor([[300], [40], [50]]), torch.tensor([[-80], [3], [11]])
    rotary = MMRotary(32, 10_000.0)
    pairs = torch.view_as_complex(torch.stack(rotate(heads, rotary(at)).double().chunk(2, -1), -1))

    turned = pairs * torch.from_numpy(np.exp(1j * shift[axis_of, 0].numpy() * frequencies))

    wanted = torch.cat([turned.real, turned.imag], -1).float()
    torch.testing.assert_close(rotate(heads, rotary(at + shift)), wanted, atol=1e-4, rtol=0)


# --------------------------------------------------------------------------- what is loaded


@pytest.mark.usefixtures("plain_attention")
def test_a_checkpoint_may_come_in_parts(folder: Path, tmp_path: Path) -> None:
    """Queries and keys of a layer, which are one parameter here, in different files."""
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    where = {name: f"model-0000{1 + index % 3}-of-00003.safetensors" for index, name in enumerate(sorted(tensors))}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in tensors if where[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    config = configured(tmp_path)

    assert_rounded(both_streams(load(config), config)[1], expected(folder)[1])


@pytest.mark.usefixtures("plain_attention")
def test_what_is_not_of_the_decoder_is_passed_over(folder: Path, changed: Callable[..., Path]) -> None:
    unused = {
        "model.vqmodel.quantize.embedding.weight": torch.zeros(4, 4),
        "model.vqmodel.quant_conv.bias": torch.zeros(4),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(16),
    }
    config = configured(changed(weights=unused))

    assert_rounded(both_streams(load(config), config)[1], expected(folder)[1])


@pytest.mark.usefixtures("plain_attention")
def test_an_output_layer_that_is_there_is_used(folder: Path, changed: Callable[..., Path]) -> None:
    """Whatever the config says of it: transformers and vLLM believe the weights."""
    config = configured(changed({"tie_word_embeddings": True}))

    assert_rounded(both_streams(load(config), config)[1], expected(folder)[1])


@pytest.mark.parametrize(
    ("weights", "error"),
    [
        # Parts of what is one parameter here, and of what vLLM's loader takes for made after loading.
        ({"model.layers.1.self_attn.k_proj.weight": None}, r"lacks model\.layers\.1\.self_attn\.k_proj\.weight"),
        ({"model.layers.0.self_attn.q_norm.bias": None}, r"lacks model\.layers\.0\.self_attn\.q_norm\.bias"),
        ({"lm_head.weight": None, "model.norm.weight": None}, r"lacks lm_head\.weight, model\.norm\.weight"),
        ({"model.layers.0.mlp.extra.weight": torch.zeros(2)}, r"has a tensor model\.layers\.0\.mlp\.extra\.weight"),
        ({"model.layers.0.self_attn.q_proj.bias": torch.zeros(128)}, r"has a tensor .*q_proj\.bias"),
        ({"model.layers.2.input_layernorm.weight": torch.ones(128)}, r"has a tensor model\.layers\.2\."),
        ({"model.layers.0.self_attn.k_norm.weight": torch.ones(4, 32)}, r"k_norm\.weight has shape \(4, 32\)"),
        ({"model.layers.0.self_attn.q_norm.bias": torch.ones(32)}, r"q_norm\.bias has shape \(32,\)"),
        ({"model.layers.0.self_attn.q_norm.bias": torch.ones(2, 1)}, r"q_norm\.bias has shape \(2, 1\)"),
    ],
)
def test_another_set_of_weights_is_refused(changed: Callable[..., Path], weights: dict[str, Any], error: str) -> None:
    config = configured(changed(weights=weights))

    with pytest.raises(ValueError, match=error):
        load(config)


@pytest.mark.parametrize(
    ("entries", "error"),
    [
        ({"mm_rope": False}, "mm_rope"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type"),
        ({"vocab_size": 65_536}, "vocab_size is 65536"),
        ({"num_attention_heads": 8}, "head_dim is 16"),
    ],
)
def test_another_model_is_refused(changed: Callable[..., Path], entries: dict[str, Any], error: str) -> None:
    config = configured(changed(entries))

    with pytest.raises(ValueError, match=error):
        load(config)


class Recording(QuantizationConfig):
    """Quantises nothing, and notes which layers it was asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: set[str] = set()

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        self.asked.add(prefix)
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None

    def get_name(self) -> Any:
        return "recording"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Recording:
        return cls()


@pytest.mark.usefixtures("plain_attention")
def test_quantisation_is_asked_about_every_linear_layer(folder: Path) -> None:
    config = configured(folder)
    config.quant_config = quantisation = Recording()

    logits = both_streams(load(config), config)[1]

    linears = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    assert {f"model.layers.{layer}.{name}" for layer in (0, 1) for name in linears} <= quantisation.asked
    assert quantisation.packed_modules_mapping["qkv_proj"] == ["q_proj", "k_proj", "v_proj"]
    assert_rounded(logits, expected(folder)[1])


# --------------------------------------------------------------------------- caches


def test_every_layer_has_a_cache_for_either_stream(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(stream_spec=lambda *arguments: arguments)
    monkeypatch.setitem(sys.modules, "vllm_packcache.engine.spec", module)  # type: ignore[arg-type]
    config = configured(folder)
    load(config)

    layers = config.compilation_config.static_forward_context
    told = {name: layer.get_kv_cache_spec(config) for name, layer in layers.items()}

    assert {name: stream for name, (_, _, stream) in told.items()} == {
        f"model.layers.{layer}.self_attn.{name}": int(name != "attn")
        for layer in (0, 1)
        for name in ("attn", "unconditional_attn")
    }
    for spec, given, _ in told.values():
        assert spec == FullAttentionSpec(block_size=32, num_kv_heads=2, head_size=32, dtype=torch.float32)
        assert given is config


BLOCK_SIZE, BLOCKS = 32, 8


def unmasked(frames: list[Stream], spec: FullAttentionSpec, names: list[str], config: VllmConfig) -> Any:
    """What vLLM's CPU backend is told of the last of ``frames``: it sees them all, and itself from end to end."""
    lengths = [len(frame.ids) for frame in frames]
    end, new = sum(lengths), lengths[-1]
    starts, at = torch.tensor([0, new], dtype=torch.int32), torch.arange(end - new, end)
    common = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor([end], dtype=torch.int32),
        num_reqs=1,
        num_actual_tokens=new,
        max_query_len=new,
        max_seq_len=end,
        block_table_tensor=torch.arange(BLOCKS - 1, 0, -1, dtype=torch.int32)[None],  # so that a slot is no index
        slot_mapping=(BLOCKS - 1 - at // BLOCK_SIZE) * BLOCK_SIZE + at % BLOCK_SIZE,
        causal=False,
    )
    return CPUAttentionMetadataBuilder(spec, names, config, torch.device("cpu")).build(0, common)


def test_a_stream_sees_its_own_history_in_vllms_caches(folder: Path) -> None:
    """Two frames of each through vLLM's own attention, at the same blocks of their two caches."""
    videos = {
        "attn": [stream((5, 6), 0, seed=1), stream((5, 6), 1, seed=2)],
        "unconditional_attn": [stream((4, 3), 0, seed=3), stream((4, 3), 1, seed=4)],
    }
    config, oracle = configured(folder), LumosReference.load(folder)
    model = load(config)
    layers = config.compilation_config.static_forward_context
    spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=2, head_size=32, dtype=torch.float32)
    for layer in layers.values():
        layer.kv_cache = torch.zeros(BLOCKS, 2, BLOCK_SIZE, 2 * 32)
    caches = {kind: oracle.new_cache(sum(len(frame.ids) for frame in frames)) for kind, frames in videos.items()}

    for frame in range(2):
        metadata, parts = {}, []
        for kind, frames in videos.items():
            names = [name for name in layers if name.endswith(f".{kind}")]
            metadata |= dict.fromkeys(names, unmasked(frames[: frame + 1], spec, names, config))
            at = torch.cat([earlier.at for earlier in frames[: frame + 1]], 1)
            ids, length = frames[frame].ids, at.shape[1]
            seen = torch.ones(len(ids), length, dtype=torch.bool)
            parts.append(oracle.run(ids, length - len(ids), caches[kind], at, seen))
        conditional, unconditional = (frames[frame] for frames in videos.values())
        ids, at = torch.cat([conditional.ids, unconditional.ids]), torch.cat([conditional.at, unconditional.at], 1)
        slots = {name: told.slot_mapping for name, told in metadata.items()}
        with set_forward_context(metadata, config, num_tokens=len(ids), slot_mapping=slots), torch.inference_mode():
            hidden = model(ids, at, conditional_rows=len(conditional.ids))
        assert_rounded(hidden, torch.cat(parts))


# --------------------------------------------------------------------------- tensor parallel


def rank_of_two(rank: int, folders: list[Path], out: Path) -> None:
    os.environ["VLLM_DIST_IDENT"] = f"tests_models_{os.getppid()}"
    torch.set_num_threads(1)
    torch._dynamo.config.disable = True  # vLLM's sharded embedding is compiled, which takes longer than all of this
    StreamAttention.forward = among_themselves  # type: ignore[method-assign]
    configs = [configured(folder, ranks=2) for folder in folders]
    with set_current_vllm_config(configs[0]):
        init_distributed_environment(2, rank, f"file://{out}/groups", rank, "gloo")
        ensure_model_parallel_initialized(2, 1)
    torch.save([both_streams(load(config), config) for config in configs], out / f"{rank}.pt")


def test_two_ranks_compute_what_one_does(tmp_path: Path) -> None:
    """Of one key-value head each has a copy, of two one; every rank has all logits."""
    shapes = ["a norm for every head", "tied", "one key-value head", "codes that fill no shard"]
    folders = [make_random_lumos(tmp_path / name, seed=3, **SHAPES[name]) for name in shapes]

    torch.multiprocessing.spawn(rank_of_two, (folders, tmp_path), nprocs=2)

    for rank in range(2):
        for folder, told in zip(folders, torch.load(tmp_path / f"{rank}.pt"), strict=True):
            for actual, wanted in zip(told, expected(folder), strict=True):
                assert_rounded(actual, wanted)
