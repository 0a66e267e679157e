"""How many videos a server holds at once with and without packcache, and what they cost it.

Two real servers, stock vLLM and vLLM with packcache, have the same model and KV pools of the same size, and are sent
the same requests over HTTP, one server at a time. A video is asked for from its condition on: every one of its tokens
is decoded.

* Capacity: the most videos that, all sent at once, run together to their end without a preemption. vLLM admits a
  request by the length of its prompt, so a server takes more videos than fit and finds out later. All begin in the
  same step, or nearly, which is the worst case: all are longest at the same time.
* Load: the same videos at once on both servers, more than stock vLLM has room for. It preempts some, which loses their
  cache and recomputes it.

Throughput is judged by the processor time of the engines, which have one thread each and never wait while there is
something to do: other processes on the machine do not count. By the clock it is given as well.
"""

from __future__ import annotations

from typing import Annotated

import typer

from benchmarks.options import Samples


def command(
    json_path: Samples = None,
    frames: Annotated[int, typer.Option(min=2, help="Frames of a video.")] = 13,
    tokens_per_frame: Annotated[int, typer.Option(min=1, help="Tokens of a frame.")] = 257,
    condition_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a video's prompt.")] = 17,
    pool_videos: Annotated[
        int, typer.Option(min=1, help="Size of the KV pool: videos that it holds with their full cache.")
    ] = 4,
    videos: Annotated[int, typer.Option(min=1, help="Videos at once where throughput is compared.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="How often both servers get the load.")] = 2,
) -> None:
    """Count the videos that a server holds at once with and without packcache, and load it with them over HTTP."""
    from benchmarks.serve.benchmark import SERVE
    from benchmarks.serve.plan import ServePlan

    plan = ServePlan(
        condition_tokens=condition_tokens,
        tokens_per_frame=tokens_per_frame,
        frames=frames,
        pool_videos=pool_videos,
        load_videos=videos,
        rounds=rounds,
    )
    SERVE.run(json_path, plan=plan)
