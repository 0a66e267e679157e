"""The pictures of a demo, drawn from made-up videos."""

from __future__ import annotations

import re
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from PIL import Image

from vllm_packcache.config.server import ServerConfig
from vllm_packcache.core.layout import VideoLayout
from vllm_packcache.core.policies import PAPER, Full, PackCache
from vllm_packcache.demo import run, story
from vllm_packcache.demo.masked import tokenizer as masked_tokenizer
from vllm_packcache.demo.masked.bundle import OPTIONS, PRESET, request_options
from vllm_packcache.demo.scores import score_objects, sightings, wrong_frames
from vllm_packcache.demo.tokenizer import VideoTokenizer, video_ids
from vllm_packcache.demo.world import make_world
from vllm_packcache.families import LUMOS, lumos

WORLD = make_world(run.EXAMPLE)
FRAMES = run.FRAMES
TRUE = np.stack([WORLD.frame_ids(k) for k in range(1, FRAMES + 1)])
GIVEN = WORLD.frame_ids(0)
VISIBLE = sightings(WORLD, TRUE).visible
LOST = max(k for k in range(1, FRAMES - 1) if VISIBLE[k - 1].any())
"""The frame in which packcache lacks what the truth shows, before those that others are told of."""


@pytest.fixture(scope="module")
def tokenizer() -> VideoTokenizer:
    return VideoTokenizer()


