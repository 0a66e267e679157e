"""What can be watched: the policy's counts, on their way from the scheduler to ``/metrics``.

Scheduler and API server are different processes. With every step vLLM sends its scheduler's statistics from one to
the other; ours travel in them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from importlib.metadata import version
from typing import Any

from prometheus_client import Counter, Gauge, Histogram
from vllm.config import VllmConfig
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import FinishReason
from vllm.v1.metrics.loggers import AggregateStatLoggerBase, StatLoggerManager
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import Request

from vllm_packcache.config.server import ServerConfig
from vllm_packcache.engine.manager import RetentionManager, record_of, retention_manager, retention_managers
from vllm_packcache.engine.record import PHASES

# vLLM removes what is called so when it starts anew in a process.
PREFIX = "vllm:packcache_"

COUNTERS = {
    "frames": "Frames of videos that have been made. In a prompt they are given.",
    "freed_blocks": "KV-cache blocks that the policy has freed.",
    "slides": "Frames by which the windows of videos have slid.",
    "rotated_blocks": "KV-cache blocks whose keys have been rotated because a window slid.",
    "preemptions": "Preemptions of video requests.",
}
GAUGES = {
    "resident_tokens": "Tokens of KV cache that running videos hold.",
    "resident_bytes": "Bytes of KV cache that running videos hold, on each worker.",
    "logical_tokens": "Tokens that have been computed of running videos, dropped ones included.",
}
VIDEOS = "videos"
ENDED = "videos_ended"
FRAME_SECONDS = "frame_seconds"
ADMITTED = "admitted"
INFO = "info"
REASONS = tuple(str(reason) for reason in FinishReason)
BUCKETS = tuple(round(base * 10.0**power, 3) for power in range(-2, 4) for base in (1, 2.5, 5))
"""Of seconds a frame: from 10 ms to an hour and more, because a frame of Lumos-1 may take minutes."""

# The one mapping among the statistics that arrives as it was sent and is read by the names of its own entries only.
_CARRIER = "num_kv_fetch_reqs_by_stage"
_BLOCK_BYTES = "_packcache_block_bytes"

logger = logging.getLogger("vllm.packcache")


_listeners: list[Callable[[Sequence[str]], None]] = []


def on_admitted(listener: Callable[[Sequence[str]], None]) -> None:
    """Have this process's front end told of videos that the engine has admitted, by the engine's ids.

    An answer comes with the first token, which of a frame made in passes may be minutes later. Where statistics are
    off nobody is told.

    Args:
        listener: called in the event loop with ids, which may be none.
    """
    _listeners.append(listener)


def send_counts(make_stats: Callable[..., SchedulerStats | None]) -> Callable[..., SchedulerStats | None]:
    """Wrap ``Scheduler.make_stats`` to send our counts along."""

    @wraps(make_stats)
    def wrapper(scheduler: Scheduler, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        stats = make_stats(scheduler, *args, **kwargs)
        managers = retention_managers(scheduler.kv_cache_manager)
        if managers:
            # Taken in any case: where nobody wants statistics nothing may pile up.
            ours = counts(managers, block_bytes(scheduler))
            if stats is not None:
                getattr(stats, _CARRIER).update({PREFIX + name: count for name, count in ours.items()})
        return stats

    return wrapper


def block_bytes(scheduler: Scheduler) -> int:
    """Bytes of a KV-cache block in all layers of a KV cache group: all groups share one pool of such blocks.

    Taken from what is allocated: the spec of a group says how one of its layers stores, and others may do so otherwise.
    """
    known: int | None = getattr(scheduler, _BLOCK_BYTES, None)
    if known is None:
        made = scheduler.kv_cache_config
        # Every one of them has the size of the one allocation that they lie in.
        known = made.kv_cache_tensors[0].size // made.num_blocks
        # It stays, and is asked for in every step.
        setattr(scheduler, _BLOCK_BYTES, known)
    return known


def counts(managers: Sequence[RetentionManager], block_bytes: int) -> dict[str, int]:
    """What the counters have grown by since they were last asked for, if at all, and gauges of videos that hold blocks.

    Blocks are those of all KV cache groups; videos, their tokens and their slides are counted once, by the first.

    Growth, because several API servers may take turns in getting it, and what they count is added up. Numbers are
    whole, as their carrier is typed: frames arrive one by one, with the microseconds that each took.

    Args:
        managers: of all KV cache groups.
        block_bytes: of `block_bytes`.
    """
    running = managers[0].running()
    # What forks have in common is there once.
    saved = sum(manager.shared.saved_blocks for manager in managers if manager.shared is not None)
    blocks = sum([record.held for record in running]) - saved
    phases = [record.phase for record in running]
    gauges = {
        "resident_tokens": blocks * managers[0].block_size,
        "resident_bytes": blocks * block_bytes,
        "logical_tokens": sum([record.logical_tokens for record in running]),
        **{f"{VIDEOS}_{phase}": phases.count(phase) for phase in PHASES},
    }
    if not any(manager.totals for manager in managers):
        return gauges
    grown = [manager.take_totals() for manager in managers]
    return {
        "frames": len(grown[0].frame_seconds),
        "freed_blocks": sum(own.freed_blocks for own in grown),
        "slides": grown[0].slides,
        "rotated_blocks": sum(own.rotated_blocks for own in grown),
        "preemptions": grown[0].preemptions,
        **gauges,
        **{f"{ENDED}_{reason}": grown[0].ended.count(reason) for reason in REASONS},
        **{f"{ADMITTED}_{name}": 1 for name in grown[0].admitted},
        **{f"{FRAME_SECONDS}_{i}": round(seconds * 1e6) for i, seconds in enumerate(grown[0].frame_seconds)},
    }


def publish_counts(init: Callable[..., None]) -> Callable[..., None]:
    """Wrap ``StatLoggerManager.__init__``: the first logger takes our counts out of what the others get."""

    @wraps(init)
    def wrapper(loggers: StatLoggerManager, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        init(loggers, vllm_config, *args, **kwargs)
        config = ServerConfig.from_additional_config(vllm_config.additional_config)
        if config is not None:
            loggers.stat_loggers.insert(0, VideoMetrics(vllm_config, loggers.engine_indexes, config))

    return wrapper


class VideoMetrics(AggregateStatLoggerBase):
    """Our counts as Prometheus metrics, each labelled with model and engine as vLLM's own are."""

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int], config: ServerConfig) -> None:
        labels = ["model_name", "engine"]
        self._counters = {
            name: Counter(PREFIX + name, documentation, labels) for name, documentation in COUNTERS.items()
        }
        self._gauges = {name: _gauge(name, documentation, labels) for name, documentation in GAUGES.items()}
        self._videos = _gauge(
            VIDEOS,
            "Running video requests by phase: fill (nothing dropped), pack (frames shrink), slide (the oldest go).",
            [*labels, "phase"],
        )
        self._ended = Counter(
            PREFIX + ENDED, "Video requests that have ended, by vLLM's reason to end them.", [*labels, "reason"]
        )
        self._frame_seconds = Histogram(
            PREFIX + FRAME_SECONDS,
            "Seconds from the begin of a frame to the begin of the next, waiting after a preemption included.",
            labels,
            buckets=BUCKETS,
        )
        info = _gauge(INFO, "1, for what obeys which policy.", [*labels, "version", "policy", "positions"])
        self._model = vllm_config.model_config.served_model_name
        about = (version("vllm-packcache"), config.name, config.positions)
        for engine in engine_indexes:
            info.labels(self._model, str(engine), *about).set(1)
            # All are there from the start: a rate of what does not exist yet would miss its first increase.
            self._publish({}, engine)

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

    def _publish(self, ours: Mapping[str, int], engine: int) -> None:
        labels = (self._model, str(engine))
        for name, counter in self._counters.items():
            counter.labels(*labels).inc(ours.get(name, 0))
        for name, gauge in self._gauges.items():
            gauge.labels(*labels).set(ours.get(name, 0))
        for phase in PHASES:
            self._videos.labels(*labels, phase).set(ours.get(f"{VIDEOS}_{phase}", 0))
        for reason in REASONS:
            self._ended.labels(*labels, reason).inc(ours.get(f"{ENDED}_{reason}", 0))
        for listener in _listeners:
            listener([name.removeprefix(f"{ADMITTED}_") for name in ours if name.startswith(f"{ADMITTED}_")])
        seconds = self._frame_seconds.labels(*labels)
        for i in range(ours.get("frames", 0)):
            seconds.observe(ours[f"{FRAME_SECONDS}_{i}"] / 1e6)


