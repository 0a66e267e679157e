"""Guided videos of a causal model in the real engine, on vLLM's V2 runner: token for token equal to two sequences.

Every request's tokens are those of the plain PyTorch loop, float32: a second sequence with the negative condition, fed the
same tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from tests.margins import TIE, CarefulReference, Tie
from tests.runner import needs_v2
from tests.serving.conftest import PAPERS, generate, prompt, run, sampling, schedule_asynchronously
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.reference.guided import GuidedVideo

pytestmark = needs_v2

BLOCK = 32


@dataclass(frozen=True)
class Case:
    """A request: tokens of the condition and of the negative one, of a frame, of what is given, and to make."""

    condition: int
    negative: int
    frame: int
    given: int
    make: int
    scale: float = 3.0
    seed: int = 0
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def ids(self) -> list[int]:
        return prompt(self.condition + self.given, seed=self.seed)

    @property
    def negative_ids(self) -> list[int]:
        return prompt(self.negative, seed=1000 + self.seed)

    @property
    def params(self) -> Any:
        return sampling(
            self.make,
            tokens_per_frame=self.frame,
            condition_tokens=self.condition,
            guidance=self.scale,
            negative_prompt_ids=self.negative_ids,
            **dict(self.options),
        )

    def video(self, policy: str, config: dict[str, Any]) -> GuidedVideo:
        server = ServerConfig.parse(policy, {**config, "guidance": True})
        made = server.request(self.params.extra_args, self.ids)
        assert made is not None
        first, second = (stream.plan for stream in made.streams)
        return GuidedVideo(self.condition, self.negative_ids, self.scale, first, second, BLOCK)


def check(reference: CarefulReference, case: Case, tokens: list[int], video: GuidedVideo) -> None:
    """Assert that ``tokens`` are the loop's.

    Raises:
        Tie: another token is as good as one of these.
    """
    assert len(tokens) == case.make
    assert not (wrong := _wrong(reference, case, tokens, video)), f"tokens {wrong} are not the reference's"


def differs(reference: CarefulReference, case: Case, tokens: list[int], video: GuidedVideo) -> bool:
    """Whether the loop would make others of another video; what is checked would show nothing otherwise."""
    return bool(_wrong(reference, case, tokens, video, ties=True))


def _wrong(
    reference: CarefulReference, case: Case, tokens: list[int], video: GuidedVideo, ties: bool = False
) -> list[int]:
    logits = video.logits(reference, [*case.ids, *tokens[:-1]])[-len(tokens) :]
    best = logits.topk(2).values
    gaps = best[:, 0] - best[:, 1]
    least = TIE * max(1, 2 * abs(case.scale))
    wrong = (logits.argmax(-1) != torch.tensor(tokens)) & (gaps >= least)
    if not ties and not wrong.any() and gaps.min() < least:
        raise Tie(f"token {int(gaps.argmin())} is ahead by {float(gaps.min()):.1e}")
    return [int(number) for number in wrong.nonzero().flatten()]


@pytest.fixture(scope="module")
def guiding(engine: Callable[..., Any]) -> Callable[..., Any]:
    """``guiding(policy, config, **options)`` -> an `LLM` whose videos may be guided."""
    return lambda policy="packcache", config=PAPERS, **options: engine(policy, {**config, "guidance": True}, **options)


SHORTER = Case(70, 20, 40, 6 * 40 + 25, 30)
LONGER = Case(21, 90, 33, 5 * 33 + 20, 28, scale=1.7, seed=1)
FROM_TEXT = Case(45, 12, 9, 0, 60, scale=5.0, seed=2)
SAME = Case(50, 50, 20, 7 * 20, 25, scale=0.5, seed=3)
BARE = Case(40, 1, 16, 3, 40, scale=2, seed=4)
CASES = [SHORTER, LONGER, FROM_TEXT, SAME, BARE]


@pytest.mark.parametrize("case", CASES)
def test_alone(case: Case, guiding: Any, reference: CarefulReference) -> None:
    (tokens,) = run(guiding(), [case.ids], [case.params])
    video = case.video("packcache", PAPERS)
    check(reference, case, tokens, video)
    assert reference.differs(case.ids, tokens, video.plan), "guidance changed nothing: the comparison shows nothing"
