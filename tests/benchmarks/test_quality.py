"""Quality of the bundled models' videos: decoders against the references, the measures, and the whole command."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from typer.testing import CliRunner

from benchmarks.protocol import Benchmark
from benchmarks.quality.benchmark import CACHED as QUALITY_CACHED
from benchmarks.quality.benchmark import CAUSAL as QUALITY
from benchmarks.quality.benchmark import GUIDED as QUALITY_GUIDED
from benchmarks.quality.benchmark import HISTORY as QUALITY_HISTORY
from benchmarks.quality.benchmark import MASKED as QUALITY_MASKED
from benchmarks.quality.decoder import Second, VideoCache, generate
from benchmarks.quality.generators import Cached, Causal, Encoded, Guided, Masked
from benchmarks.quality.history import fading
from benchmarks.quality.live_lumos import LiveLumos
from benchmarks.quality.measures import MEASURES, measure, recognises
from benchmarks.quality.runs import COPY, TRUTH, QualityPlan
from benchmarks.quality.variants import BLOCK_SIZE, BUDGETS, DEFAULT_BUDGET, FULL_CACHE, Variant, Variants
from benchmarks.training.llama import Llama, load_pretrained
from vllm_packcache.cli import app
from vllm_packcache.core import plan as plans
from vllm_packcache.core.layout import VideoLayout
from vllm_packcache.core.packing import Packing
from vllm_packcache.core.policies import AttentionSink, Full, PackCache, Policy, SlidingWindow
from vllm_packcache.core.positions import Positions
from vllm_packcache.demo.masked import bundle
from vllm_packcache.demo.masked.tokenizer import build_text_tokenizer
from vllm_packcache.demo.scores import FIRST_HELD_OUT_SEED, sequence, true_frames
from vllm_packcache.demo.tokenizer import FRAME_TOKENS, MODEL_DIR, VideoTokenizer, world_prompt
from vllm_packcache.demo.world import make_world, palette
from vllm_packcache.families import lumos
from vllm_packcache.families.lumos import MaskedOptions
from vllm_packcache.reference import GuidedVideo, LlamaReference, LumosReference, generate_masked, make_random_lumos
from vllm_packcache.reference.history import decode_reference
from vllm_packcache.tools.figures import FORMATS
from vllm_packcache.worker.history.codec import encode

TINY = QualityPlan(videos=3, frontier_videos=2, trained_frames=2, lengths=2)
CAUSAL = Causal().variants
VARIANTS = CAUSAL.named


@pytest.fixture(scope="module")
def model() -> Llama:
    return load_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def tokenizer() -> VideoTokenizer:
    return VideoTokenizer()


# ---------------------------------------------------------------------------------------------------------------------
# What is compared


@pytest.mark.parametrize(
    ("variants", "condition", "frame"),
    [(CAUSAL, 288, 257), (Masked().variants, 21 + 276, 276)],
    ids=["causal", "masked"],
)
def test_a_budget_is_the_same_number_of_live_tokens_for_everyone(variants: Variants, condition: int, frame: int):
    by_budget: dict[float | None, set[int]] = {}
    for variant in (*variants.compared, *variants.selections, *variants.frontier):
        # Late: when a budget of 8 frames has long been used up.
        by_budget.setdefault(variant.budget, set()).add(variant.live_tokens(63))

    assert set(by_budget) == (set(BUDGETS) if variants.frontier else {1, DEFAULT_BUDGET})
    if variants.frontier:
        assert max(by_budget[DEFAULT_BUDGET]) - min(by_budget[DEFAULT_BUDGET]) <= BLOCK_SIZE
    for live in by_budget.values():
        # A policy may round each of many frames up to a block.
        assert max(live) - min(live) <= 8 * BLOCK_SIZE
    assert variants.full.live_tokens(63) == condition + 63 * frame


def test_every_policy_of_the_comparison_is_a_configuration_of_its_own():
    assert len({json.dumps([v.policy, v.server.as_mapping()]) for v in VARIANTS}) == len(VARIANTS)
    assert {v.policy for v in VARIANTS} == {"full", "packcache", "sliding_window", "attention_sink"}


# ---------------------------------------------------------------------------------------------------------------------
# The decoder


@pytest.mark.parametrize(
    "variant", [v for v in VARIANTS if not v.server.policy.reads_tokens][::2], ids=lambda variant: variant.name
)
def test_generates_what_the_reference_finds_likeliest(model, tokenizer, variant: Variant):
    frames = 6
    world = make_world(FIRST_HELD_OUT_SEED + 3)
    prompt = world_prompt(tokenizer, world)
    cache = VideoCache(model.size, variant.plan(), BLOCK_SIZE, frames)

    ids = generate(model, cache, prompt, frames, lambda made: made[-1] if len(made) else np.zeros(FRAME_TOKENS, int))

    logits = LlamaReference.load(MODEL_DIR).logits(
        [*prompt, *ids.reshape(-1).tolist()[:-1]], variant.plan(), BLOCK_SIZE
    )
    assert logits[len(prompt) - 1 :].argmax(-1).tolist() == ids.reshape(-1).tolist()


def test_the_guess_decides_nothing(model, tokenizer):
    world = make_world(FIRST_HELD_OUT_SEED + 1)
    prompt = world_prompt(tokenizer, world)
    truth = sequence(tokenizer, true_frames(tokenizer, world, 3)[1:]).reshape(3, FRAME_TOKENS)
    generator = np.random.default_rng(0)
    guesses = (
        lambda made: truth[len(made)],
        lambda made: generator.integers(tokenizer.vocab_size, size=FRAME_TOKENS),
    )

    plan = CAUSAL.compared[0].plan()
    made = [generate(model, VideoCache(model.size, plan, BLOCK_SIZE, 3), prompt, 3, guess) for guess in guesses]

    assert made[0].tolist() == made[1].tolist()


@pytest.mark.parametrize(("fewer", "scale"), [(0, 0.3), (10, 2)], ids=["as long", "a shorter negative prompt"])
def test_generates_what_the_guided_reference_finds_likeliest(model, tokenizer, fewer: int, scale: float):
    frames, variant = 4, CAUSAL.compared[0]
    prompt = world_prompt(tokenizer, make_world(FIRST_HELD_OUT_SEED + 3))
    negative = [prompt[0], *[tokenizer.pad_id] * (30 - fewer), *prompt[31:]]
    plan, other = variant.plan(), variant.plan(len(negative))

    def made(*second: Second) -> list[int]:
        cache = VideoCache(model.size, plan, BLOCK_SIZE, frames)
        draft = lambda made: made[-1] if len(made) else np.zeros(FRAME_TOKENS, int)  # noqa: E731
        return generate(model, cache, prompt, frames, draft, *second).reshape(-1).tolist()

    ids = made(Second(VideoCache(model.size, other, BLOCK_SIZE, frames), negative, scale))

    video = GuidedVideo(len(prompt), negative, scale, plan, other, BLOCK_SIZE)
    logits = video.logits(LlamaReference.load(MODEL_DIR), [*prompt, *ids[:-1]])
    chosen = logits.gather(-1, torch.tensor(ids)[:, None])[:, 0]
    # Of tokens that are as good as each other either may be taken.
    assert (logits.amax(-1) - chosen).max() < 1e-3
    assert ids != made()


GRID, BLOCK = (3, 4), 8


@pytest.fixture(scope="module", params=[(4, 2), (2, 2)], ids=["grouped heads", "as many heads"])
def random_folder(request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    heads, kv_heads = request.param
    return make_random_lumos(tmp_path_factory.mktemp("lumos"), heads=heads, kv_heads=kv_heads)


@pytest.mark.parametrize(
    "policy",
    [
        Full(),
        PackCache(window=2, history_frames=1.0, selection="spatial"),
        SlidingWindow(window=1),
        AttentionSink(sink_tokens=8, recent_tokens=40),
    ],
    ids=lambda policy: policy.name,
)
@pytest.mark.parametrize("rebase", [True, False], ids=["rebase", "absolute"])
def test_live_tokens_make_the_video_that_the_reference_makes(random_folder: Path, policy: Policy, rebase: bool):
    codes = np.random.default_rng(0).integers(0, 64, (1, *GRID))
    prompt = lumos.text_prompt(list(range(100, 112)), 2, 12) + lumos.frame_of_codes(codes[0]).tolist()
    layout = lumos.video_layout(prompt, GRID, 1)
    plan = plans.Plan(layout, policy, Positions(layout, policy.history_window if rebase else None, (4, 8, 8)))
    options = MaskedOptions(seed=3, steps=4, guidance=3.0)

    everything = plans.Plan(layout, Full(), Positions(layout, None, (4, 8, 8)))
    fast, slow = LiveLumos.load(random_folder), LumosReference.load(random_folder)

    made = generate_masked(fast, prompt, 7, plan, options, BLOCK).token_ids

    assert made == generate_masked(slow, prompt, 7, plan, options, BLOCK).token_ids
    kept_all = made == generate_masked(slow, prompt, 7, everything, options, BLOCK).token_ids
    assert kept_all == isinstance(policy, Full)


@pytest.fixture(scope="module")
def masked_model(tmp_path_factory: pytest.TempPathFactory) -> Masked:
    """A random one, with the ids of the bundled one."""
    folder = make_random_lumos(tmp_path_factory.mktemp("lumos"), visual_codes=len(palette().patches))
    return Masked(folder, MaskedOptions(steps=2, guidance=2.0))


@pytest.mark.parametrize("number", [1, 4])
def test_a_masked_video_is_that_of_a_request(masked_model: Masked, tokenizer, number: int):
    variant = masked_model.variants.compared[number]
    seed = FIRST_HELD_OUT_SEED + 1
    world = make_world(seed)

    made = masked_model.maker(variant, 3)(range(seed, seed + 1))[0]

    words = build_text_tokenizer().encode(world.prompt).ids
    prompt = [0, *words, 8710, 9004, 8804 + 3, 8804 + 4, *lumos.frame_of_codes(world.frame_ids(0)).tolist()]
    layout = VideoLayout(lumos.frame_layout((16, 16)), len(prompt), 276)
    server = variant.server
    plan = plans.Plan(layout, server.policy, server.positions_of(layout, server.policy))
    assert plan.positions.scale == (4, 8, 8)
    options = replace(masked_model.options, seed=seed)
    frames = generate_masked(LumosReference.load(masked_model.checkpoint), prompt, 3, plan, options, BLOCK_SIZE).frames
    codes = [lumos.codes_of_frame(frame, (16, 16)) for frame in frames.numpy()]
    assert made.tolist() == (np.stack(codes) + tokenizer.visual_offset).tolist()
    assert made.min() >= tokenizer.visual_offset


# ---------------------------------------------------------------------------------------------------------------------
# The measures


def measured(world, frames, truth, tokenizer) -> dict[str, Any]:
    return {name: (c.total[0], c.of[0]) for name, c in measure(world, frames, truth, tokenizer).items()}


def test_the_true_video_is_perfect(tokenizer):
    for seed in range(FIRST_HELD_OUT_SEED, FIRST_HELD_OUT_SEED + 5):
        world = make_world(seed)
        truth = true_frames(tokenizer, world, 20)
        found = measured(world, truth[1:], truth, tokenizer)

        assert set(found) == set(MEASURES)
        for name in ("tokens_right", "identity", "identity_after_occlusion", "ssim"):
            assert (found[name][0] == found[name][1]).all(), name
        assert (found["psnr_db"][0] == 60).all()
        assert not found["flicker"][0].any()
        assert (found["flicker"][1] > 0).all()


def occluded_world():
    """A world whose first object is behind the pillar at some frame, and that frame."""
    for seed in range(FIRST_HELD_OUT_SEED, FIRST_HELD_OUT_SEED + 100):
        world = make_world(seed)
        hidden = [k for k in range(1, 20) if world.hidden(0, k)]
        if hidden and len(world.objects) == 1:
            return world, hidden
    raise AssertionError("no such world")


def test_an_object_counts_where_it_can_be_seen_and_after_it_was_hidden(tokenizer):
    world, hidden = occluded_world()
    truth = true_frames(tokenizer, world, 20)
    found = measured(world, truth[1:], truth, tokenizer)

    seen, after = found["identity"][1], found["identity_after_occlusion"][1]
    assert all(seen[k - 1] == 0 for k in hidden)
    assert not after[: hidden[0]].any()
    assert (after[hidden[0] :] == seen[hidden[0] :]).all()
    assert after.sum() > 0


def test_an_object_may_be_elsewhere_but_not_another(tokenizer):
    world, _ = occluded_world()
    shown = world.frame_ids(0)
    assert recognises(world, 0, shown)
    # Of another time, so at another place.
    assert recognises(world, 0, world.frame_ids(2))
    cells = world.object_cells(0, 0)
    for row, column, _ in cells.tolist():
        spoilt = shown.copy()
        spoilt[row, column] = world.background[row, column]
        assert not recognises(world, 0, spoilt)
    assert not recognises(world, 0, world.background)


def test_pictures_are_compared_by_scikit_image_and_flicker_is_change_where_nothing_moves(tokenizer):
    world = make_world(FIRST_HELD_OUT_SEED)
    truth = true_frames(tokenizer, world, 3)
    frames = truth[1:].copy()
    still = np.argwhere((truth == truth[0]).all(0))[0]
    # One cell shows another patch in the second frame only.
    frames[1][tuple(still)] = tokenizer.visual_offset
    found = measured(world, frames, truth, tokenizer)

    true, shown = tokenizer.decode_frames(truth), tokenizer.decode_frames(frames)
    assert found["psnr_db"][0][1] == pytest.approx(peak_signal_noise_ratio(true[2], shown[1]))
    assert found["ssim"][0][1] == pytest.approx(structural_similarity(true[2], shown[1], channel_axis=2))
    assert found["tokens_right"][0].tolist() == [256, 255, 256]
    change = np.abs(shown[1].astype(int) - true[2]).sum()
    # It comes and it goes.
    assert found["flicker"][0].tolist() == [0, change, change]
    moving = [(true[k + 1] != true[k]).any(-1).sum() for k in range(3)]
    assert found["flicker"][1].tolist() == [3 * (64 * 64 - n) for n in moving]


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """A folder with everything, what `run` returned and what it printed."""
    folder = tmp_path_factory.mktemp("quality") / "new"
    console = Console(file=io.StringIO(), width=80)
    result = QUALITY.run_in(folder, plan=TINY, console=console)
    assert isinstance(console.file, io.StringIO)
    return folder, result, console.file.getvalue()


def test_everything_is_written(done):
    folder, result, printed = done
    assert json.loads((folder / "quality.json").read_text()) == json.loads(json.dumps(result))
    for name in ("frontier", "by_frame", "videos"):
        assert {path.suffix for path in folder.glob(f"{name}.*")} == set(FORMATS)
        with Image.open(folder / f"{name}.png") as picture:
            assert len(picture.convert("RGB").getcolors(2**24)) > 100
    for variant in VARIANTS:
        assert variant.name in printed
    assert "…" not in printed


def test_scores_have_every_variant_and_the_lengths_it_reaches(done):
    _, result, _ = done
    assert result["spans"] == ["frames 1-2", "frames 3-4"]
    assert list(result["scores"]) == [*(variant.name for variant in VARIANTS), TRUTH, COPY]
    for variant in VARIANTS:
        reached = min(2, variant.lengths)
        for score in result["scores"][variant.name].values():
            assert list(score["spans"]) == result["spans"][:reached]
    assert result["scores"][TRUTH]["tokens_right"]["spans"]["frames 3-4"] == {"mean": 1, "ci95": 0}
    assert [point["budget"] for point in result["frontier"]] == [None, *(variant.budget for variant in CAUSAL.frontier)]


def test_differences_are_of_the_same_videos(done):
    folder, result, _ = done

    def tokens_right(name: str) -> np.ndarray:
        parts = [np.load(path) for path in sorted(folder.glob(f"parts/{name}-1*.npz"))]
        # Of what is compared, not the frontier's part, which has fewer videos.
        (part,) = (part for part in parts if len(part["tokens_right_total"]) == TINY.videos)
        return part["tokens_right_total"][:, 2:4].sum(1) / part["tokens_right_of"][:, 2:4].sum(1)

    by_video = tokens_right("packcache") - tokens_right("last-frame")
    found = result["differences"]["packcache - last frame"]["tokens_right"]["frames 3-4"]
    assert found["mean"] == pytest.approx(by_video.mean(), abs=1e-4)
    assert found["ci95"] == pytest.approx(1.96 * by_video.std(ddof=1) / 3**0.5, abs=1e-4)


def test_goals_follow_from_the_differences(done):
    _, result, _ = done
    assert {(t["goal"], t["span"]) for t in result["targets"]} == {
        ("packcache not worse than full cache", "frames 1-2"),
        ("packcache better than last frame", "frames 3-4"),
        ("packcache better than last frame, absolute", "frames 3-4"),
        ("changed not worse than full cache", "frames 1-2"),
        ("changed better than last frame", "frames 3-4"),
        ("changed better than last frame, absolute", "frames 3-4"),
        ("changed better than packcache", "frames 1-2"),
        ("changed better than packcache", "frames 3-4"),
    }
    for target in result["targets"]:
        mean = target["mean"] if target["measure"] != "flicker" else -target["mean"]
        expected = mean + target["ci95"] >= 0 if "not worse" in target["goal"] else mean - target["ci95"] > 0
        assert target["met"] == expected


def test_csv_has_every_mean(done):
    folder, result, _ = done
    with (folder / "quality.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    scores = {(r["name"], r["measure"], r["span"]): r["mean"] for r in rows if r["table"] == "scores"}
    for name, measures in result["scores"].items():
        for label, score in measures.items():
            for span, found in score["spans"].items():
                assert scores[name, label, span] == ("" if found is None else str(found["mean"]))
    assert sum(row["table"] == "frontier" for row in rows) == len(result["frontier"]) * len(MEASURES)


def test_what_is_done_is_not_done_again(done):
    folder, result, _ = done
    parts = sorted((folder / "parts").iterdir())
    parts[0].unlink()
    before = {path: path.stat().st_mtime_ns for path in parts[1:]}

    again = QUALITY.run_in(folder, plan=TINY, console=Console(file=io.StringIO()))

    assert sorted((folder / "parts").iterdir()) == parts
    assert {path: path.stat().st_mtime_ns for path in parts[1:]} == before
    for key in ("scores", "differences", "frontier", "targets"):
        assert again[key] == result[key]


def test_a_masked_model_is_judged_in_the_same_way(masked_model: Masked, tmp_path):
    plan = QualityPlan(generator=masked_model, videos=2, trained_frames=1, lengths=2)
    console = Console(file=io.StringIO(), width=100)
    result = QUALITY_MASKED.run_in(tmp_path, plan=plan, console=console)

    names = [variant.name for variant in masked_model.variants.named]
    assert list(result["scores"]) == [*names, TRUTH, COPY]
    assert names[0] == FULL_CACHE
    assert {variant["policy"] for variant in result["variants"].values()} == {
        *("full", "packcache", "sliding_window", "attention_sink")
    }
    assert result["benchmark"] == "quality-masked"
    assert result["frontier"] == []
    assert result["model"]["options"]["steps"] == 2
    assert json.loads((tmp_path / "quality_masked.json").read_text()) == json.loads(json.dumps(result))
    pictures = {f"{stem}{suffix}" for stem in ("quality_masked", "videos_masked") for suffix in FORMATS}
    assert {path.name for path in tmp_path.iterdir()} == {
        *("quality_masked.json", "quality_masked.csv", "parts"),
        *pictures,
    }
    assert result["spans"] == ["frames 1-1", "frames 2-2"]
    (part,) = tmp_path.glob("parts/packcache-1*.npz")
    with np.load(part) as stored:
        found = stored["tokens_right_total"][:, 0] / stored["tokens_right_of"][:, 0]
    assert result["scores"]["packcache"]["tokens_right"]["spans"]["frames 1-1"]["mean"] == pytest.approx(
        found.mean(), abs=1e-4
    )
    # Other steps are another video.
    again = replace(masked_model, options=replace(masked_model.options, steps=3))
    assert again.described != masked_model.described


def test_guided_videos_are_compared_with_those_without_guidance(tmp_path):
    generator = Guided(scales=(0.1, 3))
    plan = QualityPlan(generator=generator, videos=2, trained_frames=1)
    result = QUALITY_GUIDED.run_in(tmp_path, plan=plan, console=Console(file=io.StringIO(), width=100))

    policies = [FULL_CACHE, "packcache", "changed"]
    names = [*policies, *(f"{name}, guidance {scale}" for scale in (0.1, 3) for name in policies)]
    assert list(result["scores"]) == [*names, TRUTH, COPY]
    assert [own.get("guidance") for own in result["variants"].values()] == [None] * 3 + [0.1] * 3 + [3] * 3
    assert list(result["differences"]) == [
        *("packcache - full cache", "changed - full cache"),
        *("packcache, guidance 0.1 - full cache, guidance 0.1", "changed, guidance 0.1 - full cache, guidance 0.1"),
        *(f"{name}, guidance 0.1 - {name}" for name in policies),
        *("packcache, guidance 3 - full cache, guidance 3", "changed, guidance 3 - full cache, guidance 3"),
        *(f"{name}, guidance 3 - {name}" for name in policies),
    ]
    assert "targets" not in result
    pictures = {f"{stem}{suffix}" for stem in ("quality_guided", "videos_guided") for suffix in FORMATS}
    assert {path.name for path in tmp_path.iterdir()} == {
        *("quality_guided.json", "quality_guided.csv", "parts"),
        *pictures,
    }
    # What has no scale is what is made without this option, and what has one is not.
    stored = {}
    for path in tmp_path.glob("parts/full-cache-*.npz"):
        with np.load(path) as part:
            stored[path.name.split("-1000")[0]] = part["frames"].tolist()
    seeds = range(FIRST_HELD_OUT_SEED, FIRST_HELD_OUT_SEED + 2)
    assert stored["full-cache"] == Causal().maker(CAUSAL.full, 1)(seeds).tolist()
    assert stored["full-cache-guidance-0.1"] != stored["full-cache"]


def test_caches_of_fewer_bits_are_compared_with_bfloat16(monkeypatch, tmp_path):
    plan = QualityPlan(generator=Cached(formats=("fp8_e5m2",)), videos=2, trained_frames=3)
    result = QUALITY_CACHED.run_in(tmp_path, plan=plan, console=Console(file=io.StringIO(), width=100))

    kinds = ("bfloat16", "fp8_e5m2", "fp8_e5m2, equal bytes")
    names = [f"{name}, {kind}" for name in ("packcache", "changed") for kind in kinds]
    assert list(result["scores"]) == [*names, TRUTH, COPY]
    assert list(result["differences"]) == [
        f"{name}, {kind} - {name}, bfloat16" for name in ("packcache", "changed") for kind in kinds[1:]
    ]
    assert [own["cache"] for own in result["variants"].values()] == [*("bfloat16", "fp8_e5m2", "fp8_e5m2")] * 2
    base, same, larger = (result["variants"][name] for name in names[:3])
    assert same["config"] == base["config"] != larger["config"]
    assert same["bytes"] == base["bytes"] // 2
    assert {target["goal"] for target in result["targets"]} == {
        f"{name}, {kinds[2]} better than {name}, {kinds[0]}" for name in ("packcache", "changed")
    }
    assert {target["measure"] for target in result["targets"]} <= {"identity", "identity_after_occlusion"}
    for target in result["targets"]:
        assert target["met"] == (target["mean"] > target["ci95"])
    assert {path.suffix for path in tmp_path.glob("quality_cached.*")} == {".json", ".csv", *FORMATS}
    # The model is as sure of what it says as to say it from a cache of 8 bits; from one of nothing it cannot.
    (variant,), seeds = plan.generator.policies_in_formats[0].same, range(FIRST_HELD_OUT_SEED, FIRST_HELD_OUT_SEED + 1)
    rounded = plan.generator.maker(variant, 1)(seeds).tolist()
    monkeypatch.setattr("benchmarks.formats.rounded_to", lambda dtype, numbers: torch.zeros_like(numbers))
    assert plan.generator.maker(variant, 1)(seeds).tolist() != rounded


def test_encoded_histories_are_compared_with_frames_as_they_were_written(monkeypatch, tmp_path):
    generator = Encoded(options=replace(bundle.OPTIONS, steps=1, guidance=1.0), formats=("int4",), budget=2)
    plan = QualityPlan(generator=generator, videos=2, trained_frames=3)
    result = QUALITY_HISTORY.run_in(tmp_path, plan=plan, console=Console(file=io.StringIO(), width=100))

    base, same = "last 2 frames", "last 2 frames, int4"
    larger = generator.kept.larger[0].name
    assert list(result["scores"]) == [FULL_CACHE, base, same, larger, TRUTH, COPY]
    assert list(result["differences"]) == [f"{own} - {base}" for own in (same, larger)]
    variants = result["variants"]
    assert [variants[name]["cache"] for name in (base, same, larger)] == ["auto", "int4", "int4"]
    assert [variants[name]["config"]["window"] for name in (base, same, larger)] == [2, 2, 3]
    most = variants[FULL_CACHE]["bytes"]
    assert variants[same]["bytes"] < variants[larger]["bytes"] <= variants[base]["bytes"] < most
    assert {target["goal"] for target in result["targets"]} == {f"{larger} better than {base}"}
    assert {path.suffix for path in tmp_path.glob("quality_history.*")} == {".json", ".csv", *FORMATS}
    # In the third frame the first is older than the newest.
    (variant,), seeds = generator.kept.same, range(FIRST_HELD_OUT_SEED, FIRST_HELD_OUT_SEED + 1)
    own, written = (generator.maker(variant, 3)(seeds) for variant in (variant, generator.kept.base))
    assert (own[:, :2] == written[:, :2]).all()
    wrong = (torch.tensor(10.0), torch.tensor(10.0))
    monkeypatch.setattr("vllm_packcache.worker.history.codec.decode", lambda *_: wrong)
    spoiled = generator.maker(variant, 3)(seeds)
    assert (spoiled[:, :2] == written[:, :2]).all()
    assert (spoiled != written).sum() > 100 > (own != written).sum()


def test_an_encoded_history_is_what_its_bytes_stand_for():
    keys, values = torch.randn(2, 40, 8, 32, generator=torch.Generator().manual_seed(0))
    packing = Packing("int2", 8, 32)
    data = encode(packing, keys.transpose(0, 1).contiguous(), values.transpose(0, 1).contiguous())
    expected = decode_reference("int2", 8, 32, data.numpy().tobytes(), 40)
    for own, right in zip(fading("int2")(keys, values), expected, strict=True):
        assert np.array_equal(own.numpy(), right)
    assert fading("auto") is None


def test_guidance_is_that_of_videos_made_one_by_one(monkeypatch):
    """Where nobody knows what heads find, everything is computed: of the same two streams."""
    generator = Guided(scales=(0.3,))
    guided = generator.variants.compared[2]
    assert (guided.name, guided.scale) == ("full cache, guidance 0.3", 0.3)
    seeds = range(FIRST_HELD_OUT_SEED + 3, FIRST_HELD_OUT_SEED + 5)
    together = generator.maker(guided, 2)(seeds)
    monkeypatch.setattr(Causal, "is_sparse", lambda *_: False)
    assert generator.maker(guided, 2)(seeds).tolist() == together.tolist()
    assert generator.maker(generator.variants.full, 2)(seeds).tolist() != together.tolist()


@pytest.mark.parametrize(
    ("arguments", "generator", "videos", "frames"),
    [
        ([], Causal, 200, 64),
        (["--masked"], Masked, 50, 40),
        (["--masked", "--videos", "3"], Masked, 3, 40),
        (["--guidance", "1.5", "--guidance", "2"], Guided, 50, 16),
        (["--cache", "fp8_e4m3", "--videos", "9"], Cached, 9, 16),
        (["--masked", "--history"], Encoded, 50, 10),
    ],
)
def test_the_command_takes_a_generator(monkeypatch, tmp_path, arguments, generator, videos, frames):
    plans = []
    monkeypatch.setattr(Benchmark, "run_in", lambda self, out, *, plan: plans.append((out, plan)))
    called = CliRunner().invoke(app, ["bench", "quality", "--out", str(tmp_path), *arguments])
    assert called.exit_code == 0, called.output
    ((out, plan),) = plans
    assert out == tmp_path
    assert type(plan.generator) is generator
    if generator is Cached:
        assert plan.generator.formats == ("fp8_e4m3",)
    if generator is Guided:
        assert plan.generator.scales == (1.5, 2)
    assert (plan.videos, plan.frames) == (videos, frames)


def test_any_policy_is_compared_by_its_name(monkeypatch, tmp_path):
    plans = []
    monkeypatch.setattr(Benchmark, "run_in", lambda self, out, *, plan: plans.append(plan))
    given = ["bench", "quality", "--out", str(tmp_path), "--policy", "sliding_window", "--policy", "attention_sink"]
    called = CliRunner().invoke(app, given)
    assert called.exit_code == 0, called.output
    compared = plans[0].generator.variants.compared
    assert [(own.name, own.policy, dict(own.options)) for own in compared[-2:]] == [
        ("sliding_window", "sliding_window", {}),
        ("attention_sink", "attention_sink", {}),
    ]
    assert {"sliding_window", "attention_sink"} <= {work.variant.name for work in plans[0].works.values()}


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("packcache", "--policy: 'packcache' is compared already, leave it out"),
        ("every_third", "kv_cache_policy: unknown policy 'every_third': choose one of"),
    ],
)
def test_a_policy_that_cannot_be_compared_is_named_first(tmp_path, name, sentence):
    called = CliRunner().invoke(app, ["bench", "quality", "--out", str(tmp_path / "out"), "--policy", name])
    assert called.exit_code == 2
    assert sentence in " ".join(called.output.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--guidance", "0"], "--guidance must be above 0, at most 1000, and of no more than six digits, not 0.0"),
        (["--guidance", "nan"], "at most 1000, and of no more than six digits, not nan"),
        (["--guidance", "1001"], "not 1001.0"),
        (["--guidance", "1.0000001"], "not 1.0000001"),
        (["--guidance", "1"], "--guidance: 1 is no guidance, which is compared anyway, leave it out"),
        (["--guidance", "2", "--guidance", "2.0"], "--guidance: 2 is given twice, leave one out"),
        (["--guidance", "2", "--masked"], "the masked one is always guided: leave --masked out"),
        (
            ["--cache", "int4"],
            "--cache must be one of int8_per_token_head, fp8_per_token_head, fp8_e4m3, fp8_e5m2, not",
        ),
        (["--cache", "fp8_e4m3", "--cache", "fp8_e4m3"], "--cache: fp8_e4m3 is given twice, leave one out"),
        (["--history"], "--history is for the masked model: give --masked too"),
        (["--masked", "--history", "--passes"], "--history and --passes are two comparisons: leave one out"),
        (["--masked", "--history", "--policy", "reset"], "--policy: histories are compared under one policy"),
        (["--cache", "fp8_e4m3", "--masked"], "--cache is for the yardsticks of the causal model: leave --masked,"),
    ],
)
def test_what_there_is_none_of_is_refused_first(tmp_path, arguments, sentence):
    called = CliRunner().invoke(app, ["bench", "quality", "--out", str(tmp_path / "out"), *arguments])
    assert called.exit_code == 2
    assert sentence in " ".join(called.output.split())
    assert not (tmp_path / "out").exists()


def test_a_policy_that_is_named_is_guided_too():
    names = [own.name for own in Guided(("attention_sink",), (1.5,)).variants.named]
    assert names[:4] == [FULL_CACHE, "packcache", "changed", "attention_sink"]
    assert names[4:] == [f"{name}, guidance 1.5" for name in names[:4]]


SCRIPT = """
import signal
import sys
from pathlib import Path
from benchmarks.quality import generators
from benchmarks.quality.benchmark import CAUSAL
from benchmarks.quality.runs import QualityPlan

generators.AT_ONCE = 4

if __name__ == "__main__":
    # Where tests run in the background it is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    CAUSAL.run_in(Path(sys.argv[1]), plan=QualityPlan(videos=24, trained_frames=2, lengths=2))
"""


def test_an_interrupted_run_keeps_what_is_done(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    folder = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py"), str(folder)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not list(folder.glob("parts/packcache-*.npz")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=120)

    assert process.returncode != 0
    assert "the same command goes on from there" in " ".join(printed.split())
    assert not (folder / "quality.json").exists()
    # Whole parts only; some 150 were planned.
    parts = sorted((folder / "parts").glob("*.npz"))
    assert 1 <= len(parts) <= 12
    for path in parts:
        with np.load(path) as part:
            assert part["frames"].shape[0] == 4
