"""Attention mass against Hugging Face's own weights; fit and suggestion against what they must find; the command."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from vllm_packcache.calibrate import attention, report
from vllm_packcache.calibrate.change import Changes
from vllm_packcache.calibrate.command import run
from vllm_packcache.calibrate.decay import allowed, fit, kept, measured, scale_at, suggest
from vllm_packcache.calibrate.mass import IMAGE, NEAREST, SEGMENTS, TEXT, Mass, Tally, Video
from vllm_packcache.cli import app
from vllm_packcache.config.errors import ConfigError
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.core.layout import CONDITION, FrameLayout, VideoLayout
from vllm_packcache.core.plan import Plan
from vllm_packcache.core.policies.packcache import PackCache
from vllm_packcache.core.positions import Positions
from vllm_packcache.reference.models import make_random_llama
from vllm_packcache.reference.visibility import visibility

FRAMES, DISTANCES, BLOCK = 8, 4, 4
LAYOUT = VideoLayout(FrameLayout(7), condition_tokens=11, condition_image_tokens=4)
TOKENS = LAYOUT.frame_start(FRAMES)
CONFIG = '{"layout": {"tokens_per_frame": 7, "condition_image_tokens": 4}}'

Models = dict[str, Path]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Random models by how their heads share keys."""
    folder = tmp_path_factory.mktemp("models")
    shapes = {
        "gqa": {"heads": 4, "kv_heads": 2},
        "mqa": {"heads": 3, "kv_heads": 1, "head_dim": 24, "hidden": 72},
        "mha": {"heads": 2, "kv_heads": 2, "head_dim": 80},
    }
    return {name: make_random_llama(folder / name, **shape) for name, shape in shapes.items()}


def video(seed: int = 0, layout: VideoLayout = LAYOUT) -> Video:
    ids = np.random.default_rng(seed).integers(256, size=layout.frame_start(FRAMES))
    return Video(ids.tolist(), layout)


def true_weights(model: Path, ids: list[int]) -> tuple[np.ndarray, torch.Tensor]:
    """Attention weights [layers, heads, T, T] and logits of transformers' own eager attention."""
    eager = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        output = eager(torch.tensor([ids]), output_attentions=True)
    return torch.cat(output.attentions).double().numpy(), output.logits


def segment_of(query: int, key: int, layout: VideoLayout) -> str:
    """The name of what ``key`` is to ``query``, a token of a frame."""
    frame = layout.frame_of(key)
    if frame == CONDITION:
        is_text = key < layout.condition_tokens - layout.condition_image_tokens
        return "text" if is_text else "conditioning image"
    distance = layout.frame_of(query) - frame
    if distance == 0:
        return "own frame"
    return f"distance {distance}" if distance <= DISTANCES else "older frames"


NAMES = [*SEGMENTS, *(f"distance {d}" for d in range(1, DISTANCES + 1))]
QUERIES = range(LAYOUT.frame_start(DISTANCES), TOKENS)


@pytest.mark.parametrize("scores", [1, 2000, 2**23])
@pytest.mark.parametrize("name", ["gqa", "mqa", "mha"])
def test_mass_is_that_of_eager_attention(
    models: Models, name: str, scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "MOST_SCORES", scores)
    own = video()
    weights, _ = true_weights(models[name], own.token_ids)
    mass = attention.measure(attention.load(models[name]), own, DISTANCES, BLOCK)

    expected = np.zeros((*weights.shape[:2], len(NAMES)))
    for query in QUERIES:
        for key in range(query + 1):
            expected[:, :, NAMES.index(segment_of(query, key, LAYOUT))] += weights[:, :, query, key]
    np.testing.assert_allclose(mass.by_segment, expected / len(QUERIES), atol=1e-5, rtol=0)
    np.testing.assert_allclose(mass.by_segment.sum(-1), 1, atol=1e-5)

    for row, frame in zip(mass.by_block, range(DISTANCES, FRAMES), strict=True):
        queries = slice(LAYOUT.frame_start(frame), LAYOUT.frame_start(frame + 1))
        of_tokens = weights[:, :, queries].mean((1, 2))
        blocks = [of_tokens[:, i : i + BLOCK].sum(-1) for i in range(0, TOKENS, BLOCK)]
        np.testing.assert_allclose(row.T, blocks, atol=1e-5, rtol=0)


