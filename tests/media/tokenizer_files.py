"""Small tokenizers with the files and the signatures of the published ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn

from vllm_packcache.families import lumos

CODES = 64
"""Four levels of each colour."""


class Encoder(nn.Module):
    """The mean colour of every patch, to four levels; like the published encoder, in the weights' precision."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.5))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        assert pixels.dtype == self.weight.dtype
        first = pixels[:, :, :1]
        rest = pixels[:, :, 1:].unflatten(2, [-1, 4]).mean(3)
        latent = torch.cat([first, rest], 2).unflatten(4, [-1, 8]).unflatten(3, [-1, 8]).mean([4, 6])
        levels = ((latent + 1) * self.weight).round()
        indices = levels[:, 0] * 16 + levels[:, 1] * 4 + levels[:, 2]
        return indices.int(), levels, levels.mean()


class Decoder(nn.Module):
    """Every patch in its colour."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.5))

    def forward(self, indices: Tensor) -> Tensor:
        levels = torch.stack([indices // 16, indices // 4 % 4, indices % 4], 1)
        pixels = levels.to(self.weight.dtype) / self.weight - 1
        pixels = torch.cat([pixels[:, :, :1], pixels[:, :, 1:].repeat_interleave(4, 2)], 2)
        return pixels.repeat_interleave(8, 3).repeat_interleave(8, 4)


def write_video_tokenizer(folder: Path) -> Path:
    """Write ``encoder.jit`` and ``decoder.jit``, as published in bfloat16."""
    for name, module in (("encoder", Encoder()), ("decoder", Decoder())):
        torch.jit.script(module.to(torch.bfloat16)).save(str(folder / f"{name}.jit"))
    return folder


def write_text_tokenizer(folder: Path) -> Path:
    """Write a ``tokenizer.json`` of bytes that begins a sequence by itself, as the published one does."""
    vocabulary = {"<s>": lumos.BOS, "<video>": lumos.VIDEO_BEGIN, "<code>": lumos.VISUAL_BEGIN, "<unk>": 3}
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary |= {character: number for number, character in enumerate(characters, 10)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<s>", "<video>", "<code>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", lumos.BOS)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def random_video(frames: int, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """A video that the small tokenizer gives back exactly, uint8 [frames, H, W, 3]: patches of random colours."""
    levels = np.random.default_rng(seed).integers(0, 4, (1 + (frames - 1) // 4, rows, columns, 3))
    levels = np.concatenate([levels[:1], levels[1:].repeat(4, 0)])
    return (85 * levels).astype(np.uint8).repeat(8, 1).repeat(8, 2)
