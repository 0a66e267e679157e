"""How good the bundled model's video stays when it gets ten times as long as those it was trained on.

The model has seen the positions of 16 frames. With ``absolute`` positions a longer video goes past them; with
``rebase`` no position is larger than those of a full window, however long the video. Every variant runs in the real
engine on the same held-out worlds, float32 and greedy, and is asked two questions for every frame:

* teacher-forced: given the true video up to a token, is that token the most likely one? Mistakes do not add up, so
  this shows what cache and positions do;
* generated: from the condition alone, is the video the true one, and is it still a video?
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from multiprocessing.sharedctypes import SynchronizedArray
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.engine_process import child_environment
from benchmarks.statistics import Count
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.config.sources import load_mapping
from vllm_packcache.core.retention import Retention
from vllm_packcache.demo.scores import FIRST_HELD_OUT_SEED, psnr, sequence, true_frames
from vllm_packcache.demo.tokenizer import (
    CONDITION_TOKENS,
    FRAME_TOKENS,
    MODEL_DIR,
    TRAINED_FRAMES,
    VISUAL_TOKENS,
    VideoTokenizer,
    world_prompt,
)
from vllm_packcache.demo.world import World, make_world, palette
from vllm_packcache.tools import files
from vllm_packcache.tools.figures import check_format, new_figure, save
from vllm_packcache.tools.machine import about
from vllm_packcache.tools.progress import counting

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from vllm import SamplingParams
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.llm_engine import LLMEngine

Int64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

PRESET = "demo"
BLOCK_SIZE = 32
CHUNK = 2048
"""Longest prefill chunk."""

PROCESSES = 2
"""Engines that compute at the same time, one thread each. Quality does not depend on it."""

OPTIONS = {"packcache_condition_tokens": CONDITION_TOKENS}
"""Options of every request: the prompt of a teacher-forced one goes on after the condition."""

TRUTH, COPY = REFERENCES = ("the true video", "a copy of the first picture")
"""What generated videos are compared with: the best that can be, and what is had without a model."""

FORCED, GENERATED = MEASUREMENTS = ("teacher_forced", "generated")


@dataclass(frozen=True)
class Variant:
    """One way to run the model.

    Args:
        name: in table and plot.
        policy: name of the policy.
        options: of the policy, and ``positions``; the rest is the demo's preset.
        colour: in the plot.
        generates: whether it is asked to generate as well.
    """

    name: str
    policy: str
    options: Mapping[str, Any]
    colour: str
    generates: bool = True

    @property
    def config(self) -> dict[str, Any]:
        """The server's configuration."""
        preset = load_mapping(PRESET)
        base = preset if self.policy == "packcache" else {"layout": preset["layout"]}
        return {**base, **self.options}

    @property
    def measurements(self) -> tuple[str, ...]:
        """What it is asked."""
        return MEASUREMENTS if self.generates else (FORCED,)


# A decode step of the full cache reads up to 41,000 tokens for each video, so it is not asked to generate.
VARIANTS = (
    Variant("full cache, absolute", "full", {}, "#9aa0a6", generates=False),
    Variant("packcache, rebase", "packcache", {"positions": "rebase"}, "#2f6fde"),
    Variant("packcache, absolute", "packcache", {"positions": "absolute"}, "#d1495b"),
    Variant("last 2 frames, rebase", "sliding_window", {"window": 2, "positions": "rebase"}, "#2a9d8f"),
    Variant("last 2 frames, absolute", "sliding_window", {"window": 2, "positions": "absolute"}, "#e9a23b"),
    Variant("last frame, absolute", "sliding_window", {"window": 1, "positions": "absolute"}, "#7b5ea7"),
)


@dataclass(frozen=True, kw_only=True)
class LongVideoPlan:
    """Sizes of everything that is run.

    Args:
        videos: V, worlds that everything is averaged over.
        frames: T, of each.
        trained_frames: frames of the longest videos that the model was trained on; results are summed up over spans
            of as many.
        variants: what is compared.
    """

    videos: int
    frames: int
    trained_frames: int
    variants: tuple[Variant, ...]

    @property
    def seeds(self) -> range:
        """Of the worlds."""
        return range(FIRST_HELD_OUT_SEED, FIRST_HELD_OUT_SEED + self.videos)

    @property
    def tokens(self) -> int:
        """Of a whole video with its condition."""
        return CONDITION_TOKENS + self.frames * FRAME_TOKENS

    @property
    def spans(self) -> dict[str, slice]:
        """Frames that a mean is taken over, by what they are called; people count frames from 1."""
        span, frames = self.trained_frames, self.frames
        return {
            f"frames 1-{span}": slice(0, span),
            f"{span + 1}-{2 * span}": slice(span, 2 * span),
            f"{frames - span + 1}-{frames}": slice(frames - span, frames),
        }


