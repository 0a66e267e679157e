"""What is compared: policies and their ablations, each a configuration, at equal live tokens.

The yardstick is packcache with its default budget, H frames of history. A variant of the same budget reads as many
tokens of the past when a frame begins, to the block; what each really reads is part of the results.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_packcache.config import ConfigError, ServerConfig, VideoPlan, load_mapping
from vllm_packcache.demo.tokenizer import CONDITION_TOKENS, FRAME_TOKENS
from vllm_packcache.layout import VideoLayout
from vllm_packcache.policies import PackCache
from vllm_packcache.retention import Retention

BLOCK_SIZE = 16
"""Tokens of a KV-cache block: vLLM's default on a GPU."""

FULL_CACHE, PACKCACHE = "full cache", "packcache"
LAST_FRAME, LAST_FRAME_ABSOLUTE = "last frame", "last frame, absolute"

BUDGETS = (0.5, 1, 2, 4, 8)
"""H of the frontier, in frames; beyond them is the full cache."""

LAYOUT = load_mapping("demo")["layout"]
"""The bundled model's."""

DEFAULT_BUDGET = PackCache().history_frames


@dataclass(frozen=True)
class Variant:
    """One way to keep the past.

    Args:
        name: in tables and plots.
        policy: name of the policy.
        options: of the policy, and ``positions``.
        family: the curve of the frontier that it is a point of; None: of none.
        budget: H, frames of history that it may keep; None: all.
        lengths: how long its videos are, in lengths of those that the model was trained on: a long video takes hours on
            a CPU, so only those that the goals are about have them.
    """

    name: str
    policy: str
    options: Mapping[str, Any]
    family: str | None = None
    budget: float | None = DEFAULT_BUDGET
    lengths: int = 1

    @property
    def server(self) -> ServerConfig:
        """Its configuration, with the bundled model's layout."""
        return ServerConfig.parse(self.policy, {"layout": LAYOUT, **self.options})

    @property
    def plan(self) -> VideoPlan:
        """What a video of the bundled model keeps."""
        server = self.server
        assert server.layout is not None
        layout = VideoLayout(server.layout.frame_layout(), CONDITION_TOKENS, server.layout.condition_image_tokens)
        return VideoPlan(layout, server.policy, server.positions_of(layout, server.policy))

    def live_tokens(self, frame: int) -> int:
        """Tokens of the past that are read when ``frame`` begins."""
        plan = self.plan
        return Retention(plan.layout, plan.policy, BLOCK_SIZE).live_tokens(plan.layout.frame_start(frame))


def _packcache(budget: float, **options: Any) -> dict[str, Any]:
    """Options for a budget: a window as many times as long as the default's, and no shorter than that."""
    default = PackCache()
    most = max(default.window, int(budget * default.window / default.history_frames))
    # Of a long window the oldest frames may be left nothing, which is refused.
    window = max(w for w in range(1, most + 1) if _accepted({"history_frames": budget, "window": w, **options}))
    return {"history_frames": budget, "window": window, **options}


def _accepted(options: Mapping[str, Any]) -> bool:
    try:
        ServerConfig.parse("packcache", {"layout": LAYOUT, **options})
    except ConfigError:
        return False
    return True


def packcache(budget: float) -> Variant:
    """The policy itself."""
    return Variant(PACKCACHE, "packcache", _packcache(budget), PACKCACHE, budget, lengths=4)


def last_frames(budget: int) -> Variant:
    """The paper's other baseline: as many whole frames, positions re-based."""
    name = LAST_FRAME if budget == 1 else f"last {budget} frames"
    options = {"window": budget, "positions": "rebase"}
    return Variant(name, "sliding_window", options, "last frames", budget, lengths=4 if budget == 1 else 2)


def attention_sink(budget: float) -> Variant:
    """The first block, and as many recent tokens as make up for the rest of the condition."""
    recent = CONDITION_TOKENS + round(budget * FRAME_TOKENS) - BLOCK_SIZE
    options = {"sink_tokens": BLOCK_SIZE, "recent_tokens": recent}
    return Variant("attention sink", "attention_sink", options, "attention sink", budget)


def random_blocks(budget: float) -> Variant:
    """The same number of blocks of every frame of the window, drawn by lot."""
    options = _packcache(budget, decay=1, selection="random")
    return Variant("random blocks", "packcache", options, "random blocks", budget)


def strided_blocks(budget: float) -> Variant:
    """The same number of blocks of every frame of the window, evenly spread."""
    return Variant("strided blocks", "packcache", _packcache(budget, decay=1), "strided blocks", budget)


FULL = Variant(FULL_CACHE, "full", {}, FULL_CACHE, None)

COMPARED = (
    packcache(DEFAULT_BUDGET),
    Variant("packcache, absolute", "packcache", _packcache(DEFAULT_BUDGET, positions="absolute")),
    # What the condition would take goes to the history; rounding up to blocks takes the last of it.
    Variant(
        "packcache, not anchored",
        "packcache",
        {
            "history_frames": DEFAULT_BUDGET + (CONDITION_TOKENS - BLOCK_SIZE) / FRAME_TOKENS,
            "gamma_text": 0,
            "gamma_condition": 0,
        },
    ),
    last_frames(int(DEFAULT_BUDGET)),
    last_frames(1),
    Variant(LAST_FRAME_ABSOLUTE, "sliding_window", {"window": 1, "positions": "absolute"}, budget=1, lengths=4),
    attention_sink(DEFAULT_BUDGET),
    random_blocks(DEFAULT_BUDGET),
    strided_blocks(DEFAULT_BUDGET),
)
"""Policies and ablations; the full cache comes besides."""

SELECTIONS = tuple(
    Variant(f"packcache, {selection}", "packcache", _packcache(DEFAULT_BUDGET, selection=selection))
    for selection in ("rows", "tail", "random")
)
"""Other blocks of each frame; ``spatial`` is packcache itself."""

FRONTIER = tuple(
    variant
    for budget in BUDGETS
    for variant in (
        packcache(budget),
        *([last_frames(int(budget))] if budget >= 1 else []),
        attention_sink(budget),
        random_blocks(budget),
        strided_blocks(budget),
    )
)
"""The points of the frontier, without the full cache's."""
