"""What `vllm_packcache.calibrate` measures, as a benchmark: the command measures, judges and prints it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.protocol import Benchmark, Report, Session
from benchmarks.report.markdown import Files, number, percent
from benchmarks.report.parts import Goal, Result, Row, notes, provenance, verdict
from benchmarks.report.table import Paragraph, Table
from vllm_packcache.calibrate import command
from vllm_packcache.calibrate.decay import PAPER_DECAY
from vllm_packcache.calibrate.mass import NEAREST, OLDER
from vllm_packcache.calibrate.report import draw, sentences
from vllm_packcache.tools.files import stem

BUNDLED = {"demo": "the bundled model", "demo_masked": "the bundled masked model"}


def goals(result: Result) -> list[Goal]:
    """The share of attention that was asked for."""
    kept, aim = result["suggestion"], f">= {percent(result['target'], 0)}"
    if kept is None:
        most = f"at most {percent(result['most_kept'])}"
        return [Goal("attention kept by any options", most, aim, verdict(result, False))]
    share = kept["kept_measured"]
    name = "attention kept by the suggested options, measured on live blocks"
    return [Goal(name, percent(share), aim, verdict(result, share >= result["target"]))]


def rows(result: Result) -> Iterator[Row]:
    """Mass with its interval, overall, by layer, head and video; the fit; what options keep."""
    segments, intervals = result["segments"], result["mass_ci95"]
    for number_, (segment, mass) in enumerate(zip(segments, result["mass"], strict=True)):
        interval = None if intervals is None else intervals[number_]
        yield _with_interval(Row("all layers", "attention", segment, mass, unit="share"), interval)
    for layer, own in enumerate(result["mass_by_layer"]):
        yield from _masses(f"layer {layer}", segments, own)
        yield Row(f"layer {layer}", "rho", "", result["fit"]["rho_by_layer"][layer])
        for head, mass in enumerate(result["mass_by_head"][layer]):
            yield from _masses(f"layer {layer}, head {head}", segments, mass)
    for name, own in result.get("views", {}).items():
        yield from _masses(name, segments, own["mass"])
        yield Row(name, "rho", "", own["rho"])
    for video, own in enumerate(result["mass_by_video"]):
        yield from _masses(f"video {video}", segments, own)
    fit = result["fit"]
    yield _with_interval(Row("fit", "rho", "", fit["rho"]), fit["interval"])
    for name in ("scale", "r_squared", "decay", "half_in_interval", "scale_at_half"):
        yield Row("fit", name, "", fit[name])
    yield Row("any options", "most kept", "", result["most_kept"], unit="share")
    yield Row("goal", "attention kept >=", "", result["target"], unit="share")
    for own in _kept(result):
        name = "history_frames {history_frames:g}, window {window}, decay {decay:g}".format(**own)
        yield Row(name, "history tokens", "", sum(own["kept_tokens"]))
        yield Row(name, "kept, even", "", own["kept"], unit="share")
        yield Row(name, "kept, measured", "", own["kept_measured"], unit="share")
        for layer, share in enumerate(own["kept_measured_by_layer"]):
            yield Row(name, "kept, measured", f"layer {layer}", share, unit="share")
    for window, curve in result["curves"].items():
        for history, share in curve:
            yield Row(f"window {window}", "kept, even", f"history_frames {history:g}", share, unit="share")


def _with_interval(row: Row, interval: list[float] | None) -> Row:
    return row if interval is None else row._replace(low=interval[0], high=interval[1], spread="95 % CI")


def _masses(name: str, segments: list[str], masses: list[float]) -> Iterator[Row]:
    for segment, mass in zip(segments, masses, strict=True):
        yield Row(name, "attention", segment, mass, unit="share")


def _kept(result: Result) -> list[dict[str, Any]]:
    """What is suggested, if anything is, and what it is compared with."""
    return [*([result["suggestion"]] if result["suggestion"] else []), *result["compared"]]


# ---------------------------------------------------------------------------------------------------------------------
# Text


def _measured(result: Result) -> str:
    first, last = result["query_frames"]
    model = BUNDLED.get(result["model"], f"`{result['model']}`")
    return (
        f"where the attention of {model} goes with its full cache, on {result['videos']} videos of {result['frames']} "
        f"frames: shares of the attention of the queries of frames {first} to {last}."
    )


def _segments(result: Result) -> list[int]:
    """Older frames come after those that are told apart."""
    return [*range(OLDER), *range(NEAREST, len(result["segments"])), OLDER]


def _mass_table(result: Result) -> Table:
    fit, intervals = result["fit"], result["mass_ci95"]
    rows = []
    for segment in _segments(result):
        low_and_high = [] if intervals is None else [number(100 * end, 2) for end in intervals[segment]]
        distance = segment - NEAREST + 1
        models = ((fit["scale"], fit["rho"]), (fit["scale_at_half"], PAPER_DECAY)) if distance > 0 else ()
        rows.append(
            (
                result["segments"][segment],
                number(100 * result["mass"][segment], 2),
                " to ".join(low_and_high),
                *(number(100 * scale * rho**distance, 2) for scale, rho in models),
                *([""] * (2 - len(models))),
            )
        )
    headings = ("on", "attention, %", "95 % CI", f"fit, rho = {fit['rho']:.3f}", f"fit, rho = {PAPER_DECAY:g}")
    return Table(headings, rows)


def _kept_table(result: Result) -> Table:
    return Table(
        ("options", "H", "W", "decay", "history tokens", "kept if even in a frame, %", "kept on live blocks, %"),
        [
            (
                "suggested" if own is result["suggestion"] else "for comparison",
                f"{own['history_frames']:g}",
                f"{own['window']}",
                f"{own['decay']:g}",
                f"{sum(own['kept_tokens']):,}",
                number(100 * own["kept"], 2),
                number(100 * own["kept_measured"], 2),
            )
            for own in _kept(result)
        ],
    )


def long(result: Result, files: Files) -> Iterator[Paragraph]:
    """The section of the report."""
    yield f"Calibration: {_measured(result)}"
    yield provenance(result)
    yield from notes(result)
    yield _mass_table(result)
    yield "\n".join(sentences(result))
    yield Table(
        ("", *(f"layer {layer}" for layer in range(len(result["mass_by_layer"])))),
        [
            *(
                (f"{result['segments'][n]}, %", *(number(100 * own[n], 2) for own in result["mass_by_layer"]))
                for n in _segments(result)
            ),
            ("rho", *(number(rho, 3) for rho in result["fit"]["rho_by_layer"])),
        ],
    )
    if "views" in result:
        yield "**By pass**, %: every frame is shown to both streams at two steps of its schedule."
        yield Table(
            ("pass", *(result["segments"][n] for n in _segments(result)), "rho"),
            [
                (name, *(number(100 * own["mass"][n], 2) for n in _segments(result)), number(own["rho"], 3))
                for name, own in result["views"].items()
            ],
        )
    yield f"**Suggestion** for {percent(result['target'], 0)} of all attention:"
    yield _kept_table(result)
    if result["suggestion"] is None:
        yield f"Nothing is suggested: all frames that were told apart hold {percent(result['most_kept'])}."
    yield from files.picture(stem(result["benchmark"]), "Attention by temporal distance, and what options keep of it")


def short(result: Result, files: Files) -> Iterator[Paragraph]:
    """The section of a README."""
    more = files.link(f"{stem(result['benchmark'])}.json")
    yield f"**Calibration**: {_measured(result)} {' '.join(sentences(result))} More: {more}."
    yield _kept_table(result)
    yield from files.picture(stem(result["benchmark"]), "Attention by temporal distance, and what options keep of it")


# ---------------------------------------------------------------------------------------------------------------------
# The benchmark


@dataclass(frozen=True)
class CalibratePlan:
    """Sizes of what is run.

    Args:
        videos: of the bundled model's worlds.
        target: share of attention; within the frames that are told apart the bundled model cannot reach much more.
    """

    videos: int
    target: float = 0.8


def measure(plan: CalibratePlan, session: Session) -> dict[str, Any]:
    """Calibrate the bundled model."""
    folder = session.folder
    assert folder is not None
    return command.run(
        out=folder / "calibrated.yaml",
        videos=plan.videos,
        target=plan.target,
        json_path=folder / CAUSAL.file,
        console=session.console,
    )


def same(result: Result, plan: CalibratePlan, quick: bool) -> bool:
    """Whether a result is of the sizes of a plan, however it was asked for."""
    return asdict(plan).items() <= result.items()


CAUSAL = Benchmark(
    name="calibrate",
    title="Calibration",
    place=6,
    required=True,
    plan=lambda quick: CalibratePlan(videos=2 if quick else command.DEMO_VIDEOS),
    measure=measure,
    prints=False,
    report=Report(goals, rows, long, short),
    draw=draw,
    same=same,
)

MASKED = replace(
    CAUSAL,
    name="calibrate-masked",
    title="Calibration of masked generation",
    place=7,
    required=False,
    measure=None,
)
