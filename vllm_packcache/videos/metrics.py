"""What can be watched of videos over HTTP: jobs by state, how long they wait, how long a frame takes, bytes kept."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from vllm_packcache.engine.metrics import BUCKETS, PREFIX


class JobMetrics:
    """Metrics of one API server's jobs; gauges are of the store, which the servers of a host share.

    Args:
        model: name that is served.
        registry: that they are published in.
    """

    def __init__(self, model: str, registry: CollectorRegistry = REGISTRY) -> None:
        self._model = model
        self._jobs = _gauge("jobs", "Videos of the store, by state.", ["state"], registry)
        self._bytes = _gauge("jobs_bytes", "Bytes of the files of videos that are kept.", [], registry)
        self._ended = Counter(
            PREFIX + "jobs_ended",
            "Videos that were made or have failed.",
            ["model_name", "state"],
            registry=registry,
        )
        self._queued = _histogram(
            "job_queue_seconds", "Seconds from a request for a video to its first token.", registry
        )
        self._frames = _histogram(
            "job_frame_seconds", "Seconds from a frame of a video to the next, as they arrive.", registry
        )
        self._seconds = _histogram("job_seconds", "Seconds from a request for a video to the finished file.", registry)
        for state in ("completed", "failed"):
            self._ended.labels(model, state).inc(0)

    def began(self, seconds: float) -> None:
        """A video got its first token so long after it was asked for."""
        self._queued.labels(self._model).observe(seconds)

    def frame(self, seconds: float) -> None:
        """A frame came so long after the one before."""
        self._frames.labels(self._model).observe(seconds)

    def ended(self, state: str, seconds: float | None) -> None:
        """A video was made, so long after it was asked for, or has failed."""
        self._ended.labels(self._model, state).inc()
        if seconds is not None:
            self._seconds.labels(self._model).observe(seconds)

    def counted(self, counts: Mapping[str, int]) -> None:
        """What the store has, by `Store.counts`."""
        for name, count in counts.items():
            if name == "bytes":
                self._bytes.labels(self._model).set(count)
            else:
                self._jobs.labels(self._model, name).set(count)


def _gauge(name: str, documentation: str, labels: list[str], registry: CollectorRegistry) -> Gauge:
    return Gauge(
        PREFIX + name, documentation, ["model_name", *labels], multiprocess_mode="mostrecent", registry=registry
    )


def _histogram(name: str, documentation: str, registry: CollectorRegistry) -> Histogram:
    return Histogram(PREFIX + name, documentation, ["model_name"], buckets=BUCKETS, registry=registry)