def _gauge(name: str, documentation: str, labels: list[str]) -> Gauge:
    """A gauge that is, where several API servers take turns, what the last of them was told."""
    return Gauge(PREFIX + name, documentation, labels, multiprocess_mode="mostrecent")


def count_preemptions(preempt_request: Callable[..., None]) -> Callable[..., None]:
    """Wrap ``Scheduler._preempt_request`` to count those of videos."""

    @wraps(preempt_request)
    def wrapper(scheduler: Scheduler, request: Request, *args: Any, **kwargs: Any) -> None:
        manager = retention_manager(scheduler.kv_cache_manager)
        if manager is not None and record_of(request) is not None:
            manager.totals.preemptions += 1
        preempt_request(scheduler, request, *args, **kwargs)

    return wrapper


def log_videos(free_request: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``Scheduler._free_request`` to count every video that ends and to log a line."""

    @wraps(free_request)
    def wrapper(scheduler: Scheduler, request: Request, *args: Any, **kwargs: Any) -> Any:
        record, manager = record_of(request), retention_manager(scheduler.kv_cache_manager)
        if record is not None and manager is not None:
            reason = str(request.get_finished_reason())
            manager.totals.frame_seconds += record.end(request.num_tokens, time.monotonic())
            manager.totals.ended.append(reason)
            logger.info("%s", record.line(request.request_id, reason, request.num_tokens, request.num_preemptions))
        return free_request(scheduler, request, *args, **kwargs)

    return wrapper
