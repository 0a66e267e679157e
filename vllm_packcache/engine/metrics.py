"""What can be watched: the policy's counts, on their way from the scheduler to ``/metrics``.

Scheduler and API server are different processes. With every step vLLM sends its scheduler's statistics from one to
the other; ours travel in them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from prometheus_client import Counter, Gauge
from vllm.config import VllmConfig
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.loggers import AggregateStatLoggerBase, StatLoggerManager
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import Request

from vllm_packcache.config import ServerConfig
from vllm_packcache.engine.manager import PHASES, RetentionManager, record_of, retention_manager, retention_managers

# vLLM removes what is called so when it starts anew in a process.
PREFIX = "vllm:packcache_"

COUNTERS = {
    "freed_blocks": "KV-cache blocks that the policy has freed.",
    "slides": "Frames by which the windows of videos have slid.",
    "rotated_blocks": "KV-cache blocks whose keys have been rotated because a window slid.",
    "preemptions": "Preemptions of video requests.",
}
GAUGES = {
    "resident_tokens": "Tokens of KV cache that running videos hold.",
    "logical_tokens": "Tokens that have been computed of running videos, dropped ones included.",
}
VIDEOS = "videos"

# The one mapping among the statistics that arrives as it was sent and is read by the names of its own entries only.
_CARRIER = "num_kv_fetch_reqs_by_stage"

logger = logging.getLogger("vllm.packcache")


def sending_counts(make_stats: Callable[..., SchedulerStats | None]) -> Callable[..., SchedulerStats | None]:
    """Wrap ``Scheduler.make_stats`` to send our counts along."""

    @wraps(make_stats)
    def wrapper(scheduler: Scheduler, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        stats = make_stats(scheduler, *args, **kwargs)
        managers = retention_managers(scheduler.kv_cache_manager)
        if stats is not None and managers:
            getattr(stats, _CARRIER).update({PREFIX + name: count for name, count in counts(managers).items()})
        return stats

    return wrapper


def counts(managers: Sequence[RetentionManager]) -> dict[str, int]:
    """What the counters have grown by since they were last asked for, and gauges of the videos that hold blocks.

    Blocks are those of all KV cache groups; videos, their tokens and their slides are counted once, by the first.

    Growth, because several API servers may take turns in getting it, and what they count is added up.
    """
    grown = [manager.take_totals() for manager in managers]
    videos = managers[0].videos()
    by_phase = dict.fromkeys(PHASES, 0)
    for video in videos:
        by_phase[video.phase] += 1
    return {
        **{
            name: sum(getattr(own, name) for own in (grown if name.endswith("_blocks") else grown[:1]))
            for name in COUNTERS
        },
        "resident_tokens": sum(
            video.resident_blocks * manager.block_size for manager in managers for video in manager.videos()
        ),
        "logical_tokens": sum(video.computed for video in videos),
        **{f"{VIDEOS}_{phase}": count for phase, count in by_phase.items()},
    }


def publishing_counts(init: Callable[..., None]) -> Callable[..., None]:
    """Wrap ``StatLoggerManager.__init__``: the first logger takes our counts out of what the others get."""

    @wraps(init)
    def wrapper(loggers: StatLoggerManager, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        init(loggers, vllm_config, *args, **kwargs)
        if ServerConfig.from_additional_config(vllm_config.additional_config) is not None:
            loggers.stat_loggers.insert(0, VideoMetrics(vllm_config, loggers.engine_indexes))

    return wrapper


class VideoMetrics(AggregateStatLoggerBase):
    """Our counts as Prometheus metrics, each labelled with model and engine as vLLM's own are."""

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int]) -> None:
        labels = ["model_name", "engine"]
        self._counters = {
            name: Counter(PREFIX + name, documentation, labels) for name, documentation in COUNTERS.items()
        }
        self._gauges = {
            name: Gauge(PREFIX + name, documentation, labels, multiprocess_mode="mostrecent")
            for name, documentation in GAUGES.items()
        }
        self._videos = Gauge(
            PREFIX + VIDEOS,
            "Running video requests by phase: fill (nothing dropped), pack (frames shrink), slide (the oldest go).",
            [*labels, "phase"],
            multiprocess_mode="mostrecent",
        )
        self._model = vllm_config.model_config.served_model_name
        for engine in engine_indexes:
            # All are there from the start: a rate of what does not exist yet would miss its first increase.
            self._publish(dict.fromkeys([*COUNTERS, *GAUGES, *(f"{VIDEOS}_{phase}" for phase in PHASES)], 0), engine)

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Take our counts out of ``scheduler_stats``."""
        del iteration_stats, mm_cache_stats
        if scheduler_stats is None:
            return
        carrier = getattr(scheduler_stats, _CARRIER)
        ours = {name.removeprefix(PREFIX): carrier.pop(name) for name in list(carrier) if name.startswith(PREFIX)}
        if ours:
            self._publish(ours, engine_idx)

    def log_engine_initialized(self) -> None:
        """Nothing is to be said: part of vLLM's interface."""

    def _publish(self, ours: dict[str, int], engine: int) -> None:
        labels = (self._model, str(engine))
        for name, counter in self._counters.items():
            counter.labels(*labels).inc(ours[name])
        for name, gauge in self._gauges.items():
            gauge.labels(*labels).set(ours[name])
        for phase in PHASES:
            self._videos.labels(*labels, phase).set(ours[f"{VIDEOS}_{phase}"])


def counting_preemptions(preempt_request: Callable[..., None]) -> Callable[..., None]:
    """Wrap ``Scheduler._preempt_request`` to count those of videos."""

    @wraps(preempt_request)
    def wrapper(scheduler: Scheduler, request: Request, *args: Any, **kwargs: Any) -> None:
        manager = retention_manager(scheduler.kv_cache_manager)
        if manager is not None and record_of(request) is not None:
            manager.totals.preemptions += 1
        preempt_request(scheduler, request, *args, **kwargs)

    return wrapper


def logging_videos(free_request: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``Scheduler._free_request`` to log a line for every video that ends."""

    @wraps(free_request)
    def wrapper(scheduler: Scheduler, request: Request, *args: Any, **kwargs: Any) -> Any:
        record = record_of(request)
        if record is not None:
            layout, block_size = record.layout, scheduler.block_size
            logger.info(
                "Video %s ended (%s): %d frames, %d logical tokens, at most %d of %d blocks resident, %d blocks freed "
                "by the policy, %d preemptions",
                request.request_id,
                request.get_finished_reason(),
                max(0, request.num_tokens - layout.condition_tokens) // layout.tokens_per_frame,
                request.num_tokens,
                record.peak_blocks,
                -(-request.num_tokens // block_size) * max(1, len(record.held_blocks)),
                record.freed_blocks,
                request.num_preemptions,
            )
        return free_request(scheduler, request, *args, **kwargs)

    return wrapper
