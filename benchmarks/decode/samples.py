"""Times of interleaved bursts, and ratios of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.engine_process import Burst

CPU, WALL = CLOCKS = ("cpu_seconds", "wall_seconds")
"""How steps are timed: fields of `Burst`."""

CLOCK_NAMES = {CPU: "processor time", WALL: "the clock"}
"""For people."""


def step_times(bursts: Mapping[str, Sequence[Burst]], ratios: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """Seconds a step of each burst but the first, which finds the caches cold; and ratios of them."""
    seconds = {
        clock: {name: [fmean(getattr(burst, clock)) for burst in own[1:]] for name, own in bursts.items()}
        for clock in CLOCKS
    }
    return seconds | {"ratios": ratios_of(seconds, ratios)}


def ratios_of(
    seconds: Mapping[str, Mapping[str, Sequence[float]]], ratios: Mapping[str, tuple[str, str]]
) -> dict[str, Any]:
    """Ratios of samples of the same round; ``seconds`` by clock and name."""
    return {
        ratio: {
            clock: summary([a / b for a, b in zip(own[above], own[below], strict=True)])
            for clock, own in seconds.items()
        }
        for ratio, (above, below) in ratios.items()
    }


def summed(
    parts: Sequence[Mapping[str, Any]], weights: Sequence[float] | None = None
) -> dict[str, dict[str, list[float]]]:
    """Sum of the seconds of `step_times`, each part times its weight, round by round, by clock and name."""
    weighted = np.ones(len(parts)) if weights is None else np.array(weights)
    return {
        clock: {name: (weighted @ [part[clock][name] for part in parts]).tolist() for name in own}
        for clock, own in ((clock, parts[0][clock]) for clock in CLOCKS)
    }


def joined(summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One summary, by clock, of the samples of several."""
    return {clock: summary([sample for own in summaries for sample in own[clock]["samples"]]) for clock in CLOCKS}


def summary(ratios: Sequence[float]) -> dict[str, Any]:
    """What is written of the samples of a ratio."""
    low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
    return {
        "median": middle,
        "quartiles": [low, high],
        "min": min(ratios),
        "max": max(ratios),
        "samples": list(ratios),
    }
