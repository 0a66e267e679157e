"""What `benchmarks.serve` does: two servers, and the videos that they are sent."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np
import psutil
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.progress import Progress

from benchmarks.engine_process import child_environment, engine_environment
from benchmarks.model import write_model
from benchmarks.serve.plan import BLOCK_SIZE, CHUNK, PACKCACHE, POLICIES, SEED, SERVERS, STOCK, THREADS, ServePlan
from vllm_packcache.config.server import REQUEST_PREFIX
from vllm_packcache.serving.server import ServerError, serving, tokens_in

CPU, WALL = CLOCKS = ("engine_cpu_seconds", "seconds")
"""How a load is timed: fields of `Load`."""

HOLDERS = 4
"""Prompts of a chunk each that go ahead of the videos whose room is looked for. While the engine works on them the
videos arrive, and then begin in the same step."""

MODEL_NAME = "video"

PERCENTILES = (50, 90, 99)
FIRST_WATCH_SECONDS, WATCH_SECONDS = 0.05, 0.5
"""Time until the first look at a server's metrics, and the longest between two: a small load is over within that."""

SETTLE_SECONDS = 60
"""How long a server may take to count what it has answered."""

USAGE = "vllm:kv_cache_usage_perc"
GENERATED = "vllm:generation_tokens_total"
UNFINISHED = ("vllm:num_requests_running", "vllm:num_requests_waiting")
PREEMPTIONS, VIDEO_PREEMPTIONS = "vllm:num_preemptions_total", "vllm:packcache_preemptions_total"


@dataclass
class ServedVideo:
    """One request as its client saw it, in seconds after it was sent.

    Attributes:
        arrivals: when each chunk of tokens came.
        sizes: tokens of each chunk.
    """

    arrivals: list[float] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens: a chunk's time divided among its tokens, without the first chunk."""
        return np.repeat(np.diff(self.arrivals) / self.sizes[1:], self.sizes[1:]).tolist()


@dataclass(frozen=True, kw_only=True)
class Load:
    """What came of some videos that were sent at once.

    Args:
        videos: their number.
        seconds: until the last one's last token.
        engine_cpu_seconds: processor time of the engine meanwhile.
        other_cpu_seconds: processor time of the other server, which should be idle.
        tokens: all together.
        preemptions: as the server counted them.
        stopped: it was stopped at the first preemption; there are no latencies then.
        together: whether every video had begun before one ended.
        peak_usage: largest share of the KV pool that was seen in use.
        first_token_seconds: until its first token, of each video.
        video_seconds: until its last token, of each video.
        inter_token_seconds: between two tokens of a video, over all tokens: percentiles and the longest.
    """

    videos: int
    seconds: float
    engine_cpu_seconds: float
    other_cpu_seconds: float
    tokens: int
    preemptions: int
    stopped: bool
    together: bool
    peak_usage: float
    first_token_seconds: list[float]
    video_seconds: list[float]
    inter_token_seconds: dict[str, float]

    @property
    def clean(self) -> bool:
        """Whether the server had room for all of them at once."""
        return self.together and self.preemptions == 0

    def as_mapping(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self) | {
            "tokens_per_second": self.tokens / self.seconds,
            "video_seconds_percentiles": percentiles(self.video_seconds),
        }


def percentiles(samples: Sequence[float]) -> dict[str, float]:
    """p50, p90, p99 and the maximum; empty without samples."""
    if not samples:
        return {}
    values = np.percentile(samples, PERCENTILES).tolist()
    return {f"p{rank}": value for rank, value in zip(PERCENTILES, values, strict=True)} | {"max": max(samples)}


def largest(guess: int, holds: Callable[[int], bool], most: int) -> int:
    """The largest number up to ``most`` that ``holds``, if all smaller ones do; 0: none does.

    It is stepped to from ``guess``, which should be near: every question costs minutes.
    """
    number = min(guess, most)
    if holds(number):
        while number < most and holds(number + 1):
            number += 1
        return number
    while number > 1 and not holds(number - 1):
        number -= 1
    return number - 1


@dataclass(frozen=True)
class Server:
    """A server that is up."""

    url: str
    arguments: list[str]
    log: Path
    process: psutil.Process

    def engine_cpu_seconds(self) -> float:
        """Processor time of the engine so far. The server's own process serves HTTP, its child computes."""
        return _cpu_seconds(self.process.children(recursive=True))

    def cpu_seconds(self) -> float:
        """Processor time of all its processes so far."""
        return _cpu_seconds([self.process, *self.process.children(recursive=True)])


def _cpu_seconds(processes: Sequence[psutil.Process]) -> float:
    times = [process.cpu_times() for process in processes]
    return sum(time.user + time.system for time in times)


