"""One vLLM engine in a process of its own, driven step by step.

A comparison keeps several engines alive and lets one of them compute at a time, so that whatever else the
machine does hits all of them alike. The engine core runs in the same process: a step is one call, and the
block pool can be looked at after each.
"""

from __future__ import annotations

import gc
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.v1.engine.llm_engine import LLMEngine

Device = Literal["cpu", "cuda"]

LOG_TAIL = 4000
"""Characters of an engine's output that are shown when it fails."""


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """What an engine is made of; the engines of one comparison differ in ``additional_config`` only.

    Args:
        model: folder of the model.
        dtype: of weights and KV cache.
        block_size: tokens of a KV-cache block.
        kv_cache_memory_bytes: size of the KV cache.
        max_model_len: longest sequence.
        max_num_batched_tokens: longest prefill chunk.
        threads: OpenMP threads.
        additional_config: what switches the plugin on. Without it no plugin is loaded at all.
        max_num_seqs: requests of a step.
        load_format: ``dummy`` makes weights up and needs no more than a ``config.json``.
        device: on a GPU the model runner and the CUDA graphs are those that vLLM chooses.
    """

    model: str
    dtype: str
    block_size: int
    kv_cache_memory_bytes: int
    max_model_len: int
    max_num_batched_tokens: int
    threads: int
    additional_config: Mapping[str, Any]
    max_num_seqs: int = 1
    load_format: str = "auto"
    device: Device = "cpu"

    def engine_args(self) -> dict[str, Any]:
        """Arguments of ``vllm.EngineArgs``."""
        # Engines share the GPU: this much of it must be free when one starts; the cache's size is given in bytes.
        of_device = {"enforce_eager": True} if self.device == "cpu" else {"gpu_memory_utilization": 0.01}
        return {
            "model": self.model,
            "skip_tokenizer_init": True,
            "dtype": self.dtype,
            "seed": 0,
            "block_size": self.block_size,
            "kv_cache_memory_bytes": self.kv_cache_memory_bytes,
            "max_model_len": self.max_model_len,
            "max_num_batched_tokens": self.max_num_batched_tokens,
            "max_num_seqs": self.max_num_seqs,
            "load_format": self.load_format,
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
            "additional_config": dict(self.additional_config),
            **of_device,
        }

    def environment(self) -> dict[str, str | None]:
        """Environment variables of the process, None: unset."""
        return engine_environment(self.threads, plugin=bool(self.additional_config), device=self.device)


def engine_environment(threads: int, *, plugin: bool, device: Device = "cpu") -> dict[str, str | None]:
    """Environment variables of an engine that is compared with others, None: unset. Read while vLLM and OpenMP load.

    Args:
        threads: OpenMP threads.
        plugin: whether vLLM loads the plugin.
        device: on a CPU the V1 model runner, on a GPU the one that vLLM chooses.
    """
    return {
        "OMP_NUM_THREADS": str(threads),
        # Threads that spin after their work would take the cores from the engine whose turn it is.
        "OMP_WAIT_POLICY": "PASSIVE",
        # PyTorch asks for huge pages. On small ones two equal engines differ by a tenth for as long as they
        # live, because of where their KV caches happen to lie in physical memory.
        "THP_MEM_ALLOC_ENABLE": "1",
        # No process between the caller and the model; of a server, none between its engine and the model, which on
        # a CPU vLLM allows only with this.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_V2_MODEL_RUNNER": "0" if device == "cpu" else None,
        "VLLM_PLUGINS": "packcache" if plugin else "",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        # It would win over the size that an engine is given.
        "VLLM_CPU_KVCACHE_SPACE": None,
    }


@dataclass(frozen=True)
class Burst:
    """Some steps of an engine.

    Args:
        cpu_seconds: processor time of each step, all threads together.
        wall_seconds: duration of each step; with the last one all work of the burst is done, on a GPU too.
        tokens: what was sampled, of all requests in the order in which it came.
        used_blocks: KV-cache blocks in use after each step.
    """

    cpu_seconds: list[float]
    wall_seconds: list[float]
    tokens: list[int]
    used_blocks: list[int]


