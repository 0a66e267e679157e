"""The engine of `benchmarks.masked`: what a pass of a frame consists of is timed inside it."""

from __future__ import annotations

import functools
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.decode.samples import CPU, WALL
from benchmarks.engine_process import Burst, Engine, EngineSettings
from vllm_packcache.families import lumos
from vllm_packcache.tools import interpreted

LAYERS, CHOOSING, ENTERING, ENCODING = PARTS = ("layers", "choosing", "entering", "encoding")
"""Of a pass: the model's layers; the output layer and the choice of tokens; the rotation of keys, the compaction of the
block table and the positions of a frame that is entered; what is encoded when a frame has been committed."""

Seconds = dict[str, float]
"""By clock."""


@dataclass(frozen=True, kw_only=True)
class MaskedSettings(EngineSettings):
    """What an engine of a masked model is made of. There is no such engine on the V1 model runner."""

    def environment(self) -> dict[str, str | None]:
        """See `EngineSettings.environment`."""
        return super().environment() | ({"VLLM_USE_V2_MODEL_RUNNER": "1"} if self.device == "cpu" else {})


@dataclass(frozen=True)
class Made:
    """Frames that were made.

    Args:
        burst: all steps, those of the given frames included.
        parts: of each step, seconds of `PARTS`; without layers a step has computed nothing.
    """

    burst: Burst
    parts: list[dict[str, Seconds]]


class Watch:
    """Times parts of steps, and lets the model skip those that make no frame.

    Args:
        synchronise: waits until the device is idle.
    """

    def __init__(self, synchronise: Callable[[], None]) -> None:
        self._synchronise = synchronise
        self._begun: dict[str, Seconds] = {}
        self.steps: list[dict[str, Seconds]] = []

    def begin(self, part: str) -> None:
        """A part of the step begins."""
        self._begun[part] = self._now()

    def end(self, part: str) -> None:
        """It ends."""
        now, own = self._now(), self.steps[-1].setdefault(part, {CPU: 0.0, WALL: 0.0})
        for clock, begun in self._begun.pop(part).items():
            own[clock] += now[clock] - begun

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, as a part of the step."""

        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            self.begin(part)
            result = function(*arguments, **options)
            self.end(part)
            return result

        return call

    def step(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, as a step."""

        @functools.wraps(function)
        def call() -> Any:
            self.steps.append({})
            result = function()
            self._synchronise()
            return result

        return call

    def install(self, model: Any) -> None:
        """Watch a model."""
        import torch

        layers, compute = model.model.layers, model.forward

        def skipping(input_ids: Any, positions: Any, **inputs: Any) -> Any:
            # A frame that is being made, and one that is committed, has mask tokens; text and given frames have none.
            if (input_ids == lumos.MASK).any():
                return compute(input_ids, positions, **inputs)
            weight = model.model.norm.weight
            return torch.zeros(len(input_ids), len(weight), dtype=weight.dtype, device=weight.device)

        model.forward = skipping
        layers[0].register_forward_pre_hook(lambda *_: self.begin(LAYERS))
        layers[-1].register_forward_hook(lambda *_: self.end(LAYERS))

    def _now(self) -> Seconds:
        self._synchronise()
        return {CPU: time.process_time(), WALL: time.perf_counter()}


class MaskedEngine(Engine):
    """What the process obeys. Frames that a prompt gives are not computed.

    What is cached does not matter to time: the cache is filled with random numbers at the start, and the model returns
    at once from steps that hold no frame being made. So a prompt of twelve frames costs nothing, while scheduling,
    block tables and positions are as ever. What such an engine makes is no video.
    """

    def __init__(self, settings: EngineSettings) -> None:
        if settings.device == "cpu":
            interpreted.prepare()
        super().__init__(settings)
        import torch

        from vllm_packcache.worker.passes import CanvasModelState
        from vllm_packcache.worker.sampler import Canvas

        self._watch = Watch(torch.cuda.synchronize if self._on_gpu else lambda: None)
        self._engine.apply_model(self._watch.install)
        self._engine.step = self._watch.step(self._engine.step)
        Canvas.choose = self._watch.timed(CHOOSING, Canvas.choose)  # type: ignore[method-assign]
        CanvasModelState._picture = self._watch.timed(ENTERING, CanvasModelState._picture)  # type: ignore[method-assign]
        CanvasModelState._encode_what_left = self._watch.timed(  # type: ignore[method-assign]
            ENCODING, CanvasModelState._encode_what_left
        )
        for layer in self._engine.vllm_config.compilation_config.static_forward_context.values():
            # Memory that was never written to is one page of zeros, and is read from the processor's cache.
            layer.kv_cache.uniform_(-1, 1)

    def make(self, prompts: Sequence[Sequence[int]], extra_args: dict[str, Any]) -> Made:
        """Make a frame of each of ``prompts``."""
        from vllm import SamplingParams

        self._watch.steps.clear()
        params = SamplingParams(detokenize=False, extra_args=extra_args)
        burst = self._begin(prompts, [params] * len(prompts))
        return Made(burst, list(self._watch.steps))

    def peak_memory(self) -> int:
        """Bytes of memory that the process has held at most: of a GPU, if it uses one."""
        if self._on_gpu:
            import torch

            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
