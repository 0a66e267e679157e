"""Long videos as a benchmark: what is run."""

from __future__ import annotations

from typing import Any

from benchmarks.bundled import CAUSAL, identity
from benchmarks.long_video import plot, report
from benchmarks.long_video.plan import BLOCK_SIZE, CHUNK, FULL, LongVideoPlan, described
from benchmarks.long_video.runs import PROCESSES, ask_all
from benchmarks.long_video.scores import score
from benchmarks.protocol import Benchmark, Session
from vllm_packcache.demo.tokenizer import CONDITION_TOKENS, FRAME_TOKENS, VISUAL_TOKENS

LEGEND = f"""\
forced: every token given the true ones before it; changed: those that differ from the last frame
generated: from the condition alone; whole: <frame> and visual ids only
object cells (of {VISUAL_TOKENS}): show a piece of an object; debris: neither that nor background
moving: other than in the last frame"""


def measure(plan: LongVideoPlan, session: Session) -> dict[str, Any]:
    """Ask every variant both questions about every frame."""
    answers = ask_all(plan, session.console)
    return {
        "machine": {"processes": PROCESSES, "threads_per_engine": 1},
        "model": identity(CAUSAL),
        "seeds": [plan.seeds.start, plan.seeds.stop - 1],
        "videos": plan.videos,
        "frames": plan.frames,
        "trained_frames": plan.trained_frames,
        "condition_tokens": CONDITION_TOKENS,
        "tokens_per_frame": FRAME_TOKENS,
        "engine": {"dtype": "float32", "block_size": BLOCK_SIZE, "max_num_batched_tokens": CHUNK, "temperature": 0},
        "notes": [
            "ci95 is the half-width of the 95 % confidence interval of a mean over videos (normal approximation)",
            "the full cache is only teacher-forced: generating with it takes too long on a CPU",
            "all variants run with max_position_embeddings raised to the video's length; rebase does not need it",
        ],
        "variants": {variant.name: described(variant, plan) for variant in plan.variants},
        **score(plan, answers),
    }


LONG_VIDEO = Benchmark(
    name="long-video",
    title="Long videos",
    place=8,
    plan=lambda quick: FULL,
    measure=measure,
    report=report,
    legend=LEGEND,
    draw=plot.draw,
)
