"""World models that are played: sessions, beside what players have without them.

Servers run side by side, each engine with one thread; one is asked at a time, in bursts that take turns.

================  ============================================================================================
comparison        what it runs
================  ============================================================================================
throughput        some sessions with packcache, and stock vLLM with a request a frame that sends its prompt again,
                  both with the same KV pool and with prefix caching
late frames       time to the first token of late and of early frames, two sessions in turn
pauses            the slowest frame of a session, with packcache and with the ``reset`` policy
sessions at once  how many are let in, where one 32-frame video of MineWorld's frames fits whole
================  ============================================================================================
"""

from __future__ import annotations

from benchmarks.options import Quick, Samples


def command(json_path: Samples = None, quick: Quick = False) -> None:
    """Play sessions beside what players have without them, and take ratios."""
    from benchmarks.play.benchmark import PLAY

    PLAY.run(json_path, quick=quick)
