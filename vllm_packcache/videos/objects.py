"""The video object, as clients of the OpenAI dialect know it, with what is more to say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vllm_packcache.videos.store import Event, Job

TERMINAL = ("completed", "failed")


def video_object(job: Job) -> dict[str, Any]:
    """A job as clients see it: the fields of the dialect, those of this server, and what its result says."""
    request = job.request
    own = {
        "id": job.id,
        "object": "video",
        "model": request.get("model"),
        "status": job.status,
        "progress": job.progress,
        "created_at": job.created_at,
        "completed_at": job.completed_at,
        "expires_at": job.expires_at,
        "prompt": request.get("prompt"),
        "size": request.get("size"),
        "seconds": request.get("seconds"),
        "remixed_from_video_id": request.get("remixed_from"),
        "error": job.error,
        "extended_from_video_id": request.get("extended_from"),
        "started_at": None if job.started_at is None else int(job.started_at),
        "fps": request.get("fps"),
        "frames": request.get("frames"),
        "options": request.get("options"),
        "notes": request.get("notes", []),
        "tokens": job.tokens,
        "total_tokens": job.total_tokens,
        "bytes": job.bytes,
    }
    # Whatever a result is called, it is not taken for what the dialect says.
    return {**job.result, **own}


def as_it_was(job: Job, event: Event) -> Job:
    """A job at the time of an event ``status``, which a late client sees after its end.

    Otherwise a client that stops at a video that is there would miss all of its frames.
    """
    status = event.data["status"]
    return replace(
        job,
        status=status,
        started_at=None if status == "queued" else job.started_at,
        tokens=0,
        bytes=0,
        completed_at=None,
        expires_at=None,
        result={},
        error=None,
    )
