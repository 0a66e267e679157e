"""What `benchmarks.play` does: servers, and the sessions that are played on them."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np
import psutil
from rich.console import Console
from rich.progress import Progress

from benchmarks.engine_process import child_environment, engine_environment
from benchmarks.model import write_model
from benchmarks.play.plan import ACTIONS, BLOCK_SIZE, PACKCACHE, POLICIES, RESET, SEED, STOCK, THREADS, PlayPlan, layout
from vllm_packcache.serving.server import serving

MODEL_NAME = "world"
POSITIONS = 65_536
"""Of the made-up models: no length is refused."""


class Server:
    """A server, and its engine's processor time.

    Args:
        url: of it.
        process: that was started.
    """

    def __init__(self, url: str, process: psutil.Process) -> None:
        self.client = httpx.Client(base_url=url, timeout=600)
        self._process = process

    def cpu_seconds(self) -> float:
        """Processor time of the engine so far."""
        times = [child.cpu_times() for child in self._process.children(recursive=True)]
        return sum(own.user + own.system for own in times)

    def create(self, ids: Sequence[int]) -> str:
        """A new session."""
        answer = self.client.post("/v1/sessions", json={"ids": list(ids), "condition_tokens": len(ids)})
        answer.raise_for_status()
        return answer.json()["id"]

    def step(self, session: str, given: Sequence[int]) -> dict[str, Any]:
        """Its next frame."""
        answer = self.client.post(f"/v1/sessions/{session}/steps", json={"given_ids": list(given)})
        answer.raise_for_status()
        return answer.json()

    def first_token(self, session: str, given: Sequence[int]) -> float:
        """Seconds until the first token of its next frame, which is made whole."""
        began, first = time.perf_counter(), None
        body = {"given_ids": list(given), "stream": True}
        with self.client.stream("POST", f"/v1/sessions/{session}/steps", json=body) as events:
            for _ in events.iter_lines():
                first = first or time.perf_counter()
        assert first is not None
        return first - began


@contextmanager
def server(
    plan: PlayPlan, folder: Path, name: str, own: dict[str, Any], pool_blocks: int, longest: int, slots: int = 16
) -> Iterator[Server]:
    """One server, up.

    Args:
        plan: of the benchmark.
        folder: with the model.
        name: of the policy, or `STOCK`.
        own: the layout of its frames.
        pool_blocks: that requests can hold.
        longest: tokens of a sequence.
        slots: requests at once.
    """
    config = {**POLICIES.get(name, {}), "layout": own, "sessions": {"idle_seconds": 3600.0}}
    arguments = [
        *("--served-model-name", MODEL_NAME, "--skip-tokenizer-init", "--enforce-eager", "--enable-prefix-caching"),
        *("--dtype", plan.model.dtype, "--seed", str(SEED), "--block-size", str(BLOCK_SIZE)),
        *("--num-gpu-blocks-override", str(pool_blocks + 1), "--max-model-len", str(longest)),
        *("--max-num-seqs", str(slots), "--distributed-executor-backend", "uni"),
        *(("--kv-cache-policy", name, "--kv-cache-policy-config", json.dumps(config)) if name != STOCK else ()),
    ]
    others = psutil.Process().children()
    with (
        child_environment(engine_environment(THREADS, plugin=name != STOCK)),
        serving(folder, arguments, folder.parent / f"{name}-{time.monotonic_ns()}.log", lambda line: None) as url,
    ):
        (process,) = set(psutil.Process().children()) - set(others)
        yield Server(url, process)


class Bench:
    """The runs, in order.

    Args:
        plan: sizes.
        console: where progress goes.
        progress: counts frames.
    """

    def __init__(self, plan: PlayPlan, console: Console, progress: Progress) -> None:
        self.plan, self._console, self._progress = plan, console, progress
        self._random = np.random.default_rng(SEED)
        self._layout = layout(*plan.grid)

    @classmethod
    @contextmanager
    def in_temporary_folder(cls, plan: PlayPlan, console: Console, progress: Progress) -> Iterator[Bench]:
        """With a model."""
        with tempfile.TemporaryDirectory(prefix="packcache-bench-") as folder:
            bench = cls(plan, console, progress)
            bench.folder = Path(folder) / "model"
            write_model(bench.folder, plan.model, POSITIONS, SEED)
            yield bench

    folder: Path

    def _picture(self, tokens: int) -> list[int]:
        return self._random.integers(0, 400, tokens).tolist()

    def _action(self) -> list[int]:
        return self._random.integers(400, 500, ACTIONS).tolist()

    def throughput(self) -> dict[str, Any]:
        """Frames a second of several sessions at once, in bursts that take turns."""
        plan = self.plan
        visual = plan.frame - ACTIONS
        prompts = [[*self._picture(visual), *self._action()] for _ in range(plan.sessions)]
        longest = plan.frame * (plan.context + 1)
        with ExitStack() as stack:
            servers = {
                name: stack.enter_context(server(plan, self.folder, name, self._layout, plan.pool_blocks, length))
                for name, length in ((PACKCACHE, plan.frame * 64), (STOCK, longest))
            }
            ours, stock = servers[PACKCACHE], servers[STOCK]
            sessions = [ours.create(prompt) for prompt in prompts]
            began = [False] * plan.sessions
            sequences = [list(prompt) for prompt in prompts]
            task = self._progress.add_task("throughput", total=2 * plan.sessions * plan.burst * (plan.rounds + 1))

            def played(index: int) -> None:
                for _ in range(plan.burst):
                    ours.step(sessions[index], self._given(index) if began[index] else [])
                    began[index] = True
                    self._progress.advance(task)

            def sent_again(index: int) -> None:
                for _ in range(plan.burst):
                    self._one_request(stock, sequences[index], index)
                    self._progress.advance(task)

            rounds = []
            # The first round fills caches, and is not counted.
            for _ in range(plan.rounds + 1):
                own = {}
                for name, work in ((PACKCACHE, played), (STOCK, sent_again)):
                    cpu, wall = servers[name].cpu_seconds(), time.perf_counter()
                    with ThreadPoolExecutor(plan.sessions) as threads:
                        list(threads.map(work, range(plan.sessions)))
                    seconds = time.perf_counter() - wall
                    own[name] = {"seconds": seconds, "cpu_seconds": servers[name].cpu_seconds() - cpu}
                rounds.append(own)
        return {"rounds": rounds[1:], "ratios": self._ratios(rounds[1:])}

    def _given(self, index: int) -> list[int]:
        return [400 + (index * 7 + place) % 100 for place in range(ACTIONS)]

    def _one_request(self, stock: Server, sequence: list[int], index: int) -> None:
        """A frame of stock vLLM's: its prompt sent again; with no room for more it begins anew with half."""
        plan = self.plan
        if len(sequence) >= plan.context * plan.frame:
            del sequence[: len(sequence) - plan.context // 2 * plan.frame]
        visual = plan.frame - ACTIONS
        body = {
            "model": MODEL_NAME, "prompt": sequence, "max_tokens": visual, "ignore_eos": True, "temperature": 1.0,
            "return_token_ids": True, "stream": False,
        }  # fmt: skip
        answer = stock.client.post("/v1/completions", json=body)
        answer.raise_for_status()
        sequence += [*answer.json()["choices"][0]["token_ids"], *self._given(index)]

    @staticmethod
    def _ratios(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
        found = {}
        for clock in ("cpu_seconds", "seconds"):
            samples = [own[STOCK][clock] / own[PACKCACHE][clock] for own in rounds]
            found[clock] = {"median": median(samples), "samples": samples}
        return found

    def late_frames(self) -> dict[str, Any]:
        """Seconds to the first token of late frames and of early ones, in turn."""
        plan, small = self.plan, layout(3, 6)
        frame = 3 * 6 + ACTIONS
        early_frame = 20 if plan.late > 20 else plan.late // 2
        with server(plan, self.folder, PACKCACHE, small, plan.pool_blocks, frame * 64) as own:
            late, early = (own.create(self._picture(frame)) for _ in range(2))
            task = self._progress.add_task("late frames", total=plan.late + early_frame)
            for session, frames in ((late, plan.late - plan.pairs // 2), (early, early_frame - plan.pairs // 2)):
                for number in range(frames):
                    own.step(session, self._action() if number else [])
                    self._progress.advance(task)
            samples = [
                {name: own.first_token(session, self._action()) for name, session in (("late", late), ("early", early))}
                for _ in range(plan.pairs)
            ]
        ratio = median(pair["late"] for pair in samples) / median(pair["early"] for pair in samples)
        return {"frame": plan.late, "early_frame": early_frame, "samples": samples, "ratio": ratio}

    def pauses(self) -> dict[str, Any]:
        """The longest frame of a session and the median one, by policy; of each frame the median of the repeats."""
        plan, found = self.plan, {}
        frame = plan.frame
        with ExitStack() as stack:
            servers = {
                name: stack.enter_context(server(plan, self.folder, name, self._layout, plan.pool_blocks, frame * 64))
                for name in (PACKCACHE, RESET)
            }
            seconds: dict[str, list[list[float]]] = {name: [] for name in servers}
            task = self._progress.add_task("pauses", total=2 * plan.pauses * plan.repeats)
            for _ in range(plan.repeats):
                sessions = {name: own.create(self._picture(frame)) for name, own in servers.items()}
                of_repeat: dict[str, list[float]] = {name: [] for name in servers}
                for number in range(plan.pauses):
                    for name, own in servers.items():
                        made = own.step(sessions[name], self._action() if number else [])
                        of_repeat[name].append(made["seconds"])
                        self._progress.advance(task)
                for name, own in servers.items():
                    seconds[name].append(of_repeat[name])
                    own.client.delete(f"/v1/sessions/{sessions[name]}").raise_for_status()
        for name, repeats in seconds.items():
            # The first frame has its prompt to compute.
            by_frame = [median(own) for own in zip(*repeats, strict=True)][1:]
            found[name] = {"worst / median": max(by_frame) / median(by_frame), "seconds": by_frame}
        return found

    def held(self) -> dict[str, Any]:
        """How many sessions are let in at once, and play, where one video fits whole."""
        plan = self.plan
        rows, columns, actions = plan.held
        frame = rows * columns + actions
        pool = -(-plan.held_frames * frame // BLOCK_SIZE)
        own_layout = layout(rows, columns, actions)
        with server(plan, self.folder, PACKCACHE, own_layout, pool, frame * 64, slots=64) as own:
            sessions = []
            while True:
                ids = self._picture(frame)
                answer = own.client.post("/v1/sessions", json={"ids": ids, "condition_tokens": frame})
                if answer.status_code == 503:
                    break
                answer.raise_for_status()
                sessions.append(answer.json()["id"])
            with ThreadPoolExecutor(len(sessions)) as threads:
                for number in range(2):
                    given = self._random.integers(400, 500, actions).tolist() if number else []
                    made = list(threads.map(lambda session, given=given: own.step(session, given), sessions))
        return {
            "pool_blocks": pool,
            "sessions": len(sessions),
            "resident_tokens": [own["resident_tokens"] for own in made],
        }
