"""Emu3's vision tokenizer, against transformers' own ways in and out of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Emu3ImageProcessor, Emu3VQVAE

from tests.media.emu3_files import (
    CODES,
    make_vision_tokenizer,
    published_names,
    write_published,
    write_saved,
    write_whole,
)
from vllm_packcache.media.emu3_tokenizer import Emu3Tokenizer

HALF = [0.5, 0.5, 0.5]
PREPROCESSOR = Emu3ImageProcessor(do_resize=False, image_mean=HALF, image_std=HALF)
"""As the published ``preprocessor_config.json`` has it."""


@pytest.fixture(scope="module")
def model() -> Emu3VQVAE:
    return make_vision_tokenizer()


@pytest.fixture(scope="module")
def tokenizer(model: Emu3VQVAE, tmp_path_factory: pytest.TempPathFactory) -> Emu3Tokenizer:
    return Emu3Tokenizer(write_published(tmp_path_factory.mktemp("published"), model))


def pictures(frames: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth ones: noise alone would have the same code everywhere."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(frames, 3, height // 8 + 1, width // 8 + 1, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    noise = 0.1 * torch.rand(smooth.shape, generator=generator)
    return ((smooth * 0.9 + noise) * 255).permute(0, 2, 3, 1).to(torch.uint8).numpy()


@torch.inference_mode()
def encoded(model: Emu3VQVAE, picture: np.ndarray) -> Any:
    given = PREPROCESSOR(picture, input_data_format="channels_last", return_tensors="pt")["pixel_values"]
    assert given.shape == (1, 3, *picture.shape[:2])
    return model.encode(given, torch.tensor([picture.shape[:2]]))


@torch.inference_mode()
def shown(model: Emu3VQVAE, codes: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Pictures of codes, uint8 [n, H, W, 3], and where rounding leaves no doubt of them."""
    raw = model.decode(codes)
    decoded = PREPROCESSOR.postprocess([*raw], return_tensors="np", input_data_format="channels_first")["pixel_values"]
    scaled = ((raw.permute(0, 2, 3, 1) + 1) / 2 * 255).clamp(0, 255)
    return np.stack([*decoded]).reshape(-1, 3, *raw.shape[2:]).transpose(0, 2, 3, 1), (
        (scaled - scaled.round()).abs() > 1e-2
    ).numpy() | ((scaled == 0) | (scaled == 255)).numpy()


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 32, 32), (3, 16, 40), (2, 40, 8)])
def test_codes_are_those_of_transformers(
    frames: int, height: int, width: int, tokenizer: Emu3Tokenizer, model: Emu3VQVAE
) -> None:
    pixels = pictures(frames, height, width)
    codes = tokenizer.encode(pixels)
    assert codes.dtype == np.int64
    assert codes.shape == (frames, height // 8, width // 8)
    for picture, own in zip(pixels, codes, strict=True):
        np.testing.assert_array_equal(own, encoded(model, picture).image_tokens[0])


def test_a_picture_is_given_as_published(
    tokenizer: Emu3Tokenizer, model: Emu3VQVAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All values of a pixel, scaled as the published processor does; and four frames that are the same."""
    picture = np.arange(256, dtype=np.uint8).reshape(8, 32, 1).repeat(3, 2)
    given = PREPROCESSOR(picture, input_data_format="channels_last", return_tensors="pt")["pixel_values"]
    seen = []
    encoder = tokenizer._model.encoder
    forward = encoder.forward

    def watched(frames: torch.Tensor) -> torch.Tensor:
        seen.append(frames)
        return forward(frames)

    monkeypatch.setattr(encoder, "forward", watched)
    tokenizer.encode(picture[None])
    assert torch.equal(seen[0], given[:, None].repeat(1, 4, 1, 1, 1))
    assert (seen[0].min(), seen[0].max()) == (-1, 1)


def test_codes_say_what_is_seen(tokenizer: Emu3Tokenizer) -> None:
    """Else codes of anything would do for the tests above."""
    one, other = tokenizer.encode(pictures(2, 64, 64))
    assert len(np.unique(one)) > 8
    assert (one != other).mean() > 0.3


@pytest.mark.parametrize(("frames", "rows", "columns"), [(1, 4, 4), (3, 2, 5), (2, 5, 1)])
def test_pictures_are_those_of_transformers(
    frames: int, rows: int, columns: int, tokenizer: Emu3Tokenizer, model: Emu3VQVAE
) -> None:
    codes = np.random.default_rng(0).integers(0, CODES, (frames, rows, columns))
    pixels = tokenizer.decode(codes)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (frames, 8 * rows, 8 * columns, 3)
    expected, certain = shown(model, torch.from_numpy(codes))
    assert certain.mean() > 0.5
    np.testing.assert_array_equal(pixels[certain], expected[certain])
    assert np.abs(pixels.astype(int) - expected).max() <= 1
    # Another code is another picture, and most of it is neither black nor white.
    assert (tokenizer.decode((codes + 1) % CODES) != pixels).mean() > 0.5
    assert np.isin(pixels, (0, 255)).mean() < 0.5


def test_of_the_four_frames_that_are_decoded_the_first_is_shown(tokenizer: Emu3Tokenizer, model: Emu3VQVAE) -> None:
    codes = torch.from_numpy(np.random.default_rng(1).integers(0, CODES, (1, 4, 4)))
    pixels = tokenizer.decode(codes.numpy())[0]
    with torch.inference_mode():
        four = model.decode(codes[:, None])[0]
    distances = [np.abs((frame + 1).permute(1, 2, 0).numpy() * 127.5 - pixels - 0.5).clip(0, 255) for frame in four]
    inside = (pixels > 0) & (pixels < 255)
    assert [bool((distance[inside] <= 0.6).all()) for distance in distances] == [True, False, False, False]


@pytest.mark.parametrize("kind", ["saved", "whole", "prefixed"])
def test_all_folders_hold_the_same(kind: str, tokenizer: Emu3Tokenizer, model: Emu3VQVAE, tmp_path: Path) -> None:
    other = Emu3Tokenizer(
        write_saved(tmp_path, model)
        if kind == "saved"
        else write_whole(tmp_path, model, "model." if kind == "prefixed" else "")
    )
    own, others = tokenizer._model.state_dict(), other._model.state_dict()
    assert own.keys() == others.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(own[name], tensor), name
        assert torch.equal(others[name], tensor), name
    assert (other.codes, other.pixels_per_token) == (tokenizer.codes, tokenizer.pixels_per_token) == (CODES, 8)


def test_the_published_names(model: Emu3VQVAE, tmp_path: Path) -> None:
    write_published(tmp_path, model)
    said = json.loads((tmp_path / "config.json").read_text())
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors.keys() == published_names(said)
    # And of the true one's shape: two blocks a level, of which two widen.
    said |= {"ch_mult": [1, 2, 2, 4], "num_res_blocks": 2}
    assert {
        "encoder.down.1.block.0.nin_shortcut.weight", "encoder.down.3.attn.1.norm.bias",
        "decoder.up.3.attn.2.proj_out.bias", "decoder.up.2.block.0.nin_shortcut.bias",
        "decoder.up.0.block.0.nin_shortcut.weight", "decoder.mid.attn_1.norm.conv_y.weight",
    } <= published_names(said)  # fmt: skip


def test_the_published_shape_is_transformers_own() -> None:
    """Of all weights of the true size, by name, without their numbers."""
    from transformers import Emu3VQVAEConfig

    from vllm_packcache.media.emu3_tokenizer import _renamed

    config = Emu3VQVAEConfig()
    with torch.device("meta"):
        names = Emu3VQVAE(config).state_dict().keys()
    said = {
        "ch_mult": config.channel_multiplier,
        "num_res_blocks": config.num_res_blocks,
        "attn_resolutions": config.attn_resolutions,
    }
    assert {_renamed(name, torch.empty(1, 1))[0] for name in published_names(said)} == set(names)


@pytest.mark.parametrize(
    ("shape", "dtype", "sentence"),
    [
        ((1, 12, 16, 3), np.uint8, "sides are multiples of 8 pixels, not 16 x 12"),
        ((1, 16, 20, 3), np.uint8, "not 20 x 16"),
        ((16, 16, 3), np.uint8, r"uint8 \[frames, height, width, 3\], not uint8 \[16, 16, 3\]"),
        ((0, 16, 16, 3), np.uint8, r"not uint8 \[0, 16, 16, 3\]"),
        ((1, 16, 16, 3), np.float32, "not float32"),
    ],
)
def test_what_are_no_pictures(shape: tuple[int, ...], dtype: type, sentence: str, tokenizer: Emu3Tokenizer) -> None:
    with pytest.raises(ValueError, match=sentence):
        tokenizer.encode(np.zeros(shape, dtype))


@pytest.mark.parametrize(
    ("codes", "sentence"),
    [
        (np.full((1, 4, 4), CODES), "between 0 and 63, not 64 and 64"),
        (np.full((1, 4, 4), -1), "not -1 and -1"),
        (np.zeros((4, 4), np.int64), r"\[frames, rows, columns\], not \[4, 4\]"),
        (np.zeros((0, 4, 4), np.int64), r"not \[0, 4, 4\]"),
    ],
)
def test_what_are_no_codes(codes: np.ndarray, sentence: str, tokenizer: Emu3Tokenizer) -> None:
    with pytest.raises(ValueError, match=sentence):
        tokenizer.decode(codes)


def test_folders_that_are_refused(model: Emu3VQVAE, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing: pictures need the folder of Emu3's vision"):
        Emu3Tokenizer(tmp_path)
    write_published(tmp_path, model)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for changed, sentence in (
        ({"quantize.embedding.weight": torch.ones(3, 4)}, "size mismatch for quantize.embedding.weight"),
        ({"surplus": torch.ones(3)}, "surplus"),
    ):
        save_file({**tensors, **changed}, file)
        with pytest.raises(ValueError, match=rf"\A[^\n]*has no weights of the tokenizer in its config[^\n]*{sentence}"):
            Emu3Tokenizer(tmp_path)
    save_file({name: own for name, own in tensors.items() if name != "encoder.mid.attn_1.q.bias"}, file)
    with pytest.raises(ValueError, match=r"has no weights .*middle_block\.attn_1\.q_proj\.bias"):
        Emu3Tokenizer(tmp_path)
    file.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"model\.safetensors holds no tensors: "):
        Emu3Tokenizer(tmp_path)
    for said, sentence in (
        (
            {"model_type": "Emu3"},
            "has model_type 'Emu3', and must have Emu3VisionVQ, emu3_vqgan or emu3: give the files",
        ),
        ({}, "describes no vision tokenizer of Emu3's: KeyError"),
        ([], "describes no vision tokenizer of Emu3's: TypeError"),
        ({"model_type": "Emu3VisionVQ", "ch": "wide"}, "describes no vision tokenizer of Emu3's: .*base_channels"),
        ({"model_type": "emu3"}, "describes no vision tokenizer of Emu3's: KeyError: 'vq_config'"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(said))
        with pytest.raises(ValueError, match=rf"\A[^\n]*{sentence}[^\n]*\Z"):
            Emu3Tokenizer(tmp_path)


def test_what_fails_within_is_said_in_a_line(tokenizer: Emu3Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.cuda.OutOfMemoryError("no memory\nfor this")

    monkeypatch.setattr(tokenizer._model.decoder.up_block, "forward", full)
    with pytest.raises(ValueError, match=r"fails with an input of shape \[1, 4, 4\]: no memory\Z"):
        tokenizer.decode(np.zeros((1, 4, 4), np.int64))
