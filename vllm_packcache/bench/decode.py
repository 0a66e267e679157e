"""What a decode step costs with and without packcache, on the geometry of the PackCache paper.

Absolute times on a shared machine mean nothing. What is reported are ratios of bursts of decode steps that
were run right after one another, by engines that live side by side in processes of their own, one computing
at a time. A step of an engine with one thread never waits: its processor time is what it takes on an idle
machine, and leaves out what other processes do meanwhile. Ratios are judged by it; those by the clock are
given as well, and differ from them on a busy machine only.

==============  ==============================================================================================
engine          what it runs
==============  ==============================================================================================
``full``        stock vLLM, no plugin loaded
``short``       the same, on a prompt as long as what packcache reads: the limit for any policy
``packcache``   vLLM with the plugin, packcache switched on
``opt_out``     the same, on a request that keeps its whole cache (``packcache_policy=full``)
``absolute``    packcache with absolute positions: no key is ever rotated
==============  ==============================================================================================
"""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table

from vllm_packcache.bench import files
from vllm_packcache.bench.engine_process import Burst, EngineProcess, EngineSettings, interleave
from vllm_packcache.bench.machine import about
from vllm_packcache.bench.model import ModelShape, write_model
from vllm_packcache.layout import FrameLayout, VideoLayout
from vllm_packcache.policies import PackCache
from vllm_packcache.retention import Retention

SEED = 0
POLICY = PackCache()
BLOCK_SIZE = 32

THREADS = 1
"""OpenMP threads of each engine. With one, no step waits for a thread that other processes keep from running,
and prefill, which is not timed, runs in several engines at once."""

CPU, WALL = CLOCKS = ("cpu_seconds", "wall_seconds")
"""How steps are timed: fields of `Burst`."""

STOCK = ("full", "short")
WITH_PLUGIN = ("packcache", "opt_out")
LAST_FRAME = (*STOCK, *WITH_PLUGIN)
POSITIONED = ("packcache", "absolute")

PACKCACHE = {"kv_cache_policy": POLICY.name}
ENGINES: dict[str, dict[str, Any]] = {
    "full": {},
    "short": {},
    "packcache": PACKCACHE,
    "opt_out": PACKCACHE,
    "absolute": PACKCACHE | {"kv_cache_policy_config": {"positions": "absolute"}},
}
"""Every engine and what switches the plugin on in it."""

RATIOS = {
    "full / packcache": ("full", "packcache"),
    "packcache / short": ("packcache", "short"),
    "opt_out / full": ("opt_out", "full"),
}
"""Ratios of step times on the last frame: name, and the engines that it divides."""

STAGES = {
    "starting engines": 20,
    "last frame, start: prefill": 200,
    "last frame, start: decode": 45,
    "last frame, middle: prefill": 60,
    "last frame, middle: decode": 45,
    "last frame, end: prefill": 60,
    "last frame, end: decode": 45,
    "controls": 10,
    "a frame that slides: prefill": 100,
    "a frame that slides: decode": 60,
    "early and late frame: prefill": 20,
    "early and late frame: decode": 5,
    "late and early frame: prefill": 20,
    "late and early frame: decode": 5,
    "all frames from the condition on": 20,
}
"""What is run, in order, and about how many seconds it takes: the remaining time is reckoned from these."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes of everything that is run.

    Args:
        model: the model.
        chunk: longest prefill chunk.
        condition_tokens: C, of every request.
        tokens_per_frame: F, of the request whose last frame is timed.
        frames: its number of frames, the last one included.
        rounds: bursts of each engine at each place of the last frame.
        growth_tokens_per_frame: F, of the requests that compare an early frame with a late one.
        generated_tokens_per_frame: F, of the request that is generated from its condition on.
        early: number of the early frame.
        late: number of the late frame.
    """

    model: ModelShape
    chunk: int
    condition_tokens: int
    tokens_per_frame: int
    frames: int
    rounds: int
    growth_tokens_per_frame: int
    generated_tokens_per_frame: int
    early: int
    late: int

    @property
    def burst(self) -> int:
        """Steps of a burst: each contains the allocation of exactly one block."""
        return BLOCK_SIZE

    @property
    def span(self) -> int:
        """Tokens that are decoded at one place: a burst to warm up, then the rounds."""
        return (self.rounds + 1) * self.burst

    @property
    def places(self) -> dict[str, int]:
        """Where in the last frame it is timed: how many of its tokens are part of the prompt.

        A step's time is linear in the number of tokens it reads, so the mean over the three places is the
        mean over the frame.
        """
        return {
            "start": 0,
            "middle": (self.tokens_per_frame - self.span) // 2,
            "end": self.tokens_per_frame - self.span,
        }

    @property
    def max_model_len(self) -> int:
        """Longest sequence of all."""
        frames = (
            self.frames * self.tokens_per_frame,
            (self.late + 1) * self.growth_tokens_per_frame,
            (self.late + 1) * self.generated_tokens_per_frame,
        )
        return self.condition_tokens + max(frames) + BLOCK_SIZE

    def retention(self, tokens_per_frame: int) -> Retention:
        """What packcache keeps of a request of frames of ``tokens_per_frame``."""
        return Retention(VideoLayout(FrameLayout(tokens_per_frame), self.condition_tokens), POLICY, BLOCK_SIZE)

    def options(self, tokens_per_frame: int) -> dict[str, Any]:
        """Request options that say the same to the plugin."""
        return {
            "packcache_condition_tokens": self.condition_tokens,
            "packcache_tokens_per_frame": tokens_per_frame,
        }


