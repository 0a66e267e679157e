"""The quality of videos as a benchmark, for both kinds of generation and guided: what is run, and what is judged."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from benchmarks.protocol import Benchmark, Draw, Report, Session, in_formats
from benchmarks.quality import passes, plot, report
from benchmarks.quality.cached import EQUAL_BYTES
from benchmarks.quality.deviation import deviations
from benchmarks.quality.generators import Cached, Causal, Encoded, Guided, Masked, Passes
from benchmarks.quality.measures import MEASURES, OBJECTS
from benchmarks.quality.runs import QualityPlan, described, generate_all, strips, summary
from benchmarks.quality.variants import BLOCK_SIZE, CHANGED, FULL_CACHE, LAST_FRAME, LAST_FRAME_ABSOLUTE, PACKCACHE
from benchmarks.report.parts import Result
from vllm_packcache.demo.scores import FIRST_HELD_OUT_SEED
from vllm_packcache.tools.figures import FORMATS
from vllm_packcache.tools.files import stem


def measure(plan: QualityPlan, session: Session) -> dict[str, Any]:
    """Make every video, as far as ``parts/`` of the folder has not got it, and compare them."""
    assert session.folder is not None
    parts = session.folder / "parts"
    parts.mkdir(exist_ok=True)
    processes = os.cpu_count() or 1
    videos = generate_all(plan, parts, processes, session.console)
    if strip := plot.PICTURES[plan.generator.benchmark].videos:
        plot.draw_videos(strips(plan, videos), session.folder / strip)
    return {
        "machine": {"processes": processes, "threads_per_process": 1},
        "model": plan.generator.described,
        "seeds": [FIRST_HELD_OUT_SEED, FIRST_HELD_OUT_SEED + plan.videos - 1],
        "videos": plan.videos,
        "trained_frames": plan.trained_frames,
        "block_size": BLOCK_SIZE,
        "notes": [
            "ci95 is the half-width of the 95 % confidence interval of a mean over videos (normal approximation)",
            "differences are of the same worlds: the interval is that of the mean of the differences",
            plan.generator.how,
        ],
        **summary(plan, videos),
    }


def measure_passes(plan: QualityPlan, session: Session) -> dict[str, Any]:
    """The same of frames made in passes, and how far logits are from those of passes with nothing left out."""
    assert isinstance(plan.generator, Passes)
    return measure(plan, session) | {"deviations": deviations(plan.generator)}


def targets(result: Result) -> list[dict[str, Any]]:
    """The goals, each for every measure: a difference beyond its confidence interval, or not."""
    spans = result["spans"]
    goals = [(who, FULL_CACHE, spans[0], "not worse") for who in (CHANGED, PACKCACHE)]
    baselines = [(who, name) for who in (CHANGED, PACKCACHE) for name in (LAST_FRAME, LAST_FRAME_ABSOLUTE)]
    goals += [(who, name, span, "better") for who, name in baselines for span in spans[1:]]
    goals += [(CHANGED, PACKCACHE, span, "better") for span in spans]
    found = []
    for who, name, span, goal in goals:
        for label, by_span in result["differences"][f"{who} - {name}"].items():
            if by_span[span] is None:
                continue
            sign = 1 if MEASURES[label].higher_is_better else -1
            mean, error = sign * by_span[span]["mean"], by_span[span]["ci95"]
            met = mean + error >= 0 if goal == "not worse" else mean - error > 0
            sentence = f"{who} {goal} than {name}"
            found.append({"goal": sentence, "span": span, "measure": label, **by_span[span], "met": met})
    return found


def targets_of_formats(result: Result) -> list[dict[str, Any]]:
    """Whether what the freed bytes buy keeps more objects than the same bytes in bfloat16, beyond the interval."""
    span = result["spans"][0]
    return [
        {
            "goal": f"{who} better than {base}",
            "span": span,
            "measure": label,
            **measures[label][span],
            "met": measures[label][span]["mean"] - measures[label][span]["ci95"] > 0,
        }
        for pair, measures in result["differences"].items()
        for who, base in (pair.split(" - "),)
        if who.endswith(EQUAL_BYTES)
        for label in OBJECTS
        if measures[label][span] is not None
    ]


def same(result: Result, plan: QualityPlan, quick: bool) -> bool:
    """Whether a result is of the sizes of a plan, however it was asked for."""
    sizes = {"videos": plan.videos, "spans": list(plan.spans), "variants": described(plan)}
    return sizes.items() <= result.items()


def _named(name: str, chart: Draw, others: Mapping[str, Draw] | None = None) -> dict[str, Any]:
    """What all have by a name of their own."""
    csv, pictures = f"{stem(name)}.csv", plot.PICTURES[name]
    return {
        "name": name,
        "also": {csv: plot.write_csv, **in_formats(pictures.chart, chart), **(others or {})},
        "made": tuple(f"{pictures.videos}{suffix}" for suffix in FORMATS) if pictures.videos else (),
    }


CAUSAL = Benchmark(
    title="Quality of the videos",
    place=4,
    required=True,
    plan=lambda quick: QualityPlan(videos=4, frontier_videos=2, trained_frames=2) if quick else QualityPlan(),
    measure=measure,
    judged={"targets": targets},
    report=report,
    duration="seconds_of_this_run",
    same=same,
    **_named(Causal.benchmark, plot.draw_by_frame, in_formats(plot.FRONTIER, plot.draw_frontier)),
)

GUIDED = replace(
    CAUSAL,
    title="Quality of guided videos",
    required=False,
    plan=lambda quick: QualityPlan(generator=Guided()),
    # What guidance is good for is the model's business: no goal is set.
    judged={},
    **_named(Guided.benchmark, plot.draw_by_scale),
)

CACHED = replace(
    CAUSAL,
    title="Quality of videos whose cache has fewer bits",
    required=False,
    plan=lambda quick: QualityPlan(generator=Cached()),
    judged={"targets": targets_of_formats},
    **_named(Cached.benchmark, plot.draw_differences),
)

MASKED = replace(
    CAUSAL,
    title="Quality of videos made masked",
    place=5,
    required=False,
    plan=lambda quick: QualityPlan(generator=Masked()),
    **_named(Masked.benchmark, plot.draw_by_frame),
)

HISTORY = replace(
    CACHED,
    title="Quality of videos whose older frames have fewer bits",
    place=5,
    plan=lambda quick: QualityPlan(generator=Encoded()),
    **_named(Encoded.benchmark, plot.draw_differences),
)

PASSES = replace(
    CAUSAL,
    title="Quality against what is computed",
    place=5,
    required=False,
    plan=lambda quick: QualityPlan(generator=Passes()),
    measure=measure_passes,
    judged={"targets": passes.targets},
    report=Report(report.goals, passes.rows, passes.long, passes.short),
    **_named(Passes.benchmark, passes.draw),
)