def row(label: str, codes: np.ndarray, held: np.ndarray, tokens: int) -> story.Row:
    return story.Row(label, f"what {label} keeps of it", codes, held, [tokens // 2, *[tokens] * (len(codes) - 1)], 1.5)


def story_of(tokenizer: VideoTokenizer, frames: int = FRAMES, **changed: Any) -> story.Story:
    """The full cache is right, packcache lacks all objects in one frame, and the last row stands still."""
    lost = TRUE[:frames].copy()
    lost[LOST - 1 : LOST] = WORLD.background
    held = np.zeros((3, frames + 1, 16, 16), bool)
    held[0] = held[:, 0] = held[:, -1] = True
    held[1, -2, 4:8] = True
    still = np.broadcast_to(GIVEN, (frames, 16, 16))
    rows = (
        row("full cache", TRUE[:frames], held[0], 6400),
        row("packcache", lost, held[1], 1088),
        row("last frame only", still, held[2], 832),
    )
    return story.Story(
        **{"rows": rows, "given": GIVEN, "world": WORLD, "trained": 16, "tokenizer": tokenizer} | changed
    )


def drawn(told: story.Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Figure:
    """What is written as a picture, as it was just before."""
    figures: list[Figure] = []

    def keep(figure: Figure, path: Path) -> None:
        figures.append(figure)
        save(figure, path)

    save = story.save
    monkeypatch.setattr(story, "save", keep)
    story.draw(told, tmp_path / "story.png")
    return figures[0]


def outlined(axes: Axes) -> list[tuple[int, int]]:
    """Row and column of frames with an outline."""
    found = [patch for patch in axes.patches if isinstance(patch, Rectangle) and not patch.get_fill()]
    assert all(patch.get_edgecolor()[:3] == to_rgb(story.WRONG) for patch in found)
    return sorted((int(patch.get_y()), int(patch.get_x())) for patch in found)


def shows(pixels: np.ndarray, colour: str) -> np.ndarray:
    """Where pixels [..., 3] have a colour."""
    return (pixels == np.round(np.array(to_rgb(colour)) * 255)).all(-1)


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text)]


def test_what_is_held_is_bright_and_all_else_pale(
    tokenizer: VideoTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = story_of(tokenizer)
    films = drawn(told, tmp_path, monkeypatch).axes[0]
    shown = [np.asarray(image.get_array()) for image in films.images]
    columns = list(told.columns)
    assert len(shown) == 4 * len(columns)
    truth, full, packed, last = (shown[n * len(columns) : (n + 1) * len(columns)] for n in range(4))
    for own, k in zip(truth, columns, strict=True):
        assert np.array_equal(own, told.pictures(WORLD.frame_ids(k)[None])[0])
    assert all(np.array_equal(own, true) for own, true in zip(full, truth, strict=True))
    for number in (0, columns.index(FRAMES)):
        assert np.array_equal(packed[number], full[number])
    before = columns.index(FRAMES - 1)
    assert np.array_equal(packed[before][64:128], full[before][64:128])
    for pale, bright in ((packed[before][:64], full[before][:64]), (last[before], last[0])):
        assert pale.min() >= 255 * (1 - story.PALE) - 1
        assert np.array_equal(pale, (255 - (255 - bright.astype(float)) * story.PALE).astype(np.uint8))


def test_frames_in_which_an_object_is_wrong_are_outlined(
    tokenizer: VideoTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = story_of(tokenizer)
    columns = list(told.columns)
    found = outlined(drawn(told, tmp_path, monkeypatch).axes[0])
    assert [column for number, column in found if number < 2] == []
    assert [columns[column] for number, column in found if number == 2] == [LOST]
    # What stands still is wrong also where the truth hides everything; but not where all is where it was.
    still = [k for k in columns if k and not np.array_equal(WORLD.frame_ids(k), GIVEN)]
    assert [columns[column] for number, column in found if number == 3] == still
    shown = story.animate(told)
    red = shows(shown, story.WRONG)
    panels = np.split(red[:, :, : shown.shape[2] // 4 * 4], 4, axis=2)
    assert [np.flatnonzero(panel.sum((1, 2)) > 1000).tolist() for panel in panels[:3]] == [[], [], [LOST - 1]]
    assert len(np.flatnonzero(panels[3].any((1, 2)))) == wrong_frames(WORLD, told.rows[2].codes).sum()


def test_moments_that_matter_are_among_the_frames(tokenizer: VideoTokenizer) -> None:
    columns = story_of(tokenizer).columns
    assert len(columns) == story.MOST_COLUMNS
    assert list(columns)[-story.LAST_FRAMES :] == list(range(FRAMES - story.LAST_FRAMES + 1, FRAMES + 1))
    found = sightings(WORLD, TRUE)
    back = np.flatnonzero(found.returned.any(1)) + 1
    assert [k for k, what in columns.items() if what == "back"] == back.tolist()
    hidden = [k for k, what in columns.items() if what == "hidden"]
    assert all(found.hidden[k - 1].any() for k in hidden)
    # Both objects hide twice, and both at once.
    assert len(hidden) == 2
    assert all(found.hidden[k - 1].all() for k in hidden)


@pytest.mark.parametrize("seed", range(10_000, 10_040))
def test_columns_of_any_world(tokenizer: VideoTokenizer, seed: int) -> None:
    world = make_world(seed)
    for frames in (1, 4, 12, 24):
        codes = np.stack([world.frame_ids(k) for k in range(1, frames + 1)])
        one = row("full cache", codes, np.ones((frames + 1, 16, 16), bool), 64)
        columns = story.Story((one, one, one), None, world, 16, tokenizer).columns
        assert list(columns) == sorted(columns)
        assert len(columns) == min(frames, story.MOST_COLUMNS)
        assert {1 <= k <= frames for k in columns} == {True}


def test_all_is_said_and_nothing_runs_into_another(
    tokenizer: VideoTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = story_of(tokenizer)
    figure = drawn(told, tmp_path, monkeypatch)
    seen = VISIBLE.sum()
    right = seen - VISIBLE[LOST - 1].sum()
    assert right < seen
    assert told.sentence == (
        f"{FRAMES} frames, {FRAMES - 16} more than the model was trained on: packcache holds 17% of the full cache's "
        f"tokens and gets {right} of {seen} objects right (full cache: {seen}, last frame only: "
        f"{score_objects(WORLD, told.rows[2].codes).right})."
    )
    words = " ".join(" ".join(texts(figure)).split())
    for part in (
        told.sentence,
        f"1,088 tokens 1.50 s a frame {right} of {seen} right",
        "what packcache keeps of it",
        "the truth",
    ):
        assert part in words
    assert words.count("longer than trained on") == 2
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    boxes = {
        text.get_text(): text.get_window_extent(renderer)
        for text in figure.findobj(Text)
        if text.get_text().strip() and text.get_visible()
    }
    for (one, box), (other, another) in combinations(boxes.items(), 2):
        assert not box.overlaps(another), (one, other)
    width, height = figure.canvas.get_width_height()
    for one, box in boxes.items():
        assert min(box.x0, box.y0, width - box.x1, height - box.y1) >= 0, one
    assert Image.open(tmp_path / "story.png").size == pytest.approx((1606, 946), abs=2)
    chart = figure.axes[1]
    assert [line.get_ydata()[-1] for line in chart.lines] == [6400, 1088, 832]  # type: ignore[index]


@pytest.mark.parametrize("given", [True, False])
def test_a_video_whose_truth_nobody_knows(
    given: bool, tokenizer: VideoTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = story_of(tokenizer, frames=12, world=None, given=GIVEN if given else None)
    figure = drawn(told, tmp_path, monkeypatch)
    assert told.sentence == "12 frames: packcache holds 17% of the full cache's tokens."
    assert (0 in told.columns) == given
    assert len(figure.axes[0].images) == 3 * len(told.columns)
    assert outlined(figure.axes[0]) == []
    assert not re.search(r"\b(truth|right|longer|red)\b", " ".join(texts(figure)))
    shown = story.animate(told)
    assert shown.shape == (12, 396, 3 * 272 + 16, 3)
    assert not shows(shown, story.WRONG).any()


def test_the_videos_beside_each_other(tokenizer: VideoTokenizer) -> None:
    told = story_of(tokenizer)
    shown = story.animate(told)
    assert shown.shape == (FRAMES, 396, 4 * 272 + 16, 3)
    # H.264 takes even sides only.
    assert shown.shape[1] % 2 == shown.shape[2] % 2 == 0
    for number, codes in enumerate((TRUE, *(own.codes for own in told.rows))):
        left = 16 + number * 272
        assert np.array_equal(shown[:, 44 : 44 + 256, left : left + 256], told.pictures(codes))
    bars = [shows(shown[-1, 44 + 256 + 18], colour).sum() for colour in story.COLOURS]
    assert bars == pytest.approx([256, 256 * 1088 / 6400, 256 * 832 / 6400], abs=1.5)


def causal() -> tuple[ServerConfig, list[int], list[int]]:
    ids = video_ids(VideoTokenizer(), WORLD, 12).tolist()
    config = {**asdict(PAPER), "layout": "demo", "positions": "rebase"}
    return ServerConfig.parse("packcache", config), ids[: -12 * 257], ids[-12 * 257 :]


def masked() -> tuple[ServerConfig, list[int], list[int]]:
    words = masked_tokenizer.build_text_tokenizer()
    prompt = masked_tokenizer.prompt(WORLD.prompt, 12, words) + masked_tokenizer.world_frame(WORLD, 0).tolist()
    made = np.concatenate([masked_tokenizer.world_frame(WORLD, k) for k in range(1, 13)]).tolist()
    config = {**asdict(PAPER), "layout": PRESET, "positions": "rebase"}
    return ServerConfig.parse("packcache", config, family=LUMOS), prompt, made


@pytest.mark.parametrize("kind", ["causal", "masked"])
@pytest.mark.parametrize("cache", run.CACHES, ids=lambda cache: cache.name)
def test_a_row_holds_what_the_plan_keeps(kind: str, cache: run.Cache) -> None:
    server, prompt, made = causal() if kind == "causal" else masked()
    options = {f"packcache_{name}": value for name, value in cache.options.items()}
    if kind == "masked":
        options = request_options(12, OPTIONS, **cache.options)
    request = server.request(options, prompt)
    assert request is not None
    layout = request.streams[0].plan.layout
    video = run.Generated(cache, options, made, [32 * 10_000], 1.0)
    row = run.row_of(server, prompt, video, TRUE[:12])
    # Counted token by token.
    tokens = range(layout.frame_start(0), layout.frame_start(12))
    visual = [token for token in tokens if layout.place(token).row is not None]
    assert run.visual_places(layout, 12)[1:].ravel().tolist() == visual
    held = row.held.reshape(13, 256).sum(1)
    if cache.name == "full":
        assert held.tolist() == [256] * 13
    else:
        history = 4 if cache.name == "packcache" else 1
        assert (held[0], held[-1], held[-2]) == (256, 256, 256)
        assert (np.diff(held[-1 - history :]) >= 0).all()
        assert held[-1 - history] > 0
        # A block that two frames share is of the newer one, and of the condition the one that it ends in.
        assert max(held[-2 - history], held[1]) < 32
        assert held[2 : -2 - history].sum() == 0
    with pytest.raises(ChildProcessError, match=f"^{cache.label}: the engine held 32 tokens with the last frame, not"):
        run.row_of(server, prompt, run.Generated(cache, options, made, [32], 1.0), TRUE[:12])


def test_a_row_of_a_policy_that_looks_at_tokens() -> None:
    _, prompt, made = causal()
    server, options = ServerConfig.parse("packcache", "demo"), {"packcache_policy": "packcache"}
    row = run.row_of(server, prompt, run.Generated(run.CACHES[1], options, made, [32 * 10_000], 1.0), TRUE[:12])
    assert row.keeps == "one frame, and what changed in 12"
    assert row.held[-2:].all()
    # Of older frames above all the places from which something moves.
    older, moved = row.held[1:-2], TRUE[:10] != TRUE[1:11]
    assert older[moved].mean() > 0.4 > 3 * older[~moved].mean()


@pytest.mark.parametrize(("kind", "image"), [("causal", 256), ("masked", 276)])
def test_places_of_the_given_picture(kind: str, image: int) -> None:
    server, prompt, made = causal() if kind == "causal" else masked()
    layout = server.request({"packcache_policy": "full"}, prompt).streams[0].plan.layout  # type: ignore[union-attr]
    assert isinstance(layout, VideoLayout)
    assert layout.condition_image_tokens == image
    ids = np.array([*prompt, *made])[run.visual_places(layout, 12)]
    offset = VideoTokenizer().visual_offset if kind == "causal" else lumos.VISUAL_BEGIN
    assert np.array_equal(ids - offset, [GIVEN, *TRUE[:12]])


def test_what_a_policy_keeps_is_said() -> None:
    assert run.kept(Full()) == "every frame"
    assert run.kept(PAPER) == "less and less of the last 4 frames"
    assert run.kept(PackCache(selection="changed", window=12)) == "one frame, and what changed in 12"
    assert run.kept(PackCache(window=1, history_frames=1, selection="changed")) == "one frame"


EPISODES = {
    "layout": "demo",
    "selection": "changed",
    "history_frames": 3,
    "window": 9,
    "changed_tokens": 3,
    "episodes": 2,
}


@pytest.mark.parametrize(
    "config", ["demo", {**asdict(PAPER), "layout": "demo"}, EPISODES], ids=["demo", "paper", "episodes"]
)
def test_one_frame_is_what_the_last_cache_keeps_on_any_server(config: str | dict[str, Any]) -> None:
    options = {f"packcache_{name}": value for name, value in run.CACHES[2].options.items()}
    plan = ServerConfig.parse("packcache", config).plan(options, 288)
    assert plan is not None
    assert run.kept(plan.policy) == "one frame"
    assert not plan.policy.outlives_window
