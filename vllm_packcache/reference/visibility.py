"""What a query sees and where it sees it: the method's rule over tokens, stated literally."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_packcache.config import VideoPlan
from vllm_packcache.retention import Retention


def visibility(plan: VideoPlan | None, block_size: int, num_tokens: int) -> Tensor:
    """Which key each query sees.

    Query p sees key j if j is not later than p and the block of j lives when p is computed. The block that p
    itself is written to lives then by definition.

    Args:
        plan: layout and policy of the request; None: the whole cache is kept.
        block_size: tokens of a KV-cache block; without a plan it does not matter.
        num_tokens: T, length of the sequence.

    Returns:
        bool, [T, T]: row p, column j is True where query p sees key j.
    """
    tokens = torch.arange(num_tokens)
    causal = tokens[None, :] <= tokens[:, None]
    if plan is None:
        return causal
    retention = Retention(plan.layout, plan.policy, block_size)
    block_of = tokens // block_size
    live = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    for query in range(num_tokens):
        live_blocks = torch.from_numpy(retention.live_blocks(query))
        live[query] = torch.isin(block_of, live_blocks) | (block_of == query // block_size)
    return causal & live


def positions(tokens: Tensor, frame: int) -> Tensor:
    """Model positions that ``tokens`` have, as keys and as queries, while ``frame`` is made.

    The one place that decides positions. They are absolute, the same whatever frame is made: the index of
    the token in the sequence.

    Args:
        tokens: [n], indices into the sequence.
        frame: the frame being made, or `vllm_packcache.layout.CONDITION`.

    Returns:
        [n], positions.
    """
    del frame
    return tokens
