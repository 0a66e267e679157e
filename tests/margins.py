"""Exact tokens on any processor: data on which no token is decided by how float32 sums round.

Processors add up in different orders. Where that changes more than what the two best logits differ by, one token is as
right as the other, and a test shows nothing. The reference of the tests raises `Tie` there, and the test is called anew
(see ``pytest_pyfunc_call`` in `conftest`). What it draws from `numbers` is other data then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from vllm_packcache.core.plan import Plan
from vllm_packcache.reference import LlamaReference
from vllm_packcache.reference.llama import Generation
from vllm_packcache.reference.masked_video import MaskedGeneration

TIE = 1e-4
"""By how much the best logit of a token must exceed the second, of logits whose standard deviation is 1.

Sums that are rounded otherwise were seen to move a logit by 5e-6.
"""

DRAWING, MASKING = 3e-6, 5e-5
"""The same of a masked model: as a share of all probability, and in units of a logarithm.

Sums that are rounded otherwise were seen to move the two by 8e-7 and 1e-5.
"""

ATTEMPTS = 12

_attempt = 0


class Tie(Exception):
    """These data are no test: rounding may turn a token."""


def numbers(*seed: int) -> np.random.Generator:
    """Random numbers of a seed, others in every attempt of a test."""
    return np.random.default_rng([*seed, _attempt] if _attempt else list(seed))


def call_without_ties(test: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """Call a test until its data are without ties; it fails where `ATTEMPTS` different ones are not."""
    global _attempt
    ties = []
    try:
        for _attempt in range(ATTEMPTS):
            try:
                return test(**arguments)
            except Tie as tie:
                ties.append(str(tie))
    finally:
        _attempt = 0
    pytest.fail(f"none of {ATTEMPTS} data is without a tie, shorten the test: {'; '.join(ties)}")


class CarefulReference(LlamaReference):
    """The oracle, for data without ties."""

    def generate(
        self,
        prompt_ids: Sequence[int],
        max_tokens: int,
        plan: Plan | None = None,
        block_size: int = 32,
        allowed: Callable[[Sequence[int]], range] | None = None,
    ) -> Generation:
        """As ever.

        Raises:
            Tie: another token is as good as one of these.
        """
        made = super().generate(prompt_ids, max_tokens, plan, block_size, allowed)
        _refuse_ties(made.gaps)
        return made

    def check(
        self,
        prompt_ids: Sequence[int],
        tokens: Sequence[int],
        count: int,
        plan: Plan | None = None,
        block_size: int = 32,
    ) -> None:
        """Assert that ``tokens`` are the ``count`` that it would generate: soon done, all of them at once.

        Raises:
            Tie: another token is as good as one of these.
        """
        assert len(tokens) == count
        logits = self._logits_before(prompt_ids, tokens, plan, block_size)
        best = logits.topk(2).values
        gaps = best[:, 0] - best[:, 1]
        wrong = (logits.argmax(-1) != torch.tensor(tokens)) & (gaps >= TIE)
        assert not wrong.any(), f"of {len(tokens)} tokens, number {int(wrong.nonzero()[0])} is not the reference's"
        _refuse_ties(gaps)

    def differs(
        self, prompt_ids: Sequence[int], tokens: Sequence[int], plan: Plan | None = None, block_size: int = 32
    ) -> bool:
        """Whether it would generate others than ``tokens``; what is checked would show nothing otherwise."""
        return self._logits_before(prompt_ids, tokens, plan, block_size).argmax(-1).tolist() != list(tokens)

    def _logits_before(
        self, prompt_ids: Sequence[int], tokens: Sequence[int], plan: Plan | None, block_size: int
    ) -> torch.Tensor:
        return self.logits([*prompt_ids, *tokens[:-1]], plan, block_size)[len(prompt_ids) - 1 :]


def steady(choose: Callable[[torch.Tensor], list[int]], logits: torch.Tensor) -> list[int]:
    """What ``choose`` makes of logits.

    Raises:
        Tie: it makes something else of logits that were rounded otherwise.
    """
    tokens = choose(logits)
    random = torch.Generator().manual_seed(0)
    for _ in range(4):
        moved = logits + TIE / 2 * torch.randn(logits.shape, generator=random)
        if choose(moved) != tokens:
            raise Tie("a token that is drawn")
    return tokens


def refuse_masked_ties(made: MaskedGeneration, drawing: float = DRAWING) -> None:
    """Raise `Tie` if rounding may turn a token of what a masked model made."""
    drawn, masked_again = made.margins.flatten(0, 1).min(0).values.tolist()
    if drawn < drawing or masked_again < MASKING:
        raise Tie(f"a token was drawn by {drawn:.1e}, or masked again by {masked_again:.1e}")


def _refuse_ties(gaps: torch.Tensor) -> None:
    if gaps.min() < TIE:
        raise Tie(f"token {int(gaps.argmin())} of {len(gaps)} is ahead by {float(gaps.min()):.1e}")
