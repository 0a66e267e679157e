"""Random policies and layouts for the property tests, and what a question costs."""

import sys
import tracemalloc
from collections.abc import Callable

from hypothesis import settings
from hypothesis import strategies as st

from vllm_packcache.core import policies
from vllm_packcache.core.layout import FrameLayout, VideoLayout
from vllm_packcache.core.policies import AttentionSink, PackCache, Policy, Reset, SlidingWindow
from vllm_packcache.core.positions import Positions
from vllm_packcache.core.retention import Retention

quick = settings(max_examples=min(60, settings.default.max_examples), deadline=None)
"""Of all property tests; fewer examples with ``--hypothesis-profile few`` (see `conftest`)."""

POLICY_NAMES = policies.names()
BOUNDED = [name for name in POLICY_NAMES if name != "full"]

block_sizes = st.integers(8, 128)
fractions = st.integers(0, 20).map(lambda twentieths: twentieths / 20)


def packcaches(gammas: st.SearchStrategy[float] = fractions) -> st.SearchStrategy[PackCache]:
    return st.builds(
        PackCache,
        history_frames=st.floats(0.05, 8),
        window=st.integers(1, 8),
        decay=st.floats(0.05, 1),
        gamma_text=gammas,
        gamma_condition=gammas,
        selection=st.sampled_from(["spatial", "tail", "random"]),
    )


_OPTIONS = {
    "packcache": packcaches(),
    "sliding_window": st.builds(SlidingWindow, window=st.integers(1, 8)),
    "reset": st.integers(2, 12).flatmap(
        lambda frames: st.builds(Reset, reset_frames=st.just(frames), kept_frames=st.integers(1, frames - 1))
    ),
    "attention_sink": st.builds(AttentionSink, sink_tokens=st.integers(0, 500), recent_tokens=st.integers(1, 3000)),
}


def policies_called(name: str) -> st.SearchStrategy[Policy]:
    """Random valid options; a policy of another package is tried with its defaults."""
    return _OPTIONS.get(name, st.builds(policies.find(name)))


@st.composite
def layouts(draw: st.DrawFn) -> VideoLayout:
    condition = draw(st.integers(0, 400))
    image = draw(st.one_of(st.just(0), st.integers(0, condition)))
    tokens_per_frame = draw(st.one_of(st.integers(1, 16), st.integers(1, 700)))
    return VideoLayout(FrameLayout(tokens_per_frame), condition, image)


def retentions(policy: st.SearchStrategy[Policy]) -> st.SearchStrategy[Retention]:
    return st.builds(Retention, layouts(), policy, block_sizes)


@st.composite
def small_layouts(draw: st.DrawFn) -> VideoLayout:
    """Short enough to write a video of some frames down token by token; no grid."""
    condition = draw(st.integers(0, 40))
    image = draw(st.integers(0, condition))
    return VideoLayout(FrameLayout(draw(st.integers(1, 30))), condition, image)


@st.composite
def grid_layouts(draw: st.DrawFn) -> VideoLayout:
    """The same with a grid, extra tokens, and a conditioning image of whole frames."""
    extra = (draw(st.integers(0, 3)), draw(st.integers(0, 2)), draw(st.integers(0, 2)))
    frame = FrameLayout.from_grid((draw(st.integers(1, 4)), draw(st.integers(1, 5))), *extra)
    image = draw(st.integers(0, 2)) * frame.tokens_per_frame
    return VideoLayout(frame, draw(st.integers(0, 20)) + image, image)


windows = st.integers(1, 5)
# Scales above and below the tokens of a frame: either may decide which position is the highest.
axis_scales = st.tuples(*[st.one_of(st.integers(1, 9), st.integers(1, 90))] * 3)


def one_axis(window: st.SearchStrategy[int | None] = windows) -> st.SearchStrategy[Positions]:
    return st.builds(Positions, small_layouts(), window)


def three_axes(window: st.SearchStrategy[int | None] = windows) -> st.SearchStrategy[Positions]:
    return st.builds(Positions, grid_layouts(), window, axis_scales)


def cost(question: Callable[[], object]) -> tuple[int, int]:
    """Function calls (Python's and C's) and peak bytes of ``question()``."""
    calls = 0

    def count(_frame, event, _argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    tracemalloc.start()
    sys.setprofile(count)
    try:
        question()
    finally:
        sys.setprofile(None)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return calls, peak
