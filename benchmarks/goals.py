"""How a goal is judged."""

from __future__ import annotations

from typing import Any


def judged(
    ratio: str, value: float, *, at_least: float | None = None, at_most: float | None = None, judge: bool = True
) -> dict[str, Any]:
    """A ratio, the bound that it should keep, and whether it does.

    Args:
        ratio: its name.
        value: as measured.
        at_least: the bound, if it is one from below.
        at_most: the bound, if it is one from above.
        judge: whether it means anything here; None is written otherwise, as for the times of a quick run.
    """
    bounds = {name: bound for name, bound in (("at_least", at_least), ("at_most", at_most)) if bound is not None}
    met = bounds.get("at_least", value) <= value <= bounds.get("at_most", value)
    return {"ratio": ratio, "value": value, **bounds, "met": bool(met) if judge else None}