@contextmanager
def servers(plan: ServePlan, console: Console) -> Iterator[dict[str, Server]]:
    """Both servers, up, on a model in a temporary folder."""
    with (
        tempfile.TemporaryDirectory(prefix="packcache-bench-") as folder,
        ExitStack() as stack,
        console.status("starting the servers"),
    ):
        model = Path(folder) / "model"
        write_model(model, plan.model, plan.max_model_len, SEED)
        servers = {}
        for name in SERVERS:
            arguments = [
                *("--served-model-name", MODEL_NAME, "--skip-tokenizer-init", "--enforce-eager"),
                *("--dtype", plan.model.dtype, "--seed", str(SEED), "--block-size", str(BLOCK_SIZE)),
                # One is the null block, which nobody holds.
                *("--num-gpu-blocks-override", str(plan.pool_blocks + 1)),
                *("--max-model-len", str(plan.max_model_len), "--max-num-seqs", str(plan.max_videos)),
                *("--max-num-batched-tokens", str(CHUNK)),
                # A worker process beside the engine's would make each spin while it waits for the other.
                *("--distributed-executor-backend", "uni"),
                *(_policy_flags() if name == PACKCACHE else ()),
            ]
            log = Path(folder) / f"{name}.log"
            others = psutil.Process().children()
            with child_environment(engine_environment(THREADS, plugin=name == PACKCACHE)):
                url = stack.enter_context(serving(model, arguments, log, lambda line: None))
            (process,) = set(psutil.Process().children()) - set(others)
            servers[name] = Server(url, arguments, log, process)
        yield servers


def _policy_flags() -> tuple[str, ...]:
    policy = POLICIES[PACKCACHE]
    return "--kv-cache-policy", policy.name, "--kv-cache-policy-config", json.dumps(dataclasses.asdict(policy))


class Bench:
    """The runs, in order. Each sends its videos at once and waits for all of them."""

    def __init__(self, plan: ServePlan, servers: Mapping[str, Server], progress: Progress) -> None:
        self._plan = plan
        self._servers = servers
        self._progress = progress
        self._generator = np.random.default_rng(SEED)

    def warm_up(self) -> None:
        """The first request of a server waits for what is only set up then."""
        prompts = self._prompts(1)
        for name in SERVERS:
            self._send(name, prompts)

    def capacity(self, name: str) -> dict[str, Any]:
        """The most videos that a server has room for, and all loads that were tried to find it."""
        loads: list[Load] = []

        def has_room(videos: int) -> bool:
            ahead = self._prompts(HOLDERS, min(CHUNK, self._plan.max_model_len - 1))
            loads.append(self._send(name, self._prompts(videos), ahead))
            return loads[-1].clean

        videos = largest(self._plan.fitting_videos(name), has_room, self._plan.max_videos)
        return {"videos": videos, "loads": [load.as_mapping() for load in loads]}

    def load(self, videos: int) -> dict[str, Any]:
        """Send the same videos to both servers, round by round, taking turns in being first."""
        rounds: list[dict[str, Load]] = []
        for number in range(self._plan.rounds):
            prompts = self._prompts(videos)
            order = SERVERS if number % 2 == 0 else SERVERS[::-1]
            rounds.append({name: self._send(name, prompts) for name in order})
        ratios = {
            clock: [getattr(own[STOCK], clock) / getattr(own[PACKCACHE], clock) for own in rounds] for clock in CLOCKS
        }
        return {
            "videos": videos,
            "rounds": [{name: load.as_mapping() for name, load in own.items()} for own in rounds],
            "throughput packcache / stock": {
                clock: {"median": median(samples), "samples": samples} for clock, samples in ratios.items()
            },
        }

    def _prompts(self, count: int, length: int | None = None) -> list[list[int]]:
        """Random prompts, as long as a condition by default. All differ: no prefix is to be found in a cache."""
        shape = (count, length or self._plan.condition_tokens)
        return self._generator.integers(self._plan.model.vocab, size=shape).tolist()

    def _send(self, name: str, prompts: list[list[int]], ahead: Sequence[list[int]] = ()) -> Load:
        tokens = len(prompts) * self._plan.generated_tokens
        task = self._progress.add_task(f"{name}, {len(prompts)} at once", total=tokens)

        def tell(received: int) -> None:
            self._progress.advance(task, received)

        server = self._servers[name]
        (other,) = (own for own in self._servers.values() if own is not server)
        load = asyncio.run(_load(server, other, prompts, ahead, self._plan, tell))
        self._progress.remove_task(task)
        return load


