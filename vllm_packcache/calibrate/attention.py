"""Where the attention of a model's queries goes, measured in its forward pass.

transformers lets an attention function be registered by name. Ours computes attention plainly, some queries at a time,
and adds up what every key gets. What is measured is the full cache: nothing is dropped.
"""

from __future__ import annotations

from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from vllm_packcache.calibrate.mass import Mass, Tally, Video
from vllm_packcache.config.errors import ConfigError

NAME = "packcache_calibrate"
"""Under which transformers knows the attention function."""

MOST_SCORES = 2**23
"""Scores that are held at once, of all heads: 32 MiB. Weights and temporaries are as many again."""

_HARMLESS = {"dropout", "is_causal", "output_attentions", "position_embeddings", "position_ids", "use_cache"}
"""Arguments of an attention function that do not change what a query of a whole sequence attends to."""


_tally: ContextVar[Tally] = ContextVar("tally")


def load(folder: Path) -> PreTrainedModel:
    """A causal language model whose attention can be measured, in float32.

    Raises:
        ConfigError: there is none in the folder, or its layers are not all plain attention.
    """
    if not (folder / "config.json").is_file():
        raise ConfigError(f"MODEL: {str(folder)!r} is no folder with a config.json: give that of a causal LM, or demo")
    logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, attn_implementation=NAME, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"MODEL: {str(folder)!r} cannot be loaded as a causal LM: {reason}") from None
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        # transformers makes them up.
        raise ConfigError(f"MODEL: {str(folder)!r} lacks {len(missing)} weights, such as {missing[0]}")
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ["full_attention"])
    if others := sorted(kinds - {"full_attention"}):
        raise ConfigError(
            f"MODEL: it has layers of type {others[0]}: only models with full attention in every layer can be measured"
        )
    return model.eval()


def measure(model: PreTrainedModel, video: Video, distances: int, block_size: int) -> Mass:
    """The attention mass of one video.

    Args:
        model: from `load`.
        video: of more than ``distances`` frames.
        distances: D, the largest temporal distance that is told apart.
        block_size: tokens of a KV-cache block.

    Raises:
        ConfigError: the video does not fit the model, or its attention is not plain.
    """
    text = model.config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and len(video.token_ids) > positions:
        raise ConfigError(
            f"--frames: a video of {len(video.token_ids)} tokens is longer than the model's {positions} positions: "
            "measure fewer frames"
        )
    if not 0 <= min(video.token_ids) <= max(video.token_ids) < text.vocab_size:
        raise ConfigError(f"--sequences: token_ids must lie between 0 and {text.vocab_size - 1}, the model's last one")
    tally = Tally(video.layout, distances, block_size)
    token = _tally.set(tally)
    try:
        with torch.inference_mode():
            # Without the last layer: logits of all tokens would take more memory than anything else.
            model.base_model(input_ids=torch.tensor([video.token_ids]), use_cache=False)
    finally:
        _tally.reset(token)
    layers = text.num_hidden_layers
    if sorted(tally.by_segment) != list(range(layers)):
        raise ConfigError(
            f"MODEL: {len(tally.by_segment)} of {layers} layers attend by way of transformers' AttentionInterface: "
            "only models all of whose layers do can be measured"
        )
    return tally.mass()


def attend(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Causal attention of the last n of K tokens.

    Args:
        query: [heads, n, D].
        key: [KV heads, K, D]; heads are grouped, in order.
        value: [KV heads, K, E].
        scaling: of the scores.

    Returns:
        What is read, [heads, n, E], and the weights, [heads, n, K].
    """
    heads, queries = query.shape[:2]
    kv_heads, keys = key.shape[:2]
    grouped = query.reshape(kv_heads, -1, query.shape[-1]) * scaling
    scores = (grouped @ key.transpose(1, 2)).view(heads, queries, keys)
    future = torch.ones(queries, queries, dtype=torch.bool).triu(1)
    scores[:, :, keys - queries :].masked_fill_(future, -torch.inf)
    weights = scores.softmax(-1)
    return (weights.view(kv_heads, -1, keys) @ value).view(heads, queries, -1), weights


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: query [1, heads, T, D], key and value [1, KV heads, T, ...]; to [1, T, heads, E]."""
    _check_plain(module, attention_mask, options)
    tally, layer = _tally.get(), _layer(module)
    if layer in tally.by_segment:
        raise ConfigError(f"MODEL: layer {layer} attends twice: attention of such a model cannot be measured")
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    heads, tokens = query.shape[1:3]
    read = query.new_empty(1, tokens, heads, value.shape[-1])
    for frame, start, stop in tally.layout.segments(0, tokens):
        mass = torch.zeros(heads, stop, dtype=torch.float64)
        step = max(1, MOST_SCORES // (heads * stop))
        for first in range(start, stop, step):
            last = min(first + step, stop)
            own, weights = attend(query[0, :, first:last], key[0, :, :last], value[0, :, :last], scaling)
            read[0, first:last] = own.transpose(0, 1)
            mass[:, :last] += weights.sum(1)
        tally.add(layer, frame, mass / (stop - start))
    return read, None


def _layer(module: nn.Module) -> int:
    index = getattr(module, "layer_idx", None)
    if not isinstance(index, int):
        raise ConfigError("MODEL: its attention does not know its layer (layer_idx): such a model cannot be measured")
    return index


AttentionInterface.register(NAME, _attention)


def _check_plain(module: nn.Module, attention_mask: Tensor | None, options: dict[str, Any]) -> None:
    """Refuse what would be ignored: no mask is made for an attention function that transformers does not know."""
    given = {name for name, value in options.items() if value is not None and value is not False}
    special = sorted(given - _HARMLESS)
    if attention_mask is not None:
        special.append("attention_mask")
    if options.get("is_causal", getattr(module, "is_causal", True)) is False:
        special.append("is_causal=False")
    if special:
        raise ConfigError(
            f"MODEL: the attention of its layers is not plain, it has {special[0]}: only causal attention to "
            "everything before can be measured"
        )
