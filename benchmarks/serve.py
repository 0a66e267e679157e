"""How many videos a server holds at once with and without packcache, and what they cost it.

Two real servers, stock vLLM and vLLM with packcache, have the same model and KV pools of the same size, and are sent
the same requests over HTTP, one server at a time. A video is asked for from its condition on: every one of its tokens
is decoded.

* Capacity: the most videos that, all sent at once, run together to their end without a preemption. vLLM admits a
  request by the length of its prompt, so a server takes more videos than fit and finds out later. All begin in the
  same step, or nearly, which is the worst case: all are longest at the same time.
* Load: as many videos as packcache has room for, at once, on both servers. Stock vLLM preempts some, which loses their
  cache and recomputes it.

Throughput is judged by the processor time of the engines, which have one thread each and never wait while there is
something to do: other processes on the machine do not count. By the clock it is given as well.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import shlex
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

import httpx
import numpy as np
import psutil
from prometheus_client.parser import text_string_to_metric_families
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.engine_process import child_environment, engine_environment
from benchmarks.model import ModelShape, write_model
from vllm_packcache.config.server import REQUEST_PREFIX
from vllm_packcache.core.layout import FrameLayout, VideoLayout
from vllm_packcache.core.policies import Full, PackCache, Policy
from vllm_packcache.core.retention import Retention
from vllm_packcache.serving.server import ServerError, serving, tokens_in
from vllm_packcache.tools import files
from vllm_packcache.tools.machine import about
from vllm_packcache.tools.progress import counting

SEED = 0
BLOCK_SIZE = 32
CHUNK = 2048
"""Longest prefill chunk."""

THREADS = 1
"""OpenMP threads of each engine: the API server and the client need a core of a small machine."""

CPU, WALL = CLOCKS = ("engine_cpu_seconds", "seconds")
"""How a load is timed: fields of `Load`."""

STOCK, PACKCACHE = SERVERS = ("stock", "packcache")
POLICIES: dict[str, Policy] = {STOCK: Full(), PACKCACHE: PackCache()}

HOLDERS = 4
"""Prompts of a chunk each that go ahead of the videos whose room is looked for. While the engine works on them the
videos arrive, and then begin in the same step."""

MODEL_NAME = "video"

PERCENTILES = (50, 90, 99)
WATCH_SECONDS = 0.5
"""Time between two looks at a server's metrics."""

SETTLE_SECONDS = 60
"""How long a server may take to count what it has answered."""

USAGE = "vllm:kv_cache_usage_perc"
GENERATED = "vllm:generation_tokens_total"
UNFINISHED = ("vllm:num_requests_running", "vllm:num_requests_waiting")
PREEMPTIONS, VIDEO_PREEMPTIONS = "vllm:num_preemptions_total", "vllm:packcache_preemptions_total"

CAPACITY_SHARE = 0.9
"""Of full length / bounded length, which the capacity must grow by."""

THROUGHPUT_RATIO = 3.0

MODEL = ModelShape(layers=2, heads=8, head_size=128, hidden=256, vocab=512, dtype="bfloat16", bytes_per_element=2)
"""That of `benchmarks.decode`."""


@dataclass(frozen=True, kw_only=True)
class ServePlan:
    """Sizes of everything that is run.

    Args:
        model: the model.
        condition_tokens: C, the prompt of every video.
        tokens_per_frame: F.
        frames: T, of every video.
        pool_videos: videos with their full cache that the KV pool has room for, to the block.
        rounds: how often both servers get the load.
    """

    model: ModelShape = MODEL
    condition_tokens: int
    tokens_per_frame: int
    frames: int
    pool_videos: int
    rounds: int

    @property
    def generated_tokens(self) -> int:
        """Of a video."""
        return self.frames * self.tokens_per_frame

    @property
    def max_model_len(self) -> int:
        """A video in whole blocks."""
        return -(-(self.condition_tokens + self.generated_tokens) // BLOCK_SIZE) * BLOCK_SIZE

    @property
    def pool_blocks(self) -> int:
        """KV-cache blocks that requests of either server can hold."""
        return self.pool_videos * self.peak_blocks(STOCK)

    @property
    def max_videos(self) -> int:
        """Videos that a server may run at once: more than it has room for."""
        return 2 * self.fitting_videos(PACKCACHE)

    def held_blocks(self, server: str) -> list[int]:
        """Blocks that one video holds on ``server`` by its policy, while each token after the condition is computed."""
        layout = VideoLayout(FrameLayout(self.tokens_per_frame), self.condition_tokens)
        retention = Retention(layout, POLICIES[server], BLOCK_SIZE)
        # The last token is sampled and never computed.
        return [
            len(segment.past) + token // BLOCK_SIZE + 1 - segment.tail_start
            for segment in retention.segments(self.condition_tokens, layout.frame_start(self.frames) - 1)
            for token in range(segment.start, segment.stop)
        ]

    def peak_blocks(self, server: str) -> int:
        """Most blocks that one video holds on ``server``."""
        return max(self.held_blocks(server))

    def fitting_videos(self, server: str) -> int:
        """Videos of ``server`` that fit into the pool if all are longest at the same time."""
        return self.pool_blocks // self.peak_blocks(server)


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


def run(json_path: Path | None, *, plan: ServePlan, console: Console | None = None) -> dict[str, Any]:
    """Measure, print a table and write what was measured.

    Args:
        json_path: file for the samples and all that is needed to repeat them; None: only the table.
        plan: what is run.
        console: where progress and table go.

    Returns:
        What is written to ``json_path``.

    Raises:
        OSError: a file cannot be written, or a server did not come up or failed.
    """
    console = console or Console()
    files.claim(json_path)
    result: dict[str, Any] = {
        **about("serve", threads_per_engine=THREADS),
        "seed": SEED,
        "model": dataclasses.asdict(plan.model) | {"kv_bytes_per_token": plan.model.kv_bytes_per_token},
        "policy": {"name": POLICIES[PACKCACHE].name} | dataclasses.asdict(POLICIES[PACKCACHE]),
        "video": {
            "condition_tokens": plan.condition_tokens,
            "tokens_per_frame": plan.tokens_per_frame,
            "frames": plan.frames,
        },
        "pool_blocks": plan.pool_blocks,
        "peak_blocks_of_a_video": {name: plan.peak_blocks(name) for name in SERVERS},
        "mean_blocks_of_a_video": {name: fmean(plan.held_blocks(name)) for name in SERVERS},
    }
    start = time.monotonic()
    with _servers(plan, console) as servers, counting(console, "tokens") as progress:
        bench = _Bench(plan, servers, progress)
        result["engine"] = {name: shlex.join(server.arguments) for name, server in servers.items()}
        bench.warm_up()
        result["capacity"] = {name: bench.capacity(name) for name in SERVERS}
        result["load"] = bench.load(result["capacity"][PACKCACHE]["videos"])
    result["seconds"] = time.monotonic() - start
    result["machine"]["load_average_after"] = os.getloadavg()
    result["targets"] = _targets(result)
    if json_path is not None:
        files.write(json_path, result)
    _print(result, console)
    return result


@dataclass(frozen=True)
class _Server:
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
def _servers(plan: ServePlan, console: Console) -> Iterator[dict[str, _Server]]:
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
                *(("--kv-cache-policy", PACKCACHE) if name == PACKCACHE else ()),
            ]
            log = Path(folder) / f"{name}.log"
            others = psutil.Process().children()
            with child_environment(engine_environment(THREADS, plugin=name == PACKCACHE)):
                url = stack.enter_context(serving(model, arguments, log, lambda line: None))
            (process,) = set(psutil.Process().children()) - set(others)
            servers[name] = _Server(url, arguments, log, process)
        yield servers


