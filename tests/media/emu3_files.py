"""Small tokenizers with the files of Emu3's published ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import Emu3VQVAE, Emu3VQVAEConfig

CODES = 64

SPECIALS = {
    "<|extra_200|>": 151846, "<|extra_201|>": 151847, "<|extra_203|>": 151849, "<|extra_204|>": 151850,
    "<|image token|>": 151851, "<|image start|>": 151852, "<|image end|>": 151853,
    **{f"<|visual token {code:0>6d}|>": 151854 + code for code in range(CODES)},
}  # fmt: skip


def make_vision_tokenizer(seed: int = 0) -> Emu3VQVAE:
    """A small one of four levels as the published one, whose weights are all random: no two could change places."""
    torch.manual_seed(seed)
    model = Emu3VQVAE(
        Emu3VQVAEConfig(
            base_channels=32, channel_multiplier=[1, 1, 1, 2], num_res_blocks=1, hidden_size=64, codebook_size=CODES
        )
    )
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "running_var" in name:
                tensor.uniform_(0.5, 1.5)
            elif "norm" in name and name.endswith("weight"):
                tensor.normal_(1, 0.2)
            elif "norm" in name and tensor.is_floating_point():
                tensor.normal_(0, 0.2)
        # So that most pixels are neither black nor white.
        model.decoder.conv_out.weight *= 0.3
    return model.eval()


def write_saved(folder: Path, model: Emu3VQVAE) -> Path:
    """As transformers saves it."""
    model.save_pretrained(folder)
    return folder


def write_whole(folder: Path, model: Emu3VQVAE, prefix: str) -> Path:
    """As a part of an Emu3 of transformers', in several files."""
    config = {
        "model_type": "emu3",
        "vq_config": model.config.to_dict(),
        "text_config": {"model_type": "emu3_text_model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {f"{prefix}vqmodel.{name}": own.contiguous() for name, own in model.state_dict().items()}
    names = sorted(tensors)
    tensors["model.text_model.norm.weight"] = torch.ones(3)
    save_file({name: tensors[name] for name in names[::2]}, folder / "model-00001-of-00002.safetensors")
    save_file(
        {name: own for name, own in tensors.items() if name not in names[::2]},
        folder / "model-00002-of-00002.safetensors",
    )
    return folder


def write_published(folder: Path, model: Emu3VQVAE) -> Path:
    """As BAAI publishes it."""
    config = model.config
    said = {
        "architectures": ["Emu3VisionVQModel"],
        "auto_map": {"AutoModel": "modeling_emu3visionvq.Emu3VisionVQModel"},
        "attn_resolutions": [*config.attn_resolutions],
        "ch": config.base_channels,
        "ch_mult": [*config.channel_multiplier],
        "codebook_size": config.codebook_size,
        "double_z": False,
        "dropout": 0.0,
        "embed_dim": config.embed_dim,
        "in_channels": 3,
        "model_type": "Emu3VisionVQ",
        "num_res_blocks": config.num_res_blocks,
        "out_channels": 3,
        "temporal_downsample_factor": 4,
        "torch_dtype": "float32",
        "z_channels": config.latent_channels,
    }
    (folder / "config.json").write_text(json.dumps(said))
    # Nobody must run it.
    (folder / "modeling_emu3visionvq.py").write_text("raise RuntimeError")
    save_file(dict(published(name, own) for name, own in model.state_dict().items()), folder / "model.safetensors")
    return folder


def published(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """A weight of transformers' as BAAI has it."""
    for theirs, own in (
        ("down_block.down", "down"), ("up_block.up", "up"), ("middle_block.attn_norm", "mid.attn_1.norm"),
        ("middle_block", "mid"),
    ):  # fmt: skip
        name = name.replace(theirs, own)
    if "attn_norms" in name:
        before, _, rest = name.partition("attn_norms.")
        number, _, rest = rest.partition(".")
        name = f"{before}attn.{number}.norm.{rest}"
    for theirs, own in (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("out_proj", "proj_out")):
        if theirs in name:
            name = name.replace(theirs, own)
            tensor = tensor[..., None, None] if name.endswith("weight") else tensor
    return name, tensor.contiguous()


def published_names(said: dict[str, Any]) -> set[str]:
    """Names of all weights of BAAI's model, by the modules that its public code puts together."""
    names: set[str] = set()

    def add(*modules: str) -> None:
        names.update(f"{module}.{own}" for module in modules for own in ("weight", "bias"))

    def norm(module: str, spatial: bool) -> None:
        add(*([f"{module}.{part}" for part in ("norm_layer", "conv_y", "conv_b")] if spatial else [module]))

    def block(module: str, spatial: bool, widens: bool) -> None:
        norm(f"{module}.norm1", spatial)
        norm(f"{module}.norm2", spatial)
        add(f"{module}.conv1", f"{module}.conv2", *([f"{module}.nin_shortcut"] if widens else []))

    def attention(module: str, spatial: bool) -> None:
        norm(f"{module}.norm", spatial)
        add(*(f"{module}.{part}" for part in ("q", "k", "v", "proj_out")))

    levels, blocks, widths = len(said["ch_mult"]), said["num_res_blocks"], said["ch_mult"]
    for side, part, count in (("encoder", "down", blocks), ("decoder", "up", blocks + 1)):
        spatial = side == "decoder"
        add(f"{side}.conv_in", f"{side}.conv_out", f"{side}.time_conv.0.conv.conv", f"{side}.time_conv.1.conv.conv")
        norm(f"{side}.norm_out", spatial)
        for number in range(blocks):
            stack = f"{side}.time_res_stack.{number}"
            add(f"{stack}.norm1", f"{stack}.norm2", f"{stack}.conv1.conv", f"{stack}.conv2.conv")
            names.update(
                f"{stack}.norm{which}.{own}"
                for which in (1, 2)
                for own in ("running_mean", "running_var", "num_batches_tracked")
            )
        block(f"{side}.mid.block_1", spatial, False)
        block(f"{side}.mid.block_2", spatial, False)
        attention(f"{side}.mid.attn_1", spatial)
        for level in range(levels):
            last = widths[min(level + 1, levels - 1)] if spatial else (1, *widths)[level]
            for number in range(count):
                block(f"{side}.{part}.{level}.block.{number}", spatial, number == 0 and last != widths[level])
                if level in said["attn_resolutions"]:
                    attention(f"{side}.{part}.{level}.attn.{number}", spatial)
        for level in range(1, levels) if spatial else range(levels - 1):
            add(f"{side}.{part}.{level}.{'upsample' if spatial else 'downsample'}.conv")
    add("quant_conv.conv", "post_quant_conv.conv")
    return {*names, "quantize.embedding.weight"}


def write_text_tokenizer(folder: Path) -> Path:
    """Write a ``tokenizer.json`` of bytes, with Emu3's ids of digits, of the star and of special tokens."""
    characters = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set("0123456789*"))
    vocabulary = {"*": 9, **{str(digit): 15 + digit for digit in range(10)}}
    vocabulary |= {character: number for number, character in enumerate(characters, 300)}
    tokenizer = Tokenizer(models.BPE(vocab={**vocabulary, **SPECIALS}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([*SPECIALS])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
