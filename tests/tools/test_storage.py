"""Bytes in `vllm-packcache explain`: what is said of a model, and what the streams take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.tools.test_explain import TINY, TINY_OPTIONS, run
from vllm_packcache.cli import app
from vllm_packcache.config.errors import ConfigError
from vllm_packcache.config.formats import FORMATS
from vllm_packcache.core.packing import HISTORY_FORMATS, Packing
from vllm_packcache.tools.explain import explain
from vllm_packcache.tools.storage import Shape, Storage, shown_bytes, storage

MODEL = ["--layers", "3", "--kv-heads", "2", "--head-size", "64"]
TINY_BYTES = """\
        ┌blocks───────┐ live of full      held  positions
frame 0 │C##          │  24  100 %  36.0 KiB   8
frame 1 │C11##        │  40  100 %  60.0 KiB   8 24
frame 2 │C2211##      │  56  100 %  84.0 KiB   8 24 40
frame 3 │C3·2·11##    │  56   78 %  84.0 KiB   8 24 40 56
frame 4 │C··3·2·11##  │  56   64 %  84.0 KiB   8 24 40 56
frame 5 │C····3·2·11##│  56   54 %  84.0 KiB   8 24 40 56

Blocks are dropped from frame 3 on; frame 5 reads 56 of 104 tokens, 54 % of the full cache.
Positions stay below 72 however long the video gets.

A token takes 1,536 bytes: 3 layers of 2 keys and values of 64, bfloat16.

The condition takes 12.0 KiB, a whole frame 24.0 KiB.

