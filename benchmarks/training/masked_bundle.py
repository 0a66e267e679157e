"""Writes what `vllm_packcache.demo.masked.bundle` reads: the rows of a trained model that are in use."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.training.masked_model import Lumos, LumosSize
from vllm_packcache.demo.masked.bundle import MODEL_DIR, TOKEN_IDS, WEIGHTS
from vllm_packcache.demo.masked.tokenizer import SPECIALS, build_text_tokenizer
from vllm_packcache.families.lumos import ARCHITECTURES, VISUAL_BEGIN

LAST_NORM = "model.norm.weight"

MAX_POSITIONS = 32768

SHARPNESS = 3.0
"""What the bundle's logits are multiplied with, in its last norm. Tokens are drawn at temperature 1, as published; of
hundreds of tokens that a small model is 99 % sure of, some would come out wrong in every frame."""


def save_bundle(model: Lumos, directory: Path) -> None:
    """Write the bundle of a model: bfloat16, but for the norms."""
    from transformers import PreTrainedTokenizerFast

    bos, pad, eos, unknown = SPECIALS
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=build_text_tokenizer(),
        bos_token=bos,
        eos_token=eos,
        unk_token=unknown,
        pad_token=pad,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(directory)
    size = model.size
    config = {
        "architectures": [ARCHITECTURES[0]],
        "model_type": "chameleon",
        "torch_dtype": "bfloat16",
        "vocab_size": VISUAL_BEGIN + model.codes,
        "hidden_size": size.hidden_size,
        "intermediate_size": size.intermediate_size,
        "num_hidden_layers": size.num_hidden_layers,
        "num_attention_heads": size.num_attention_heads,
        "num_key_value_heads": size.num_attention_heads,
        "hidden_act": "silu",
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": size.rms_norm_eps,
        "rope_theta": size.rope_theta,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "model_parallel_size": size.num_attention_heads,
        "swin_norm": size.swin_norm,
        "mm_rope": True,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    state = model.state_dict()
    state[LAST_NORM] = SHARPNESS * state[LAST_NORM]
    # Where heads look is in the norms: rounded, they look beside it.
    weights = {
        name: value.to(torch.float32 if "norm" in name else torch.bfloat16).contiguous()
        for name, value in state.items()
    }
    weights[TOKEN_IDS] = torch.from_numpy(model.ids).int()
    save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})


def load_bundle(directory: Path = MODEL_DIR) -> Lumos:
    """The model that `save_bundle` wrote, float32: its logits are `SHARPNESS` times those of training."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    state = load_file(directory / WEIGHTS)
    size = LumosSize(**{name: config[name] for name in LumosSize.__dataclass_fields__})
    model = Lumos(size, state.pop(TOKEN_IDS).long().numpy(), config["vocab_size"] - VISUAL_BEGIN)
    model.load_state_dict({name: value.float() for name, value in state.items()})
    return model.eval()
