"""Classifier-free guidance of a model that makes a video token by token, literally: two sequences, one sampled token.

One request at a time. Each stream is a sequence with a condition of its own and the same tokens behind it; each keeps
its whole history, and the method is a mask and positions.

Source: classifier-free guidance (arXiv 2207.12598), as of Emu3's public code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_packcache.core.plan import Plan
from vllm_packcache.reference.llama import Generation, LlamaReference


class GuidedVideo(NamedTuple):
    """What a guided video is made of.

    Attributes:
        condition_tokens: how many tokens at the beginning of a prompt the second stream has others for.
        negative_ids: those.
        scale: s.
        plan: of the first stream; None: the whole cache is kept.
        negative_plan: of the second one.
        block_size: tokens of a KV-cache block.
    """

    condition_tokens: int
    negative_ids: Sequence[int]
    scale: float
    plan: Plan | None = None
    negative_plan: Plan | None = None
    block_size: int = 32

    def negative(self, token_ids: Sequence[int]) -> list[int]:
        """The second stream of a request of ``token_ids``."""
        return [*self.negative_ids, *token_ids[self.condition_tokens :]]

    def logits(self, model: LlamaReference, token_ids: Sequence[int]) -> Tensor:
        """Guided logits behind every token of a given sequence, from the last of its condition on (teacher forcing).

        Args:
            model: the oracle.
            token_ids: T tokens, condition first.

        Returns:
            float32, [T - condition_tokens + 1, vocabulary].
        """
        own = model.logits(token_ids, self.plan, self.block_size)[self.condition_tokens - 1 :]
        negative = self.negative(token_ids)
        other = model.logits(negative, self.negative_plan, self.block_size)[len(self.negative_ids) - 1 :]
        return combined(own, other, self.scale)


def combined(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """``u + s (c - u)``, c and u the logarithms of the probabilities, [n, vocabulary]."""
    c, u = (torch.log_softmax(logits, dim=-1) for logits in (conditional, unconditional))
    return u + scale * (c - u)


def generate_guided(
    model: LlamaReference,
    prompt_ids: Sequence[int],
    max_tokens: int,
    video: GuidedVideo,
    choose: Callable[[Tensor], int] = lambda logits: int(logits.argmax()),
) -> Generation:
    """Generate token by token, each of which both streams go on with.

    Args:
        model: the oracle.
        prompt_ids: the condition, and any given frames.
        max_tokens: n, tokens to generate.
        video: how.
        choose: the next token, of guided logits [vocabulary].
    """
    tokens, logits = list(prompt_ids), []
    for _ in range(max_tokens):
        # Both are computed anew, as far as they have come: what a cache would hold follows from masks.
        logits.append(video.logits(model, tokens)[-1])
        tokens.append(choose(logits[-1]))
    return Generation(tokens[len(prompt_ids) :], torch.stack(logits))
