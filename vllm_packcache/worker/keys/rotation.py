"""Key rotation: when the window slides, the cached keys of its frames move to their new positions.

A key is turned in place, once for every slide that it lives through, by an angle that does not depend on where it
is. What it is turned by is worked out in float64 and applied in float32, whatever the cache holds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding, RotaryEmbeddingBase
from vllm.model_executor.layers.rotary_embedding.linear_scaling_rope import LinearScalingRotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.llama3_rope import Llama3RotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.mrope import MRotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.yarn_scaling_rope import YaRNScalingRotaryEmbedding
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_packcache.config.errors import ConfigError
from vllm_packcache.core.positions import Float64, Int64, Positions, contiguous_axes, interleaved_axes, slide_angles
from vllm_packcache.core.retention import Retention
from vllm_packcache.worker.keys.stored import CachedKeys

if TYPE_CHECKING:
    from vllm_packcache.worker.keys.kernel import RotationKernel

NUMBERS_AT_ONCE = 2**18
"""Numbers of a cache that are turned in one go: as float32 they and what becomes of them stay in a core's cache."""


class Rotary(NamedTuple):
    """How a model's keys are rotated; n pairs of channels turn, the other channels do not.

    Attributes:
        frequencies: angle of each pair at position 1, [n].
        axis_of: axis of a position that each pair turns with, [n].
        left: first channel of each pair, [n].
        right: second channel of each pair, [n].
    """

    frequencies: Float64
    axis_of: Int64
    left: Int64
    right: Int64


def rotary_of(model: Any) -> Rotary:
    """Read the rotary embedding of a loaded model (a `torch.nn.Module`).

    Raises:
        ConfigError: it has several, or one whose angles are not known to grow in proportion to the position.
    """
    language_model = model.get_language_model() if hasattr(model, "get_language_model") else model
    embeddings = {module for module in language_model.modules() if isinstance(module, RotaryEmbeddingBase)}
    if len(embeddings) != 1:
        raise ConfigError(
            f"positions: rebase needs one rotary embedding for all layers, and {type(model).__name__} has "
            f"{len(embeddings)}: set positions: absolute"
        )
    (embedding,) = embeddings
    frequencies = _frequencies(embedding)
    pairs = np.arange(len(frequencies))
    if embedding.is_neox_style:
        left, right = pairs, pairs + len(pairs)
    else:
        left, right = 2 * pairs, 2 * pairs + 1
    sections = getattr(embedding, "mrope_section", None)
    if not sections:
        axis_of = np.zeros_like(pairs)
    elif getattr(embedding, "mrope_interleaved", False):
        axis_of = interleaved_axes(sections)
    else:
        axis_of = contiguous_axes(sections)
    return Rotary(frequencies, axis_of, left, right)


def _frequencies(embedding: RotaryEmbeddingBase) -> Float64:
    kind = type(embedding)
    scaled = kind is MRotaryEmbedding and embedding.scaling_factor is not None
    if kind is YaRNScalingRotaryEmbedding or scaled:
        frequencies = embedding._compute_inv_freq(embedding.scaling_factor)
    elif kind is LinearScalingRotaryEmbedding and len(embedding.scaling_factors) == 1:
        frequencies = embedding._compute_inv_freq(embedding.base) / embedding.scaling_factors[0]
    elif kind in (RotaryEmbedding, Llama3RotaryEmbedding, MRotaryEmbedding):
        frequencies = embedding._compute_inv_freq(embedding.base)
    else:
        raise ConfigError(
            f"positions: rebase does not know the rotary embedding {kind.__name__}: set positions: absolute"
        )
    return frequencies.double().cpu().numpy()


@dataclass(frozen=True)
class KeyRotation:
    """Rotates the cached keys of a model's layers.

    Args:
        rotary: how the model rotates keys.
        layers: the keys of every layer, each cache once.
    """

    rotary: Rotary
    layers: tuple[CachedKeys, ...]

    @classmethod
    def of(cls, rotary: Rotary, layers: Iterable[CachedKeys]) -> KeyRotation:
        """The rotation of ``layers``, of which some may share their cache."""
        by_memory = {keys.memory.data_ptr(): keys for keys in layers}
        return cls(rotary, tuple(by_memory.values()))

    def slide(self, retention: Retention, positions: Positions, token: int, block_table: Tensor) -> None:
        """Move the history of one request by one frame: its window slides before ``token`` is computed.

        Args:
            retention: what of the request lives.
            positions: where its tokens are.
            token: the first token of the frame about to be made.
            block_table: the request's blocks, [at least its logical blocks], on any device.
        """
        logical = retention.sliding_blocks(positions.layout.frame_of(token))
        if len(logical) == 0:
            return
        block_size = retention.block_size
        tokens = logical[:, None] * block_size + np.arange(block_size)
        kinds = torch.from_numpy(positions.slide_kinds(tokens))
        # A copy from pageable memory would wait for everything that the device has yet to do.
        blocks = block_table[async_tensor_h2d(logical, device=block_table.device)].long()
        angles = slide_angles(positions, self.rotary.frequencies, self.rotary.axis_of)
        if self._kernel is not None:
            self._kernel.rotate(blocks, kinds, angles, interleaved=bool(self.rotary.right[0] == 1))
            return
        for keys in self.layers:
            rotate(keys, blocks, kinds, angles, self.rotary)

    @cached_property
    def _kernel(self) -> RotationKernel | None:
        """One launch for all layers, on a GPU; None: they are turned one after another."""
        if not all(keys.memory.is_cuda for keys in self.layers):
            return None
        from vllm_packcache.worker.keys.kernel import RotationKernel

        return RotationKernel(self.layers)


