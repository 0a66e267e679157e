"""The runs: engines side by side, requests of the same prompt, bursts of one after the other."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.progress import Progress

from vllm_packcache.bench.decode.plan import (
    BLOCK_SIZE,
    ENGINES,
    LAST_FRAME,
    POSITIONED,
    RATIOS,
    SEED,
    STAGES,
    STOCK,
    THREADS,
    WITH_PLUGIN,
    Plan,
)
from vllm_packcache.bench.decode.samples import CLOCKS, joined, ratios_of, step_times
from vllm_packcache.bench.engine_process import Burst, EngineProcess, EngineSettings, interleave
from vllm_packcache.bench.model import write_model
from vllm_packcache.retention import Retention


class Bench:
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
                **step_times(bursts, RATIOS),
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
            "ratios": ratios_of(whole, RATIOS),
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
                measured[label] = {"prompt_tokens": length} | step_times(bursts, {"full / short": STOCK})
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
            halves.append(step_times(by_role, {"late / early": ("late", "early")}))
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
            "ratios": {"late / early": joined([half["ratios"]["late / early"] for half in halves])},
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
def engines(plan: Plan) -> Iterator[dict[str, EngineProcess]]:
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
