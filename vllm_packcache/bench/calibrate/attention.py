"""Where the attention of a model's queries goes, measured in its forward pass.

transformers lets an attention function be registered by name. Ours computes attention plainly, some queries at a time,
and adds up what every key gets. What is measured is the full cache: nothing is dropped.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from vllm_packcache.config import ConfigError
from vllm_packcache.layout import VideoLayout

Float64 = npt.NDArray[np.float64]

NAME = "packcache_calibrate"
"""Under which transformers knows the attention function."""

MOST_SCORES = 2**23
"""Scores that are held at once, of all heads: 32 MiB. Weights and temporaries are as many again."""

SEGMENTS = ("text", "conditioning image", "own frame", "older frames")
"""What the first columns of a measurement stand for; behind them come the frames at distance 1, 2, ... D."""

TEXT, IMAGE, OWN, OLDER, NEAREST = range(len(SEGMENTS) + 1)
"""Columns of a measurement."""

_HARMLESS = {"dropout", "is_causal", "output_attentions", "position_embeddings", "position_ids", "use_cache"}
"""Arguments of an attention function that do not change what a query of a whole sequence attends to."""


@dataclass(frozen=True)
class Video:
    """A video as a model sees it.

    Args:
        token_ids: condition and whole frames.
        layout: which of them is what.
    """

    token_ids: list[int]
    layout: VideoLayout


class Mass(NamedTuple):
    """Attention mass of one video: shares of a query's attention, averaged over queries.

    Only queries of frames with D frames before them count, so that every distance has the same queries.

    Args:
        by_segment: [layers, heads, 4 + D], see `SEGMENTS`; over the last axis they sum to 1.
        by_block: [frames - D, layers, blocks], averaged over heads; row i is of the queries of frame D + i.
    """

    by_segment: Float64
    by_block: Float64


@dataclass
class _Tally:
    """What is known so far of one video.

    Args:
        layout: of the video.
        distances: D.
        block_size: tokens of a block.
    """

    layout: VideoLayout
    distances: int
    block_size: int
    by_segment: dict[int, list[Tensor]] = field(default_factory=dict)
    by_block: dict[int, list[Tensor]] = field(default_factory=dict)

    def begin(self, layer: int) -> None:
        """A layer attends.

        Raises:
            ConfigError: it has done so before.
        """
        if layer in self.by_segment:
            raise ConfigError(f"MODEL: layer {layer} attends twice: attention of such a model cannot be measured")
        self.by_segment[layer] = []
        self.by_block[layer] = []

    def add(self, layer: int, frame: int, mass: Tensor) -> None:
        """Count the queries of ``frame``: what every token got of them on average, [heads, tokens] in float64."""
        if frame < self.distances:
            return
        condition = self.layout.condition_tokens
        first = frame - self.distances
        starts = torch.tensor([self.layout.frame_start(k) for k in range(first, frame + 2)])
        before = F.pad(mass.cumsum(-1), (1, 0))
        of_frames = before[:, starts].diff()
        condition_edges = [0, condition - self.layout.condition_image_tokens, condition, int(starts[0])]
        text, image, older = before[:, condition_edges].diff().unbind(-1)
        of_condition = torch.stack([text, image, of_frames[:, -1], older], -1)
        # The nearest frame is the last one before the query's own.
        self.by_segment[layer].append(torch.cat([of_condition, of_frames[:, :-1].flip(-1)], -1))
        blocks = -(-self.layout.frame_start(frame + 1) // self.block_size)
        padded = F.pad(mass.mean(0), (0, blocks * self.block_size - mass.shape[1]))
        self.by_block[layer].append(padded.view(blocks, self.block_size).sum(-1))

    def mass(self, layers: int) -> Mass:
        """The measurement of a model of so many layers.

        Raises:
            ConfigError: not all of them, or others, have attended.
        """
        if sorted(self.by_segment) != list(range(layers)):
            raise ConfigError(
                f"MODEL: {len(self.by_segment)} of {layers} layers attend by way of transformers' AttentionInterface: "
                "only models all of whose layers do can be measured"
            )
        by_segment = [torch.stack(self.by_segment[layer]).mean(0) for layer in range(layers)]
        # Later frames see more blocks: rows are as long as the last.
        by_block = [nn.utils.rnn.pad_sequence(self.by_block[layer], batch_first=True) for layer in range(layers)]
        return Mass(torch.stack(by_segment).numpy(), torch.stack(by_block, 1).numpy())


_tally: ContextVar[_Tally] = ContextVar("tally")


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
    tally = _Tally(video.layout, distances, block_size)
    token = _tally.set(tally)
    try:
        with torch.inference_mode():
            # Without the last layer: logits of all tokens would take more memory than anything else.
            model.base_model(input_ids=torch.tensor([video.token_ids]), use_cache=False)
    finally:
        _tally.reset(token)
    return tally.mass(text.num_hidden_layers)


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
    tally.begin(layer)
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