class _Bench:
    """The runs, in order. Each sends its videos at once and waits for all of them."""

    def __init__(self, plan: ServePlan, servers: Mapping[str, _Server], progress: Progress) -> None:
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
    server: _Server,
    other: _Server,
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
        usage, stopped = 0.0, False
        while pending and not stopped:
            done, pending = await asyncio.wait(pending, timeout=WATCH_SECONDS)
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


def _targets(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every ratio with the bound it must keep, and whether it does."""
    peaks, capacity = result["peak_blocks_of_a_video"], result["capacity"]
    values = (
        (
            "capacity packcache / stock",
            capacity[PACKCACHE]["videos"] / capacity[STOCK]["videos"],
            CAPACITY_SHARE * peaks[STOCK] / peaks[PACKCACHE],
        ),
        (
            "throughput packcache / stock",
            result["load"]["throughput packcache / stock"][CPU]["median"],
            THROUGHPUT_RATIO,
        ),
    )
    return [
        {"ratio": ratio, "value": value, "at_least": bound, "met": value >= bound} for ratio, value, bound in values
    ]


ROWS = (
    ("tokens / s", ("tokens_per_second",), "{:.0f}"),
    ("engine's processor time, s", (CPU,), "{:.1f}"),
    ("preemptions", ("preemptions",), "{:.0f}"),
    ("most of the KV pool in use", ("peak_usage",), "{:.0%}"),
    *((f"whole video, p{rank}, s", ("video_seconds_percentiles", f"p{rank}"), "{:.1f}") for rank in PERCENTILES),
    *((f"between tokens, p{rank}, s", ("inter_token_seconds", f"p{rank}"), "{:.4f}") for rank in PERCENTILES),
    ("between tokens, longest, s", ("inter_token_seconds", "max"), "{:.4f}"),
)
"""Of the table, medians over the rounds: heading, where in a load, format."""


def _found(load: Any, path: Sequence[str]) -> float:
    for key in path:
        load = load[key]
    return load


def _print(result: Mapping[str, Any], console: Console) -> None:
    video = result["video"]
    table = Table(
        title=f"{result['load']['videos']} videos of {video['frames']} frames of {video['tokens_per_frame']} tokens at "
        f"once, KV pool of {result['pool_blocks']} blocks",
        box=SIMPLE_HEAD,
    )
    table.add_column("", no_wrap=True)
    for name in SERVERS:
        table.add_column(name, justify="right")
    for measure, form in (("peak", "{}"), ("mean", "{:.1f}")):
        of_a_video = result[f"{measure}_blocks_of_a_video"]
        table.add_row(f"blocks of a video, {measure}", *(form.format(of_a_video[name]) for name in SERVERS))
    table.add_row("videos without preemption", *(str(result["capacity"][name]["videos"]) for name in SERVERS))
    for heading, path, form in ROWS:
        medians = [median(_found(own[name], path) for own in result["load"]["rounds"]) for name in SERVERS]
        table.add_row(heading, *(form.format(value) for value in medians))
    console.print(table)
    by_clock = result["load"]["throughput packcache / stock"][WALL]["median"]
    console.print(f"throughput is compared by the engines' processor time; by the clock it is {by_clock:.2f}")
    for target in result["targets"]:
        met = "[green]met[/]" if target["met"] else "[red]MISSED[/]"
        console.print(f"{target['ratio']}: {target['value']:.2f}, must be >= {target['at_least']:.2f}: {met}")
