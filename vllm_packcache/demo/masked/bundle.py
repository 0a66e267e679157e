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

from safetensors.torch import load_file, save_file

from vllm_packcache.config.server import REQUEST_PREFIX
from vllm_packcache.families.lumos import MaskedOptions

MODEL_DIR = Path(__file__).parent / "model"
"""The bundle: config, text tokenizer, weights, evaluation."""

PRESET = "demo_masked"
"""Configuration of a server of this model."""

OPTIONS = MaskedOptions(steps=4, guidance=1.2, remask=0.0)
"""How the demo's videos are made: what is committed is what is remembered, so none of it is masked again."""

TRAINED_FRAMES = 10
"""Of the longest videos that the bundled model was trained on."""

WEIGHTS = "weights.safetensors"
EMBEDDING = "model.embed_tokens.weight"
TOKEN_IDS = "token_ids"
"""Name of the tensor that says whose rows the embedding's are, int32 [rows]."""


def request_options(frames: int, options: MaskedOptions, **others: Any) -> dict[str, Any]:
    """What a request says in ``vllm_xargs``.

    Args:
        frames: to make.
        options: how they are made.
        others: more options, such as the policy.
    """
    how = {name: int(value) if isinstance(value, bool) else value for name, value in asdict(options).items()}
    return {f"{REQUEST_PREFIX}{name}": value for name, value in {"frames": frames, **how, **others}.items()}


def write_checkpoint(path: str | Path, bundle: Path = MODEL_DIR) -> Path:
    """Write the bundled model as a checkpoint of Lumos-1 is published: some 30 MB, within a second.

    Args:
        path: folder for ``config.json``, ``model.safetensors`` and the text tokenizer; it is created.
        bundle: folder with the bundle, as training wrote it.

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