FULL = Plan(
    model=ModelShape(layers=2, heads=8, head_size=128, hidden=256, vocab=512, dtype="bfloat16", bytes_per_element=2),
    chunk=2048,
    condition_tokens=272,
    tokens_per_frame=4084,
    frames=13,
    rounds=10,
    growth_tokens_per_frame=515,
    generated_tokens_per_frame=67,
    early=10,
    late=100,
)
QUICK = Plan(
    model=ModelShape(layers=2, heads=2, head_size=32, hidden=64, vocab=256, dtype="float32", bytes_per_element=4),
    chunk=512,
    condition_tokens=70,
    tokens_per_frame=197,
    frames=13,
    rounds=2,
    growth_tokens_per_frame=131,
    generated_tokens_per_frame=35,
    early=10,
    late=30,
)


def run(json_path: Path | None, *, quick: bool = False, console: Console | None = None) -> dict[str, Any]:
    """Measure, print a table and write everything measured to ``json_path``.

    Args:
        json_path: file for the samples and all that is needed to repeat them; None: only the table.
        quick: a small geometry that shows in a minute that everything works; its times say nothing.
        console: where progress and table go.

    Returns:
        What is written to ``json_path``.

    Raises:
        EngineFailed: an engine raised or died.
    """
    console = console or Console()
    files.claim(json_path)
    plan = QUICK if quick else FULL
    result: dict[str, Any] = {
        **about("decode", threads_per_engine=THREADS),
        "quick": quick,
        "seed": SEED,
        "model": dataclasses.asdict(plan.model) | {"kv_bytes_per_token": plan.model.kv_bytes_per_token},
        "engine": {"block_size": BLOCK_SIZE, "max_num_batched_tokens": plan.chunk, "enforce_eager": True},
        "policy": {"name": POLICY.name} | dataclasses.asdict(POLICY),
        "steps_per_burst": plan.burst,
    }
    start = time.monotonic()
    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress, _engines(plan) as engines:
        bench = _Bench(plan, engines, progress)
        bench.start_engines()
        result["last_frame"] = bench.last_frame()
        result["machine"]["huge_page_kib"] = bench.huge_page_kib()
        result["control"] = bench.control()
        result["sliding_frame"] = bench.sliding_frame()
        result["early_and_late_frame"] = bench.early_and_late_frame()
        result["generated"] = bench.generated()
    result["seconds"] = time.monotonic() - start
    result["machine"]["load_average_after"] = os.getloadavg()
    result["share_of_reading"] = _share_of_reading(result)
    result["checks"] = _checks(result)
    result["targets"] = _targets(result)
    if json_path is not None:
        files.write(json_path, result)
    _print(result, console)
    return result


