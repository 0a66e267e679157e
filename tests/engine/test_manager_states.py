"""vLLM's real KV cache manager under random requests, steps, preemptions and aborts.

Every rule is followed by the whole of `Harness.check`: who holds what, who is free, what is hashed, what the
steps in flight still read.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.engine.harness import Harness, Served, prompt, video_options
from vllm_packcache.config.server import REQUEST_PREFIX, ServerConfig

LAGS = st.integers(0, 2)
CONFIGS = [
    ServerConfig.parse(policy, options)
    for policy, options in [
        ("packcache", {"history_frames": 1.0, "window": 2}),
        ("packcache", {"history_frames": 2.5, "window": 3}),
        ("packcache", {"history_frames": 1.5, "window": 3, "gamma_text": 0.5, "gamma_condition": 0.3}),
        ("sliding_window", {"window": 1}),
        ("attention_sink", {"sink_tokens": 4, "recent_tokens": 9}),
        ("full", {}),
        ("packcache", {"history_frames": 1.0, "window": 4, "selection": "changed"}),
        ("packcache", {"history_frames": 1.6, "window": 3, "selection": "changed", "changed_tokens": 2}),
        ("packcache", {"history_frames": 2.5, "window": 3, "selection": "changed", "episodes": 2}),
    ]
]


@st.composite
def requests(draw: st.DrawFn) -> tuple[list[int], dict[str, Any] | None]:
    """Token ids and options: a video, one that opts out, or text. Of two streams: prefixes are shared."""
    length = draw(st.integers(1, 70))
    # Few different ids: where one frame is given after another, much of it stays.
    token_ids = [index * 7919 % 104_729 % 3 for index in prompt(draw(st.integers(0, 1)), length)]
    kind = draw(st.sampled_from(["video", "video", "video", "opted out", "text"]))
    if kind == "text":
        return token_ids, None
    # A condition shorter than the prompt: the rest of it is frames.
    condition = draw(st.none() | st.integers(0, length))
    # From less than a block up; with fewer tokens the oldest frame of a window would be left nothing.
    options = video_options(draw(st.integers(3, 21)), condition)
    if kind == "opted out":
        options[f"{REQUEST_PREFIX}policy"] = "full"
    elif condition:
        options[f"{REQUEST_PREFIX}condition_image_tokens"] = draw(st.integers(0, condition))
    return token_ids, options


class KVCacheManagerStates(RuleBasedStateMachine):
    """Requests come, run, are preempted and go."""

    harness: Harness

    @initialize(
        config=st.sampled_from(CONFIGS),
        enable_caching=st.booleans(),
        num_blocks=st.sampled_from([40, 160]),
        forgets=st.booleans(),
    )
    def start(self, config: ServerConfig, enable_caching: bool, num_blocks: int, forgets: bool) -> None:
        self.harness = Harness(
            config, enable_caching=enable_caching, num_blocks=num_blocks, distinct_ids=3, forgets=forgets
        )

    def _pick(self, index: int, running: bool) -> Served:
        choices = [served for served in self.harness.served.values() if served.running == running]
        return choices[index % len(choices)]

    def _any(self, running: bool) -> bool:
        return any(served.running == running for served in self.harness.served.values())

    @precondition(lambda self: len(self.harness.served) < 5)
    @rule(request=requests(), chunk=st.integers(1, 80))
    def add(self, request: tuple[list[int], dict[str, Any] | None], chunk: int) -> None:
        self._admit(self.harness.add(*request), chunk)

    @precondition(lambda self: self._any(running=False))
    @rule(index=st.integers(0, 4), chunk=st.integers(1, 80))
    def resume(self, index: int, chunk: int) -> None:
        self._admit(self._pick(index, running=False), chunk)

    def _admit(self, served: Served, chunk: int) -> None:
        hit = self.harness.admit(served, chunk)
        if hit and served.retention is not None:
            assert hit <= served.retention.layout.condition_tokens

    @precondition(lambda self: self._any(running=True))
    @rule(index=st.integers(0, 4), chunk=st.integers(1, 80), lag=LAGS)
    def step(self, index: int, chunk: int, lag: int) -> None:
        self._step(self._pick(index, running=True), chunk, lag)

    @precondition(lambda self: self._any(running=True))
    @rule(index=st.integers(0, 4), count=st.integers(2, 45), lag=LAGS)
    def decode(self, index: int, count: int, lag: int) -> None:
        served = self._pick(index, running=True)
        for _ in range(count):
            # One token a step, once the prompt is through: nothing may go wrong between two of them either.
            self._step(served, 1, lag)
            self.harness.check()

    def _step(self, served: Served, chunk: int, lag: int) -> None:
        if served.worker is not None and served.worker.policy.reads_tokens:
            # It takes the ids of the frame before, of which the last are not known more than a step ahead.
            lag = min(lag, 1)
        self.harness.step(served, chunk, lag)

    @precondition(lambda self: self._any(running=True))
    @rule(index=st.integers(0, 4))
    def preempt(self, index: int) -> None:
        self.harness.preempt(self._pick(index, running=True))

    @precondition(lambda self: self.harness.served)
    @rule(index=st.integers(0, 4), finish=st.booleans())
    def end(self, index: int, finish: bool) -> None:
        served = list(self.harness.served.values())[index % len(self.harness.served)]
        while finish and served.in_flight:
            self.harness.process(served)
        self.harness.end(served)

    @invariant()
    def consistent(self) -> None:
        if hasattr(self, "harness"):
            self.harness.check()

    def teardown(self) -> None:
        if hasattr(self, "harness"):
            self.harness.check_empty()


_SETTINGS = settings(
    deadline=None,
    derandomize=True,
    database=None,
    stateful_step_count=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)


class TestStates(KVCacheManagerStates.TestCase):
    settings = settings(_SETTINGS, max_examples=80)


@pytest.mark.long
class TestManyStates(KVCacheManagerStates.TestCase):
    settings = settings(_SETTINGS, max_examples=3000, stateful_step_count=60)
