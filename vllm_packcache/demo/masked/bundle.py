"""The bundled masked demo model: small on disk, a checkpoint as published when it is written out.

A checkpoint of Lumos-1 has 65,536 embedding rows before the visual ones. This model knows sixty words, so the bundle
has only the rows in use, with their ids; all others are zero.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from vllm_packcache.config import REQUEST_PREFIX
from vllm_packcache.demo.masked.model import Lumos
from vllm_packcache.demo.masked.tokenizer import SPECIALS, build_text_tokenizer
from vllm_packcache.masked import ARCHITECTURES, VISUAL_BEGIN, MaskedOptions

MODEL_DIR = Path(__file__).parent / "model"
"""The bundle: config, text tokenizer, weights, evaluation."""

PRESET = "demo_masked"
"""Configuration of a server of this model."""

OPTIONS = MaskedOptions(steps=8, guidance=1.5)
"""How the demo's videos are made."""

WEIGHTS = "weights.safetensors"
EMBEDDING = "model.embed_tokens.weight"
LAST_NORM = "model.norm.weight"
TOKEN_IDS = "token_ids"
"""Name of the tensor that says whose rows the embedding's are, int32 [rows]."""

MAX_POSITIONS = 32768

SHARPNESS = 3.0
"""What the bundle's logits are multiplied with, in its last norm. Tokens are drawn at temperature 1, as published; of
hundreds of tokens that a small model is 99 % sure of, some would come out wrong in every frame."""


def request_options(frames: int, policy: str, options: MaskedOptions) -> dict[str, Any]:
    """What a request says in ``vllm_xargs``.

    Args:
        frames: to make.
        policy: ``packcache`` or ``full``.
        options: how they are made.
    """
    how = {name: int(value) if isinstance(value, bool) else value for name, value in asdict(options).items()}
    return {f"{REQUEST_PREFIX}{name}": value for name, value in {"frames": frames, "policy": policy, **how}.items()}


def save_bundle(model: Lumos, directory: Path) -> None:
    """Write the bundle of a model, bfloat16."""
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
        "swin_norm": False,
        "mm_rope": True,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    state = model.state_dict()
    state[LAST_NORM] = SHARPNESS * state[LAST_NORM]
    weights = {name: value.to(torch.bfloat16).contiguous() for name, value in state.items()}
    weights[TOKEN_IDS] = torch.from_numpy(model.ids).int()
    save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})


def write_checkpoint(path: str | Path, bundle: Path = MODEL_DIR) -> Path:
    """Write the bundled model as a checkpoint of Lumos-1 is published: some 30 MB, within a second.

    Args:
        path: folder for ``config.json``, ``model.safetensors`` and the text tokenizer; it is created.
        bundle: folder of `save_bundle`.

    Returns:
        The folder.

    Raises:
        OSError: the bundle cannot be read, or the folder not be written.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(bundle / name, folder / name)
    config = json.loads((bundle / "config.json").read_text(encoding="utf-8"))
    weights = load_file(bundle / WEIGHTS)
    ids, rows = weights.pop(TOKEN_IDS), weights[EMBEDDING]
    weights[EMBEDDING] = rows.new_zeros(config["vocab_size"], config["hidden_size"])
    weights[EMBEDDING][ids.long()] = rows
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
