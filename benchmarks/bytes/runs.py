"""What `benchmarks.bytes` does: an engine after the other, each with more videos than it has room for."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
from rich.progress import Progress

from benchmarks.bytes.plan import BASE, CASES, SEED, THREADS, BytesPlan, Case, additional_config
from benchmarks.engine_process import Engine, EngineProcess, EngineSettings
from benchmarks.model import write_model
from vllm_packcache.tools import interpreted


@dataclass(frozen=True, kw_only=True)
class PoolSettings(EngineSettings):
    """What an engine is made of.

    Args:
        case: backend and runner.
        cache: format of its cache; `BASE`: the model's.
    """

    case: Case
    cache: str

    def engine_args(self) -> dict[str, Any]:
        """See `EngineSettings.engine_args`."""
        cache = {} if self.cache == BASE else {"kv_cache_dtype": self.cache}
        return super().engine_args() | cache | {"enable_prefix_caching": False}

    def environment(self) -> dict[str, str | None]:
        """See `EngineSettings.environment`."""
        return super().environment() | {"VLLM_USE_V2_MODEL_RUNNER": str(int(self.case.runner == "V2"))}


class PoolEngine(Engine):
    """What the process obeys: an engine that is given a queue."""

    def __init__(self, settings: PoolSettings) -> None:
        if settings.case.runner == "V2":
            interpreted.prepare()
            _attend_with(settings.case.backend)
        super().__init__(settings)

    def serve(self, prompts: Sequence[Sequence[int]], max_tokens: int, options: dict[str, Any]) -> dict[str, Any]:
        """Run videos that all come at once to their end; what was seen at each step that left some waiting.

        Returns:
            ``running`` by step, the most of ``used_blocks``, ``preemptions``, ``ended``.
        """
        from vllm import SamplingParams

        scheduler = self._core.scheduler
        for number, prompt in enumerate(prompts):
            said = SamplingParams(
                temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, extra_args=options
            )
            self._engine.add_request(str(number), {"prompt_token_ids": list(prompt)}, said)
        running, used, ended = list[int](), list[int](), 0
        requests = list(scheduler.requests.values())
        schedule = scheduler.schedule

        def counted(*arguments: Any, **options: Any) -> Any:
            step = schedule(*arguments, **options)
            if scheduler.waiting:
                running.append(len(scheduler.running))
                used.append(self._used_blocks())
            return step

        scheduler.schedule = counted
        while self._engine.has_unfinished_requests():
            ended += sum(output.finished for output in self._engine.step())
        preempted = sum(own.num_preemptions for own in requests)
        return {"running": running, "used_blocks": max(used), "preemptions": preempted, "ended": ended}


def _attend_with(backend: str) -> None:
    """On a CPU vLLM offers its own backend only; Triton's can be interpreted."""
    import torch
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.ops.triton_reshape_and_cache_flash import triton_reshape_and_cache_flash

    path = AttentionBackendEnum[backend].get_path()
    CpuPlatform.get_attn_backend_cls = classmethod(lambda cls, *args, **kwargs: path)
    # The kernel that writes to the cache asks, to choose how many numbers a program writes.
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    # The same in C++ is not in CPU builds.
    vars(torch.ops._C_cache_ops)["reshape_and_cache_flash"] = triton_reshape_and_cache_flash


def compare(plan: BytesPlan, name: str, progress: Progress) -> dict[str, Any]:
    """The engines of a case, one after the other."""
    case = CASES[name]
    generator = np.random.default_rng(SEED)
    prompts = generator.integers(plan.model.vocab, size=(plan.videos, plan.prompt_tokens)).tolist()
    pool_bytes = plan.pool_bytes(case.block_size)
    found: dict[str, Any] = {"case": asdict(case), "pool_bytes": pool_bytes, "engines": {}}
    task = progress.add_task(name, total=2)
    with tempfile.TemporaryDirectory(prefix="packcache-bench-") as folder:
        model = Path(folder) / "model"
        write_model(model, plan.model, plan.max_model_len, SEED)
        for cache in (BASE, case.cache):
            settings = PoolSettings(
                model=str(model),
                dtype=plan.model.dtype,
                block_size=case.block_size,
                kv_cache_memory_bytes=pool_bytes,
                max_model_len=plan.max_model_len,
                max_num_batched_tokens=2048,
                max_num_seqs=plan.videos,
                threads=THREADS,
                additional_config=additional_config(),
                case=case,
                cache=cache,
            )
            engine = EngineProcess(cache, settings, Path(folder) / f"{cache}.log", PoolEngine)
            try:
                engine.answer()
                about = engine.call("about")
                served = engine.call("serve", prompts, plan.made_tokens, plan.options)
            finally:
                engine.close()
            found["engines"][cache] = {
                "about": about,
                # Some are let in who are preempted as they grow: the median is what the pool has room for.
                "at_once": median(served["running"]),
                "mean_at_once": fmean(served["running"]),
                "most_at_once": max(served["running"]),
                **served,
            }
            progress.advance(task)
    return found