async def _load(
    server: Server,
    other: Server,
    prompts: list[list[int]],
    ahead: Sequence[list[int]],
    plan: ServePlan,
    tell: Callable[[int], None],
) -> Load:
    """Send videos, after the prompts that go ``ahead``; with those, only until one is preempted."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=None, limits=limits, trust_env=False) as client:
        before = await _metrics(client)
        videos = [ServedVideo() for _ in prompts]
        engine_cpu, other_cpu = server.engine_cpu_seconds(), other.cpu_seconds()
        start = time.monotonic()
        bodies = [{"model": MODEL_NAME, "prompt": prompt, "max_tokens": 1} for prompt in ahead]
        holders = [asyncio.create_task(client.post("/v1/completions", json=body)) for body in bodies]
        pending = {
            asyncio.create_task(_generate(client, prompt, plan, video, tell))
            for prompt, video in zip(prompts, videos, strict=True)
        }
        usage, stopped, wait = 0.0, False, FIRST_WATCH_SECONDS
        while pending and not stopped:
            done, pending = await asyncio.wait(pending, timeout=wait)
            wait = min(2 * wait, WATCH_SECONDS)
            for task in done:
                task.result()
            now = await _metrics(client)
            usage = max(usage, now[USAGE])
            stopped = bool(holders and pending) and _preemptions(before, now) > 0
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        for response in await asyncio.gather(*holders):
            response.raise_for_status()
        tokens = sum(sum(video.sizes) for video in videos)
        after = await _settled(client, None if stopped else before[GENERATED] + tokens + len(holders))
    ended = [] if stopped else [video.arrivals[-1] for video in videos]
    return Load(
        videos=len(videos),
        seconds=max(ended, default=time.monotonic() - start),
        engine_cpu_seconds=server.engine_cpu_seconds() - engine_cpu,
        other_cpu_seconds=other.cpu_seconds() - other_cpu,
        tokens=tokens,
        preemptions=_preemptions(before, after),
        stopped=stopped,
        together=not stopped and max(video.arrivals[0] for video in videos) <= min(ended),
        peak_usage=usage,
        first_token_seconds=[] if stopped else [video.arrivals[0] for video in videos],
        video_seconds=ended,
        inter_token_seconds={} if stopped else percentiles([gap for video in videos for gap in video.gaps]),
    )


async def _generate(
    client: httpx.AsyncClient, prompt: list[int], plan: ServePlan, video: ServedVideo, tell: Callable[[int], None]
) -> None:
    """Stream one video into ``video``.

    Raises:
        ServerError: the server refused it, gave up on it, or sent another number of tokens than it was asked for.
    """
    body = {
        "model": MODEL_NAME,
        "prompt": prompt,
        "max_tokens": plan.generated_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
        "vllm_xargs": {f"{REQUEST_PREFIX}tokens_per_frame": plan.tokens_per_frame},
    }
    start = time.monotonic()
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != httpx.codes.OK:
            raise ServerError(f"the server refused a video: {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
            received = len(tokens_in(line))
            if received:
                video.arrivals.append(time.monotonic() - start)
                video.sizes.append(received)
                tell(received)
    if sum(video.sizes) != plan.generated_tokens:
        raise ServerError(f"a video of {plan.generated_tokens} tokens came with {sum(video.sizes)}")


async def _metrics(client: httpx.AsyncClient) -> dict[str, float]:
    """The metrics that are looked at, summed over their labels; one that is not there is 0."""
    names = (USAGE, GENERATED, *UNFINISHED, PREEMPTIONS, VIDEO_PREEMPTIONS)
    response = await client.get("/metrics")
    # Parsing all of them would hold up the clock of the tokens that arrive meanwhile.
    lines = [line for line in response.text.splitlines() if line.startswith(names)]
    found: dict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families("\n".join(lines)):
        for sample in family.samples:
            found[sample.name] += sample.value
    return found


async def _settled(client: httpx.AsyncClient, generated: float | None) -> dict[str, float]:
    """Metrics of a server at rest that has counted ``generated`` tokens; None: however many.

    Raises:
        ServerError: it does not come to rest.
    """
    deadline = time.monotonic() + SETTLE_SECONDS
    while time.monotonic() < deadline:
        now = await _metrics(client)
        if not any(now[name] for name in UNFINISHED) and generated in (None, now[GENERATED]):
            return now
        await asyncio.sleep(0.05)
    raise ServerError(f"the server has not come to rest {SETTLE_SECONDS} s after its last answer: {now}")


def _preemptions(before: Mapping[str, float], now: Mapping[str, float]) -> int:
    """Preemptions since ``before``.

    vLLM counts one when the request goes on, the plugin when it happens; in the end they agree.
    """
    return int(max(now[name] - before[name] for name in (PREEMPTIONS, VIDEO_PREEMPTIONS)))