FULL = LongVideoPlan(videos=10, frames=10 * TRAINED_FRAMES, trained_frames=TRAINED_FRAMES, variants=VARIANTS)


class Answers(NamedTuple):
    """What an engine said of one variant.

    Args:
        likeliest: whether each true token was the most likely one, [V, T, 257].
        generated: token ids, [V, T * 257]; None: not asked for.
    """

    likeliest: Bools
    generated: Int64 | None


def run(
    json_path: Path | None, plot_path: Path | None, *, plan: LongVideoPlan = FULL, console: Console | None = None
) -> dict[str, Any]:
    """Measure, print a table and write what was measured.

    Args:
        json_path: file for the results and all that is needed to repeat them; None: none.
        plot_path: PNG or SVG file for curves over the frames; None: none.
        plan: what is run.
        console: where progress and table go.

    Returns:
        What is written to ``json_path``.

    Raises:
        OSError: a file cannot be written.
    """
    console = console or Console()
    check_format("--plot", plot_path)
    files.claim(json_path, plot_path)
    result: dict[str, Any] = about("long-video", processes=PROCESSES, threads_per_engine=1)
    start = time.monotonic()
    answers = _ask_all(plan, console)
    result |= {
        "seconds": round(time.monotonic() - start),
        "model": "the bundled one",
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
        "variants": {variant.name: _described(variant, plan) for variant in plan.variants},
        **_score(plan, answers),
    }
    if json_path is not None:
        files.write(json_path, result)
    _print(result, console)
    if plot_path is not None:
        draw(result, plot_path)
    return result


