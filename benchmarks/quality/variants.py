"""What is compared: policies and their ablations, each a configuration, at equal live tokens.

The yardstick is packcache with its default budget, H frames of history. A variant of the same budget reads as many
tokens of the past when a frame begins, to the block; what each really reads is part of the results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from benchmarks.formats import FLOAT32
from vllm_packcache.config.errors import ConfigError, shown
from vllm_packcache.config.guidance import MAX_GUIDANCE
from vllm_packcache.config.precision import PRECISION_KEY, PrecisionConfig
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.config.sources import load_mapping
from vllm_packcache.core.layout import VideoLayout
from vllm_packcache.core.plan import Plan
from vllm_packcache.core.policies import PAPER, PackCache
from vllm_packcache.core.retention import Retention, some_tokens

BLOCK_SIZE = 16
"""Tokens of a KV-cache block: vLLM's default on a GPU."""

FULL_CACHE, PACKCACHE, CHANGED = "full cache", "packcache", "changed"
LAST_FRAME, LAST_FRAME_ABSOLUTE = "last frame", "last frame, absolute"

SELECTIONS = ("rows", "tail", "random")
"""Of blocks inside a frame, besides packcache's own."""

BUDGETS = (0.5, 1, 2, 4, 8)
"""H of the frontier, in frames; beyond them is the full cache."""

DEFAULT_BUDGET = PackCache.history_frames

AS_WRITTEN = PrecisionConfig().history
"""Of a history that is not encoded."""


@dataclass(frozen=True)
class Shape:
    """What the videos of a model are like.

    Args:
        preset: name of the preset that has their layout.
        condition_tokens: C, of a usual prompt.
        sink_tokens: of an attention sink.
    """

    preset: str
    condition_tokens: int
    sink_tokens: int = BLOCK_SIZE

    @cached_property
    def layout(self) -> Mapping[str, Any]:
        """The preset's."""
        return load_mapping(self.preset)["layout"]

    @cached_property
    def frame_tokens(self) -> int:
        """F."""
        layout = ServerConfig.parse("full", {"layout": self.layout}).layout
        assert layout is not None
        return layout.frame_layout().tokens_per_frame

    def accepts(self, options: Mapping[str, Any]) -> bool:
        """Whether packcache can have these options."""
        try:
            ServerConfig.parse("packcache", {"layout": self.layout, **options})
        except ConfigError:
            return False
        return True


@dataclass(frozen=True)
class Variant:
    """One way to keep the past.

    Args:
        shape: of the videos.
        name: in tables and plots.
        policy: name of the policy.
        options: of the policy, and ``positions``.
        family: the curve of the frontier that it is a point of; None: of none.
        budget: H, frames of history that it may keep; None: all.
        lengths: how long its videos are, in lengths of those that the model was trained on: a long video takes hours on
            a CPU, so only those that the goals are about have them.
        scale: of guidance; 1: none.
        cache: name of the format that keys and values are kept in.
        history: name of the one that older frames are kept in.
        made: how frames are made in passes, as far as it is not what the generator says.
    """

    shape: Shape
    name: str
    policy: str
    options: Mapping[str, Any]
    family: str | None = None
    budget: float | None = DEFAULT_BUDGET
    lengths: int = 1
    scale: float = 1
    cache: str = FLOAT32.name
    history: str = AS_WRITTEN
    made: Mapping[str, Any] = field(default_factory=dict)

    def guided(self, scale: float) -> Variant:
        """The same policy, which both streams of a video have; itself for a scale of 1."""
        return replace(self, name=under(self.name, scale), scale=float(scale))

    @property
    def server(self) -> ServerConfig:
        """Its configuration, with the layout of the videos."""
        precision = {} if self.history == AS_WRITTEN else {PRECISION_KEY: {"history": self.history}}
        return ServerConfig.parse(self.policy, {"layout": self.shape.layout, **self.options, **precision})

    def plan(self, condition_tokens: int | None = None) -> Plan:
        """What a video keeps whose condition has so many tokens; None: as many as is usual."""
        server = self.server
        assert server.layout is not None
        condition = self.shape.condition_tokens if condition_tokens is None else condition_tokens
        layout = VideoLayout(server.layout.frame_layout(), condition, server.layout.condition_image_tokens)
        return Plan(layout, server.policy, server.positions_of(layout, server.policy))

    def live_tokens(self, frame: int) -> int:
        """Tokens of the past that are read when ``frame`` of a usual video begins."""
        plan = self.plan()
        retention = Retention(plan.layout, plan.policy, BLOCK_SIZE, some_tokens)
        return retention.live_tokens(plan.layout.frame_start(frame))


def under(name: str, scale: float) -> str:
    """What a variant is called under a scale of guidance; 1: none."""
    return name if scale == 1 else f"{name}, guidance {scale:g}"


