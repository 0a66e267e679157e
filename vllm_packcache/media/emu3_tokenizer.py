"""Pictures as Emu3 and UniVLA see them: discrete codes, a grid of them for each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import silu
from transformers import Emu3VQVAE, Emu3VQVAEConfig

from vllm_packcache.config.errors import shown
from vllm_packcache.families.checkpoint import read_config
from vllm_packcache.media.pictures import Pixels
from vllm_packcache.media.video_tokenizer import Codes

CONFIG, WEIGHTS = "config.json", "*.safetensors"
"""Of a folder."""

PUBLISHED, SAVED, WHOLE = "Emu3VisionVQ", "emu3_vqgan", "emu3"
"""``model_type`` of BAAI's folder, of the same model as transformers saves it, and of a whole Emu3 of transformers'."""

_FIELDS = {
    "ch": "base_channels",
    "ch_mult": "channel_multiplier",
    "z_channels": "latent_channels",
    "double_z": "double_latent",
    **{
        name: name
        for name in (
            "codebook_size", "embed_dim", "in_channels", "out_channels", "temporal_downsample_factor", "num_res_blocks",
            "attn_resolutions",
        )
    },
}  # fmt: skip
"""What BAAI's configuration calls what transformers' does."""

_NAMES = tuple(
    (re.compile(own), theirs)
    for own, theirs in (
        (r"^(encoder|decoder)\.(down|up)\.", r"\1.\2_block.\2."),
        (r"^(encoder|decoder)\.mid\.", r"\1.middle_block."),
        (r"\.attn_1\.norm\.", r".attn_norm."),
        (r"\.attn\.(\d+)\.norm\.", r".attn_norms.\1."),
        (r"\.(attn_1|attn\.\d+)\.([qkv])\.", r".\1.\2_proj."),
        (r"\.(attn_1|attn\.\d+)\.proj_out\.", r".\1.out_proj."),
    )
)
"""What BAAI's weights are called, and what transformers' are."""

_PREFIX = re.compile(r"^(model\.)?vqmodel\.")
"""Of its weights in a whole Emu3."""

_LINEAR = re.compile(r"\.[qkv]_proj\.weight$|\.out_proj\.weight$")
"""Weights that transformers has [out, in] and BAAI, as of a convolution, [out, in, 1, 1]."""

MOST_SAID = 200
"""Characters of what a library says of a file that it cannot use."""


class Emu3Tokenizer:
    """Emu3's vision tokenizer, by transformers: no remote code is run.

    Each frame is a picture of its own, which is how Emu3 makes pictures and UniVLA the frames of its videos. The
    tokenizer can also see four frames as one, which no model does whose weights are published.

    It computes in float32, as published. Its weights are on the device only while it runs: beside a server there is
    little room.

    Source: the public code of Emu3 (github.com/baaivision/Emu3) and transformers' conversion of its weights. A picture
    is encoded as four frames that are the same, and the first of the four that are decoded is shown. Pixels are scaled
    to [-1, 1], as [batch, 3, H, W]; those that are decoded are rounded down.

    Args:
        folder: with ``config.json`` and ``*.safetensors``: BAAI/Emu3-VisionTokenizer, an ``Emu3VQVAE`` that
            transformers has saved, or a whole Emu3 of transformers', of which nothing else is read.

    Raises:
        FileNotFoundError: there is no configuration.
        ValueError: the folder is no such tokenizer's.

    Attributes:
        codes: that there are: those of a picture lie below.
        pixels_per_token: sides of what a code stands for.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # transformers gives ``to`` a type of its own, which takes no device.
        self._model: Any = _load(folder)
        self.codes: int = self._model.config.codebook_size
        self.pixels_per_token: int = self._model.spatial_scale_factor

    def encode(self, pixels: Pixels) -> Codes:
        """See `VideoTokenizer.encode`: uint8, [T, H, W, 3], to int64, [T, rows, columns].

        T may be any. H and W are multiples of ``pixels_per_token``.
        """
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3 or not pixels.size:
            raise ValueError(f"pictures are uint8 [frames, height, width, 3], not {pixels.dtype} {list(pixels.shape)}")
        height, width = pixels.shape[1:3]
        if height % self.pixels_per_token or width % self.pixels_per_token:
            raise ValueError(f"sides are multiples of {self.pixels_per_token} pixels, not {width} x {height}")
        return self._run(self._encode, torch.from_numpy(np.array(pixels)))

    def decode(self, codes: Codes) -> Pixels:
        """See `VideoTokenizer.decode`: int64, [T, rows, columns], to uint8, [T, H, W, 3]."""
        if codes.ndim != 3 or not codes.size:
            raise ValueError(f"codes of pictures are [frames, rows, columns], not {list(codes.shape)}")
        if codes.min() < 0 or codes.max() >= self.codes:
            raise ValueError(f"codes lie between 0 and {self.codes - 1}, not {codes.min()} and {codes.max()}")
        return self._run(self._decode, torch.from_numpy(np.array(codes, np.int64)))

    @torch.inference_mode()
    def _run(self, convert: Callable[[Tensor], Tensor], given: Tensor) -> Any:
        """``convert`` of each of ``given``, one after the other: a large picture takes gigabytes on its way."""
        try:
            self._model.to(self._device)
            return torch.stack([convert(own.to(self._device)).cpu() for own in given]).numpy()
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"{self._folder} fails with an input of shape {list(given.shape)}: {reason}") from None
        finally:
            self._model.to("cpu")

    def _encode(self, pixels: Tensor) -> Tensor:
        """Codes, [rows, columns], of a picture, [H, W, 3]."""
        scaled = ((pixels.double() / 255).float() - 0.5) / 0.5
        sizes = torch.tensor([pixels.shape[:2]])
        return self._model.encode(scaled.permute(2, 0, 1)[None], sizes).image_tokens[0]

    def _decode(self, codes: Tensor) -> Tensor:
        """A picture, [H, W, 3], of codes, [rows, columns]: the first of the four that ``Emu3VQVAE.decode`` makes.

        The others, which cost as much each, are left out as soon as frames are independent of each other.
        """
        decoder = self._model.decoder
        quantized = self._model.quantize.embedding(codes).permute(2, 0, 1)[None, :, None]
        both = torch.cat([self._model.post_quant_conv(quantized), quantized])
        for block in decoder.time_res_stack:
            both = block(both)
        for double in decoder.time_conv:
            both = silu(double(both))
        latent, quantized = both[:, :, 0].split(1)
        latent = decoder.middle_block(decoder.conv_in(latent), quantized)
        latent = decoder.norm_out(decoder.up_block(latent, quantized), quantized)
        scaled = decoder.conv_out(silu(latent))[0].permute(1, 2, 0)
        return ((scaled + 1) / 2 * 255).clamp(0, 255).to(torch.uint8)


