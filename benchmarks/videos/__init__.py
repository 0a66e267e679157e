"""Videos over HTTP, beside what makes the same token ids without them.

One server of the bundled model, engine and API server each a process; it is asked for one thing at a time, in rounds.

================  ============================================================================================
comparison        what it runs
================  ============================================================================================
overhead          a video, and a streamed completion of the same prompt and options, in turn: processor time of the
                  engine and of the API server, of which decoding and storage are told apart
followers         a video while nobody, one or several clients follow its events, in turn
================  ============================================================================================
"""

from __future__ import annotations

from benchmarks.options import Quick, Samples


def command(json_path: Samples = None, quick: Quick = False) -> None:
    """Make videos over HTTP beside completions of the same token ids, and take ratios."""
    from benchmarks.videos.benchmark import VIDEOS

    VIDEOS.run(json_path, quick=quick)
