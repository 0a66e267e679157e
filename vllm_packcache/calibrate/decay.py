"""From attention mass by temporal distance to the decay and the options of PackCache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from vllm_packcache.calibrate.mass import NEAREST, OLDER, Float64, Mass, Video
from vllm_packcache.core.layout import FrameLayout
from vllm_packcache.core.policies.packcache import MAX_WINDOW, PAPER, PackCache
from vllm_packcache.core.retention import Retention
from vllm_packcache.tools.sequences import lookup

PAPER_DECAY = 0.5
"""rho of the paper."""

HISTORY_STEP = 0.25
"""Budgets that are tried are multiples of this, in frames."""

RESAMPLES = 2000
BOOTSTRAP_SEED = 0

DECIMALS = 4
"""Of the decay in a configuration."""


class Interval(NamedTuple):
    """A 95 % confidence interval."""

    low: float
    high: float


@dataclass(frozen=True)
class Fit:
    """Attention mass of the frame at distance d, modelled as ``mu_d = C rho^d``.

    Args:
        scale: C.
        rho: by which it falls from one distance to the next.
        r_squared: of the logarithms; how much of their variance the model explains.
        interval: of rho, over videos; None: there is one video.
    """

    scale: float
    rho: float
    r_squared: float
    interval: Interval | None

    @property
    def decay(self) -> float:
        """Rho as the option ``decay`` takes it: rounded, above 0 and at most 1."""
        return min(1.0, max(10.0**-DECIMALS, round(self.rho, DECIMALS)))

    @property
    def holds_half(self) -> bool | None:
        """Whether the interval holds the paper's rho; None: there is no interval."""
        return None if self.interval is None else self.interval.low <= PAPER_DECAY <= self.interval.high


def _logs(mass: Float64) -> Float64:
    # Nothing smaller comes out of a softmax in float32.
    return np.log(np.maximum(mass, np.finfo(np.float32).tiny))


def lines(mass: Float64) -> Float64:
    """Least-squares lines through log mass against distance: [D, n] to slopes and intercepts, [2, n]."""
    return np.polyfit(np.arange(1, len(mass) + 1), _logs(mass), 1)


def fit(by_distance: Float64) -> Fit:
    """Fit the decay, with a bootstrap over videos (percentiles).

    Args:
        by_distance: attention mass, [videos, D], D of 2 or more.
    """
    mean = by_distance.mean(0)
    (slope,), (intercept,) = lines(mean[:, None])
    distances = np.arange(1, len(mean) + 1)
    logs = _logs(mean)
    variance = logs.var()
    rest = np.mean((logs - intercept - slope * distances) ** 2)
    interval = None
    if len(by_distance) > 1:
        slopes, _ = lines(resampled_means(by_distance).T)
        interval = percentiles(np.exp(slopes))
    return Fit(
        float(np.exp(intercept)),
        float(np.exp(slope)),
        # Masses that are all the same are a perfect decay of 1.
        float(1 - rest / variance) if variance > 0 else 1.0,
        interval,
    )


def scale_at(mean: Float64, rho: float) -> float:
    """C of the best model of masses [D] with a given rho, by the same least squares."""
    return float(np.exp(np.mean(_logs(mean) - np.arange(1, len(mean) + 1) * np.log(rho))))


def resampled_means(values: Float64) -> Float64:
    """Means over as many videos, drawn with replacement: [videos, n] to [RESAMPLES, n]."""
    videos = len(values)
    drawn = np.random.default_rng(BOOTSTRAP_SEED).multinomial(videos, np.full(videos, 1 / videos), size=RESAMPLES)
    return drawn @ values / videos


def percentiles(samples: Float64) -> Interval:
    """The interval that holds the middle 95 % of samples."""
    low, high = np.percentile(samples, [2.5, 97.5])
    return Interval(float(low), float(high))


def kept(policy: PackCache, mean: Float64, frame: FrameLayout) -> float:
    """Share of all attention mass on what a policy keeps, a frame's mass taken as even over its tokens.

    Args:
        policy: that keeps the whole condition.
        mean: mass by segment, [4 + D].
        frame: the shape of a frame.
    """
    # From frame 2 W on a policy keeps the same of every distance.
    tokens = policy.kept_tokens(frame.tokens_per_frame, 2 * policy.window)
    shares = np.array(tokens) / frame.tokens_per_frame
    return float(mean[:OLDER].sum() + shares @ mean[NEAREST : NEAREST + len(shares)])


def allowed(policy: PackCache, frame: FrameLayout) -> bool:
    """Whether the options go together."""
    try:
        policy.check(frame)
    except ValueError:
        return False
    return True


def budgets(distances: int) -> Iterator[float]:
    """Values of H that are tried, ascending: in `HISTORY_STEP` up to D frames."""
    return (n * HISTORY_STEP for n in range(1, round(distances / HISTORY_STEP) + 1))


def suggest(mean: Float64, decay: float, frame: FrameLayout, target: float) -> PackCache | None:
    """The cheapest options that keep a share of all attention mass: the smallest H, and for it the smallest W.

    Args:
        mean: mass by segment, [4 + D].
        decay: rho.
        frame: the shape of a frame.
        target: share to be kept, see `kept`.

    Returns:
        The policy; None: nothing within D frames keeps as much.
    """
    by_distance = mean[NEAREST:]
    distances = len(by_distance)
    best = np.concatenate([[0.0], np.cumsum(np.sort(by_distance)[::-1])])
    for history in budgets(distances):
        # The best frames, whole: no policy keeps more with this budget, and most budgets need not be looked at.
        if mean[:OLDER].sum() + np.interp(history, np.arange(distances + 1), best) < target - 1e-6:
            continue
        for window in range(1, min(distances, MAX_WINDOW) + 1):
            policy = replace(PAPER, history_frames=history, window=window, decay=decay)
            if allowed(policy, frame) and kept(policy, mean, frame) >= target:
                return policy
    return None


def measured(
    policy: PackCache, masses: Sequence[Mass], block_size: int, videos: Sequence[Video] | None = None
) -> Float64:
    """Share of all attention mass that falls on blocks that live under a policy, by layer, [layers].

    Args:
        policy: what is kept.
        masses: of the videos, with the full cache.
        block_size: tokens of a block, as measured with.
        videos: whose masses they are, one each; needed by a policy that reads tokens.
    """
    by_video = []
    for number, mass in enumerate(masses):
        tokens = None
        if videos is not None:
            # A stream is the end of the sequence, with a condition of its own.
            video = videos[number]
            start = video.layout.condition_tokens - mass.layout.condition_tokens
            tokens = lookup(np.array(video.token_ids, dtype=np.int64)[start:])
        retention = Retention(mass.layout, policy, block_size, tokens)
        frames = len(mass.by_block)
        distances = mass.by_segment.shape[-1] - NEAREST
        shares = [
            row[:, retention.past(frame)].sum(-1) + row[:, retention.blocks.tail_start(frame) :].sum(-1)
            for frame, row in zip(range(distances, distances + frames), mass.by_block, strict=True)
        ]
        by_video.append(np.mean(shares, axis=0))
    return np.mean(by_video, axis=0)
