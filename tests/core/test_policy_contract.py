"""A policy that breaks its contract is told so in one sentence: which policy, which frame, which block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest

from vllm_packcache.config.errors import ConfigError
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.core import policies
from vllm_packcache.core.blocks import BlockMap
from vllm_packcache.core.layout import FrameLayout, VideoLayout
from vllm_packcache.core.policies import PackCache, Policy, SlidingWindow
from vllm_packcache.core.retention import PolicyError, Retention, check_policy
from vllm_packcache.tools.explain import explain

BLOCK = 16
# Frame k begins in block 2 + 2 k.
LAYOUT = VideoLayout(FrameLayout(32), 32)


@dataclass(frozen=True, kw_only=True)
class Broken(Policy):
    """Keeps everything until ``frame`` is made, and then what `wrong` says."""

    rebases: ClassVar[bool] = False
    wrong: ClassVar[Callable[[BlockMap], Any]]
    most: ClassVar[Any] = None
    window: ClassVar[Any] = None
    frame: int = 3

    def past_blocks(self, blocks: BlockMap, frame: int) -> Any:
        return type(self).wrong(blocks) if frame == self.frame else np.arange(blocks.tail_start(frame))

    def most_past_blocks(self, blocks: BlockMap) -> Any:
        return self.most

    @property
    def history_window(self) -> Any:
        return self.window


def broken(wrong: Callable[[BlockMap], Any], **promises: Any) -> Policy:
    return type("Broken", (Broken,), {"wrong": staticmethod(wrong), **promises})()


def fail(blocks: BlockMap) -> Any:
    raise ZeroDivisionError("division\nby zero")


DECISIONS = {
    "list": (broken(lambda blocks: [0, 1]), "past_blocks must return block indices as an array of integers, not list"),
    "floats": (
        broken(lambda blocks: np.array([0.0])),
        "past_blocks must return block indices as an array of integers, not ndarray of float64 and shape [1]",
    ),
    "two axes": (
        broken(lambda blocks: np.zeros((1, 2), dtype=int)),
        "past_blocks must return block indices as an array of integers, not ndarray of int64 and shape [1, 2]",
    ),
    "tail": (broken(lambda blocks: np.array([0, 8])), "block 8 is none of the past, which has blocks 0 to 7"),
    "negative": (broken(lambda blocks: np.array([-1, 3])), "block -1 is none of the past, which has blocks 0 to 7"),
    "order": (
        broken(lambda blocks: np.array([0, 5, 4])),
        "block 4 comes after block 5: indices must ascend, each once",
    ),
    "twice": (
        broken(lambda blocks: np.array([0, 5, 5])),
        "block 5 comes after block 5: indices must ascend, each once",
    ),
    "raises": (broken(fail), "past_blocks raised ZeroDivisionError: division by zero"),
    "too many": (
        broken(lambda blocks: np.arange(8), most=7),
        "it keeps 8 blocks, up to block 7, and said that it keeps 7 at most (most_past_blocks)",
    ),
    "too old": (
        broken(lambda blocks: np.array([1, 2, 6]), window=2),
        "block 2 is of frame 0, and it said that it keeps nothing older than 2 frames (history_window)",
    ),
}


@pytest.mark.parametrize(("policy", "sentence"), DECISIONS.values(), ids=DECISIONS)
def test_a_decision_that_may_not_be_taken_is_named(policy: Policy, sentence: str) -> None:
    retention = Retention(LAYOUT, policy, BLOCK)
    check_policy(retention, 3)
    for _ in range(2):
        with pytest.raises(PolicyError) as error:
            retention.past(3)
        assert str(error.value) == f"policy Broken, frame 3: {sentence}"


def test_a_block_that_comes_back_is_named_whichever_frame_is_asked_about_first() -> None:
    # At frame 3 blocks 4 and 5 are dropped, at frame 4 everything is kept.
    policy = broken(lambda blocks: np.array([0, 1, 2, 3, 6, 7]))
    sentence = "policy Broken, frame 4: block 4 comes back, which was dropped by frame 3"
    for frames in ([0, 3, 4], [3, 4], [4, 3], [4, 5, 3]):
        *before, last = [Retention(LAYOUT, policy, BLOCK), *frames]
        retention, *asked = before
        for frame in asked:
            retention.past(frame)
        with pytest.raises(PolicyError) as error:
            retention.past(last)
        assert str(error.value).replace("frame 5", "frame 4") == sentence


@pytest.mark.parametrize(
    ("promises", "sentence"),
    [
        ({"most": 1.5}, "most_past_blocks must be a whole number, 0 or more, or None, not 1.5"),
        ({"window": 0}, "history_window must be a whole number, 1 or more, or None, not 0"),
        ({"window": property(fail)}, "history_window raised ZeroDivisionError: division by zero"),
    ],
)
def test_a_bound_that_is_none_is_named(promises: dict[str, Any], sentence: str) -> None:
    with pytest.raises(PolicyError) as error:
        Retention(LAYOUT, broken(fail, **promises), BLOCK)
    assert str(error.value) == f"policy Broken: {sentence}"


def test_a_decision_is_kept_whatever_becomes_of_the_policys_own_array() -> None:
    own = np.arange(6)
    retention = Retention(LAYOUT, broken(lambda blocks: own), BLOCK)
    past = retention.past(3)
    own[0] = 5
    assert past.tolist() == [0, 1, 2, 3, 4, 5]


# --------------------------------------------------------------------------- when it is first used


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, type], None]:
    """``installed(name, policy)``: as if a package had an entry point of that name."""
    find = policies.find

    def install(name: str, policy: type) -> None:
        monkeypatch.setattr(policies, "find", lambda asked: policy if asked == name else find(asked))

    return install


def refusal(policy: str, **options: Any) -> str:
    with pytest.raises(ConfigError) as error:
        ServerConfig.parse(policy, options)
    return str(error.value)


class Plain(PackCache):
    depth: int = 3


@dataclass(frozen=True, kw_only=True)
class Untyped(PackCache):
    depth: Any = 3


@dataclass(frozen=True, kw_only=True)
class Reserved(PackCache):
    grid: int = 3


@dataclass(frozen=True, kw_only=True)
class Unfinished(Policy):
    depth: int = 3


@dataclass(frozen=True, kw_only=True)
class Unhashable(SlidingWindow):
    depths: list[int]


NAME = __name__


@pytest.mark.parametrize(
    ("policy", "sentence"),
    [
        (Plain, f"{NAME}.Plain must be a frozen dataclass: decorate it with @dataclass(frozen=True, kw_only=True)"),
        (Untyped, f"{NAME}.Untyped: option depth needs a type, so that what is given can be validated"),
        (Reserved, f"{NAME}.Reserved: option grid needs another name, which is no option already"),
        (Unfinished, f"{NAME}.Unfinished has no past_blocks"),
    ],
)
def test_a_class_whose_options_cannot_be_validated_is_refused(
    installed: Callable[[str, type], None], policy: type, sentence: str
) -> None:
    installed("mine", policy)
    assert refusal("mine") == f"kv_cache_policy: 'mine': {sentence}"


def test_options_that_cannot_be_compared_are_refused(installed: Callable[[str, type], None]) -> None:
    installed("mine", Unhashable)
    assert refusal("mine", depths=[1]) == (
        "kv_cache_policy_config: the options of policy 'mine' cannot be validated and compared: unhashable type: 'list'"
    )


@dataclass(frozen=True, kw_only=True)
class Listed(Policy):
    since: int = 0

    def past_blocks(self, blocks: BlockMap, frame: int) -> Any:
        everything = np.arange(blocks.tail_start(frame))
        return everything.tolist() if frame >= self.since else everything


def test_the_first_frames_are_tried_at_start_and_explain_tries_all_that_it_draws(
    installed: Callable[[str, type], None],
) -> None:
    installed("listed", Listed)
    sentence = "frame {}: past_blocks must return block indices as an array of integers, not list"
    assert refusal("listed") == f"kv_cache_policy: 'listed': policy Listed, {sentence.format(0)}"

    source = '{"since": 50, "layout": {"grid": [4, 6]}}'
    assert explain(source, "listed", frames=50).title == "JSON: listed"
    with pytest.raises(ConfigError) as error:
        explain(source, "listed", frames=51)
    assert str(error.value) == f"policy Listed, {sentence.format(50)}"


# --------------------------------------------------------------------------- what it is called


@dataclass(frozen=True, kw_only=True)
class Wide(PackCache):
    """Says nothing of its name, so that it has its parent's."""

    def past_blocks(self, blocks: BlockMap, frame: int) -> Any:
        return SlidingWindow(window=self.window).past_blocks(blocks, frame)

    def most_past_blocks(self, blocks: BlockMap) -> int:
        return SlidingWindow(window=self.window).most_past_blocks(blocks)