class EngineFailed(RuntimeError):
    """An engine's process raised or died, or leaks. The message holds its traceback or the end of its output."""


class EngineProcess:
    """Handle of an engine in its own process. `ask` sends an order, `answer` waits for what came of it.

    Args:
        name: for messages.
        settings: the engine.
        log: file that receives the output of the process.
        engine: what the process makes of the settings and obeys.
    """

    def __init__(self, name: str, settings: EngineSettings, log: Path, engine: type[Engine] | None = None) -> None:
        self.name = name
        self._log = log
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, engine or Engine, settings, str(log)), daemon=True)
        with child_environment(settings.environment()):
            self._process.start()
        theirs.close()

    def ask(self, order: str, *arguments: Any) -> None:
        """Send an order: the name of a method of the process's `Engine` and its arguments."""
        self._connection.send((order, arguments))

    def answer(self) -> Any:
        """The result of the oldest order that has none yet; the first answer of all is that the engine is up.

        Raises:
            EngineFailed: the process raised or died.
        """
        try:
            failure, result = self._connection.recv()
        except EOFError:
            output = self._log.read_text(encoding="utf-8", errors="replace") if self._log.is_file() else ""
            raise EngineFailed(f"engine {self.name!r} died:\n{output[-LOG_TAIL:]}") from None
        if failure is not None:
            raise EngineFailed(f"engine {self.name!r} failed:\n{failure}")
        return result

    def call(self, order: str, *arguments: Any) -> Any:
        """`ask`, then `answer`."""
        self.ask(order, *arguments)
        return self.answer()

    def end(self) -> None:
        """End the requests.

        Raises:
            EngineFailed: the engine holds blocks after it.
        """
        left = self.call("end")
        if left:
            raise EngineFailed(f"engine {self.name!r} holds {left} blocks after all its requests have ended")

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def interleave(engines: Mapping[str, EngineProcess], rounds: int, steps: int) -> dict[str, list[Burst]]:
    """Rounds of one burst of ``steps`` an engine, one computing at a time, each round in another order."""
    names = list(engines)
    bursts: dict[str, list[Burst]] = {name: [] for name in names}
    for number in range(rounds):
        turn = number % len(names)
        for name in (*names[turn:], *names[:turn]):
            bursts[name].append(engines[name].call("decode", steps))
    return bursts


@contextmanager
def child_environment(variables: Mapping[str, str | None]) -> Iterator[None]:
    """Set or unset environment variables for the children that are started meanwhile."""
    before = {name: os.environ.get(name) for name in variables}
    _set_environment(variables)
    try:
        yield
    finally:
        _set_environment(before)