def _described(variant: Variant, plan: LongVideoPlan) -> dict[str, Any]:
    """Its configuration, and what it needs while the last frame is made: tokens it reads, positions the model has."""
    server = ServerConfig.parse(variant.policy, variant.config)
    video = server.plan(OPTIONS, plan.tokens)
    last = plan.tokens - FRAME_TOKENS
    return {
        "policy": variant.policy,
        "config": server.as_mapping(),
        "live_tokens": last if video is None else Retention(video.layout, video.policy, BLOCK_SIZE).live_tokens(last),
        "positions": plan.tokens if video is None else video.positions.limit(plan.tokens),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Engines


def _ask_all(plan: LongVideoPlan, console: Console) -> dict[str, Answers]:
    """The answers of all variants, by name: each from an engine in a process of its own."""
    context = multiprocessing.get_context("spawn")
    counters: _Counters = {measurement: context.Array("l", len(plan.variants)) for measurement in MEASUREMENTS}
    environment = {
        "OMP_NUM_THREADS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_PLUGINS": "packcache",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": None,
        # Compiling the function that ranks tokens takes longer than it runs.
        "TORCH_COMPILE_DISABLE": "1",
    }
    with ExitStack() as stack:
        stack.enter_context(child_environment(environment))
        pool = stack.enter_context(
            ProcessPoolExecutor(PROCESSES, context, _begin_process, (counters,), max_tasks_per_child=1)
        )
        progress = stack.enter_context(counting(console, "{task.fields[unit]}"))
        bars = {
            (measurement, number): progress.add_task(
                f"{variant.name}: {measurement.replace('_', '-')}",
                start=False,
                total=plan.videos if measurement == FORCED else plan.frames,
                unit="videos" if measurement == FORCED else "frames",
            )
            for number, variant in enumerate(plan.variants)
            for measurement in variant.measurements
        }
        futures: list[Future[Answers]] = [pool.submit(_ask, plan, number) for number in range(len(plan.variants))]
        waiting: set[Future[Answers]] = set(futures)
        while waiting:
            finished, waiting = wait(waiting, timeout=0.5)
            for (measurement, number), bar in bars.items():
                if done := counters[measurement][number]:
                    progress.start_task(bar)
                    progress.update(bar, completed=done)
            for future in finished:
                if future.exception() is not None:
                    pool.shutdown(wait=False, cancel_futures=True)
                    future.result()
    return {variant.name: future.result() for variant, future in zip(plan.variants, futures, strict=True)}


_Counters = dict[str, "SynchronizedArray[int]"]
"""By measurement, how much of it is done for each variant: videos or frames. Shared by all processes."""

_counters: _Counters


def _begin_process(counters: _Counters) -> None:
    """First thing in a process: keep the shared counters, and what vLLM prints away from the progress bars."""
    global _counters
    _counters = counters
    descriptor = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(descriptor, stream.fileno())


def _ask(plan: LongVideoPlan, number: int) -> Answers:
    """Body of a process: measure variant ``number``."""
    from vllm import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    variant = plan.variants[number]
    # A multiple of the block, with room for the token that is sampled after a video.
    length = (plan.tokens // BLOCK_SIZE + 2) * BLOCK_SIZE
    args = EngineArgs(
        str(MODEL_DIR),
        skip_tokenizer_init=True,
        dtype="float32",
        seed=0,
        block_size=BLOCK_SIZE,
        max_model_len=length,
        max_num_batched_tokens=CHUNK,
        max_num_seqs=plan.videos,
        # Admission counts a whole video; beside it the other videos hold a window each.
        num_gpu_blocks_override=length // BLOCK_SIZE + 60 * plan.videos,
        kv_cache_memory_bytes=2**30,
        hf_overrides={"max_position_embeddings": length},
        enforce_eager=True,
        disable_log_stats=True,
        use_tqdm_on_load=False,
        additional_config={"kv_cache_policy": variant.policy, "kv_cache_policy_config": variant.config},
    )
    engine = LLMEngine.from_engine_args(args)
    tokenizer = VideoTokenizer()
    worlds = [make_world(seed) for seed in plan.seeds]

    def telling(measurement: str) -> Callable[[int], None]:
        return partial(_counters[measurement].__setitem__, number)

    likeliest = likeliest_tokens(engine, tokenizer, worlds, plan.frames, telling(FORCED))
    ids = generate(engine, tokenizer, worlds, plan.frames, telling(GENERATED)) if variant.generates else None
    return Answers(likeliest, ids)


def likeliest_tokens(
    engine: LLMEngine, tokenizer: VideoTokenizer, worlds: Sequence[World], frames: int, tell: Callable[[int], None]
) -> Bools:
    """Whether each token of the true videos is the most likely one after the true tokens before it.

    Args:
        engine: of the demo model.
        tokenizer: the demo's.
        worlds: V worlds.
        frames: T.
        tell: is told how many videos are done.

    Returns:
        [V, T, 257].
    """
    found = np.zeros((len(worlds), frames * FRAME_TOKENS), dtype=np.bool_)
    for number, world in enumerate(worlds):
        truth = sequence(tokenizer, true_frames(tokenizer, world, frames)[1:]).tolist()
        (output,) = _run(engine, [[*world_prompt(tokenizer, world), *truth]], _greedy(1, prompt_logprobs=0))
        assert output.prompt_logprobs is not None
        after = output.prompt_logprobs[CONDITION_TOKENS:]
        found[number] = [of_place[token].rank == 1 for of_place, token in zip(after, truth, strict=True)]
        tell(number + 1)
    return found.reshape(len(worlds), frames, FRAME_TOKENS)


def generate(
    engine: LLMEngine, tokenizer: VideoTokenizer, worlds: Sequence[World], frames: int, tell: Callable[[int], None]
) -> Int64:
    """The videos that the model makes of the worlds' conditions, all in one batch.

    Args:
        engine: of the demo model.
        tokenizer: the demo's.
        worlds: V worlds.
        frames: T.
        tell: is told how many frames are done.

    Returns:
        Token ids, [V, T * 257].
    """
    prompts = [world_prompt(tokenizer, world) for world in worlds]
    outputs = _run(engine, prompts, _greedy(frames * FRAME_TOKENS), lambda steps: tell(steps // FRAME_TOKENS))
    return np.array([output.outputs[0].token_ids for output in outputs])


def _greedy(max_tokens: int, prompt_logprobs: int | None = None) -> SamplingParams:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=0,
        max_tokens=max_tokens,
        ignore_eos=True,
        detokenize=False,
        prompt_logprobs=prompt_logprobs,
        # A list of all tokens so far with every step would take longer than the step.
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args=OPTIONS,
    )


def _run(
    engine: LLMEngine,
    prompts: Sequence[list[int]],
    params: SamplingParams,
    tell: Callable[[int], None] = lambda steps: None,
) -> list[RequestOutput]:
    """Outputs of a batch of requests in their order; ``tell`` is told how many steps were run."""
    for i, ids in enumerate(prompts):
        engine.add_request(str(i), {"prompt_token_ids": ids}, params)
    outputs: dict[str, RequestOutput] = {}
    steps = 0
    while engine.has_unfinished_requests():
        outputs |= {output.request_id: output for output in engine.step()}
        steps += 1
        tell(steps)
    return [outputs[str(i)] for i in range(len(prompts))]


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def _score(plan: LongVideoPlan, answers: Mapping[str, Answers]) -> dict[str, Any]:
    """The scores of both measurements, by measurement, variant and measure. References show what is easy."""
    tokenizer = VideoTokenizer()
    worlds = [make_world(seed) for seed in plan.seeds]
    truth = np.stack([true_frames(tokenizer, world, plan.frames) for world in worlds])
    first = np.broadcast_to(truth[:, :1], truth[:, 1:].shape)
    forced = {name: _forced_counts(own.likeliest, truth) for name, own in answers.items()}
    generated = {
        name: _generated_counts(own.generated, worlds, truth, tokenizer)
        for name, own in answers.items()
        if own.generated is not None
    } | {
        name: _generated_counts(_ids(frames, tokenizer), worlds, truth, tokenizer)
        for name, frames in ((TRUTH, truth[:, 1:]), (COPY, first))
    }
    return {
        measurement: {
            name: {measure: count.summary(plan.spans) for measure, count in counts.items()}
            for name, counts in by_name.items()
        }
        for measurement, by_name in ((FORCED, forced), (GENERATED, generated))
    }


def _ids(frames: Int64, tokenizer: VideoTokenizer) -> Int64:
    """Frames [V, T, 16, 16] as if generated, [V, T * 257]."""
    return np.stack([sequence(tokenizer, video) for video in frames])


def _forced_counts(likeliest: Bools, truth: Int64) -> dict[str, Count]:
    """Shares of right tokens.

    Args:
        likeliest: [V, T, 257].
        truth: [V, T + 1, 16, 16].
    """
    right = likeliest[:, :, 1:]
    changed = (truth[:, 1:] != truth[:, :-1]).reshape(right.shape)
    return {
        "changed_tokens_right": Count((right & changed).sum(2), changed.sum(2)),
        "tokens_right": Count(right.sum(2), np.full(right.shape[:2], VISUAL_TOKENS)),
        "frame_token_right": Count(likeliest[:, :, 0].astype(np.float64), np.ones(right.shape[:2])),
    }


def _generated_counts(ids: Int64, worlds: Sequence[World], truth: Int64, tokenizer: VideoTokenizer) -> dict[str, Count]:
    """How much generated videos are like the true ones, and like any video of these worlds.

    Args:
        ids: [V, T * 257].
        worlds: V worlds.
        truth: [V, T + 1, 16, 16].
        tokenizer: the demo's.
    """
    videos, frames = len(worlds), truth.shape[1] - 1
    shown = np.stack([tokenizer.frames_from_ids(video) for video in ids.tolist()])
    right = (shown == truth[:, 1:]).sum((2, 3))
    ratios = [
        psnr(tokenizer.decode_frames(true[1:]), tokenizer.decode_frames(own))
        for true, own in zip(truth, shown, strict=True)
    ]
    raw = ids.reshape(videos, frames, FRAME_TOKENS)
    # Visual ids are the end of the vocabulary.
    whole = (raw[:, :, 0] == tokenizer.frame_id) & (raw[:, :, 1:] >= tokenizer.visual_offset).all(2)
    background = np.stack([world.background for world in worlds])[:, None] + tokenizer.visual_offset
    of_objects = np.stack(
        [np.isin(own - tokenizer.visual_offset, _codewords(world)) for own, world in zip(shown, worlds, strict=True)]
    )
    other = shown != background
    before = np.concatenate([truth[:, :1], shown[:, :-1]], axis=1)
    one = np.ones((videos, frames))
    return {
        "tokens_right": Count(right, one * VISUAL_TOKENS),
        "psnr_db": Count(np.stack(ratios), one),
        "whole_frames": Count(whole * one, one),
        "object_cells": Count((other & of_objects).sum((2, 3)), one),
        "debris_cells": Count((other & ~of_objects).sum((2, 3)), one),
        "moving_cells": Count((shown != before).sum((2, 3)), one),
    }


def _codewords(world: World) -> Int64:
    """All codewords that the objects of a world can show."""
    looks = np.stack([palette().objects[thing.shape, thing.colour, world.scene] for thing in world.objects])
    # Elsewhere the background shows through.
    return np.unique(looks[looks >= 0])


# ---------------------------------------------------------------------------------------------------------------------
# Table and plot

SHOWN = (
    (FORCED, "changed_tokens_right", "forced: changed tokens right, %", 100),
    (FORCED, "tokens_right", "forced: tokens right, %", 100),
    (GENERATED, "tokens_right", "generated: tokens right, %", 100),
    (GENERATED, "psnr_db", "generated: PSNR, dB", 1),
    (GENERATED, "whole_frames", "generated: whole frames, %", 100),
    (GENERATED, "object_cells", "generated: object cells", 1),
    (GENERATED, "debris_cells", "generated: debris cells", 1),
    (GENERATED, "moving_cells", "generated: moving cells", 1),
)
"""Rows of the table: measurement, measure, heading, factor."""

LEGEND = f"""\
forced: every token given the true ones before it; changed: those that differ from the last frame
generated: from the condition alone; whole: <frame> and visual ids only
object cells (of {VISUAL_TOKENS}): show a piece of an object; debris: neither that nor background
moving: other than in the last frame"""


_COLOURS = {variant.name: variant.colour for variant in VARIANTS} | {COPY: "#c9c9c9"}
"""Of the curves in the plot."""


def _print(result: Mapping[str, Any], console: Console) -> None:
    table = Table(
        title=f"{result['videos']} videos of {result['frames']} frames, trained on {result['trained_frames']}: "
        "mean and 95 % confidence interval",
        box=SIMPLE_HEAD,
    )
    table.add_column("", no_wrap=True)
    some = next(iter(result[FORCED].values()))
    for span in some["tokens_right"]["spans"]:
        table.add_column(span, justify="right", no_wrap=True)
    for measurement, measure, heading, factor in SHOWN:
        table.add_row(f"[bold]{heading}[/]")
        for name, scores in result[measurement].items():
            spans = scores[measure]["spans"].values()
            cells = [f"{factor * s['mean']:.1f} ± {factor * s['ci95']:.1f}" if s else "n/a" for s in spans]
            table.add_row(f"  {name}", *cells, style="" if name in result["variants"] else "dim")
    console.print(table)
    console.print(LEGEND)
    for name, variant in result["variants"].items():
        console.print(
            f"{name}: the last frame reads {variant['live_tokens']:,} tokens before it, "
            f"{variant['positions']:,} positions"
        )


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw the curves of a result of `run` as a PNG or SVG, as the name says."""
    figure = new_figure(11, 8)
    forced, generated = figure.subplots(2, 1, sharex=True)
    _draw_curves(forced, result, FORCED, "changed_tokens_right")
    forced.set_title("given the true past: tokens that differ from the last frame", loc="left", fontsize=11)
    _draw_curves(generated, result, GENERATED, "tokens_right")
    generated.set_title("generated from the condition alone: all tokens", loc="left", fontsize=11)
    generated.set_xlabel("frame")
    # No picture has all the curves.
    lines = {line.get_label(): line for axes in (forced, generated) for line in axes.get_lines()}
    names = [name for name in _COLOURS if name in lines]
    figure.legend([lines[name] for name in names], names, loc="outside upper center", ncols=4, frameon=False)
    save(figure, path)


def _draw_curves(axes: Axes, result: Mapping[str, Any], measurement: str, measure: str) -> None:
    frames = np.arange(1, result["frames"] + 1)
    for name, scores in result[measurement].items():
        if name in _COLOURS:
            share = np.array(scores[measure]["by_frame"], dtype=np.float64)
            axes.plot(frames, 100 * share, color=_COLOURS[name], label=name, linewidth=1.4)
    trained = result["trained_frames"]
    axes.axvline(trained + 0.5, color="#555555", linewidth=1, linestyle="--")
    axes.annotate(
        f"trained on {trained} frames",
        (trained + 0.5, 0.02),
        xycoords=("data", "axes fraction"),
        xytext=(4, 0),
        textcoords="offset points",
        fontsize=9,
        color="#555555",
    )
    axes.set_ylabel("right, %")
    axes.set_xlim(1, result["frames"])
    axes.spines[["top", "right"]].set_visible(False)
