"""A frame of a masked model as a benchmark: what is run, and what is judged of it."""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any

import torch

from benchmarks.decode.plan import described
from benchmarks.decode.samples import CPU
from benchmarks.goals import judged
from benchmarks.masked import history, passes, plot, report
from benchmarks.masked.plan import BLOCK_SIZE, ON_CPU, ON_GPU, POLICY, PUBLISHED_FRAMES, QUICK, SEED, MaskedPlan
from benchmarks.masked.runs import Bench, rates, readings
from benchmarks.protocol import Benchmark, Session
from benchmarks.report.parts import Result
from vllm_packcache.tools.progress import counting


def sizes(quick: bool) -> MaskedPlan:
    """What is run on this machine."""
    on_gpu = torch.cuda.is_available()
    if quick:
        return dataclasses.replace(QUICK, device="cuda" if on_gpu else "cpu")
    return ON_GPU if on_gpu else ON_CPU


def measure(plan: MaskedPlan, session: Session) -> dict[str, Any]:
    """Make frames, whole and in parts."""
    gpu = {"gpu": torch.cuda.get_device_name()} if plan.device == "cuda" else {}
    with counting(session.console, "frames") as progress:
        # One frame warms up.
        frames = 1 + plan.rounds * len(plan.cases) + plan.batch_rounds * (1 + plan.videos)
        task = progress.add_task("making frames", total=frames)
        with Bench.in_temporary_folder(plan, lambda: progress.advance(task)) as bench:
            last, batch, engine = bench.last_frame(), bench.batch(), bench.about()
    return {
        "machine": gpu | {"threads_per_engine": plan.threads},
        "seed": SEED,
        "is": plan.described,
        "model": dataclasses.asdict(plan.model) | {"kv_bytes_per_token": plan.model.kv_bytes_per_token},
        "policy": described(POLICY),
        "grid": list(plan.grid),
        "tokens_per_frame": plan.last_frame().tokens_per_frame,
        "frames": plan.frames,
        "layers_timed": plan.model.layers,
        "layers_reported": plan.layers,
        "steps_timed": plan.steps,
        "steps_reported": plan.steps_reported,
        "last_frame": last,
        "batch": batch,
        "engine": {"device": plan.device, "block_size": BLOCK_SIZE, **engine},
        "readings": readings(last, plan),
        "rates": None if session.quick else rates(last, plan),
        "memory": {
            "kv_bytes": {name: plan.cache_bytes(own["peak_blocks"]) for name, own in last["videos"].items()},
            "published_frames": PUBLISHED_FRAMES,
            "published_mask_bytes": plan.published_mask_bytes,
        },
    }


def checks(result: Result) -> dict[str, bool]:
    """What does not depend on time."""
    live = {name: sum(own["live_tokens"]) for name, own in result["last_frame"]["videos"].items()}
    return {
        "short reads as many tokens as packcache": live["short"] == live["packcache"],
        "blocks in use are those that retention decides": result["last_frame"]["blocks_as_decided"],
    }


def targets(result: Result) -> list[dict[str, Any]]:
    """Every ratio with the bound it must keep, and whether it does.

    None: of a quick run; and of videos in one batch, for which the bound is that of a GPU.
    """
    ratios = result["last_frame"]["whole_frame"]["ratios"] | result["batch"]["whole_frame"]["ratios"]
    found = {name: by_clock[CPU]["median"] for name, by_clock in ratios.items()}
    judge = not result["quick"]
    on_gpu = result["engine"]["device"] != "cpu"
    return [
        judged("full / packcache", found["full / packcache"], at_least=2.3, judge=judge),
        judged("packcache / short", found["packcache / short"], at_most=1.03, judge=judge),
        judged("together / apart", found["together / apart"], at_most=0.5, judge=judge and on_gpu),
    ]


MASKED = Benchmark(
    name="masked",
    title="A masked model, frame by frame",
    place=3,
    required=True,
    plan=sizes,
    measure=measure,
    judged={"checks": checks, "targets": targets},
    report=report,
    draw=plot.draw,
    same=lambda result, plan, quick: result.get("quick") == quick,
)


def _of(module: ModuleType, name: str, title: str) -> Benchmark:
    """A benchmark that stands in a module of its own."""
    return Benchmark(
        name=name,
        title=title,
        place=MASKED.place,
        plan=module.sizes,
        measure=module.measure,
        judged={"targets": module.targets},
        report=module,
        draw=module.draw,
        same=MASKED.same,
    )


PASSES = _of(passes, "masked-passes", "A masked frame with less computed")
HISTORY = _of(history, "masked-history", "A masked frame whose older frames are held in fewer bits")
