"""Attention of a Lumos-1 checkpoint against transformers' Chameleon without a cache; the command on such a model."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AttentionInterface
from typer.testing import CliRunner

from tests.reference.chameleon import BruteForce, Chameleon
from vllm_packcache.calibrate import masked as masked_attention
from vllm_packcache.calibrate.command import run
from vllm_packcache.calibrate.decay import fit
from vllm_packcache.calibrate.mass import NEAREST, SEGMENTS, Video
from vllm_packcache.cli import app
from vllm_packcache.config.errors import ConfigError
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.core.layout import CONDITION, VideoLayout
from vllm_packcache.core.plan import Plan
from vllm_packcache.core.policies import Full, PackCache
from vllm_packcache.core.positions import Positions
from vllm_packcache.families import lumos
from vllm_packcache.families.lumos import MaskedOptions
from vllm_packcache.reference.models import make_random_lumos

GRID, FRAMES, DISTANCES, BLOCK = (3, 4), 6, 3, 8
CONFIG = json.dumps(
    {
        "layout": {
            **{"grid": GRID, "frame_start_tokens": 3, "row_end_tokens": 1, "frame_end_tokens": 1},
            **{"condition_image_tokens": 19, "axis_scale": [4, 8, 8]},
        }
    }
)
TEXT = lumos.text_prompt(list(range(100, 109)), 2, 12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_lumos(tmp_path_factory.mktemp("lumos"), heads=4, kv_heads=2, layers=2)


def video(seed: int = 0, frames: int = FRAMES, images: int = 1) -> Video:
    codes = np.random.default_rng(seed).integers(0, 64, (images + frames, *GRID))
    ids = TEXT + [token for frame in codes for token in lumos.frame_of_codes(frame).tolist()]
    return Video(ids, lumos.video_layout(ids, GRID, images))


class Watched(Chameleon):
    """Keeps the weights of the last segment, those of the frame being made: [heads, F, T] a layer."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.config._attn_implementation = "watched"
        self.weights: list[torch.Tensor] = []


