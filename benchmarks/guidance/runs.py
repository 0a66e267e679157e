"""The runs: engines side by side on Model Runner V2, bursts of one after the other."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.decode.samples import CLOCKS, ratios_of
from benchmarks.engine_process import Burst, Engine, EngineProcess, EngineSettings, interleave
from benchmarks.guidance.plan import (
    BLOCK_SIZE,
    GUIDED,
    GUIDED_FULL,
    GUIDED_LAST,
    LAST,
    RATIOS,
    SCALE,
    SEED,
    TEXTS,
    THREADS,
    Geometry,
    GuidancePlan,
    Request,
    additional_config,
)
from benchmarks.model import write_model
from benchmarks.overhead.runs import OverheadSettings
from vllm_packcache.tools import interpreted
from vllm_packcache.tools.progress import counting

_GUIDED = (GUIDED, GUIDED_FULL, GUIDED_LAST)


class InterpretedEngine(Engine):
    """What the process obeys: an engine whose processor time is without what interpreted kernels take."""

    def __init__(self, settings: EngineSettings) -> None:
        interpreted.prepare()
        self._interpreting = 0.0
        self._leave_out_kernels()
        super().__init__(settings)

    def processor_time(self) -> float:
        """See `Engine.processor_time`."""
        return time.process_time() - self._interpreting

    def _leave_out_kernels(self) -> None:
        from triton.runtime.interpreter import InterpretedFunction

        run = InterpretedFunction.run

        @wraps(run)
        def counted(*arguments: Any, **options: Any) -> Any:
            start = time.process_time()
            try:
                return run(*arguments, **options)
            finally:
                self._interpreting += time.process_time() - start

        InterpretedFunction.run = counted


class Bench:
    """The runs.

    Args:
        plan: sizes.
        folder: for models and the engines' output.
        console: where progress goes.
    """

    def __init__(self, plan: GuidancePlan, folder: Path, console: Console) -> None:
        self._plan = plan
        self._folder = folder
        self._console = console
        self._generator = np.random.default_rng(SEED)

    @classmethod
    @contextmanager
    def in_temporary_folder(cls, plan: GuidancePlan, console: Console) -> Iterator[Bench]:
        """One that leaves nothing behind."""
        with tempfile.TemporaryDirectory(prefix="packcache-bench-") as folder:
            yield cls(plan, Path(folder), console)

    def compare(self, stages: Sequence[str]) -> dict[str, Any]:
        """Run stages of one geometry, one after the other, each with what `RATIOS` divides of it."""
        geometry = self._plan.geometry(stages[0])
        names = {name: None for stage in stages for pair in RATIOS[stage].values() for name in pair}
        found: dict[str, Any] = {}
        with self._engines(list(names), geometry) as engines, counting(self._console, "rounds") as progress:
            task = progress.add_task("", total=len(stages) * (geometry.rounds + geometry.warm_up))
            for stage in stages:
                own = {name: engines[name] for pair in RATIOS[stage].values() for name in pair}
                progress.update(task, description=f"{stage}: prefill")
                requests = self.requests(stage)
                for name, engine in own.items():
                    prompts, options = zip(*requests[name in _GUIDED], strict=True)
                    engine.ask("begin_each", prompts, geometry.max_tokens, options)
                for engine in own.values():
                    engine.answer()
                progress.update(task, description=f"{stage}: decoding")
                bursts: dict[str, list[Burst]] = {name: [] for name in own}
                for number in range(geometry.warm_up + geometry.rounds):
                    for name, (burst,) in interleave(_turned(own, number), 1, geometry.burst).items():
                        if number >= geometry.warm_up:
                            bursts[name].append(burst)
                    progress.advance(task)
                for engine in own.values():
                    engine.end()
                found[stage] = _compared(stage, bursts)
        return found

    def requests(self, stage: str) -> tuple[list[Request], list[Request]]:
        """Requests of an engine that does not guide, and those of one that does: of the same streams."""
        geometry = self._plan.geometry(stage)
        first, second = geometry.condition_tokens, geometry.negative_tokens
        separate, together = list[Request](), list[Request]()
        for _ in range(1 if stage == LAST else self._plan.requests // 2):
            condition, negative, given = (self._ids(count) for count in (first, second, geometry.given_tokens))
            for own in (condition, negative):
                separate.append(Request([*own, *given], {} if stage == TEXTS else geometry.options(len(own))))
            guided = {"packcache_guidance": SCALE, "packcache_negative_prompt_ids": negative}
            together.append(Request([*condition, *given], geometry.options(first) | guided))
        return separate, together

    def _ids(self, count: int) -> list[int]:
        return self._generator.integers(self._plan.host.model.vocab, size=count).tolist()

    @contextmanager
    def _engines(self, names: Sequence[str], geometry: Geometry) -> Iterator[dict[str, EngineProcess]]:
        model = self._folder / f"model-{names[0]}"
        write_model(model, geometry.model, geometry.max_model_len, SEED)
        streams = 2 if geometry is self._plan.last_frame else self._plan.requests
        blocks = streams * -(-(geometry.max_model_len + geometry.chunk) // BLOCK_SIZE) + 1
        with ExitStack() as stack:
            engines = {}
            for name in names:
                settings = OverheadSettings(
                    model=str(model),
                    dtype=geometry.model.dtype,
                    block_size=BLOCK_SIZE,
                    kv_cache_memory_bytes=blocks * BLOCK_SIZE * geometry.model.kv_bytes_per_token,
                    max_model_len=geometry.max_model_len,
                    max_num_batched_tokens=geometry.chunk,
                    max_num_seqs=streams,
                    threads=THREADS,
                    additional_config=additional_config(name),
                    runner="V2",
                )
                engines[name] = EngineProcess(name, settings, self._folder / f"{name}.log", InterpretedEngine)
                stack.callback(engines[name].close)
            for engine in engines.values():
                engine.answer()
            yield engines


def _turned(engines: Mapping[str, EngineProcess], number: int) -> dict[str, EngineProcess]:
    """Each round in another order."""
    names = list(engines)
    turn = number % len(names)
    return {name: engines[name] for name in (*names[turn:], *names[:turn])}


def _compared(stage: str, bursts: Mapping[str, Sequence[Burst]]) -> dict[str, Any]:
    """Seconds of a step of each burst, by clock and engine, and ratios of them."""
    seconds = {
        clock: {name: [fmean(getattr(burst, clock)) for burst in own] for name, own in bursts.items()}
        for clock in CLOCKS
    }
    return seconds | {"ratios": ratios_of(seconds, RATIOS[stage])}
