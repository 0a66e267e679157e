"""The command: videos in; a configuration, a table, a plot and all numbers out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from rich.console import Console

from vllm_packcache.calibrate import attention, report
from vllm_packcache.calibrate import masked as masked_attention
from vllm_packcache.calibrate.change import Changes
from vllm_packcache.calibrate.decay import (
    BOOTSTRAP_SEED,
    PAPER_DECAY,
    RESAMPLES,
    allowed,
    budgets,
    fit,
    kept,
    lines,
    measured,
    percentiles,
    resampled_means,
    scale_at,
    suggest,
)
from vllm_packcache.calibrate.mass import NEAREST, OLDER, SEGMENTS, Float64, Mass, Video
from vllm_packcache.config.errors import ConfigError
from vllm_packcache.config.server import OWNER_KEY, REQUEST_PREFIX, ServerConfig
from vllm_packcache.core.layout import FrameLayout
from vllm_packcache.core.policies.packcache import MAX_WINDOW, PAPER, PackCache
from vllm_packcache.demo.masked import bundle
from vllm_packcache.demo.masked import tokenizer as masked_tokenizer
from vllm_packcache.demo.scores import FIRST_HELD_OUT_SEED
from vllm_packcache.demo.tokenizer import CONDITION_TOKENS, MODEL_DIR, TRAINED_FRAMES, VideoTokenizer, video_ids
from vllm_packcache.demo.world import make_world
from vllm_packcache.families import lumos
from vllm_packcache.tools import files
from vllm_packcache.tools.figures import check_format
from vllm_packcache.tools.machine import about, sha256
from vllm_packcache.tools.progress import counting
from vllm_packcache.tools.sequences import VideoIds

DEMO, MASKED_DEMO = "demo", bundle.PRESET
"""Name the bundled models, and the presets of their layouts."""

DEMO_VIDEOS = 20

BUNDLED = {DEMO: MODEL_DIR / "model.safetensors", MASKED_DEMO: bundle.MODEL_DIR / bundle.WEIGHTS}
"""Weights of the bundled models."""

TRAINED = {DEMO: TRAINED_FRAMES, MASKED_DEMO: bundle.TRAINED_FRAMES}
"""Frames of the longest videos that a bundled model was trained on."""

CHANGED_OPTIONS = ("history_frames", "window", "decay", "selection", "changed_tokens")
"""What a suggestion for ``selection: changed`` sets."""

ALL_QUERIES = "all queries"
"""The one view of a causal model's attention: every token is computed once."""

LEAST_FRAMES = 6
"""Of a video: a line through fewer than three distances says nothing."""