Blocks are held whole: at most 7, 84.0 KiB. The full cache takes 156 KiB: 54 %.
"""
"""3 layers x 2 heads x (64 + 64) numbers x 2 bytes = 1,536 bytes a token; 56 tokens are 86,016 bytes = 84 KiB."""


def test_bytes_of_a_small_video_are_exact() -> None:
    assert run(TINY, *TINY_OPTIONS, *MODEL).endswith(TINY_BYTES)


def test_bytes_of_a_format_stand_beside_those_of_the_model() -> None:
    """3 x 2 x (64 + 64 + 8) = 816 bytes a token: 44.6 KiB of 56 tokens, 82.9 KiB of 104."""
    output = run(TINY, *TINY_OPTIONS, *MODEL, "--kv-cache-dtype", "int8_per_token_head")
    assert (
        "A token takes 816 bytes: 3 layers of 2 keys and values of 64, int8_per_token_head; in bfloat16 1,536."
        in output
    )
    assert "at most 7, 44.6 KiB. The full cache takes 82.9 KiB: 54 %; in bfloat16 156 KiB: 29 %." in " ".join(
        output.split()
    )


@pytest.mark.parametrize("columns", [40, 80, 200])
@pytest.mark.parametrize("preset", ["demo", "lumos1_384p"])
def test_lines_with_bytes_fit_the_terminal(preset: str, columns: int) -> None:
    output = run(preset, *MODEL, columns=columns)
    assert max(map(len, output.splitlines())) <= columns
    # In the sentences, and beside each frame of each stream where there is room.
    assert output.count("iB") == {"demo": 4 + 12, "lumos1_384p": 4 + 24}[preset] if columns > 40 else 4


def test_both_streams_count() -> None:
    """Each has blocks of its own, and a condition of its own."""
    stored = Storage(Shape(28, 8, 128), "bfloat16", FORMATS["int8_per_token_head"])
    explanation = explain("lumos1_384p", "packcache", frames=5, stored=stored)
    blocks = [stream.overview.blocks for stream in explanation.streams.values()]
    assert len(blocks) == 2
    most = max(map(sum, zip(*blocks, strict=True)))
    whole = sum(stream.num_blocks for stream in explanation.streams.values())
    pair = 28 * 8 * (2 * 128 + 8)
    conditions = sum(stream.retention.layout.condition_tokens for stream in explanation.streams.values())
    first, second, third = explanation.bytes_summary
    assert f"A token takes {pair:,} bytes" in first
    assert f"condition takes {shown_bytes(conditions * pair)} in both streams" in second
    assert f"a whole frame {shown_bytes(4084 * pair)} in each" in second
    assert f"at most {most:,} in both streams, {shown_bytes(most * 16 * pair)}" in third
    assert f"The full cache takes {shown_bytes(whole * 16 * pair)}: {100 * most / whole:.0f} %" in third
    assert f"in bfloat16 {shown_bytes(whole * 16 * 28 * 8 * 512)}" in third


def test_a_picture_with_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.svg"
    run("lumos1_256p", *MODEL, "--kv-cache-dtype", "fp8", "--frames", "3", "--out", str(path))
    assert path.stat().st_size > 1000


ENCODED = {"layout": "lumos1_256p", "window": 3, "history_frames": 3, "selection": "spatial"}


@pytest.mark.parametrize("history", HISTORY_FORMATS)
def test_older_frames_are_read_whole_and_take_less(history: str) -> None:
    stored = Storage(Shape(2, 4, 64), "bfloat16", FORMATS["auto"])
    plain = explain(json.dumps(ENCODED), "packcache", frames=6, stored=stored)
    source = json.dumps({**ENCODED, "precision": {"history": history}})
    encoded = explain(source, "packcache", frames=6, stored=stored)
    assert [row.live for row in encoded.overview.tokens] == [row.live for row in plain.overview.tokens]
    frames, page = plain.retention.blocks.frame_blocks, 16 * 4 * 2 * 64 * 2
    packing = Packing(history, 4, 64)
    # While frame 5 is made, frames 2 and 3 are older than the newest, 4.
    freed = sum(len(frames(own)) + -packing.encoded_bytes(16 * len(frames(own))) // page for own in (2, 3))
    assert freed > 0
    assert plain.overview.blocks[5] - encoded.overview.blocks[5] == freed
    assert f"({history}); the others are dropped." in encoded.bytes_summary[1]


@pytest.mark.parametrize(
    ("source", "stored", "words"),
    [
        (ENCODED, None, "how many blocks an older frame takes depends on the model: give --model, or --layers"),
        (json.loads(TINY), None, "precision is for models that make whole frames"),
        ({**ENCODED, "history_frames": 2}, Shape(2, 4, 64), "an older frame is kept whole or dropped"),
    ],
)
def test_precision_that_cannot_be_shown_is_refused(source: Any, stored: Shape | None, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        explain(
            json.dumps({**source, "precision": {"history": "int4"}}),
            "packcache",
            stored=None if stored is None else Storage(stored, "bfloat16", FORMATS["auto"]),
        )


# --------------------------------------------------------------------------- which model

LLAMA: dict[str, Any] = {"num_hidden_layers": 4, "num_attention_heads": 6, "hidden_size": 384}


@pytest.mark.parametrize(
    ("config", "shape", "dtype"),
    [
        (LLAMA, (4, 6, 64), "bfloat16"),
        ({**LLAMA, "num_key_value_heads": 2, "head_dim": 128, "dtype": "float16"}, (4, 2, 128), "float16"),
        ({**LLAMA, "num_key_value_heads": None, "head_dim": None, "torch_dtype": "bfloat16"}, (4, 6, 64), "bfloat16"),
        # As vLLM serves it.
        ({**LLAMA, "torch_dtype": "float32"}, (4, 6, 64), "bfloat16"),
        ({"num_hidden_layers": 9, "dtype": "float16", "text_config": LLAMA}, (4, 6, 64), "float16"),
    ],
)
def test_a_checkpoint_says_its_shape(config: Any, shape: tuple[int, ...], dtype: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    for model in (tmp_path, path):
        found = storage(model=model, kv_cache_dtype="fp8_e5m2")
        assert found == Storage(Shape(*shape), dtype, FORMATS["fp8_e5m2"])
    layers, heads, size = shape
    assert found is not None
    assert (found.token_bytes, found.own_token_bytes) == (layers * heads * 2 * size, layers * heads * 4 * size)
    float32 = storage(model=tmp_path, dtype="float32")
    assert float32 is not None
    assert float32.token_bytes == layers * heads * 8 * size


def test_vllm_serves_float32_in_16_bits() -> None:
    """Where it is told nothing; that is what is counted."""
    import torch
    from vllm.config.model import _resolve_auto_dtype

    assert _resolve_auto_dtype("llama", torch.float32, is_pooling_model=False).itemsize == 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read: No such file or directory"),
        ("{", "cannot be read: it is not JSON"),
        (
            "[]",
            "num_hidden_layers in config.json of .* must be a number of 1 or more, not None: give --layers, --kv-heads",
        ),
        (json.dumps({**LLAMA, "num_hidden_layers": "4"}), "num_hidden_layers in config.json .* not '4'"),
        (json.dumps({**LLAMA, "num_attention_heads": 0}), "num_key_value_heads in config.json .* not 0"),
        (json.dumps({**LLAMA, "hidden_size": None}), "head_dim in config.json .* not None"),
        (json.dumps({**LLAMA, "kv_lora_rank": 512}), "caches MLA latents, not keys and values"),
    ],
)
def test_what_is_no_checkpoint_is_refused(content: str | None, words: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=f"^--model: .*{words}") as refused:
        storage(model=tmp_path)
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["demo", "--kv-cache-dtype", "fp8"],
            "--kv-cache-dtype is for bytes: give --model, or --layers, --kv-heads, --head-s",
        ),
        (["demo", "--dtype", "float16"], "--dtype is for bytes: give --model"),
        (["demo", "--layers", "3"], "--layers, --kv-heads, --head-size go together: give all three, or --model"),
        (["demo", *MODEL, "--model", "x"], "--model says what --layers, --kv-heads, --head-size would"),
        (["demo", *MODEL[:-1], "0"], "--head-size must lie between 1 and 1,048,576, not 0"),
        (["demo", *MODEL, "--dtype", "half"], "--dtype must be one of bfloat16, float16, float32, not 'half'"),
        (["demo", *MODEL, "--kv-cache-dtype", "int3"], "--kv-cache-dtype must be one of auto, float16, "),
        (["demo", *MODEL, "--kv-cache-dtype", "nvfp4"], "positions: rebase turns cached keys in place"),
        (["demo_masked", *MODEL, "--kv-cache-dtype", "nvfp4"], "is not for models that make whole frames"),
    ],
)
def test_what_does_not_go_together_is_refused_in_a_sentence(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(app, ["explain", *arguments])
    assert (result.exit_code, result.stdout) == (2, "")
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_formats_that_are_not_turned_go_with_absolute_positions() -> None:
    source = json.dumps({**json.loads(TINY), "positions": "absolute"})
    assert "nvfp4; in bfloat16" in run(source, *TINY_OPTIONS, *MODEL, "--kv-cache-dtype", "nvfp4")


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0 B"), (999, "999 B"), (1000, "0.98 KiB"), (1536, "1.50 KiB"), (84 * 1024, "84.0 KiB"), (2**30, "1.00 GiB"),
     (999 * 2**20, "999 MiB"), (1023 * 2**20, "1.00 GiB"), (5 * 2**50, "5120 TiB")],
)  # fmt: skip
def test_three_digits_and_a_unit(count: int, words: str) -> None:
    assert shown_bytes(count) == words
