"""Pictures as PNG or SVG files, without a display."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_packcache.config.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg")

DOTS_PER_INCH = 110

QUICK = "a quick run: its numbers say nothing"


def check_format(option: str, path: Path | None) -> None:
    """Make sure that a picture can be of the kind that its name says, before there is something to draw; None is none.

    Raises:
        ConfigError: it cannot; ``option`` has named it.
        ModuleNotFoundError: matplotlib is not installed.
    """
    if path is None:
        return
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"{option} must name a file that ends in {' or '.join(FORMATS)}, not {path.name!r}")
    import_module("matplotlib")


def new_figure(width: float, height: float) -> Figure:
    """An empty figure; sizes in inches."""
    # Without pyplot there is no global state, and no display is looked for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path, *, quick: bool = False) -> None:
    """Write a figure, as PNG or SVG by the suffix of ``path``: the same figure, the same file.

    Args:
        figure: what is drawn.
        path: a name that `check_format` lets pass.
        quick: say across the picture that its sizes are too small for its numbers to mean anything.
    """
    from matplotlib import rc_context

    if quick:
        figure.text(0.5, 0.5, QUICK, fontsize=24, color="#c8102e", alpha=0.35, rotation=15, ha="center", va="center")
    kind = path.suffix[1:].lower()
    metadata = {"Date": None} if kind == "svg" else None
    # Without a salt the identifiers in an SVG are others each time.
    with rc_context({"svg.hashsalt": path.name}):
        figure.savefig(path, dpi=DOTS_PER_INCH, format=kind, metadata=metadata)