def run(
    model: str = DEMO,
    config: str | None = None,
    sequences: Path | None = None,
    *,
    out: Path,
    videos: int | None = None,
    frames: int | None = None,
    target: float = 0.8,
    block_size: int = 16,
    plot_path: Path | None = None,
    json_path: Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure, print tables and write the suggested configuration.

    Args:
        model: `DEMO`, `MASKED_DEMO`, or the folder of a causal LM or of a Lumos-1.
        config: whose layout the videos have; None with a bundled model only.
        sequences: JSON lines with the videos; None with a bundled model only.
        out: YAML file for the configuration.
        videos: how many; None: all of ``sequences``, or `DEMO_VIDEOS`.
        frames: T, of each; None: as many as the shortest of ``sequences`` has, or as the bundled model was trained on.
        target: share of all attention mass that is to be kept.
        block_size: tokens of a KV-cache block, for the mass on what is really kept.
        plot_path: PNG or SVG file; None: none.
        json_path: file for all numbers and what is needed to repeat them; None: none.
        console: where progress and tables go.

    Returns:
        What is written to ``json_path``.

    Raises:
        ConfigError: an option is wrong, the model cannot be measured, or the target cannot be reached; for the last,
            all but the configuration is written.
        OSError: a file cannot be written.
    """
    console = console or Console(highlight=False)
    if not 0 < target < 1:
        raise ConfigError(f"--target must lie between 0 and 1, not {target:g}: it is a share of all attention mass")
    check_format("--plot", plot_path)
    makes_masked = model == MASKED_DEMO or masked_attention.recognises(Path(model))
    server = _server(model, config, sequences, makes_masked)
    chosen = _demo_videos(model, videos, frames) if sequences is None else _read(sequences, server, videos, frames)
    files.claim(plot_path, json_path, out)
    if out.stat().st_size == 0:
        # Should this be interrupted, nobody is to start a server with an empty configuration.
        out.unlink()
    assert server.layout is not None
    benchmark = "calibrate-masked" if makes_masked else "calibrate"
    result: dict[str, Any] = about(benchmark, threads=torch.get_num_threads())
    result["versions"]["transformers"] = version("transformers")
    length = chosen[0].frames
    distances = length // 2
    seeds = _held_out(len(chosen))
    start = time.monotonic()
    masses = _measure(model, makes_masked, chosen, distances, block_size, console)
    result |= {
        "seconds": round(time.monotonic() - start),
        "model": model,
        "weights": sha256(BUNDLED[model]) if model in BUNDLED else None,
        "videos": len(chosen),
        "frames": length,
        "trained_frames": TRAINED.get(model),
        "seeds": {"videos": None if sequences is not None else [seeds[0], seeds[-1]], "bootstrap": BOOTSTRAP_SEED},
        "sequences": None if sequences is None else str(sequences),
        "layout": server.layout.model_dump(mode="json", exclude_none=True),
        "condition_tokens": [video.layout.condition_tokens for video in chosen],
        "largest_distance": distances,
        "query_frames": [distances + 1, length],
        "block_size": block_size,
        "dtype": "float32",
        "target": target,
        "notes": [
            "shares of a query's attention with the full cache, averaged over queries, heads, layers and videos",
            *(masked_attention.NOTES if makes_masked else ()),
            "every distance is averaged over the same queries: of the frames query_frames (counted from 1), which have "
            "at least largest_distance frames before them",
            f"ci95 are percentiles of {RESAMPLES} bootstrap samples over videos",
            "the fit is least squares on the logarithm of the mean mass",
            "kept: a frame's mass taken as even over its tokens; kept_measured: mass on the blocks that live",
            "changed: counted in the videos' tokens; the budget of its suggestion is at most that of the other, or one "
            "frame; without another, at most the usual one",
        ],
        **analyse(masses, server.layout.frame_layout(), target, block_size),
    }
    result["changed"] = analyse_changes(Changes(chosen, block_size), masses, result)
    suggestion = result["suggestion"]
    if suggestion is not None:
        options = {"history_frames", "window", "decay"}
        suggested = ServerConfig.parse(
            PackCache.name,
            {
                "layout": result["layout"],
                **{k: suggestion[k] for k in options},
                "selection": PAPER.selection,
                "positions": "rebase",
            },
        )
        result["config"] = {OWNER_KEY: PackCache.name, **suggested.as_mapping()}
    if json_path is not None:
        files.write(json_path, result)
    if plot_path is not None:
        report.draw(result, plot_path)
    report.print_tables(result, console)
    if suggestion is None:
        most = 100 * result["most_kept"]
        raise ConfigError(
            f"--target {target:g} cannot be reached: all of the {distances} frames whose attention was told apart hold "
            f"{most:.2f} % with condition and own frame; ask for less than that"
        )
    out.write_text(report.as_yaml(result), encoding="utf-8")
    console.print(f"wrote {out}: --kv-cache-policy packcache --kv-cache-policy-config {out}", soft_wrap=True)
    return result


def analyse(masses: Mapping[str, Sequence[Mass]], frame: FrameLayout, target: float, block_size: int) -> dict[str, Any]:
    """Means, fit and suggestion of measured videos, as plain data.

    Args:
        masses: of V videos, as often as each was looked at, by the name of the view; all views count alike.
        frame: the shape of a frame.
        target: share to be kept.
        block_size: tokens of a block, as measured with.
    """
    of_views = np.stack([[mass.by_segment for mass in own] for own in masses.values()])
    by_head = of_views.mean(0)
    by_video = by_head.mean((1, 2))
    mean = by_video.mean(0)
    by_layer = by_head.mean((0, 2))
    distances = len(mean) - NEAREST
    intervals = [list(percentiles(column)) for column in resampled_means(by_video).T] if len(by_video) > 1 else None
    fitted = fit(by_video[:, NEAREST:])
    best = suggest(mean, fitted.decay, frame, target)

    def described(policy: PackCache) -> dict[str, Any]:
        layers = measured(policy, [mass for own in masses.values() for mass in own], block_size)
        return {
            "history_frames": policy.history_frames,
            "window": policy.window,
            "decay": policy.decay,
            "kept_tokens": policy.kept_tokens(frame.tokens_per_frame, 2 * policy.window),
            "kept": kept(policy, mean, frame),
            "kept_measured": float(layers.mean()),
            "kept_measured_by_layer": layers.tolist(),
        }

    views = {}
    if len(masses) > 1:
        by_view = of_views.mean((1, 2, 3))
        rhos = np.exp(lines(by_view[:, NEAREST:].T)[0])
        views = {
            name: {"mass": own.tolist(), "rho": float(rho)}
            for name, own, rho in zip(masses, by_view, rhos, strict=True)
        }
    # The paper's rho at the same budget and window; where nothing is suggested, both at the defaults.
    usual = replace(PAPER, window=min(PAPER.window, distances))
    base = best or replace(usual, decay=fitted.decay)
    compared = [base, replace(base, decay=PAPER_DECAY), usual]
    windows = sorted({n for n in (1, 2, 4, best.window if best else 1, distances) if n <= min(distances, MAX_WINDOW)})
    return {
        "segments": [*SEGMENTS, *(f"distance {d}" for d in range(1, distances + 1))],
        "mass": mean.tolist(),
        "mass_ci95": intervals,
        "mass_by_video": by_video.tolist(),
        "mass_by_layer": by_layer.tolist(),
        "mass_by_head": by_head.mean(0).tolist(),
        **({"views": views} if views else {}),
        "fit": {
            **asdict(fitted),
            "decay": fitted.decay,
            "half_in_interval": fitted.holds_half,
            "rho_by_layer": np.exp(lines(by_layer[:, NEAREST:].T)[0]).tolist(),
            "scale_at_half": scale_at(mean[NEAREST:], PAPER_DECAY),
        },
        "suggestion": None if best is None else described(best),
        "compared": [
            described(policy) for policy in dict.fromkeys(compared) if policy != best and allowed(policy, frame)
        ],
        "most_kept": float(mean.sum() - mean[OLDER]),
        "curves": {str(window): _curve(window, fitted.decay, mean, frame) for window in windows},
    }


def analyse_changes(
    changes: Changes, masses: Mapping[str, Sequence[Mass]], analysed: Mapping[str, Any]
) -> dict[str, Any]:
    """What changes in the videos, and a suggestion for ``selection: changed``, as plain data.

    The window is the longest whose changes find room, to the share that is the target, in the budget that is suggested
    without it; and the budget is then the least that does.

    Args:
        changes: of the videos.
        masses: of them, as for `analyse`.
        analysed: what that returned, with ``target`` and ``largest_distance``.
    """
    frame, decay = changes.videos[0].layout.frame, analysed["fit"]["decay"]
    other = analysed["suggestion"]
    most = max(1.0, PackCache.history_frames if other is None else other["history_frames"])
    windows = changes.holding(decay, analysed["largest_distance"], most, analysed["target"])
    window, history = windows[-1]

    def described(policy: PackCache) -> dict[str, Any]:
        of_views = [mass for own in masses.values() for mass in own]
        layers = measured(policy, of_views, changes.block_size, [*changes.videos] * len(masses))
        return {
            **{option: getattr(policy, option) for option in CHANGED_OPTIONS},
            "kept_tokens": policy.kept_tokens(frame.tokens_per_frame, 2 * policy.window),
            "kept_measured": float(layers.mean()),
            "kept_measured_by_layer": layers.tolist(),
        }

    policy = changes.policy(history, window, decay)
    spatial = replace(policy, selection="spatial", changed_tokens=1)
    return {
        "tokens": changes.tokens,
        "blocks": changes.blocks,
        "blocks_by_tokens": changes.by_count.tolist(),
        "told_apart": changes.told_apart,
        "windows": windows,
        "suggestion": {**described(policy), "held": changes.held(policy)},
        "spatial": described(spatial) if allowed(spatial, frame) else None,
    }


def _curve(window: int, decay: float, mean: Float64, frame: FrameLayout) -> list[list[float]]:
    """Pairs of H and the share kept, for one W."""
    policies = (
        replace(PAPER, history_frames=history, window=window, decay=decay) for history in budgets(len(mean) - NEAREST)
    )
    return [[policy.history_frames, kept(policy, mean, frame)] for policy in policies if allowed(policy, frame)]


def _measure(
    model: str, makes_masked: bool, videos: Sequence[Video], distances: int, block_size: int, console: Console
) -> dict[str, list[Mass]]:
    """What every view of the model's attention gives of the videos."""
    masses: dict[str, list[Mass]] = {}
    with counting(console, "videos") as progress, TemporaryDirectory() as written:
        if model == MASKED_DEMO:
            folder = bundle.write_checkpoint(written)
        else:
            folder = MODEL_DIR if model == DEMO else Path(model)
        of_video = _opened(folder, makes_masked)
        for video in progress.track(videos, description="attention"):
            for view, mass in of_video(video, distances, block_size).items():
                masses.setdefault(view, []).append(mass)
    return masses


def _opened(folder: Path, makes_masked: bool) -> Callable[[Video, int, int], dict[str, Mass]]:
    """What measures the videos of a checkpoint: from video, distances and block size to mass by view."""
    if makes_masked:
        return partial(masked_attention.measure, masked_attention.load(folder))
    model = attention.load(folder)
    return lambda *asked: {ALL_QUERIES: attention.measure(model, *asked)}


# ---------------------------------------------------------------------------------------------------------------------
# Videos


def _server(model: str, config: str | None, sequences: Path | None, makes_masked: bool) -> ServerConfig:
    """The configuration whose layout the videos have."""
    if model in TRAINED:
        for option, given in (("--config", config), ("--sequences", sequences)):
            if given is not None:
                raise ConfigError(f"{option}: a bundled model has its own: leave it out, or give another MODEL")
        return ServerConfig.parse(PackCache.name, model)
    if config is None:
        raise ConfigError("--config is needed: the layout of the videos of this MODEL, as a preset, a file or JSON")
    if sequences is None:
        raise ConfigError("--sequences is needed: a file of videos of this MODEL, one JSON object a line")
    server = ServerConfig.parse(PackCache.name, config)
    if server.layout is None:
        raise ConfigError(f"--config: {config!r} has no layout: without it nobody can tell frames apart")
    if makes_masked and not lumos.describes(server.layout.frame_layout(), server.layout.axis_scale):
        raise ConfigError(
            f"--config: {config!r} has not the layout of this MODEL, a Lumos-1: take that of the preset lumos1_384p "
            "and give it your grid"
        )
    if not makes_masked and server.layout.axis_scale is not None:
        raise ConfigError(
            "--config: causal LMs whose positions have three axes (axis_scale) cannot be measured: they would be given "
            "the index of a token on every axis"
        )
    return server


def _held_out(videos: int) -> range:
    return range(FIRST_HELD_OUT_SEED, FIRST_HELD_OUT_SEED + videos)


def _demo_videos(model: str, videos: int | None, frames: int | None) -> list[Video]:
    """True videos of held-out worlds for a bundled model."""
    server = ServerConfig.parse(PackCache.name, model)
    length = TRAINED[model] if frames is None else frames
    worlds = [make_world(seed) for seed in _held_out(DEMO_VIDEOS if videos is None else videos)]
    if model == DEMO:
        tokenizer = VideoTokenizer()
        return [_video(video_ids(tokenizer, world, length).tolist(), CONDITION_TOKENS, server) for world in worlds]
    text = masked_tokenizer.build_text_tokenizer()
    chosen = []
    for world in worlds:
        ids = masked_tokenizer.prompt(world.prompt, length, text)
        pictures = np.concatenate([masked_tokenizer.world_frame(world, k) for k in range(length + 1)]).tolist()
        image = len(pictures) // (length + 1)
        chosen.append(_video(ids + pictures, len(ids) + image, server))
    return chosen


def _read(path: Path, server: ServerConfig, videos: int | None, frames: int | None) -> list[Video]:
    """The first videos of a file, all cut to the same number of frames."""
    read: list[Video] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ConfigError(f"--sequences: {path} is not text: it must have one JSON object a line") from None
    for number, text in enumerate(lines, 1):
        if len(read) == videos:
            break
        try:
            line = VideoIds.model_validate_json(text)
            read.append(_video(line.token_ids, line.condition_tokens, server))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "it"
            raise ConfigError(f"--sequences: line {number} of {path}: {where}: {first['msg']}") from None
        except ConfigError as error:
            raise ConfigError(f"--sequences: line {number} of {path}: {error}") from None
    if not read or (videos is not None and len(read) < videos):
        raise ConfigError(f"--sequences: {path} has {len(read)} videos, not {videos or 'any'}")
    shortest = min(video.frames for video in read)
    length = shortest if frames is None else frames
    if shortest < length:
        raise ConfigError(f"--frames {length}: the shortest video of --sequences has {shortest} frames: ask for fewer")
    if length < LEAST_FRAMES:
        raise ConfigError(
            f"--sequences: the shortest video has {length} whole frames: to fit a decay it takes {LEAST_FRAMES}"
        )
    return [Video(video.token_ids[: video.layout.frame_start(length)], video.layout) for video in read]


def _video(token_ids: list[int], condition_tokens: int, server: ServerConfig) -> Video:
    plan = server.plan({f"{REQUEST_PREFIX}condition_tokens": condition_tokens}, len(token_ids))
    assert plan is not None
    return Video(token_ids, plan.layout)