def test_logits_are_those_of_eager_attention(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured in later layers depends on what earlier ones read."""
    monkeypatch.setattr(attention, "MOST_SCORES", 1000)
    own = video(1)
    _, expected = true_weights(models["gqa"], own.token_ids)
    token = attention._tally.set(Tally(LAYOUT, DISTANCES, BLOCK))
    with torch.inference_mode():
        logits = attention.load(models["gqa"])(torch.tensor([own.token_ids])).logits
    attention._tally.reset(token)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_no_more_scores_are_held_than_allowed(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    held = []
    original = attention.attend

    def watched(*arguments: Any) -> Any:
        read, weights = original(*arguments)
        held.append(weights.numel())
        return read, weights

    monkeypatch.setattr(attention, "attend", watched)
    monkeypatch.setattr(attention, "MOST_SCORES", 700)
    attention.measure(attention.load(models["gqa"]), video(), DISTANCES, BLOCK)
    # Two layers, and 88 queries of up to 67 keys and 4 heads.
    assert 350 < max(held) <= 700
    assert len(held) > 2 * FRAMES


@pytest.mark.parametrize("condition", [(11, 4), (8, 8), (0, 0)])
@pytest.mark.parametrize(
    "policy",
    [
        PackCache(history_frames=0.75, window=2, decay=0.4, selection="spatial"),
        PackCache(history_frames=2, window=4, decay=0.7, selection="spatial"),
        PackCache(history_frames=2, window=3, decay=0.5, gamma_text=0.5, gamma_condition=0.5, selection="spatial"),
        PackCache(history_frames=1.5, window=4, selection="changed", changed_tokens=2),
    ],
)
def test_measured_share_is_that_of_a_mask(models: Models, policy: PackCache, condition: tuple[int, int]) -> None:
    """Frames of 7 tokens and blocks of 4: nothing is aligned."""
    layout = VideoLayout(LAYOUT.frame, *condition)
    own = video(2, layout)
    # Half of the places are as in the frame before.
    own.token_ids[layout.condition_tokens :: 2] = [7] * len(own.token_ids[layout.condition_tokens :: 2])
    weights, _ = true_weights(models["gqa"], own.token_ids)
    mass = attention.measure(attention.load(models["gqa"]), own, DISTANCES, BLOCK)
    live = visibility(Plan(layout, policy, Positions(layout)), BLOCK, len(own.token_ids), own.token_ids).numpy()
    queries = slice(layout.frame_start(DISTANCES), None)
    expected = (weights * live)[:, :, queries].sum(-1).mean((1, 2))
    np.testing.assert_allclose(measured(policy, [mass], BLOCK, [own]), expected, atol=1e-5, rtol=0)
    assert expected.max() < 0.99


@pytest.mark.parametrize("rho", [0.2, 0.5, 0.9, 1.0, 1.1])
def test_a_known_decay_is_found(rho: float) -> None:
    distances = np.arange(1, 7)
    exact = np.tile(0.3 * rho**distances, (5, 1))
    found = fit(exact)
    assert (found.rho, found.scale) == pytest.approx((rho, 0.3))
    assert found.r_squared == pytest.approx(1)
    assert found.interval == pytest.approx((rho, rho))
    assert found.decay == pytest.approx(min(rho, 1.0))
    assert scale_at(exact[0], rho) == pytest.approx(0.3)

    noise = np.exp(np.random.default_rng(0).normal(0, 0.1, (50, 6)))
    noisy = fit(exact[:1] * noise)
    assert noisy.interval is not None
    low, high = noisy.interval
    assert low < rho < high
    assert 0 < high - low < 0.05 * rho
    assert noisy.holds_half == (rho == 0.5)


def test_the_interval_is_over_videos() -> None:
    """As wide as normal theory says: the slope is linear in the logarithms, which differ by a factor a video."""
    rhos = np.random.default_rng(1).normal(0.6, 0.03, 400)
    found = fit(np.stack([rho ** np.arange(1, 4) for rho in rhos]))
    assert found.interval is not None
    assert found.interval.high - found.interval.low == pytest.approx(2 * 1.96 * 0.03 / 20, rel=0.15)
    assert fit(np.array([[0.4, 0.2, 0.1]])).interval is None


def test_a_decay_that_is_none_is_a_bad_fit() -> None:
    plateau = fit(np.array([[0.5, 0.05, 0.05, 0.05, 0.05, 0.05]] * 3))
    assert plateau.r_squared < report.GOOD_FIT
    nothing = fit(np.array([[0.9, 0.0, 0.0]]))
    assert 0 < nothing.decay <= 1


def masses(seed: int, distances: int = 5) -> np.ndarray:
    """A random mean, decaying or not."""
    random = np.random.default_rng(seed)
    mean = random.dirichlet(np.full(NEAREST + distances, 0.6))
    if seed % 2:
        mean[NEAREST:] = np.sort(mean[NEAREST:])[::-1]
    return mean


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("share", [0.1, 0.5, 0.8, 0.97, 0.9999])
@pytest.mark.parametrize("tokens_per_frame", [3, 257])
def test_the_suggestion_is_the_cheapest(seed: int, share: float, tokens_per_frame: int) -> None:
    """A target between what is kept anyway and what can be kept; brute force goes through all options."""
    mean, frame = masses(seed), FrameLayout(tokens_per_frame)
    decay = [0.3, 0.5, 0.8, 1.0][seed % 4]
    target = mean[: NEAREST - 1].sum() + share * mean[NEAREST:].sum()
    good = []
    for quarters in range(1, 21):
        for window in range(1, 6):
            policy = PackCache(history_frames=quarters / 4, window=window, decay=decay, selection="spatial")
            if allowed(policy, frame) and kept(policy, mean, frame) >= target:
                good.append((quarters / 4, window))
    assert good
    found = suggest(mean, decay, frame, target)
    assert found is not None
    assert (found.history_frames, found.window) == min(good)
    assert found.decay == decay


def test_what_cannot_be_kept_is_not_suggested() -> None:
    mean = np.array([0.1, 0.1, 0.1, 0.2, 0.3, 0.2])
    assert suggest(mean, 0.5, FrameLayout(9), 0.81) is None
    all_of_it = suggest(mean, 0.5, FrameLayout(9), 0.8 - 1e-9)
    assert all_of_it is not None
    assert (all_of_it.history_frames, all_of_it.window) == (2, 2)


def test_kept_counts_what_the_policy_keeps() -> None:
    mean = np.array([0.05, 0.05, 0.1, 0.1, 0.4, 0.16, 0.08, 0.06])
    # Of frames of 8 tokens, 8, 4, 2 and 2.
    policy = PackCache(history_frames=2, window=4, decay=0.5, selection="spatial")
    assert kept(policy, mean, FrameLayout(8)) == pytest.approx(0.2 + 0.4 + 0.16 / 2 + 0.08 / 4 + 0.06 / 4)


# ---------------------------------------------------------------------------------------------------------------------
# What changes


def changing(share: float, tokens_per_frame: int = 16, frames: int = 9, condition: int = 8) -> Video:
    """A video in whose every frame another share of the blocks of 4 changes, in one token each."""
    frame = np.zeros(tokens_per_frame, dtype=np.int64)
    ids = [np.zeros(condition, dtype=np.int64)]
    for number in range(frames):
        frame = frame.copy()
        count = round(share * tokens_per_frame / 4)
        frame[(np.arange(count) + number) * 4 % tokens_per_frame] += 1
        ids.append(frame)
    layout = VideoLayout(FrameLayout(tokens_per_frame), condition)
    return Video(np.concatenate(ids).tolist(), layout)


def test_what_changes_is_counted_by_block() -> None:
    own = changing(0.25)
    changes = Changes([own], 4)
    # In every frame one block more, from the left: it changes in the frame before.
    places = [[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [1, 0, 0, 0]]
    assert [counts.tolist() for counts in changes.counts[0]] == [places[number % 4] for number in range(8)]
    assert changes.by_count.tolist() == [24, 8, 0, 0, 0]
    assert (changes.tokens, changes.blocks, changes.threshold, changes.told_apart) == (1 / 16, 1 / 4, 1, True)


@pytest.mark.parametrize("layout", [LAYOUT, VideoLayout(FrameLayout(3), 5), VideoLayout(FrameLayout(12), 0)])
def test_counts_are_those_of_tokens_one_by_one(layout: VideoLayout) -> None:
    """Blocks that lie in two frames are of the later one."""
    own = Video(np.random.default_rng(3).integers(3, size=layout.frame_start(FRAMES)).tolist(), layout)
    expected = np.zeros(BLOCK + 1, dtype=int)
    for block in range(-(-layout.condition_tokens // BLOCK), layout.frame_start(FRAMES - 1) // BLOCK):
        places = range(block * BLOCK, (block + 1) * BLOCK)
        expected[sum(own.token_ids[i] != own.token_ids[i + layout.tokens_per_frame] for i in places)] += 1
    assert Changes([own], BLOCK).by_count.tolist() == expected.tolist()


def test_where_nothing_changes_a_window_costs_nothing() -> None:
    changes = Changes([changing(0)], 4)
    assert (changes.tokens, changes.blocks, changes.threshold, changes.told_apart) == (0, 0, 1, True)
    assert changes.holding(0.5, 5, most=2, target=0.99) == [(window, 1.0) for window in range(1, 6)]


def test_where_everything_changes_only_whole_frames_hold_it() -> None:
    layout = changing(0, 64).layout
    ids = [0] * 8 + [frame for frame in range(9) for _ in range(64)]
    changes = Changes([Video(ids, layout)], 4)
    assert (changes.tokens, changes.blocks, changes.threshold, changes.told_apart) == (1, 1, 1, False)
    assert changes.holding(1.0, 4, most=4, target=1) == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    # The room besides the last frame, which is not compared yet.
    assert changes.held(changes.policy(2.5, 4, 1.0)) == pytest.approx(1.5 / 3)


def test_a_budget_has_room_for_what_changes() -> None:
    """Of 16 blocks 4 change from frame to frame: with the last frame whole, a window of W takes 4 (W - 1) more."""
    changes = Changes([changing(0.25, 64)], 4)
    # Shares are rounded up to blocks.
    assert changes.holding(0.5, 4, most=4, target=1) == [(1, 1.0), (2, 1.25), (3, 1.5), (4, 1.75)]
    assert changes.holding(0.5, 4, most=1.6, target=1) == [(1, 1.0), (2, 1.25), (3, 1.5)]
    assert changes.holding(0.5, 4, most=4, target=0.6) == [(1, 1.0), (2, 1.25), (3, 1.5), (4, 1.5)]


def test_noise_in_most_blocks_is_no_change() -> None:
    """Where more than half of all blocks differ in a token or two, a block must differ in more."""
    random = np.random.default_rng(0)
    layout = VideoLayout(FrameLayout(256), 16)
    still = np.tile(random.integers(100, size=256), (9, 1))
    for number in range(9):
        still[number, 16 * number : 16 * number + 16] = 100 + number
    noisy = np.where(random.random(still.shape) < 0.05, 999 + np.arange(9)[:, None], still)
    ids = np.concatenate([np.zeros(16, dtype=np.int64), noisy.ravel()]).tolist()
    changes = Changes([Video(ids, layout)], 16)
    assert changes.threshold > 1
    assert changes.tokens > 0.1
    assert changes.blocks < 0.5
    assert changes.by_count[14:].sum() >= 8


# ---------------------------------------------------------------------------------------------------------------------
# The command


def call(*arguments: str | Path) -> Any:
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, ["calibrate", *map(str, arguments)])


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any], Path]:
    """The command on the bundled model, with few frames: what it said, its JSON, its folder."""
    folder = tmp_path_factory.mktemp("demo") / "new"
    files = ["--out", folder / "out.yaml", "--plot", folder / "plot.svg", "--json", folder / "all.json"]
    called = call("--videos", "2", "--frames", "6", "--target", "0.6", *files)
    assert called.exit_code == 0, called.output
    return called, json.loads((folder / "all.json").read_text()), folder


def test_the_configuration_is_what_was_suggested(demo: tuple[Any, dict[str, Any], Path]) -> None:
    called, result, folder = demo
    server = ServerConfig.parse("packcache", str(folder / "out.yaml"))
    preset = ServerConfig.parse("packcache", "demo")
    suggestion = result["suggestion"]
    assert server.layout == preset.layout
    assert server.positions == "rebase"
    assert server.policy == PackCache(
        **{k: suggestion[k] for k in ("history_frames", "window", "decay")}, selection="spatial"
    )
    assert server.policy.decay == result["fit"]["decay"]
    header = (folder / "out.yaml").read_text().split("layout:")[0]
    assert "rho = " in header
    assert f"{100 * suggestion['kept_measured']:.2f} % measured" in header
    assert suggestion["kept"] >= 0.6
    assert f"wrote {folder / 'out.yaml'}" in called.stdout


def test_what_keeps_changes_is_in_the_file_too(demo: tuple[Any, dict[str, Any], Path]) -> None:
    """As comments, from which a person makes options."""
    called, result, folder = demo
    changed = result["changed"]
    own = changed["suggestion"]
    lines = (folder / "out.yaml").read_text().splitlines()
    options = yaml.safe_load("\n".join(line.removeprefix("# ") for line in lines[-4:]))
    assert options == {name: own[name] for name in ("history_frames", "window", "selection", "changed_tokens")}
    policy = PackCache(**options, decay=own["decay"])
    assert own["selection"] == "changed"
    # The last frame is whole, whatever the attention says.
    assert 1 <= own["history_frames"] <= max(1, result["suggestion"]["history_frames"])
    assert own["held"] >= result["target"]
    # Of 2 worlds the first 5 frames of 6.
    assert sum(changed["blocks_by_tokens"]) == pytest.approx(2 * 5 * 257 / 16, abs=2)
    assert [policy.window, policy.history_frames] == changed["windows"][-1]
    said = " ".join(called.stdout.split())
    assert f"history_frames = {own['history_frames']:g}, window = {own['window']} and changed_tokens = " in said
    assert f"they keep {100 * own['kept_measured']:.2f} % of all attention, and spread evenly at the same size" in said
    assert changed["spatial"]["kept_tokens"] == own["kept_tokens"]


def test_all_numbers_are_in_the_json(demo: tuple[Any, dict[str, Any], Path]) -> None:
    _, result, _ = demo
    assert result["seeds"] == {"videos": [10000, 10001], "bootstrap": 0}
    assert (result["largest_distance"], result["query_frames"]) == (3, [4, 6])
    shape = np.shape(result["mass_by_head"])
    assert shape == (3, 28, len(result["segments"])) == (3, 28, 7)
    np.testing.assert_allclose(np.mean(result["mass_by_head"], (0, 1)), result["mass"])
    np.testing.assert_allclose(np.mean(result["mass_by_video"], 0), result["mass"])
    np.testing.assert_allclose(np.sum(result["mass_by_layer"], 1), 1, atol=1e-5)
    intervals = np.array(result["mass_ci95"])
    assert (intervals[:, 0] <= np.array(result["mass"]) + 1e-12).all()
    assert result["versions"]["transformers"] == transformers.__version__
    # The condition is its first 32 tokens of text and 256 of the picture; most heads of the bundled model read words.
    assert result["mass"][TEXT] > result["mass"][IMAGE] > 0


def test_what_is_printed(demo: tuple[Any, dict[str, Any], Path]) -> None:
    called, result, _ = demo
    lies = "inside" if result["fit"]["half_in_interval"] else "outside"
    assert f"The paper's rho = 0.5 lies {lies} the interval." in called.stdout
    for name in result["segments"]:
        assert name in called.stdout
    assert "…" not in called.stdout


def test_the_plot_is_a_picture(demo: tuple[Any, dict[str, Any], Path], tmp_path: Path) -> None:
    _, result, folder = demo
    assert (folder / "plot.svg").read_text().startswith("<?xml")
    report.draw({**result, "suggestion": None, "mass_ci95": None}, tmp_path / "plot.PNG")
    with Image.open(tmp_path / "plot.PNG") as picture:
        assert picture.format == "PNG"


def sequences(path: Path, *lines: Any) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def lines(*frames: int, condition: int = 11) -> list[dict[str, Any]]:
    ids = np.random.default_rng(0).integers(256, size=1000).tolist()
    return [{"token_ids": ids[: condition + 7 * n], "condition_tokens": condition} for n in frames]


def test_videos_of_a_file(models: Models, tmp_path: Path) -> None:
    """Videos differ in length and condition: all are cut to as many frames; without an image all is text."""
    path = sequences(tmp_path / "videos.jsonl", *lines(9, 8), *lines(10, condition=3))
    files = {"out": tmp_path / "out.yaml", "json_path": tmp_path / "all.json"}
    result = run(str(models["gqa"]), CONFIG, path, target=0.7, console=Console(file=io.StringIO()), **files)
    assert (result["videos"], result["frames"], result["condition_tokens"]) == (3, 8, [11, 11, 3])
    model = attention.load(models["gqa"])
    by_video = []
    for line in json.loads(f"[{','.join(path.read_text().splitlines())}]"):
        condition = line["condition_tokens"]
        layout = VideoLayout(LAYOUT.frame, condition, 4 if condition >= 4 else 0)
        own = Video(line["token_ids"][: layout.frame_start(8)], layout)
        by_video.append(attention.measure(model, own, 4, 16).by_segment.mean((0, 1)))
    np.testing.assert_allclose(result["mass_by_video"], by_video)
    assert yaml.safe_load(files["out"].read_text()) == result["config"]
    assert run(str(models["gqa"]), CONFIG, path, target=0.7, videos=1, **files)["fit"]["interval"] is None


def test_an_impossible_target_says_what_is_possible(models: Models, tmp_path: Path) -> None:
    path = sequences(tmp_path / "videos.jsonl", *lines(8, 8))
    arguments = [models["gqa"], "--config", CONFIG, "--sequences", path]
    files = ["--out", tmp_path / "out.yaml", "--json", tmp_path / "all.json", "--plot", tmp_path / "plot.png"]
    called = call(*arguments, *files, "--target", "0.999")
    assert called.exit_code == 2
    most = json.loads((tmp_path / "all.json").read_text())["most_kept"]
    assert f"{100 * most:.2f} %" in called.stderr
    assert len(called.stderr.splitlines()) == 1
    # Nobody must take an empty file for the configuration.
    assert not (tmp_path / "out.yaml").exists()
    assert (tmp_path / "plot.png").stat().st_size > 1000


THREE_AXES = (
    '{"layout": {"grid": [1, 7], "frame_start_tokens": 0, "axis_scale": [1, 1, 1], "condition_image_tokens": 7}}'
)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target", "1"], "--target must lie between"),
        (["--target", "nan"], "--target must lie between"),
        (["--plot", "plot.pdf"], "--plot must name a file that ends in .png or .svg"),
        (["--config", "demo"], "--config: a bundled model has its own"),
        (["--sequences", "x.jsonl"], "--sequences: a bundled model has its own"),
        (["MODEL"], "--config is needed"),
        (["MODEL", "--config", CONFIG], "--sequences is needed"),
        (["MODEL", "--config", "{}", "--sequences", "GOOD"], "has no layout"),
        (["MODEL", "--config", THREE_AXES, "--sequences", "GOOD"], "three axes"),
        (["MODEL", "--config", CONFIG, "--sequences", "GOOD", "--frames", "9"], "has 8 frames"),
        (["MODEL", "--config", CONFIG, "--sequences", "GOOD", "--videos", "3"], "has 2 videos, not 3"),
        (["MODEL", "--config", CONFIG, "--sequences", "none.jsonl"], "No such file"),
        (["MODEL", "--config", CONFIG, "--sequences", "SHORT"], "5 whole frames"),
        (["MODEL", "--config", CONFIG, "--sequences", "BAD"], "line 2 of"),
        (["MODEL", "--config", CONFIG, "--sequences", "STRANGE"], "between 0 and 255"),
        (["nowhere", "--config", CONFIG, "--sequences", "GOOD"], "no folder with a config.json"),
        (["--frames", "100", "--videos", "1"], "longer than the model's 20480 positions"),
    ],
)
def test_mistakes_get_a_sentence(arguments: list[str], words: str, models: Models, tmp_path: Path) -> None:
    strange = lines(8)[0]
    strange["token_ids"][5] = 256
    names: dict[str, Any] = {
        "MODEL": models["gqa"],
        "GOOD": sequences(tmp_path / "good.jsonl", *lines(8, 9)),
        "SHORT": sequences(tmp_path / "short.jsonl", *lines(8, 5)),
        "BAD": sequences(tmp_path / "bad.jsonl", *lines(8), {"token_ids": ["1"], "condition_tokens": 0}),
        "STRANGE": sequences(tmp_path / "strange.jsonl", strange),
    }
    called = call(*(names.get(argument, argument) for argument in arguments), "--out", tmp_path / "out.yaml")
    assert called.exit_code == 2
    assert words in called.stderr
    assert len(called.stderr.splitlines()) == 1
    assert not (tmp_path / "out.yaml").exists()


SMALL = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: transformers.BloomConfig(**SMALL, n_head=2, n_layer=2), "0 of 2 layers attend"),
        (lambda: transformers.MistralConfig(**SMALL, sliding_window=8, intermediate_size=32), "sliding_window"),
        (
            lambda: transformers.Qwen3Config(
                **SMALL, intermediate_size=32, use_sliding_window=True, sliding_window=8, max_window_layers=1
            ),
            "layers of type sliding_attention",
        ),
        (
            lambda: transformers.MambaConfig(vocab_size=256, hidden_size=32, num_hidden_layers=2),
            "type linear_attention",
        ),
    ],
    ids=["no interface", "window in the arguments", "window in the layers", "no attention"],
)
def test_models_that_would_be_measured_wrongly_are_refused(make: Callable[[], Any], words: str, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(make()).save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=words) as error:
        attention.measure(attention.load(tmp_path / "model"), video(), DISTANCES, BLOCK)
    assert str(error.value).startswith("MODEL: ")


def test_weights_are_not_made_up(models: Models, tmp_path: Path) -> None:
    shutil.copytree(models["gqa"], tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    del weights["model.layers.1.self_attn.k_proj.weight"]
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks 1 weights, such as model\.layers\.1\.self_attn\.k_proj"):
        attention.load(tmp_path / "model")


def test_what_changes_attention_is_not_ignored(models: Models) -> None:
    model = attention.load(models["gqa"])
    layer = model.model.layers[0].self_attn
    query = torch.zeros(1, 4, 3, 32)
    for options in ({"softcap": 30.0}, {"s_aux": torch.zeros(4)}, {"is_causal": False}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            attention._attention(layer, query, query, query, None, **options)
    with pytest.raises(ConfigError, match="attention_mask"):
        attention._attention(layer, query, query, query, torch.zeros(1, 1, 3, 3))


def test_sentences_say_what_is_odd() -> None:
    """A growing, badly fitted attention of one video past the trained length, whose best is none."""
    result: dict[str, Any] = {
        "largest_distance": 3, "frames": 20, "trained_frames": 16, "target": 0.9, "suggestion": None, "compared": [],
        "fit": {
            "rho": 1.2, "decay": 1.0, "r_squared": 0.2, "interval": None, "half_in_interval": None,
            "rho_by_layer": [1.0, 1.4],
        },
    }  # fmt: skip
    said = " ".join(report.sentences(result))
    for words in ("does not decay", "badly", "one video", "trained on videos of 16"):
        assert words in said
    good = {
        **result["fit"],
        "rho": 0.5,
        "decay": 0.5,
        "r_squared": 0.99,
        "interval": (0.4, 0.6),
        "half_in_interval": True,
    }
    own = {"history_frames": 2.0, "window": 4, "decay": 0.5, "kept_measured": 0.8}
    said = " ".join(report.sentences({**result, "frames": 16, "fit": good, "suggestion": own}))
    assert "lies inside" in said
    assert "within a frame, attention is not even" in said
    assert "badly" not in said


def test_measured_share_where_every_block_has_as_much() -> None:
    layout = VideoLayout(FrameLayout(4), 4)
    even = Mass(layout, np.full((1, 1, NEAREST + 2), 1 / 6), np.full((1, 1, 4), 0.25))
    # Frame 2 is block 3; the window of one frame is block 2; the condition is block 0.
    assert measured(PackCache(history_frames=1, window=1, selection="spatial"), [even], 4) == pytest.approx([0.75])
