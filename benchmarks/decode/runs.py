"""The runs: engines side by side, requests of the same prompt, bursts of one after the other."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.progress import Progress

from benchmarks.decode.plan import (
    BLOCK_SIZE,
    CHANGED,
    END_TO_END,
    FRAME_RATIOS,
    POSITIONED,
    RATIOS,
    SEED,
    STAGES,
    STOCK,
    THREADS,
    TIMED_FRAMES,
    WITH_PLUGIN,
    DecodePlan,
    described,
)
from benchmarks.decode.samples import CLOCKS, CPU, joined, ratios_of, step_times, summed
from benchmarks.engine_process import Burst, EngineProcess, EngineSettings, interleave
from benchmarks.model import write_model
from benchmarks.statistics import frames_stood_for
from vllm_packcache.core.policies import Full
from vllm_packcache.core.policies.base import Int64
from vllm_packcache.core.retention import Retention, check_policy

CHOICES = 20
"""How often what changed is chosen, where that is timed."""


@dataclass(frozen=True)
class Request:
    """What an engine is given.

    Args:
        prompt_tokens: length of the prompt.
        retention: what is to be kept of it.
        options: what says so to the plugin.
    """

    prompt_tokens: int
    retention: Retention
    options: Mapping[str, Any] = field(default_factory=dict)

    def blocks_decided(self, steps: int) -> list[int]:
        """Blocks that the request should hold after each of ``steps`` decode steps."""
        blocks: list[int] = []
        for segment in self.retention.segments(self.prompt_tokens, self.prompt_tokens + steps):
            before = len(segment.past) - segment.tail_start
            blocks += [before + token // BLOCK_SIZE + 1 for token in range(segment.start, segment.stop)]
        return blocks


@dataclass(frozen=True)
class Run:
    """What engines did side by side, by engine.

    Args:
        requests: what they were given.
        prefill: up to the first sampled token.
        bursts: interleaved.
        rest: steps after the bursts.
    """

    requests: Mapping[str, Request]
    prefill: dict[str, Burst]
    bursts: dict[str, list[Burst]]
    rest: dict[str, Burst]

    def decoded(self, name: str) -> list[Burst]:
        """All decode steps of an engine."""
        return [*self.bursts[name], self.rest[name]]

    def used_blocks(self, name: str) -> list[int]:
        """Blocks that an engine held after each decode step."""
        return [blocks for burst in self.decoded(name) for blocks in burst.used_blocks]

    @property
    def blocks_as_decided(self) -> bool:
        """Whether after every decode step each engine held as many blocks as retention decides."""
        used = {name: self.used_blocks(name) for name in self.requests}
        return all(own == self.requests[name].blocks_decided(len(own)) for name, own in used.items())


class Bench:
    """The runs. Engines are shared: each run begins its own requests and ends them.

    Args:
        plan: sizes.
        folder: for the model and the engines' output.
        progress: is told which stage of `STAGES` runs.
    """

    def __init__(self, plan: DecodePlan, folder: Path, progress: Progress) -> None:
        self._plan = plan
        self._folder = folder
        self._engines: dict[str, EngineProcess] = {}
        self._progress = progress
        self._task = progress.add_task("", total=sum(STAGES.values()))
        generator = np.random.default_rng(SEED)
        self._tokens = generator.integers(plan.model.vocab, size=plan.max_model_len).tolist()
        write_model(self._model, plan.model, plan.max_model_len, SEED)

    @classmethod
    @contextmanager
    def in_temporary_folder(cls, plan: DecodePlan, progress: Progress) -> Iterator[Bench]:
        """One that leaves nothing behind."""
        with tempfile.TemporaryDirectory(prefix="packcache-bench-") as folder:
            yield cls(plan, Path(folder), progress)

    @contextmanager
    def engines(self, purpose: str, names: Sequence[str]) -> Iterator[None]:
        """Engines of `DecodePlan.engines`, beside those that live already."""
        with ExitStack() as stack:
            with self._stage(f"starting engines {purpose}"):
                for name in names:
                    self._engines[name] = EngineProcess(name, self._settings(name), self._folder / f"{name}.log")
                    stack.callback(self._close, name)
                for name in names:
                    self._engines[name].answer()
            yield

    def last_frame(self) -> dict[str, Any]:
        """Time the engines of `RATIOS` at three places of the last frame."""
        plan = self._plan
        retention, whole = plan.retention(plan.tokens_per_frame), plan.retention(plan.tokens_per_frame, Full())
        video = plan.options(plan.tokens_per_frame)
        places: dict[str, Any] = {}
        runs: list[Run] = []
        for place, offset in plan.places.items():
            prompt = retention.layout.frame_start(plan.frames - 1) + offset
            live = retention.live_tokens(prompt)
            requests = {
                "full": Request(prompt, whole),
                "short": Request(live, whole),
                "packcache": Request(prompt, retention, video),
                "opt_out": Request(prompt, whole, video | {"packcache_policy": "full"}),
            }
            run = self._side_by_side(f"last frame, {place}", requests, plan.rounds + 1)
            runs.append(run)
            places[place] = {
                "prompt_tokens": prompt,
                "live_tokens": live,
                "warm_up_tokens": plan.burst,
                "timed_tokens": plan.rounds * plan.burst,
                "blocks_at_the_end": {name: run.used_blocks(name)[-1] for name in requests},
                **step_times(run.bursts, RATIOS),
            }
        tokens = {
            name: [token for run in runs for burst in run.bursts[name] for token in burst.tokens]
            for name in ("full", "opt_out")
        }
        return {
            "condition_tokens": plan.condition_tokens,
            "tokens_per_frame": plan.tokens_per_frame,
            "frames": plan.frames,
            "places": places,
            # A step of the whole frame, three times.
            "ratios": ratios_of(summed(list(places.values())), RATIOS),
            "tokens_equal": tokens["opt_out"] == tokens["full"],
            "blocks_as_decided": all(run.blocks_as_decided for run in runs),
        }

    def frames(self) -> dict[str, Any]:
        """Time each policy of `DecodePlan.policies` in the middle of each of `TIMED_FRAMES`.

        A step's time is linear in the number of tokens it reads, so the middle of a frame stands for its mean.
        What all frames take, end to end, is `END_TO_END`.
        """
        plan = self._plan
        retentions = {name: plan.retention(plan.tokens_per_frame, policy) for name, policy in plan.policies.items()}
        video = plan.options(plan.tokens_per_frame)
        frames: list[dict[str, Any]] = []
        for frame in TIMED_FRAMES:
            prompt = retentions["full"].layout.frame_start(frame) + plan.middle_of_frame
            requests = {
                name: Request(prompt, retention, {} if name in STOCK else video)
                for name, retention in retentions.items()
            }
            run = self._side_by_side(f"frame {frame}", requests, plan.frame_rounds + 1)
            frames.append(
                {
                    "frame": frame,
                    "prompt_tokens": prompt,
                    "live_tokens": {name: retention.live_tokens(prompt) for name, retention in retentions.items()},
                    **step_times(run.bursts, FRAME_RATIOS),
                    "blocks_as_decided": run.blocks_as_decided,
                }
            )
        seconds = summed(frames, [plan.tokens_per_frame * count for count in frames_stood_for(TIMED_FRAMES)])
        return {
            "condition_tokens": plan.condition_tokens,
            "tokens_per_frame": plan.tokens_per_frame,
            "policies": {name: described(policy) for name, policy in plan.policies.items()},
            "warm_up_tokens": plan.burst,
            "timed_tokens": plan.frame_rounds * plan.burst,
            "huge_page_kib": self.huge_page_kib(),
            "frames": frames,
            "end_to_end": {"is": END_TO_END} | seconds | {"ratios": ratios_of(seconds, FRAME_RATIOS)},
            "last": {"ratios": frames[-1]["ratios"]},
            "choosing": self._choosing(median(seconds[CPU]["changed"]) / plan.frames),
            "blocks_as_decided": all(frame["blocks_as_decided"] for frame in frames),
        }

    def _choosing(self, frame_seconds: float) -> dict[str, float]:
        """How long the host takes to choose what changed of a whole window, once a frame."""
        layout, seconds = self._plan.retention(self._plan.tokens_per_frame).layout, []
        for _ in range(CHOICES):
            retention = Retention(layout, CHANGED, BLOCK_SIZE, self._ids)
            check_policy(retention, self._plan.frames)
            start = time.process_time()
            retention.past(self._plan.frames)
            seconds.append(time.process_time() - start)
        return {"seconds": median(seconds), "frame_seconds": frame_seconds, "share": median(seconds) / frame_seconds}

    def _ids(self, start: int, stop: int) -> Int64:
        """As a scheduler has them: a list."""
        return np.array(self._tokens[start:stop], dtype=np.int64)

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
        for label, length in lengths.items():
            request = Request(length, plan.retention(plan.tokens_per_frame, Full()))
            run = self._side_by_side(f"control, {label}", dict.fromkeys(STOCK, request), plan.rounds + 1)
            measured[label] = {"prompt_tokens": length} | step_times(run.bursts, {"full / short": STOCK})
        return measured

    def sliding_frame(self) -> dict[str, Any]:
        """Time one whole frame that the window slides for, with positions re-based and absolute.

        The slide is in the first step: it turns the keys of the whole history.
        """
        plan = self._plan
        retention = plan.retention(plan.tokens_per_frame)
        prompt = retention.layout.frame_start(plan.frames - 1)
        request = Request(prompt, retention, plan.options(plan.tokens_per_frame))
        run = self._side_by_side(
            "a frame that slides", dict.fromkeys(POSITIONED, request), *divmod(plan.tokens_per_frame, plan.burst)
        )
        frame: dict[str, Any] = {}
        for clock in CLOCKS:
            steps = {
                name: [step for burst in run.decoded(name) for step in getattr(burst, clock)] for name in POSITIONED
            }
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
            "blocks_as_decided": run.blocks_as_decided,
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
            requests = {engine: Request(prompts[role], retention, options) for role, engine in engine_of.items()}
            run = self._side_by_side(f"{first} and {second} frame", requests, *divmod(tokens_per_frame, plan.burst))
            by_role = {role: run.bursts[engine_of[role]] for role in frames}
            halves.append(step_times(by_role, {"late / early": ("late", "early")}))
            for role, engine in engine_of.items():
                peaks[role].append(max(run.used_blocks(engine)))
                prefill_peaks[role].append(max(run.prefill[engine].used_blocks))
            blocks_as_decided &= run.blocks_as_decided
        return {
            "tokens_per_frame": tokens_per_frame,
            "frames": frames,
            "prompt_tokens": prompts,
            "live_tokens": {role: retention.live_tokens(prompt) for role, prompt in prompts.items()},
            "halves": halves,
            "ratios": {"late / early": joined([half["ratios"]["late / early"] for half in halves])},
            "peak_blocks": {role: max(values) for role, values in peaks.items()},
            "peak_blocks_of_prefill": {role: max(values) for role, values in prefill_peaks.items()},
            "blocks_as_decided": blocks_as_decided,
        }

    def generated(self) -> dict[str, Any]:
        """Generate a video from its condition to the end of the late frame, watching the block pool."""
        plan = self._plan
        tokens_per_frame = plan.generated_tokens_per_frame
        request = Request(plan.condition_tokens, plan.retention(tokens_per_frame), plan.options(tokens_per_frame))
        steps = (plan.late + 1) * tokens_per_frame
        run = self._side_by_side("all frames from the condition on", {"packcache": request}, 0, steps)
        used = run.used_blocks("packcache")
        frames = {"early": plan.early, "late": plan.late}
        return {
            "tokens_per_frame": tokens_per_frame,
            "frames": frames,
            "peak_blocks": {role: max(used[: (frame + 1) * tokens_per_frame]) for role, frame in frames.items()},
            "blocks_as_decided": run.blocks_as_decided,
        }

    def _side_by_side(self, stage: str, requests: Mapping[str, Request], bursts: int, rest: int = 0) -> Run:
        """Prefill all requests at once, decode each in interleaved bursts and then ``rest`` steps, end them.

        Args:
            stage: two of `STAGES`, its prefill and its decoding.
            requests: one an engine.
            bursts: of each.
            rest: steps of each after them.
        """
        plan = self._plan
        engines = {name: self._engines[name] for name in requests}
        with self._stage(f"{stage}: prefill"):
            for name, request in requests.items():
                length = request.prompt_tokens
                engines[name].ask("begin", [self._tokens[:length]], plan.max_model_len - length, request.options)
            prefill = {name: engine.answer() for name, engine in engines.items()}
        with self._stage(f"{stage}: decode"):
            decoded = interleave(engines, bursts, plan.burst)
            left = {name: engine.call("decode", rest) for name, engine in engines.items()}
        for engine in engines.values():
            engine.end()
        return Run(requests, prefill, decoded, left)

    def _settings(self, name: str) -> EngineSettings:
        plan = self._plan
        blocks = -(-(plan.max_model_len + plan.chunk) // BLOCK_SIZE)
        return EngineSettings(
            model=str(self._model),
            dtype=plan.model.dtype,
            block_size=BLOCK_SIZE,
            kv_cache_memory_bytes=blocks * BLOCK_SIZE * plan.model.kv_bytes_per_token,
            max_model_len=plan.max_model_len,
            max_num_batched_tokens=plan.chunk,
            threads=THREADS,
            additional_config=plan.engines[name],
        )

    @property
    def _model(self) -> Path:
        return self._folder / "model"

    def _close(self, name: str) -> None:
        self._engines.pop(name).close()

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        self._progress.update(self._task, description=name)
        yield
        self._progress.advance(self._task, STAGES[name])
