"""Means over videos, and how far they can be trusted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]

NORMAL_95 = 1.96
"""Standard errors on either side of a mean that make a 95 % confidence interval."""


class Count(NamedTuple):
    """A quantity of each frame of each video, as a sum and what to divide it by.

    Args:
        total: [V, T].
        of: [V, T].
    """

    total: Float64
    of: Float64

    def of_videos(self, span: slice) -> Float64:
        """Of each video over the frames of ``span``, [V]; NaN where there is nothing to divide by."""
        return ratio(self.total[:, span].sum(1), self.of[:, span].sum(1))

    def summary(self, spans: Mapping[str, slice]) -> dict[str, Any]:
        """The mean by frame, and by span with the half-width of its 95 % confidence interval over videos.

        None: there was nothing to divide by.
        """
        return {
            "by_frame": [round(x, 4) if x == x else None for x in ratio(self.total.sum(0), self.of.sum(0)).tolist()],
            "spans": {name: mean_of_videos(self.of_videos(span)) for name, span in spans.items()},
        }


def ratio(total: Float64, of: Float64) -> Float64:
    """NaN where there is nothing to divide by."""
    return np.divide(total, of, out=np.full(total.shape, np.nan), where=of > 0)


def mean_of_videos(values: Float64) -> dict[str, float] | None:
    """Of those that have a value; None: fewer than two do."""
    values = values[~np.isnan(values)]
    if len(values) < 2:
        return None
    error = values.std(ddof=1) / len(values) ** 0.5
    return {"mean": round(float(values.mean()), 4), "ci95": round(float(NORMAL_95 * error), 4)}


def frames_stood_for(timed: Sequence[int]) -> list[float]:
    """How many frames each timed one stands for, where those between two of them are interpolated.

    Args:
        timed: numbers of frames, ascending from 0; all up to the last one count.
    """
    return [float(np.interp(range(timed[-1] + 1), timed, one).sum()) for one in np.eye(len(timed))]
