"""What the model computes in each pass of a frame that is made in passes, where not everything is.

A pass chooses tokens by logits. As published, the model computes the whole frame for it, in both streams. Of that a
request may leave out:

- rows that are **settled**: their token was known when the model last computed them, so only what they see of the frame
  has changed since. Their keys and values stay. Source: dKV-Cache, arXiv 2505.15781.
- **passes** before which little has changed: they draw anew, with their own noise, by what the last computed pass has
  left of the rows that are still unknown. Source: FlowCache, arXiv 2602.10825; its measure of change is here the share
  of tokens that have become known.
- the **unconditional stream** of some passes: of the rows that are still unknown its last hidden states are used again,
  against the new conditional ones. Where tokens are drawn without guidance nothing of it is used. Source: arXiv
  2404.07724.

How many tokens are unknown before a pass follows from the schedule, so all of this is known before the frame is begun.
The commit always computes everything in both streams: what later frames see is never stale.

This module is pure: it knows neither vLLM nor torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from vllm_packcache.families.lumos import Grid, MaskedOptions, frame_layout, still_masked


class Pass(NamedTuple):
    """One pass of a frame in which tokens are chosen.

    Args:
        rows: how many tokens of the frame the model computes in each stream, the conditional one first. All F of them
            where the pass is whole; 0 where the stream is left out; otherwise those visual tokens that were masked when
            the stream was last computed: so many, or fewer after ties (see `still_masked`).
        guided: whether tokens are drawn with guidance.
    """

    rows: tuple[int, int]
    guided: bool

    @property
    def computed(self) -> bool:
        """Whether the model runs; otherwise the pass draws by what the last one that was computed has left."""
        return self.rows[0] > 0


@lru_cache(maxsize=256)
def most_unknown(steps: int, tokens: int) -> tuple[int, ...]:
    """How many visual tokens are unknown before each step, ties aside; after them there may be fewer.

    Args:
        steps: S.
        tokens: N, visual tokens of a frame.

    Returns:
        [S], the first is N.
    """
    unknown = [tokens]
    for step in range(steps - 1):
        unknown.append(still_masked(step, steps, tokens, unknown[-1]))
    return tuple(unknown)


@lru_cache(maxsize=256)
def schedule(options: MaskedOptions, grid: Grid) -> tuple[Pass, ...]:
    """The passes of every frame, the commit left out.

    The first pass is computed. Later ones are where as large a share of the tokens as ``options.reuse`` has become
    known since the last computed one, and where guidance begins. Of the computed passes ``options.refresh`` after a
    whole one are whole again, and the unconditional stream is computed in every ``options.guidance_interval``-th of
    those with guidance, from the first of them on. Each stream has its whole passes for itself: the first time that a
    frame has of a stream is one.

    Args:
        options: of the request.
        grid: of its frames.

    Returns:
        As many as ``options.steps``.
    """
    whole, tokens = frame_layout(grid).tokens_per_frame, grid[0] * grid[1]
    unknown = most_unknown(options.steps, tokens)
    conditional, unconditional = (_Stream(options.refresh, whole, unknown) for _ in range(2))
    passes: list[Pass] = []
    computed, last = 0, 0
    for step in range(options.steps):
        guided = options.guides(step)
        begins = step == 0 or (guided and unconditional.computed is None)
        if not begins and unknown[last] - unknown[step] < options.reuse * tokens:
            passes.append(Pass((0, 0), guided))
            continue
        due = guided and unconditional.due(computed, options.guidance_interval)
        rows = conditional.compute(computed, step), unconditional.compute(computed, step) if due else 0
        passes.append(Pass(rows, guided))
        computed, last = computed + 1, step
    return tuple(passes)


def computed_passes(options: MaskedOptions, grid: Grid) -> int:
    """How many times the model computes something of a frame, the commit included: so many engine steps it takes."""
    return 1 + sum(own.computed for own in schedule(options, grid))


@dataclass
class _Stream:
    """When a stream of a frame was computed last, and when last whole, counted in computed passes.

    Args:
        refresh: computed passes from one whole one to the next.
        tokens: F, of a frame.
        unknown: of `most_unknown`.
        step: of the last time.
    """

    refresh: int
    tokens: int
    unknown: tuple[int, ...]
    computed: int | None = None
    whole: int | None = None
    step: int = 0

    def due(self, number: int, interval: int) -> bool:
        """Whether it is to be computed again, ``interval`` computed passes after the last time."""
        return self.computed is None or number - self.computed >= interval

    def compute(self, number: int, step: int) -> int:
        """Have it computed by the computed pass ``number``; how many of its tokens are."""
        rows = self.unknown[self.step]
        if self.whole is None or number - self.whole >= self.refresh:
            self.whole, rows = number, self.tokens
        self.computed, self.step = number, step
        return rows
