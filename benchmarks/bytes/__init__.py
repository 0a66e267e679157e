"""What a KV cache of fewer bits adds to a policy: videos at once, at as many bytes.

Real engines of a one-layer model have KV pools of the same size in bytes, one in bfloat16 and one in 8 bits, and both
keep what packcache keeps. Each gets more videos than it has room for, at once; those that run are counted at every step
at which others wait. Nothing is timed.

What 8 bits do to the videos of the bundled model is told by `bench memory --cache` and `bench quality --cache`.
"""

from __future__ import annotations

from benchmarks.options import Quick, Samples


def command(json_path: Samples = None, quick: Quick = False) -> None:
    """Count the videos that run at once in as many bytes of KV cache, in 8 bits and in bfloat16."""
    from benchmarks.bytes.benchmark import BYTES

    BYTES.run(json_path, quick=quick)