def watched(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> Any:
    model: Watched = options["model"]
    groups = module.num_key_value_groups
    keys, values = (heads[0].repeat_interleave(groups, 0) for heads in (key, value))
    read = []
    for first, last, at, seen in options["segments"]:
        queries = model.turn(query[0, :, first:last], at[:, first:last])
        scores = queries @ model.turn(keys, at).transpose(1, 2) / math.sqrt(query.shape[-1])
        weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
        read.append(weights @ values)
    model.weights.append(weights)
    return torch.cat(read, 1).transpose(0, 1)[None], None


AttentionInterface.register("watched", watched)


def segment_of(layout: VideoLayout, frame: int, token: int) -> str:
    other = layout.frame_of(token)
    if other == CONDITION:
        return "text" if token < layout.condition_tokens - layout.condition_image_tokens else "conditioning image"
    if other == frame:
        return "own frame"
    return f"distance {frame - other}" if frame - other <= DISTANCES else "older frames"


NAMES = [*SEGMENTS, *(f"distance {d}" for d in range(1, DISTANCES + 1))]


@pytest.mark.parametrize("images", [0, 1])
def test_mass_is_that_of_transformers_without_a_cache(folder: Path, images: int) -> None:
    own = video(images=images)
    layout, options = own.layout, MaskedOptions()
    masses = masked_attention.measure(masked_attention.load(folder), own, DISTANCES, BLOCK)

    model = Watched(folder)
    prompt = own.token_ids[: layout.condition_tokens]
    plan = Plan(layout, Full(), Positions(layout, scale=(4, 8, 8)))
    brute = BruteForce(model, prompt, plan, options, BLOCK)
    by_segment = {name: np.zeros((2, 4, len(NAMES))) for name in masses}
    by_block: dict[str, list[np.ndarray]] = {name: [] for name in masses}
    for frame in range(FRAMES):
        true = own.token_ids[layout.frame_start(frame) : layout.frame_start(frame + 1)]
        for step, unknown in {"half-way": 8, "nearly finished": 1}.items():
            shown = masked_attention._as_after(torch.tensor(true), GRID, frame, masked_attention.STEPS[step]).tolist()
            # Of 12 visual tokens floor(12 cos(pi / 4)) and floor(12 cos(0.45 pi)) are unknown.
            hidden = [token for token, now in zip(true, shown, strict=True) if now != token]
            assert len(hidden) == shown.count(9003) == unknown
            assert min(hidden) >= 65536
            for number, stream in enumerate(masked_attention.STREAMS):
                model.weights.clear()
                brute.frame_logits(number, shown)
                weights = torch.stack(model.weights).double().mean(2).numpy()
                if frame < DISTANCES:
                    continue
                name, (stream_plan, _) = f"{stream}, {step}", brute.streams[number]
                for token in range(weights.shape[-1]):
                    segment = NAMES.index(segment_of(stream_plan.layout, frame, token))
                    by_segment[name][:, :, segment] += weights[:, :, token] / (FRAMES - DISTANCES)
                blocks = [weights[..., i : i + BLOCK].sum(-1).mean(1) for i in range(0, weights.shape[-1], BLOCK)]
                by_block[name].append(np.stack(blocks, 1))
        for _, history in brute.streams:
            history += lumos.committed(np.array(true), options.remask).tolist()

    assert len(masses) == 4
    for name, mass in masses.items():
        text = mass.layout.condition_tokens - mass.layout.condition_image_tokens
        assert text == (len(TEXT) if name.startswith("conditional") else 3)
        np.testing.assert_allclose(mass.by_segment, by_segment[name], atol=1e-5, rtol=0)
        np.testing.assert_allclose(mass.by_segment.sum(-1), 1, atol=1e-5)
        for row, blocks in zip(mass.by_block, by_block[name], strict=True):
            np.testing.assert_allclose(row[:, : blocks.shape[1]], blocks, atol=1e-5, rtol=0)
            assert not row[:, blocks.shape[1] :].any()
    different = [masses[name].by_segment for name in masses]
    assert min(np.abs(a - b).max() for i, a in enumerate(different) for b in different[:i]) > 1e-3


def test_many_queries_are_counted_once(folder: Path) -> None:
    """More than the reference attends for at once."""
    grid = (24, 24)
    codes = np.random.default_rng(0).integers(0, 64, (3, *grid))
    ids = TEXT + [token for frame in codes for token in lumos.frame_of_codes(frame).tolist()]
    own = Video(ids, lumos.video_layout(ids, grid))
    for mass in masked_attention.measure(masked_attention.load(folder), own, 2, BLOCK).values():
        assert mass.by_segment.shape == (2, 4, 4 + 2)
        np.testing.assert_allclose(mass.by_segment.sum(-1), 1, atol=1e-5)


def test_nobody_is_watched_afterwards(folder: Path) -> None:
    model = masked_attention.load(folder)
    masked_attention.measure(model, video(), DISTANCES, BLOCK)
    assert model.watch is None


# ---------------------------------------------------------------------------------------------------------------------
# The command


def sequences(path: Path, *videos: Video, **changed: Any) -> Path:
    lines = [{"token_ids": own.token_ids, "condition_tokens": own.layout.condition_tokens} | changed for own in videos]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def done(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    """The command on three videos, one of them without an image: JSON, what it printed, its folder."""
    out = tmp_path_factory.mktemp("out")
    path = sequences(out / "videos.jsonl", video(0), video(1, FRAMES + 1), video(2, images=0))
    console = Console(file=io.StringIO(), width=130)
    run(
        str(folder),
        CONFIG,
        path,
        out=out / "out.yaml",
        target=0.7,
        plot_path=out / "plot.png",
        json_path=out / "all.json",
        console=console,
    )
    assert isinstance(console.file, io.StringIO)
    return json.loads((out / "all.json").read_text()), console.file.getvalue(), out


def test_all_passes_count_alike(done: tuple[dict[str, Any], str, Path], folder: Path) -> None:
    result, _, _ = done
    assert (result["benchmark"], result["videos"], result["frames"]) == ("calibrate-masked", 3, FRAMES)
    model = masked_attention.load(folder)
    masses = [masked_attention.measure(model, own, 3, 16) for own in (video(0), cut(video(1, 7)), video(2, images=0))]
    expected = [np.mean([mass.by_segment.mean((0, 1)) for mass in own.values()], 0) for own in masses]
    np.testing.assert_allclose(result["mass_by_video"], expected)
    assert set(result["views"]) == set(masses[0])
    for name, view in result["views"].items():
        by_video = np.array([own[name].by_segment.mean((0, 1)) for own in masses])
        np.testing.assert_allclose(view["mass"], by_video.mean(0))
        assert view["rho"] == pytest.approx(fit(by_video[:, NEAREST:]).rho)


def cut(own: Video) -> Video:
    return Video(own.token_ids[: own.layout.frame_start(FRAMES)], own.layout)


def test_the_configuration_is_one_for_this_model(done: tuple[dict[str, Any], str, Path]) -> None:
    result, printed, out = done
    server = ServerConfig.parse("packcache", str(out / "out.yaml"))
    assert server.layout == ServerConfig.parse("packcache", CONFIG).layout
    assert server.positions == "rebase"
    options = {key: result["suggestion"][key] for key in ("history_frames", "window", "decay")}
    assert server.policy == PackCache(**options, selection="spatial")
    assert result["suggestion"]["kept"] >= 0.7
    for words in ("Attention by pass", "unconditional,", "nearly"):
        assert words in " ".join(printed.split())
    assert "…" not in printed
    with Image.open(out / "plot.png") as picture:
        assert picture.format == "PNG"


def test_kept_is_measured_in_both_streams(done: tuple[dict[str, Any], str, Path], folder: Path) -> None:
    """Streams have other blocks: each is asked of its own."""
    result, _, _ = done
    options = {key: result["suggestion"][key] for key in ("history_frames", "window", "decay")}
    policy = PackCache(**options, selection="spatial")
    model = masked_attention.load(folder)
    kept = []
    for own in (video(0), cut(video(1, 7)), video(2, images=0)):
        for mass in masked_attention.measure(model, own, 3, 16).values():
            plan = Plan(mass.layout, policy, Positions(mass.layout))
            for frame, row in zip(range(3, FRAMES), mass.by_block, strict=True):
                live = live_blocks(plan, frame, row.shape[1])
                kept.append(row[:, live].sum(-1))
    np.testing.assert_allclose(result["suggestion"]["kept_measured_by_layer"], np.mean(kept, 0))


def live_blocks(plan: Plan, frame: int, blocks: int) -> np.ndarray:
    from vllm_packcache.reference.visibility import frame_visibility

    seen = frame_visibility(plan, 16, frame).numpy()
    seen = np.pad(seen, (0, 16 * blocks - len(seen)))
    return seen.reshape(blocks, 16).any(1)


CAUSAL = json.dumps({"layout": {"tokens_per_frame": 19}})


@pytest.mark.parametrize(
    ("config", "change", "words"),
    [
        (CAUSAL, {}, "has not the layout of this MODEL, a Lumos-1"),
        (CONFIG, {"condition_tokens": 13}, "the first picture, of which the last 3"),
        (CONFIG, {"token": (60, 9003)}, "no finished frame"),
        (CONFIG, {"token": (60, 65536 + 64)}, "between 0 and 65599"),
        (CONFIG, {"token": (30, 9003)}, "no finished frame"),
    ],
)
def test_mistakes_get_a_sentence(config: str, change: dict[str, Any], words: str, folder: Path, tmp_path: Path) -> None:
    own = video()
    if "token" in change:
        place, token = change.pop("token")
        own.token_ids[place] = token
    path = sequences(tmp_path / "videos.jsonl", own, **change)
    arguments = ["--config", config, "--sequences", str(path), "--out", str(tmp_path / "out.yaml")]
    called = CliRunner().invoke(app, ["calibrate", str(folder), *arguments])
    assert called.exit_code == 2, called.output
    assert words in called.stderr
    assert len(called.stderr.splitlines()) == 1
    assert not (tmp_path / "out.yaml").exists()


def test_a_weight_that_lacks_is_named(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.self_attn.k_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ConfigError, match=r"MODEL: it lacks the weight .*layers\.1\.self_attn\.k_proj"):
        masked_attention.measure(masked_attention.load(tmp_path), video(), DISTANCES, BLOCK)


def test_a_checkpoint_is_recognised_by_its_architecture(folder: Path, tmp_path: Path) -> None:
    assert masked_attention.recognises(folder)
    assert not masked_attention.recognises(tmp_path)
    for text in ("{", "{}", '{"architectures": ["LlamaForCausalLM"]}', '{"architectures": []}'):
        (tmp_path / "config.json").write_text(text)
        assert not masked_attention.recognises(tmp_path)
