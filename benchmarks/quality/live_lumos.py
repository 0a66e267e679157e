"""The reference of Lumos-1 with a faster attention: the same loop, positions and visibility."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vllm_packcache.reference.lumos import LumosReference


class LiveLumos(LumosReference):
    """Rotates and reads live tokens only, and fuses softmax with what it weighs.

    The reference rotates, scores and masks what is dropped too. Videos of both are compared token for token in
    `tests/benchmarks/test_quality.py`.
    """

    def attention(self, queries: Tensor, queries_at: Tensor, cached: Tensor, keys_at: Tensor, mask: Tensor) -> Tensor:
        """As that of the reference; where all queries see the same keys, as those of a frame do, with those only."""
        seen = mask[0]
        if not (mask == seen).all():
            return super().attention(queries, queries_at, cached, keys_at, mask)
        keys, values = self.rotate(cached[0, seen], keys_at[:, seen]), cached[1, seen]
        # Of three dimensions it is not fused on a CPU.
        by_head = [heads.transpose(0, 1)[None] for heads in (self.rotate(queries, queries_at), keys, values)]
        return scaled_dot_product_attention(by_head[0], by_head[1], by_head[2], enable_gqa=True)[0].transpose(0, 1)