def rotate(keys: CachedKeys, blocks: Tensor, kinds: Tensor, angles: Float64, rotary: Rotary) -> None:
    """Turn the keys of ``blocks`` in place.

    Args:
        keys: of one layer. Its blocks may be smaller by a whole factor: block b is then b x factor + 0, 1, ...
        blocks: int64, [n].
        kinds: int64, [n, tokens of a block]: by which row of ``angles`` each token turns.
        angles: [kinds, pairs of channels].
        rotary: which channels are a pair.
    """
    memory, order, stored = keys
    split = kinds.shape[1] // order.shape[0]
    parts = blocks[:, None] * split + torch.arange(split, device=blocks.device)
    blocks = parts.flatten().to(memory.device, non_blocking=True)
    kinds = kinds.view(-1, order.shape[0]).to(memory.device, non_blocking=True)
    turn = _turn(order, angles, rotary)
    at_once = max(1, NUMBERS_AT_ONCE // memory[0].numel())
    for some, kinds_of_some in zip(blocks.split(at_once), kinds.split(at_once), strict=True):
        numbers = stored.read(memory, some)
        straight, crossed = turn.coefficients(kinds_of_some)
        stored.write(memory, some, (numbers * straight).addcmul_(turn.partners(numbers), crossed))


class _Turn(NamedTuple):
    """A rotation as ``numbers * straight + partners * crossed`` over the packed keys of a block, m numbers.

    Attributes:
        straight: float32, [kinds, m].
        crossed: float32, [kinds, m].
        partner: the number that each is paired with, [m].
        stride: how far apart partners are, if numbers trade places with others in runs of so many; None: they do not.
        token_of: the token that each number is of, [m].
    """

    straight: Tensor
    crossed: Tensor
    partner: Tensor
    stride: int | None
    token_of: Tensor

    def coefficients(self, kinds: Tensor) -> tuple[Tensor, Tensor]:
        """``straight`` and ``crossed`` of blocks whose tokens are of ``kinds`` [n, tokens], [n or 1, 1, m]."""
        if len(self.straight) == 1:
            return self.straight[:, None], self.crossed[:, None]
        row = kinds[:, self.token_of]
        return tuple(table.gather(0, row)[:, None] for table in (self.straight, self.crossed))  # type: ignore[return-value]

    def partners(self, numbers: Tensor) -> Tensor:
        """What each of ``numbers`` [n, heads, m] is paired with: runs move several times faster than single numbers."""
        if self.stride is None:
            return numbers[..., self.partner]
        return numbers.unflatten(-1, (-1, 2, self.stride)).flip(-2).flatten(-3)


def _turn(order: Tensor, angles: Float64, rotary: Rotary) -> _Turn:
    tokens, channels = order.shape
    partner_channel = np.arange(channels)
    partner_channel[rotary.left], partner_channel[rotary.right] = rotary.right, rotary.left
    cos, sin = np.ones((len(angles), channels)), np.zeros((len(angles), channels))
    cos[:, rotary.left] = cos[:, rotary.right] = np.cos(angles)
    sin[:, rotary.right] = np.sin(angles)
    sin[:, rotary.left] = -sin[:, rotary.right]
    device = order.device
    channel_of = torch.empty(order.numel(), dtype=torch.int64, device=device)
    token_of, partner = torch.empty_like(channel_of), torch.empty_like(channel_of)
    channel_of[order] = torch.arange(channels, device=device)
    token_of[order] = torch.arange(tokens, device=device)[:, None]
    partner[order] = order[:, torch.from_numpy(partner_channel).to(device)]
    straight, crossed = (torch.from_numpy(table).float().to(device)[:, channel_of] for table in (cos, sin))
    return _Turn(straight, crossed, partner, _stride(partner), token_of)


def _stride(partner: Tensor) -> int | None:
    """See `_Turn`. Channels that do not turn are paired with themselves, and whatever is moved there counts nothing."""
    numbers = torch.arange(len(partner), device=partner.device)
    turning = partner != numbers
    stride = int((partner - numbers)[turning][0].abs())
    if len(partner) % (2 * stride):
        return None
    moved = numbers.unflatten(0, (-1, 2, stride)).flip(-2).flatten()
    return stride if bool((moved == partner)[turning].all()) else None