def test_a_policy_is_called_what_its_entry_point_says(installed: Callable[[str, type], None]) -> None:
    installed("wide", Wide)
    config = ServerConfig.parse("wide", {"window": 3, "layout": {"grid": [4, 6]}})
    assert (config.name, type(config.policy)) == ("wide", Wide)

    plan = config.plan({"packcache_policy": "wide", "packcache_window": 2}, 40)
    assert plan is not None
    assert plan.policy == Wide(window=2)
    for named, said in ({"policy": "packcache"}, "packcache_policy must be 'wide'"), ({"depth": 1}, "packcache_depth"):
        with pytest.raises(ConfigError, match=said):
            config.plan({f"packcache_{name}": value for name, value in named.items()}, 40)
    assert "no option of policy 'wide'" in refusal("wide", depth=3)


def test_fingerprints_tell_what_a_name_stands_for(installed: Callable[[str, type], None]) -> None:
    layout = {"layout": {"grid": [4, 6]}}
    prints = [ServerConfig.parse(name, layout).fingerprint() for name in ("packcache", "sliding_window")]
    installed("packcache", Wide)
    prints.append(ServerConfig.parse("packcache", layout).fingerprint())
    assert prints[0]["class"] == "vllm_packcache.core.policies.packcache:PackCache"
    assert prints[2]["class"] == f"{NAME}:Wide"
    assert len({text for fingerprint in prints for text in fingerprint.values()}) == 6


@pytest.mark.parametrize("layout", [{"tokens_per_frame": 2**20}, {"grid": [1, 1], "condition_image_tokens": 10**9}])
def test_the_fingerprint_of_the_largest_layout_costs_little(layout: dict[str, Any]) -> None:
    from tests.strategies import cost

    _, peak = cost(lambda: ServerConfig.parse("full", {"layout": layout}))
    assert peak < 2**22