class _Bench:
    """The runs, in order. Engines are shared: each run begins its own requests and ends them."""

    def __init__(self, plan: Plan, engines: dict[str, EngineProcess], progress: Progress) -> None:
        self._plan = plan
        self._engines = engines
        self._progress = progress
        self._task = progress.add_task("", total=sum(STAGES.values()))
        generator = np.random.default_rng(SEED)
        self._tokens = generator.integers(plan.model.vocab, size=plan.max_model_len).tolist()

    def start_engines(self) -> None:
        """Wait until all of them are up."""
        with self._stage("starting engines"):
            for engine in self._engines.values():
                engine.answer()

    def last_frame(self) -> dict[str, Any]:
        """Time the engines of `LAST_FRAME` at three places of the last frame."""
        plan = self._plan
        retention = plan.retention(plan.tokens_per_frame)
        video = plan.options(plan.tokens_per_frame)
        places: dict[str, Any] = {}
        tokens: dict[str, list[int]] = {name: [] for name in LAST_FRAME}
        blocks_as_decided = True
        for place, offset in plan.places.items():
            prompt = retention.layout.frame_start(plan.frames - 1) + offset
            live = retention.live_tokens(prompt)
            requests = {
                "full": (prompt, {}),
                "short": (live, {}),
                "packcache": (prompt, video),
                "opt_out": (prompt, video | {"packcache_policy": "full"}),
            }
            with self._stage(f"last frame, {place}: prefill"):
                self._begin(requests)
            with self._stage(f"last frame, {place}: decode"):
                bursts = self._interleave(LAST_FRAME, plan.rounds + 1)
            self._end(LAST_FRAME)
            for name in LAST_FRAME:
                tokens[name] += [token for burst in bursts[name] for token in burst.tokens]
            used = {name: _used_blocks(bursts[name]) for name in LAST_FRAME}
            blocks_as_decided &= used["packcache"] == _blocks_decided(retention, prompt, len(used["packcache"]))
            places[place] = {
                "prompt_tokens": prompt,
                "live_tokens": live,
                "warm_up_tokens": plan.burst,
                "timed_tokens": plan.rounds * plan.burst,
                "blocks_at_the_end": {name: blocks[-1] for name, blocks in used.items()},
                **_times(bursts, RATIOS),
            }
        # Round by round over the places: a step of the whole frame, three times.
        whole = {
            clock: {
                name: np.sum([place[clock][name] for place in places.values()], axis=0).tolist() for name in LAST_FRAME
            }
            for clock in CLOCKS
        }
        return {
            "condition_tokens": plan.condition_tokens,
            "tokens_per_frame": plan.tokens_per_frame,
            "frames": plan.frames,
            "places": places,
            "ratios": _ratios(whole, RATIOS),
            "tokens_equal": tokens["opt_out"] == tokens["full"],
            "blocks_as_decided": blocks_as_decided,
        }

    def huge_page_kib(self) -> dict[str, int | None]:
        """Memory of each engine that lies on huge pages; the KV cache should."""
        return {name: engine.call("huge_page_kib") for name, engine in self._engines.items()}

    def control(self) -> dict[str, Any]:
        """How much of a step is reading the cache, and how far apart two engines are that do the same."""
        plan = self._plan
        retention = plan.retention(plan.tokens_per_frame)
        middle = retention.layout.frame_start(plan.frames - 1) + plan.places["middle"]
        lengths = {"tiny": BLOCK_SIZE, "live": retention.live_tokens(middle)}
        measured: dict[str, Any] = {}
        with self._stage("controls"):
            for label, length in lengths.items():
                self._begin({name: (length, {}) for name in STOCK})
                bursts = self._interleave(STOCK, plan.rounds + 1)
                measured[label] = {"prompt_tokens": length} | _times(bursts, {"full / short": STOCK})
                self._end(STOCK)
        return measured

    def sliding_frame(self) -> dict[str, Any]:
        """Time one whole frame that the window slides for, with positions re-based and absolute.

        The slide is in the first step: it turns the keys of the whole history.
        """
        plan = self._plan
        options = plan.options(plan.tokens_per_frame)
        retention = plan.retention(plan.tokens_per_frame)
        prompt = retention.layout.frame_start(plan.frames - 1)
        with self._stage("a frame that slides: prefill"):
            self._begin(dict.fromkeys(POSITIONED, (prompt, options)))
        with self._stage("a frame that slides: decode"):
            bursts = self._interleave(POSITIONED, plan.tokens_per_frame // plan.burst)
            for name in POSITIONED:
                bursts[name].append(self._engines[name].call("decode", plan.tokens_per_frame % plan.burst))
        self._end(POSITIONED)
        decided = _blocks_decided(retention, prompt, plan.tokens_per_frame)
        frame: dict[str, Any] = {}
        for clock in CLOCKS:
            steps = {name: [step for burst in bursts[name] for step in getattr(burst, clock)] for name in POSITIONED}
            seconds = {name: sum(own) for name, own in steps.items()}
            slide = steps["packcache"][0]
            frame[clock] = {
                "frame": seconds,
                "rebase / absolute": seconds["packcache"] / seconds["absolute"],
                "slide": slide,
                "share_of_slide": (slide - median(steps["packcache"])) / seconds["packcache"],
            }
        return {
            "prompt_tokens": prompt,
            "tokens_per_frame": plan.tokens_per_frame,
            **frame,
            "blocks_as_decided": all(_used_blocks(bursts[name]) == decided for name in POSITIONED),
        }

    def early_and_late_frame(self) -> dict[str, Any]:
        """Time one whole frame early and late in a video, at the same live length.

        Engines swap roles half-way: no two processes are quite equally fast.
        """
        plan = self._plan
        tokens_per_frame = plan.growth_tokens_per_frame
        options = plan.options(tokens_per_frame)
        retention = plan.retention(tokens_per_frame)
        frames = {"early": plan.early, "late": plan.late}
        prompts = {role: retention.layout.frame_start(frame) for role, frame in frames.items()}
        halves: list[dict[str, Any]] = []
        peaks: dict[str, list[int]] = {role: [] for role in frames}
        prefill_peaks: dict[str, list[int]] = {role: [] for role in frames}
        blocks_as_decided = True
        for first, second in (("early", "late"), ("late", "early")):
            engine_of = dict(zip((first, second), WITH_PLUGIN, strict=True))
            with self._stage(f"{first} and {second} frame: prefill"):
                prefill = self._begin({engine_of[role]: (prompts[role], options) for role in frames})
            with self._stage(f"{first} and {second} frame: decode"):
                bursts = self._interleave(WITH_PLUGIN, tokens_per_frame // plan.burst)
                rest = {name: self._engines[name].call("decode", tokens_per_frame % plan.burst) for name in WITH_PLUGIN}
            self._end(WITH_PLUGIN)
            by_role = {role: bursts[engine_of[role]] for role in frames}
            halves.append(_times(by_role, {"late / early": ("late", "early")}))
            for role, engine in engine_of.items():
                used = _used_blocks([*bursts[engine], rest[engine]])
                peaks[role].append(max(used))
                prefill_peaks[role].append(max(prefill[engine].used_blocks))
                blocks_as_decided &= used == _blocks_decided(retention, prompts[role], tokens_per_frame)
        return {
            "tokens_per_frame": tokens_per_frame,
            "frames": frames,
            "prompt_tokens": prompts,
            "live_tokens": {role: retention.live_tokens(prompt) for role, prompt in prompts.items()},
            "halves": halves,
            "ratios": {"late / early": _joined([half["ratios"]["late / early"] for half in halves])},
            "peak_blocks": {role: max(values) for role, values in peaks.items()},
            "peak_blocks_of_prefill": {role: max(values) for role, values in prefill_peaks.items()},
            "blocks_as_decided": blocks_as_decided,
        }

    def generated(self) -> dict[str, Any]:
        """Generate a video from its condition to the end of the late frame, watching the block pool."""
        plan = self._plan
        tokens_per_frame = plan.generated_tokens_per_frame
        retention = plan.retention(tokens_per_frame)
        with self._stage("all frames from the condition on"):
            self._begin({"packcache": (plan.condition_tokens, plan.options(tokens_per_frame))})
            steps = (plan.late + 1) * tokens_per_frame
            used = self._engines["packcache"].call("decode", steps).used_blocks
            self._end(("packcache",))
        frames = {"early": plan.early, "late": plan.late}
        return {
            "tokens_per_frame": tokens_per_frame,
            "frames": frames,
            "peak_blocks": {role: max(used[: (frame + 1) * tokens_per_frame]) for role, frame in frames.items()},
            "blocks_as_decided": used == _blocks_decided(retention, plan.condition_tokens, steps),
        }

    def _begin(self, requests: Mapping[str, tuple[int, Mapping[str, Any]]]) -> dict[str, Burst]:
        """Prefill all at once. Requests by engine: prompt length and options."""
        for name, (length, options) in requests.items():
            max_tokens = self._plan.max_model_len - length
            self._engines[name].ask("begin", [self._tokens[:length]], max_tokens, options)
        return {name: self._engines[name].answer() for name in requests}

    def _end(self, names: Iterable[str]) -> None:
        for name in names:
            self._engines[name].end()

    def _interleave(self, names: Sequence[str], rounds: int) -> dict[str, list[Burst]]:
        return interleave({name: self._engines[name] for name in names}, rounds, self._plan.burst)

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        self._progress.update(self._task, description=name)
        yield
        self._progress.advance(self._task, STAGES[name])


@contextmanager
def _engines(plan: Plan) -> Iterator[dict[str, EngineProcess]]:
    """The engines, starting up, on a model in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="packcache-bench-") as folder, ExitStack() as stack:
        model = Path(folder) / "model"
        write_model(model, plan.model, plan.max_model_len, SEED)
        blocks = -(-(plan.max_model_len + plan.chunk) // BLOCK_SIZE)
        engines: dict[str, EngineProcess] = {}
        for name, additional_config in ENGINES.items():
            settings = EngineSettings(
                model=str(model),
                dtype=plan.model.dtype,
                block_size=BLOCK_SIZE,
                kv_cache_memory_bytes=blocks * BLOCK_SIZE * plan.model.kv_bytes_per_token,
                max_model_len=plan.max_model_len,
                max_num_batched_tokens=plan.chunk,
                threads=THREADS,
                additional_config=additional_config,
            )
            engines[name] = EngineProcess(name, settings, Path(folder) / f"{name}.log")
            stack.callback(engines[name].close)
        yield engines


def _used_blocks(bursts: Sequence[Burst]) -> list[int]:
    return [blocks for burst in bursts for blocks in burst.used_blocks]


def _blocks_decided(retention: Retention, prompt_tokens: int, steps: int) -> list[int]:
    """Blocks that a request should hold after each of ``steps`` decode steps."""
    blocks = []
    for token in range(prompt_tokens, prompt_tokens + steps):
        frame = retention.layout.frame_of(token)
        tail = token // retention.block_size + 1 - retention.blocks.tail_start(frame)
        blocks.append(len(retention.past(frame)) + tail)
    return blocks


def _times(bursts: Mapping[str, Sequence[Burst]], ratios: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """Seconds a step of each burst but the first, which finds the caches cold; and ratios of them."""
    seconds = {
        clock: {name: [fmean(getattr(burst, clock)) for burst in own[1:]] for name, own in bursts.items()}
        for clock in CLOCKS
    }
    return seconds | {"ratios": _ratios(seconds, ratios)}


def _ratios(
    seconds: Mapping[str, Mapping[str, Sequence[float]]], ratios: Mapping[str, tuple[str, str]]
) -> dict[str, Any]:
    """Ratios of samples of the same round; ``seconds`` by clock and name."""
    return {
        ratio: {
            clock: _summary([a / b for a, b in zip(own[above], own[below], strict=True)])
            for clock, own in seconds.items()
        }
        for ratio, (above, below) in ratios.items()
    }


def _joined(summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One summary, by clock, of the samples of several."""
    return {
        clock: _summary([sample for summary in summaries for sample in summary[clock]["samples"]]) for clock in CLOCKS
    }


def _summary(ratios: Sequence[float]) -> dict[str, Any]:
    low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
    return {
        "median": middle,
        "quartiles": [low, high],
        "min": min(ratios),
        "max": max(ratios),
        "samples": list(ratios),
    }


def _targets(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every ratio with the bound it must keep, and whether it does: None for the times of a quick run."""
    last = {name: by_clock[CPU]["median"] for name, by_clock in result["last_frame"]["ratios"].items()}
    growth, generated = result["early_and_late_frame"], result["generated"]
    timed = [
        _target("full / packcache", last["full / packcache"], at_least=3.7),
        _target("packcache / short", last["packcache / short"], at_most=1.05),
        _target("opt_out / full", last["opt_out / full"], at_most=1.02),
        _target("rebase / absolute", result["sliding_frame"][CPU]["rebase / absolute"], at_most=1.02),
        _target(_growth_name(result), growth["ratios"]["late / early"][CPU]["median"], at_most=1.03),
    ]
    if result["quick"]:
        timed = [target | {"met": None} for target in timed]
    return [
        *timed,
        _peak_target("peak blocks, prompted", growth["peak_blocks"]),
        _peak_target("peak blocks, generated", generated["peak_blocks"]),
    ]


def _peak_target(name: str, peaks: Mapping[str, int]) -> dict[str, Any]:
    """Late over early: equal, but for one block at each boundary of the condition and of the window's frames."""
    boundaries = 1 + POLICY.window + 1
    return _target(name, peaks["late"] / peaks["early"], at_most=1 + boundaries / peaks["early"])


def _target(ratio: str, value: float, *, at_least: float = 0, at_most: float = math.inf) -> dict[str, Any]:
    bound = {"at_least": at_least} if at_least else {"at_most": at_most}
    return {"ratio": ratio, "value": value, **bound, "met": at_least <= value <= at_most}


def _checks(result: Mapping[str, Any]) -> dict[str, bool]:
    """What does not depend on time."""
    runs = ("last_frame", "sliding_frame", "early_and_late_frame", "generated")
    return {
        "tokens of opt_out equal those of full": result["last_frame"]["tokens_equal"],
        "blocks in use are those that retention decides": all(result[run]["blocks_as_decided"] for run in runs),
    }


def _print(result: Mapping[str, Any], console: Console) -> None:
    last, growth = result["last_frame"], result["early_and_late_frame"]
    table = Table(title="Decode steps: ratios of interleaved runs", box=SIMPLE_HEAD)
    table.add_column("ratio", no_wrap=True)
    for column in ("median", "quartiles", "by the clock", "must be"):
        table.add_column(column, justify="right")
    table.add_column("met")
    measured = last["ratios"] | {_growth_name(result): growth["ratios"]["late / early"]}
    for target in result["targets"]:
        name = target["ratio"]
        if name in measured:
            cells = _cells(measured[name])
        elif name == "rebase / absolute":
            cells = (f"{target['value']:.3f}", "whole frame", f"{result['sliding_frame'][WALL][name]:.3f}")
        else:
            cells = (f"{target['value']:.3f}", "counted", "")
        bound = f">= {target['at_least']:.2f}" if "at_least" in target else f"<= {target['at_most']:.2f}"
        met = {True: "[green]yes[/]", False: "[red]MISSED[/]", None: "n/a"}[target["met"]]
        table.add_row(name, *cells, bound, met)
        for place, at_place in last["places"].items():
            if name in at_place["ratios"]:
                table.add_row(f"  at its {place}", *_cells(at_place["ratios"][name]), style="dim")
    for control in result["control"].values():
        row = f"control, {control['prompt_tokens']:,} tokens"
        table.add_row(row, *_cells(control["ratios"]["full / short"]), style="dim")
    console.print(table)
    for check, passed in result["checks"].items():
        console.print(f"{check}: {'[green]yes[/]' if passed else '[red]NO[/]'}")
    slide = result["sliding_frame"][CPU]["share_of_slide"]
    console.print(f"share of a frame that the slide before it takes: {slide:.2%}")
    shares = ", ".join(f"{name} {share:.0%}" for name, share in result["share_of_reading"].items())
    console.print(f"share of a step that a sequence of {BLOCK_SIZE} tokens does not need: {shares}")


def _cells(by_clock: Mapping[str, Any]) -> tuple[str, str, str]:
    """Median and quartiles by processor time, and the median by the clock."""
    low, high = by_clock[CPU]["quartiles"]
    return f"{by_clock[CPU]['median']:.3f}", f"{low:.2f} - {high:.2f}", f"{by_clock[WALL]['median']:.3f}"


def _growth_name(result: Mapping[str, Any]) -> str:
    return "frame {late} / frame {early}".format(**result["early_and_late_frame"]["frames"])


def _share_of_reading(result: Mapping[str, Any]) -> dict[str, float]:
    """Part of a step in the middle of the last frame that a sequence of one block does not need."""
    tiny = median(sample for own in result["control"]["tiny"][CPU].values() for sample in own)
    steps = result["last_frame"]["places"]["middle"][CPU]
    return {name: 1 - tiny / median(own) for name, own in steps.items()}
