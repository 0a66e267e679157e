"""Models whose keys and values are kept in fewer bits: rounded when they are written, and keys at every turn as well.

Unlike their bases they keep keys rotated, as a cache does: what rounding leaves of a key depends on the turns that it
has lived through, so it must be turned literally, a slide of the window after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from vllm_packcache.core.layout import CONDITION, Segment
from vllm_packcache.core.plan import Plan
from vllm_packcache.families.lumos import LumosConfig
from vllm_packcache.reference.llama import LlamaConfig, LlamaReference
from vllm_packcache.reference.lumos import LumosReference
from vllm_packcache.reference.visibility import positions

Rounding = Callable[[Tensor], Tensor]
"""From keys or values, float32 [n, G, D], to what a cache then stands for."""


class QuantisedReference(LlamaReference):
    """The oracle of a cache of 8 bits.

    Args:
        config: the checkpoint's shape.
        weights: its tensors by their Hugging Face names.
        written: what becomes of keys and values that are new.
        turned: what becomes of keys that a slide of the window turns.
    """

    def __init__(self, config: LlamaConfig, weights: Mapping[str, Tensor], written: Rounding, turned: Rounding) -> None:
        super().__init__(config, weights)
        self._written, self._turned = written, turned

    def _forward(
        self,
        token_ids: Sequence[int],
        start: int,
        cache: Tensor,
        mask: Tensor,
        plan: Plan | None,
        block_size: int,
    ) -> Tensor:
        stop = start + len(token_ids)
        segments = [Segment(CONDITION, start, stop)] if plan is None else list(plan.layout.segments(start, stop))

        def attend(queries: Tensor, cached: Tensor) -> Tensor:
            read = []
            for frame, first, last in segments:
                at = positions(plan, block_size, len(mask), frame)
                if plan is not None and frame != CONDITION and first == plan.layout.frame_start(frame):
                    moved = at - positions(plan, block_size, len(mask), frame - 1)
                    slide(cached[0, :first], moved[:, :first], self.rotate, self._turned)
                cached[0, first:last] = self._written(self.rotate(cached[0, first:last], at[:, first:last]))
                cached[1, first:last] = self._written(cached[1, first:last])
                # Keys are where the model sees them: nothing is left to turn.
                still = torch.zeros_like(at[:, :last])
                seen = mask[first:last, :last]
                read.append(
                    self.attention(
                        queries[first - start : last - start], at[:, first:last], cached[:, :last], still, seen
                    )
                )
            return torch.cat(read)

        return self.output(self.hidden_states(token_ids, start, cache, attend))


class QuantisedLumosReference(LumosReference):
    """The same of Lumos-1. A pass writes over what the pass before it wrote, and only a frame's first one slides.

    Args:
        config: the checkpoint's shape.
        weights: its tensors by their Hugging Face names.
        written: as of `QuantisedReference`.
        turned: as of `QuantisedReference`.
    """

    def __init__(self, config: LumosConfig, weights: Mapping[str, Tensor], written: Rounding, turned: Rounding) -> None:
        super().__init__(config, weights)
        self._written, self._turned = written, turned
        # Of each cache: where its keys are.
        self._at: dict[int, Tensor] = {}

    def run(
        self, token_ids: Tensor, start: int, cache: Tensor, at: Tensor, mask: Tensor, some: Tensor | None = None
    ) -> Tensor:
        """See `LumosReference.run`."""
        stop, moved = start + len(token_ids), None
        rows = torch.arange(len(token_ids)) if some is None else some
        places = start + rows
        if start:
            moved = at[:, :start] - self._at[cache.data_ptr()][:, :start]
        self._at[cache.data_ptr()] = at

        def attend(queries: Tensor, cached: Tensor) -> Tensor:
            if moved is not None:
                slide(cached[0, :start], moved, self.rotate, self._turned)
            cached[0, places] = self._written(self.rotate(cached[0, places], at[:, places]))
            cached[1, places] = self._written(cached[1, places])
            return self.attention(queries, at[:, places], cached[:, :stop], torch.zeros_like(at), mask[rows])

        return self.hidden_states(token_ids[rows], start, cache, attend, places)


def slide(keys: Tensor, moved: Tensor, rotate: Callable[[Tensor, Tensor], Tensor], turned: Rounding) -> None:
    """Turn ``keys`` [n, G, D] in place by ``moved`` [axes, n]; those that stay are not touched.

    Args:
        keys: of a layer, rotated.
        moved: by how much the position of each changes.
        rotate: of the model.
        turned: what becomes of those that are turned.
    """
    (moving,) = moved.any(0).nonzero(as_tuple=True)
    if len(moving):
        keys[moving] = turned(rotate(keys[moving], moved[:, moving]))