def _set_environment(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _serve(connection: Connection, kind: type[Engine], settings: EngineSettings, log: str) -> None:
    """Body of the process: obey orders until the other end is closed."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(descriptor, stream.fileno())
    try:
        engine = kind(settings)
        connection.send((None, None))
        while True:
            order, arguments = connection.recv()
            connection.send((None, getattr(engine, order)(*arguments)))
    except EOFError:
        return
    except Exception:
        connection.send((traceback.format_exc(), None))


class Engine:
    """What the process obeys: some requests at a time, which begin and end together."""

    def __init__(self, settings: EngineSettings) -> None:
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        self._engine: LLMEngine = LLMEngine.from_engine_args(EngineArgs(**settings.engine_args()))
        self._core = self._engine.engine_core.engine_core
        self._pool = self._core.scheduler.kv_cache_manager.block_pool
        self._free_at_rest = self._pool.get_num_free_blocks()
        self._on_gpu = settings.device == "cuda"
        self._requests = 0
        self._running: list[str] = []
        self._sampled: dict[str, int] = {}
        # What was made so far stays: a full collection in the middle of a burst would walk all of it.
        gc.collect()
        gc.freeze()

    def about(self) -> dict[str, Any]:
        """What vLLM has chosen."""
        config = self._engine.vllm_config
        layers = config.compilation_config.static_forward_context.values()
        return {
            "runner": "V2" if config.use_v2_model_runner else "V1",
            "attention": sorted({layer.attn_backend.get_name() for layer in layers if hasattr(layer, "attn_backend")}),
            "cudagraph_mode": config.compilation_config.cudagraph_mode.name,
            "async_scheduling": config.scheduler_config.async_scheduling,
            "kv_cache_blocks": config.cache_config.num_gpu_blocks,
        }

    def begin(self, prompts: Sequence[Sequence[int]], max_tokens: int, extra_args: dict[str, Any]) -> Burst:
        """Start a request for each of ``prompts`` and prefill them; ends when each has sampled its first token.

        Those that are prefilled first decode while the others are.
        """
        return self.begin_each(prompts, max_tokens, [extra_args] * len(prompts))

    def begin_each(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, extra_args: Sequence[dict[str, Any]]
    ) -> Burst:
        """`begin`, with options of its own for each of ``prompts``."""
        from vllm import SamplingParams

        made = (
            SamplingParams(
                temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, extra_args=own or None
            )
            for own in extra_args
        )
        return self._begin(prompts, list(made))

    def _begin(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> Burst:
        self._running, self._sampled = [], {}
        for prompt, own in zip(prompts, params, strict=True):
            self._requests += 1
            request = str(self._requests)
            self._running.append(self._engine.add_request(request, {"prompt_token_ids": list(prompt)}, own))
            self._sampled[request] = 0
        return self._run(1)

    def decode(self, steps: int) -> Burst:
        """Decode ``steps`` tokens of each request."""
        return self._run(steps)

    def end(self) -> int:
        """Abort the requests; returns the blocks that are still in use: 0 unless there is a leak."""
        self._engine.abort_request(self._running, internal=True)
        # With async scheduling a step of theirs is in flight.
        while self._core.batch_queue:
            self._engine.step()
        return self._used_blocks()

    def huge_page_kib(self) -> int | None:
        """Memory of the process that lies on huge pages; None where the system does not say."""
        rollup = Path("/proc/self/smaps_rollup")
        if rollup.is_file():
            for line in rollup.read_text(encoding="ascii").splitlines():
                if line.startswith("AnonHugePages:"):
                    return int(line.split()[1])
        return None

    def processor_time(self) -> float:
        """Processor time of this process so far, all threads together, in seconds."""
        return time.process_time()

    def _run(self, tokens: int) -> Burst:
        burst = Burst([], [], [], [])
        goal = {request: sampled + tokens for request, sampled in self._sampled.items()}
        while any(self._sampled[request] < goal[request] for request in goal):
            if not self._engine.has_unfinished_requests():
                raise RuntimeError(f"the requests ended before {tokens} more tokens of each: max_tokens is too small")
            wall, cpu = time.perf_counter(), self.processor_time()
            outputs = self._engine.step()
            burst.cpu_seconds.append(self.processor_time() - cpu)
            burst.wall_seconds.append(time.perf_counter() - wall)
            burst.used_blocks.append(self._used_blocks())
            for output in outputs:
                sampled = output.outputs[0].token_ids
                burst.tokens.extend(sampled[self._sampled[output.request_id] :])
                self._sampled[output.request_id] = len(sampled)
        if self._on_gpu:
            burst.wall_seconds[-1] += self._seconds_until_idle()
        return burst

    @staticmethod
    def _seconds_until_idle() -> float:
        """Wait for the step that async scheduling has begun: it is of this burst, as the next one's first is not.

        A burst finds one step in flight, or done, and leaves one: the GPU does as many as the burst has tokens.
        """
        import torch

        start = time.perf_counter()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    def _used_blocks(self) -> int:
        return self._free_at_rest - self._pool.get_num_free_blocks()
