"""The runs: engines side by side, as many requests in each, bursts of one after the other."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.decode.samples import CLOCKS, ratios_of
from benchmarks.engine_process import Burst, EngineProcess, EngineSettings, interleave
from benchmarks.model import write_model
from benchmarks.overhead.clock import WatchedEngine
from benchmarks.overhead.plan import BLOCK_SIZE, CASES, PACKCACHE, SEED, STOCK, THREADS, WITH_PLUGIN, OverheadPlan
from vllm_packcache.tools.progress import counting


@dataclass(frozen=True, kw_only=True)
class OverheadSettings(EngineSettings):
    """What an engine is made of.

    Args:
        runner: V1 or V2.
    """

    runner: str

    def environment(self) -> dict[str, str | None]:
        """See `EngineSettings.environment`."""
        return super().environment() | {"VLLM_USE_V2_MODEL_RUNNER": str(int(self.runner == "V2"))}


class Bench:
    """The runs.

    Args:
        plan: sizes.
        folder: for the model and the engines' output.
        console: where progress goes.
    """

    def __init__(self, plan: OverheadPlan, folder: Path, console: Console) -> None:
        self._plan = plan
        self._folder = folder
        self._console = console
        self._generator = np.random.default_rng(SEED)
        write_model(folder / "model", plan.model, plan.max_model_len, SEED)

    @classmethod
    @contextmanager
    def in_temporary_folder(cls, plan: OverheadPlan, console: Console) -> Iterator[Bench]:
        """One that leaves nothing behind."""
        with tempfile.TemporaryDirectory(prefix="packcache-bench-") as folder:
            yield cls(plan, Path(folder), console)

    def v1(self) -> dict[str, Any]:
        """Compare the engines of `CASES` on the V1 model runner, then look into those with the plugin."""
        plan = self._plan
        with self._engines("V1", tuple(CASES)) as engines, counting(self._console, "rounds") as progress:
            task = progress.add_task("decoding", total=plan.rounds)
            prompts = self._prompts(plan.requests, plan.condition_tokens)
            for name, engine in engines.items():
                engine.call("begin", prompts, plan.max_model_len - len(prompts[0]) - 1, plan.options(name))
            bursts: dict[str, list[Burst]] = {name: [] for name in engines}
            order = list(engines)
            for number in range(plan.rounds):
                # One round at a time, each in another order: see `interleave`.
                turn = number % len(order)
                turned = {name: engines[name] for name in (*order[turn:], *order[:turn])}
                for name, own in interleave(turned, 1, plan.burst).items():
                    bursts[name] += own
                progress.advance(task)
            watched = {name: _watched(engines[name], plan.watched_steps, plan.requests) for name in WITH_PLUGIN}
            for engine in engines.values():
                engine.end()
        seconds = {
            clock: {name: [fmean(getattr(burst, clock)) for burst in own] for name, own in bursts.items()}
            for clock in CLOCKS
        }
        ratios = {f"{name} / {STOCK}": (name, STOCK) for name in CASES if name != STOCK}
        return seconds | {"ratios": ratios_of(seconds, ratios), "host": {"V1": watched}}

    def v2(self) -> dict[str, Any]:
        """Look into one engine on Model Runner V2, case by case: nothing is compared with its slow kernels."""
        plan = self._plan
        given = plan.condition_tokens + plan.given_frames * plan.tokens_per_frame
        prompts = self._prompts(plan.interpreted_requests, given)
        found: dict[str, Any] = {}
        with self._engines("V2", (PACKCACHE,)) as engines, counting(self._console, "cases") as progress:
            task = progress.add_task("looking into Model Runner V2", total=len(WITH_PLUGIN))
            engine = engines[PACKCACHE]
            for name in WITH_PLUGIN:
                engine.call("begin", prompts, plan.max_model_len - len(prompts[0]) - 1, plan.options(name))
                found[name] = _watched(engine, plan.interpreted_steps, plan.interpreted_requests)
                engine.end()
                progress.advance(task)
        return found

    @contextmanager
    def _engines(self, runner: str, names: Sequence[str]) -> Iterator[dict[str, EngineProcess]]:
        with ExitStack() as stack:
            engines = {}
            for name in names:
                log = self._folder / f"{name}-{runner}.log"
                engines[name] = EngineProcess(name, self._settings(name, runner), log, WatchedEngine)
                stack.callback(engines[name].close)
            for engine in engines.values():
                engine.answer()
            yield engines

    def _settings(self, name: str, runner: str) -> OverheadSettings:
        plan = self._plan
        blocks = plan.requests * (-(-plan.max_model_len // BLOCK_SIZE) + 1) + 1
        return OverheadSettings(
            model=str(self._folder / "model"),
            dtype=plan.model.dtype,
            block_size=BLOCK_SIZE,
            kv_cache_memory_bytes=blocks * BLOCK_SIZE * plan.model.kv_bytes_per_token,
            max_model_len=plan.max_model_len,
            max_num_batched_tokens=max(2048, plan.max_model_len),
            max_num_seqs=plan.requests,
            threads=THREADS,
            additional_config=plan.additional_config(name),
            runner=runner,
        )

    def _prompts(self, requests: int, length: int) -> list[list[int]]:
        return self._generator.integers(self._plan.model.vocab, size=(requests, length)).tolist()


def _watched(engine: EngineProcess, steps: int, requests: int) -> dict[str, Any]:
    burst, counted = engine.call("watch", steps)
    return host_part(burst, counted, requests)


def host_part(burst: Burst, counted: Sequence[dict[str, int]], requests: int) -> dict[str, Any]:
    """Microseconds inside our own functions.

    The median over steps is a step within a frame, as most are; the mean has the steps in it that begin a frame.

    Args:
        burst: the steps.
        counted: nanoseconds by function, of each step.
        requests: of each step.
    """
    steps = [sum(own.values()) / 1e3 for own in counted]
    names = {name for own in counted for name in own}
    by_function = {name: fmean(own.get(name, 0) / 1e3 for own in counted) for name in names}
    return {
        "steps": len(steps),
        "requests": requests,
        "microseconds_per_step": {"median": median(steps), "mean": fmean(steps), "max": max(steps)},
        "microseconds_per_step_and_request": median(steps) / requests,
        "share_of_step": sum(steps) / (1e6 * sum(burst.cpu_seconds)),
        "functions": dict(sorted(by_function.items(), key=lambda item: -item[1])),
    }