@dataclass(frozen=True)
class Variants:
    """Everything that is compared.

    Args:
        full: the full cache, or what is first.
        compared: policies and ablations; the full cache comes besides.
        selections: other blocks of each frame; ``spatial`` is packcache itself.
        frontier: points of quality against live tokens, without the full cache's.
    """

    full: Variant
    compared: tuple[Variant, ...]
    selections: tuple[Variant, ...] = ()
    frontier: tuple[Variant, ...] = ()

    def beside(self, policies: Sequence[str]) -> Variants:
        """The same, with policies of these names as they are where nobody gives them options.

        Raises:
            ConfigError: there is none of such a name, or it is compared anyway.
        """
        known = {variant.name for variant in self.named}
        others = []
        for name in policies:
            if name in known:
                raise ConfigError(f"--policy: {shown(name)} is compared already, leave it out")
            known.add(name)
            variant = Variant(self.full.shape, name, name, {}, budget=None)
            # What is wrong with it is known before hours have passed.
            variant.live_tokens(0)
            others.append(variant)
        return replace(self, compared=(*self.compared, *others))

    def guided(self, scales: Sequence[float]) -> Variants:
        """The same, and each besides under each of these scales of guidance.

        Raises:
            ConfigError: a scale is none, or is there twice.
        """
        others: dict[str, Variant] = {}
        for scale in scales:
            if not 0 < scale <= MAX_GUIDANCE or float(f"{scale:g}") != scale:
                raise ConfigError(
                    f"--guidance must be above 0, at most {MAX_GUIDANCE:g}, and of no more than six digits, not {scale}"
                )
            if scale == 1:
                raise ConfigError("--guidance: 1 is no guidance, which is compared anyway, leave it out")
            own = {variant.name: variant for variant in (old.guided(scale) for old in self.named)}
            if own.keys() & others.keys():
                raise ConfigError(f"--guidance: {scale:g} is given twice, leave one out")
            others |= own
        return replace(self, compared=(*self.compared, *others.values()))

    @property
    def named(self) -> tuple[Variant, ...]:
        """All but the frontier's, each with a name of its own."""
        return (self.full, *self.compared, *self.selections)


@dataclass(frozen=True)
class _Make:
    """Variants of videos of one shape."""

    shape: Shape

    def variant(self, name: str, policy: str, options: Mapping[str, Any], *args: Any, **kwargs: Any) -> Variant:
        return Variant(self.shape, name, policy, options, *args, **kwargs)

    def options(self, budget: float, **options: Any) -> dict[str, Any]:
        """Of the paper's rule: a window as many times as long as `PAPER`'s, and no shorter than that."""
        most = max(PAPER.window, int(budget * PAPER.window / PAPER.history_frames))
        # Of a long window the oldest frames may be left nothing, which is refused.
        own = {"selection": PAPER.selection, **options}
        choices = ({"history_frames": budget, "window": window, **own} for window in range(most, 0, -1))
        return next(filter(self.shape.accepts, choices))

    def packcache(self, budget: float) -> Variant:
        """The paper's rule."""
        return self.variant(PACKCACHE, "packcache", self.options(budget), PACKCACHE, budget, lengths=4)

    def changed(self, budget: float) -> Variant:
        """The default: what changed first."""
        options = {"history_frames": budget, "window": PackCache.window, "selection": "changed"}
        return self.variant(CHANGED, "packcache", options, CHANGED, budget, lengths=4)

    def last_frame_and_others(self) -> Variant:
        """The same budget of every frame, with blocks spread evenly: no block changes as much as that."""
        options = {**self.changed(DEFAULT_BUDGET).options, "changed_tokens": BLOCK_SIZE, "decay": 1}
        return self.variant("last frame, evenly", "packcache", options)

    def absolute(self) -> Variant:
        return self.variant("packcache, absolute", "packcache", self.options(DEFAULT_BUDGET, positions="absolute"))

    def not_anchored(self) -> Variant:
        """Of the condition only the first block, which an attention sink has too: what it would take is history.

        That is rounded up to a block once more than the others.
        """
        more = (self.shape.condition_tokens - BLOCK_SIZE) / self.shape.frame_tokens
        options = {
            **self.options(DEFAULT_BUDGET, gamma_text=0.5, gamma_condition=0),
            "history_frames": DEFAULT_BUDGET + more,
        }
        return self.variant("packcache, not anchored", "packcache", options)

    def last_frames(self, budget: int) -> Variant:
        """The paper's other baseline: as many whole frames, positions re-based."""
        name = LAST_FRAME if budget == 1 else f"last {budget} frames"
        options = {"window": budget, "positions": "rebase"}
        return self.variant(name, "sliding_window", options, "last frames", budget, lengths=4 if budget == 1 else 2)

    def last_frame_absolute(self) -> Variant:
        options = {"window": 1, "positions": "absolute"}
        return self.variant(LAST_FRAME_ABSOLUTE, "sliding_window", options, budget=1, lengths=4)

    def attention_sink(self, budget: float) -> Variant:
        """The first tokens, and as many recent ones as make up for the rest of the condition."""
        recent = self.shape.condition_tokens + round(budget * self.shape.frame_tokens) - self.shape.sink_tokens
        options = {"sink_tokens": self.shape.sink_tokens, "recent_tokens": recent}
        return self.variant("attention sink", "attention_sink", options, "attention sink", budget)

    def random_blocks(self, budget: float) -> Variant:
        """The same number of blocks of every frame of the window, drawn by lot."""
        options = self.options(budget, decay=1, selection="random")
        return self.variant("random blocks", "packcache", options, "random blocks", budget)

    def strided_blocks(self, budget: float) -> Variant:
        """The same number of blocks of every frame of the window, evenly spread."""
        options = self.options(budget, decay=1)
        return self.variant("strided blocks", "packcache", options, "strided blocks", budget)

    def selected(self, selection: str) -> Variant:
        options = self.options(DEFAULT_BUDGET, selection=selection)
        return self.variant(f"packcache, {selection}", "packcache", options)

    def full(self) -> Variant:
        return self.variant(FULL_CACHE, "full", {}, FULL_CACHE, None, lengths=4)