def _load(folder: Path) -> Emu3VQVAE:
    kind, config = _config(folder)
    with torch.device("meta"):
        model = Emu3VQVAE(config)
    try:
        model.load_state_dict(dict(_tensors(folder, kind)), assign=True)
    except RuntimeError as error:
        raise ValueError(f"{folder} has no weights of the tokenizer in its {CONFIG}: {_line(error)}") from None
    return model.float().eval()


def _config(folder: Path) -> tuple[str, Emu3VQVAEConfig]:
    """The kind of a folder, and what the tokenizer in it is made of."""
    file = folder / CONFIG
    try:
        said = read_config(folder)
        kind = said["model_type"]
        if kind == PUBLISHED:
            own = {theirs: said[name] for name, theirs in _FIELDS.items() if name in said}
            usual = Emu3VQVAEConfig(**own)
            # Attention is as wide as the last level.
            return kind, Emu3VQVAEConfig(**own, hidden_size=usual.base_channels * usual.channel_multiplier[-1])
        if kind in (SAVED, WHOLE):
            return kind, Emu3VQVAEConfig.from_dict(dict(said if kind == SAVED else said["vq_config"]))
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} is missing: pictures need the folder of Emu3's vision tokenizer") from None
    # What is no JSON, no object, or no such model: each has its own error.
    except Exception as error:
        raise ValueError(f"{file} describes no vision tokenizer of Emu3's: {_line(error)}") from None
    raise ValueError(
        f"{file} has model_type {shown(kind)}, and must have {PUBLISHED}, {SAVED} or {WHOLE}: give the files of "
        "BAAI/Emu3-VisionTokenizer"
    )


def _tensors(folder: Path, kind: str) -> Iterator[tuple[str, Tensor]]:
    """The tokenizer's weights by transformers' names."""
    for file in sorted(folder.glob(WEIGHTS)):
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - it is no mapping
                    if kind == WHOLE:
                        if _PREFIX.match(name):
                            yield _PREFIX.sub("", name), tensors.get_tensor(name)
                    elif kind == SAVED:
                        yield name, tensors.get_tensor(name)
                    else:
                        yield _renamed(name, tensors.get_tensor(name))
        except SafetensorError as error:
            raise ValueError(f"{file} holds no tensors: {_line(error)}") from None


def _renamed(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    for own, theirs in _NAMES:
        name = own.sub(theirs, name)
    return name, tensor.flatten(1) if _LINEAR.search(name) else tensor


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:MOST_SAID]
