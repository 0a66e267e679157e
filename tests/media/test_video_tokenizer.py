"""The tokenizer of video."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.media.tokenizer_files import random_video, write_video_tokenizer
from vllm_packcache.media.video_tokenizer import CODES, CosmosTokenizer, VideoTokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video_tokenizer(tmp_path_factory.mktemp("cosmos"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> VideoTokenizer:
    return CosmosTokenizer(folder)


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_round_trip(frames: int, tokenizer: VideoTokenizer) -> None:
    pixels = random_video(frames, 4, 8)
    codes = tokenizer.encode(pixels)
    assert codes.dtype == np.int64
    assert codes.shape == (1 + (frames - 1) // 4, 4, 8)
    levels = pixels[[0, *range(1, frames, 4)], ::8, ::8].astype(int) // 85
    np.testing.assert_array_equal(codes, levels @ [16, 4, 1])
    decoded = tokenizer.decode(codes)
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, pixels)


def test_grids_that_no_frame_states_are_decoded_too(tokenizer: VideoTokenizer) -> None:
    assert tokenizer.decode(np.zeros((2, 3, 5), dtype=np.int64)).shape == (5, 24, 40, 3)


@pytest.mark.parametrize(
    ("shape", "dtype", "sentence"),
    [
        ((4, 32, 32, 3), np.uint8, r"has 1 \+ 4 k frames, not 4"),
        ((0, 32, 32, 3), np.uint8, r"has 1 \+ 4 k frames, not 0"),
        ((1, 40, 32, 3), np.uint8, "multiples of 32 pixels, not 32 x 40"),
        ((1, 32, 32), np.uint8, r"uint8 \[frames, height, width, 3\], not uint8 \[1, 32, 32\]"),
        ((1, 32, 32, 3), np.float32, "not float32"),
    ],
)
def test_what_is_no_video(shape: tuple[int, ...], dtype: type, sentence: str, tokenizer: VideoTokenizer) -> None:
    with pytest.raises(ValueError, match=sentence):
        tokenizer.encode(np.zeros(shape, dtype=dtype))


@pytest.mark.parametrize(
    ("codes", "sentence"),
    [
        (np.full((1, 4, 4), CODES), "between 0 and 63999, not 64000 and 64000"),
        (np.full((1, 4, 4), -1), "not -1 and -1"),
        (np.zeros((4, 4), dtype=np.int64), r"not \[4, 4\]"),
        (np.zeros((0, 4, 4), dtype=np.int64), r"not \[0, 4, 4\]"),
    ],
)
def test_what_are_no_codes(codes: np.ndarray, sentence: str, tokenizer: VideoTokenizer) -> None:
    with pytest.raises(ValueError, match=sentence):
        tokenizer.decode(codes)


@pytest.mark.parametrize("name", ["encoder.jit", "decoder.jit"])
def test_files(name: str, tmp_path: Path) -> None:
    write_video_tokenizer(tmp_path)
    (tmp_path / name).write_text("no program")
    with pytest.raises(ValueError, match=f"{name} is no TorchScript"):
        CosmosTokenizer(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing"):
        CosmosTokenizer(tmp_path)


class Coarse(nn.Module):
    """Patches of twice the size, as other Cosmos tokenizers have them."""

    def forward(self, given: Tensor) -> tuple[Tensor, Tensor]:
        if given.dim() == 5:
            return given[:, 0, :, ::16, ::16].int(), given
        pixels = given[:, None].expand(-1, 3, -1, -1, -1).float()
        return pixels.repeat_interleave(16, 3).repeat_interleave(16, 4), pixels


class Failing(nn.Module):
    """Needs what it does not get."""

    def forward(self, given: Tensor) -> Tensor:
        return given @ torch.zeros(7, 7)


def test_a_tokenizer_of_another_kind_is_found_out(tmp_path: Path) -> None:
    write_video_tokenizer(tmp_path)
    torch.jit.script(Coarse()).save(str(tmp_path / "encoder.jit"))
    with pytest.raises(ValueError, match=r"makes codes of shape \[1, 2, 2\] .* Cosmos DV4x8x8 makes \[1, 4, 4\]"):
        CosmosTokenizer(tmp_path).encode(np.zeros((1, 32, 32, 3), dtype=np.uint8))
    torch.jit.script(Failing()).save(str(tmp_path / "decoder.jit"))
    with pytest.raises(ValueError, match=r"decoder\.jit fails with an input of shape \[1, 1, 4, 4\]: "):
        CosmosTokenizer(tmp_path).decode(np.zeros((1, 4, 4), dtype=np.int64))