def all_variants(shape: Shape) -> Variants:
    """Policies, ablations, selections and the frontier."""
    make = _Make(shape)
    compared = (
        make.packcache(DEFAULT_BUDGET),
        make.changed(DEFAULT_BUDGET),
        make.last_frame_and_others(),
        make.absolute(),
        make.not_anchored(),
        make.last_frames(int(DEFAULT_BUDGET)),
        make.last_frames(1),
        make.last_frame_absolute(),
        make.attention_sink(DEFAULT_BUDGET),
        make.random_blocks(DEFAULT_BUDGET),
        make.strided_blocks(DEFAULT_BUDGET),
    )
    frontier = tuple(
        variant
        for budget in BUDGETS
        for variant in (
            make.packcache(budget),
            *([make.changed(budget), make.last_frames(int(budget))] if budget >= 1 else []),
            make.attention_sink(budget),
            make.random_blocks(budget),
            make.strided_blocks(budget),
        )
    )
    return Variants(make.full(), compared, tuple(map(make.selected, SELECTIONS)), frontier)


def yardsticks(shape: Shape) -> Variants:
    """The rule of the paper and the default, beside the full cache."""
    make = _Make(shape)
    return Variants(make.full(), (make.packcache(DEFAULT_BUDGET), make.changed(DEFAULT_BUDGET)))


def of_any_budget(shape: Shape) -> tuple[Callable[[float], Variant], ...]:
    """The rule of the paper and the default, of so many frames of history."""
    make = _Make(shape)
    return make.packcache, make.changed


def whole_frames(shape: Shape) -> tuple[Variant, Callable[[int], Variant]]:
    """The full cache, and so many last frames, whole."""
    make = _Make(shape)
    return replace(make.full(), lengths=1), lambda budget: replace(make.last_frames(budget), lengths=1)


def in_passes(
    shape: Shape, whole: Sequence[int], fewer: Sequence[int], less: Mapping[int, Sequence[_Made]]
) -> Variants:
    """The default policy, with frames made in fewer passes, or with less computed in them.

    Args:
        shape: of the videos.
        whole: numbers of passes that less is computed of; the first is the yardstick of pictures and tables.
        fewer: other numbers of passes.
        less: by number of passes, the options that leave something out.
    """
    changed = _Make(shape).changed(DEFAULT_BUDGET)

    def made(steps: int, **options: Any) -> Variant:
        return replace(changed, name=name_of(steps, **options), lengths=1, made={"steps": steps, **options})

    first, *others = whole
    plain = tuple(made(steps) for steps in (*others, *fewer))
    return Variants(made(first), plain + tuple(made(steps, **own) for steps, some in less.items() for own in some))


_Made = Mapping[str, Any]


def name_of(steps: int, **options: Any) -> str:
    """What is said of how frames are made."""
    return ", ".join([f"{steps} passes", *([less_of(options)] if options else [])])


def less_of(options: _Made) -> str:
    """What is said of what is left out."""
    return ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in options.items())


def policies_only(shape: Shape) -> Variants:
    """The policies, without ablations and frontier."""
    make = _Make(shape)
    compared = (
        make.packcache(DEFAULT_BUDGET),
        make.changed(DEFAULT_BUDGET),
        make.last_frame_and_others(),
        make.absolute(),
        make.last_frames(int(DEFAULT_BUDGET)),
        make.last_frames(1),
        make.last_frame_absolute(),
        make.attention_sink(DEFAULT_BUDGET),
    )
    return Variants(make.full(), compared)
