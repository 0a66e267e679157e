"""The demo: a picture and a sentence become a video, served by vLLM with packcache and with the full cache."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import imageio.v3 as iio
import numpy as np
from PIL import Image, ImageDraw
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from vllm_packcache.config import ServerConfig, VideoPlan
from vllm_packcache.demo.server import serving, tokens_in
from vllm_packcache.demo.tokenizer import FRAME_TOKENS, GRID, MODEL_DIR, VideoTokenizer
from vllm_packcache.media.pictures import Pixels, read_picture
from vllm_packcache.policies import Full
from vllm_packcache.retention import Retention

ASSETS = Path(__file__).parent / "assets"
POLICIES = ("packcache", "full")
"""What the request is made with, one after the other."""
FRAMES = 16
BLOCK_SIZE = 32
FRAMES_PER_SECOND = 4
SCALE = 4
"""Pixels of the written pictures for each pixel of the model's."""


@dataclass
class Video:
    """One generated video.

    Attributes:
        policy: what the request asked for.
        token_ids: generated tokens.
        resident_tokens: most KV-cache tokens seen held while the server made frame k; None where nobody looked.
        seconds: from the request to its last token.
    """

    policy: str
    token_ids: list[int] = field(default_factory=list)
    resident_tokens: list[float | None] = field(default_factory=list)
    seconds: float = 0.0


class Held(NamedTuple):
    """KV-cache tokens (whole blocks) held while a frame was made; ``seen`` in the server's metrics, or reckoned."""

    tokens: float
    seen: bool


def run_demo(image: Path | None, prompt: str | None, out: Path) -> None:
    """Serve the bundled model, make a video twice, and write what came out to ``out``.

    Args:
        image: any picture; the example's by default.
        prompt: what is to happen in it; the example's by default, which fits only the example's picture.
        out: folder for the videos (GIF, MP4), the pictures (PNG) and the server's log; it is created.

    Raises:
        OSError: the picture cannot be read, or the folder not be written.
        ServerError: the server did not come up.
    """
    console = Console()
    prompt = prompt if prompt is not None else (ASSETS / "example_prompt.txt").read_text(encoding="utf-8").strip()
    image = image if image is not None else ASSETS / "example.png"
    pixels = read_picture(image)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = VideoTokenizer()
    ids = tokenizer.build_prompt(prompt, pixels)
    console.print(f"[bold]picture[/] {escape(str(image))}   [bold]prompt[/] {escape(prompt)}", soft_wrap=True)
    unknown = [word for word in prompt.split() if tokenizer.unk_id in tokenizer.encode_text(word)]
    if unknown:
        console.print(f"[yellow]the model does not know[/] {escape(', '.join(unknown))}")

    arguments = [
        *("--kv-cache-policy", "packcache", "--kv-cache-policy-config", "demo"),
        *("--served-model-name", "demo", "--dtype", "float32", "--enforce-eager"),
        *("--max-model-len", "8192", "--block-size", str(BLOCK_SIZE), "--max-num-seqs", "4"),
        # A message a token, or a worker process that spins beside the engine, would leave the API server too
        # little of a small machine to answer for its metrics.
        *("--stream-interval", "16", "--distributed-executor-backend", "uni"),
    ]
    console.print(f"[bold]vllm serve[/] {MODEL_DIR} {' '.join(arguments)}", soft_wrap=True)
    with (
        console.status("starting the server") as status,
        serving(MODEL_DIR, arguments, out / "server.log", lambda line: status.update(one_line(line))) as url,
    ):
        status.stop()
        with httpx.Client(base_url=url, timeout=600) as client, progress_bars(console) as progress:
            videos = [
                stream_video(client, _body(ids, policy), policy, FRAMES, FRAME_TOKENS, progress) for policy in POLICIES
            ]
    plan = ServerConfig.parse("packcache", "demo").plan({"packcache_policy": "packcache"}, len(ids))
    assert plan is not None
    plans = {"packcache": plan, "full": replace(plan, policy=Full())}
    report(
        console,
        videos,
        {v.policy: tokenizer.decode_frames(tokenizer.frames_from_ids(v.token_ids)) for v in videos},
        {policy: [own] for policy, own in plans.items()},
        out,
    )


def progress_bars(console: Console) -> Progress:
    """Bars for `stream_video`."""
    return Progress(
        TextColumn("[bold]{task.description:9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tokens, {task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def _body(ids: list[int], policy: str) -> dict[str, Any]:
    return {
        "prompt": ids,
        "max_tokens": FRAMES * FRAME_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "vllm_xargs": {"packcache_grid": [GRID, GRID], "packcache_policy": policy},
    }


def stream_video(
    client: httpx.Client, body: dict[str, Any], policy: str, frames: int, frame_tokens: int, progress: Progress
) -> Video:
    """Stream one video while watching the server's metrics.

    Args:
        client: of the server.
        body: of the request, with its ``max_tokens``.
        policy: what the body asks for.
        frames: of the video.
        frame_tokens: tokens of each.
        progress: of `progress_bars`.

    Raises:
        OSError: the server refused the request.
    """
    task = progress.add_task(policy, total=frames * frame_tokens, note="frame 0")
    video = Video(policy)
    body = {"model": "demo", "stream": True, "return_token_ids": True, **body}
    began = time.monotonic()
    with watching(str(client.base_url)) as samples, client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise OSError(f"the server refused the request: {response.read().decode()}")
        for line in response.iter_lines():
            video.token_ids += tokens_in(line)
            frame = min(len(video.token_ids) // frame_tokens, frames - 1)
            progress.update(task, completed=len(video.token_ids), note=f"frame {frame}")
    video.seconds = time.monotonic() - began
    video.resident_tokens = [
        max((held for made, held in samples if made // frame_tokens == frame and held), default=None)
        for frame in range(frames)
    ]
    return video


@contextmanager
def watching(url: str) -> Iterator[list[tuple[int, float]]]:
    """Read a server's metrics over and over; yields a growing list of what `read_metrics` saw.

    The number of tokens comes from the same reading as the memory: what a client has received says little about
    where the server is. It counts from the start of the watch.
    """
    samples: list[tuple[int, float]] = []
    done = threading.Event()

    def watch() -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            before, _ = read_metrics(client)
            ready.set()
            while not done.wait(0.02):
                made, held = read_metrics(client)
                samples.append((made - before, held))

    ready = threading.Event()
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    ready.wait(60)
    try:
        yield samples
    finally:
        done.set()
        watcher.join()


def read_metrics(client: httpx.Client) -> tuple[int, float]:
    """Tokens generated so far, and tokens of KV cache that requests hold (whole blocks), by vLLM's own metrics."""
    families = {family.name: family for family in text_string_to_metric_families(client.get("/metrics").text)}
    (info,) = families["vllm:cache_config_info"].samples
    made = sum(s.value for s in families["vllm:generation_tokens"].samples if s.name.endswith("_total"))
    usage = sum(sample.value for sample in families["vllm:kv_cache_usage_perc"].samples)
    # One block is the null block, which nobody holds.
    return int(made), usage * (int(info.labels["num_gpu_blocks"]) - 1) * int(info.labels["block_size"])


def report(
    console: Console,
    videos: Sequence[Video],
    frames: Mapping[str, Pixels],
    streams: Mapping[str, Sequence[VideoPlan]],
    out: Path,
    also: Mapping[str, Pixels] | None = None,
) -> None:
    """Write both videos, their frames and what the server held, and say so.

    Args:
        console: to say it on.
        videos: made with packcache and with the full cache.
        frames: of each, by its policy, [T, H, W, 3].
        streams: what each keeps in the KV cache, by its policy: of one sequence or, with guidance, of two.
        out: folder.
        also: other frames to show beside them, by what they are.
    """
    packed, full = videos
    pictures = {name: enlarged(own) for name, own in {**frames, **(also or {})}.items()}
    write_video(pictures["packcache"], out / "video")
    write_video(pictures["full"], out / "full")
    contact_sheet(pictures, out / "frames.png")
    full_tokens, packed_tokens = (_held(video, streams[video.policy]) for video in (full, packed))
    condition = sum(plan.layout.condition_tokens for plan in streams["full"])
    draw_resident(packed_tokens, full_tokens, condition, out / "resident.png")

    table = Table(title="most KV-cache tokens the server held while it made a frame")
    for heading in ("frame", "full cache", "packcache", "share"):
        table.add_column(heading, justify="right")
    for frame, (full_held, packed_held) in enumerate(zip(full_tokens, packed_tokens, strict=True)):
        table.add_row(
            str(frame), _shown(full_held), _shown(packed_held), f"{packed_held.tokens / full_held.tokens:.0%}"
        )
    console.print(table)
    if not all(held.seen for held in (*full_tokens, *packed_tokens)):
        console.print("* the server was too busy to be asked: by the policy's schedule")
    same = np.mean(np.array(packed.token_ids) == np.array(full.token_ids))
    console.print(f"{same:.1%} of the tokens are those of the full cache.")
    console.print(f"packcache {packed.seconds:.1f} s, full cache {full.seconds:.1f} s (a small model: little to gain).")
    for name, what in (
        ("video.gif", "the video (video.mp4: the same)"),
        ("full.gif", "the same request with its whole cache kept (full.mp4: the same)"),
        ("frames.png", "all frames of both, side by side"),
        ("resident.png", "the table above as a picture"),
    ):
        console.print(f"  [bold]{escape(str(out / name))}[/]  {what}", soft_wrap=True)


def write_video(frames: Pixels, stem: Path) -> None:
    """Write ``frames`` [T, H, W, 3] as ``stem``.gif and ``stem``.mp4 (H.264)."""
    iio.imwrite(stem.with_suffix(".gif"), frames, duration=1000 // FRAMES_PER_SECOND, loop=0)
    iio.imwrite(stem.with_suffix(".mp4"), frames, plugin="pyav", codec="libx264", fps=FRAMES_PER_SECOND)


def contact_sheet(pictures: dict[str, Pixels], path: Path) -> None:
    """All frames in one picture: one row of frames for each video, wrapped after eight."""
    columns, gap, label = 8, 6, 18
    count = max(len(frames) for frames in pictures.values())
    height, width = next(iter(pictures.values())).shape[1:3]
    height, width = height // 2, width // 2
    rows = [(name, start) for start in range(0, count, columns) for name in pictures]
    sheet = Image.new("RGB", (columns * (width + gap) + gap, len(rows) * (height + gap + label) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (name, start) in enumerate(rows):
        top = gap + row * (height + gap + label)
        shown = pictures[name][start : start + columns]
        draw.text((gap, top), f"{name}, frames {start} to {start + len(shown) - 1}", fill="black", font_size=13)
        for column, frame in enumerate(shown):
            small = Image.fromarray(frame).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(small, (gap + column * (width + gap), top + label))
    sheet.save(path)


def draw_resident(packed: list[Held], full: list[Held], condition: int, path: Path) -> None:
    """Draw resident tokens per frame, packcache beside full; what was not seen is hatched."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for shift, colour, label, helds in ((-0.2, "#b0b7c3", "full cache", full), (0.2, "#2f6fde", "packcache", packed)):
        hatches = ["" if held.seen else "//" for held in helds]
        places = [frame + shift for frame in range(len(helds))]
        heights = [held.tokens for held in helds]
        axes.bar(places, heights, 0.4, color=colour, label=label, hatch=hatches, edgecolor="white")
    axes.axhline(condition, color="#d1495b", linewidth=1, linestyle="--", label="condition (text and picture)")
    axes.set(xlabel="frame being made", ylabel="resident KV-cache tokens", xticks=range(len(full)))
    source = "as the server's metrics report it"
    if not all(held.seen for held in (*packed, *full)):
        source += " (hatched: by the schedule)"
    axes.set_title(f"KV cache held by one video, {source}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def enlarged(frames: Pixels) -> Pixels:
    """Frames [T, H, W, 3] as they are written, `SCALE` times as large."""
    return frames.repeat(SCALE, axis=1).repeat(SCALE, axis=2)


def _held(video: Video, streams: Sequence[VideoPlan]) -> list[Held]:
    """What was seen, and for frames that no reading caught what the policy holds at their last token."""
    return [
        Held(seen, True) if seen is not None else Held(sum(_scheduled(plan, frame) for plan in streams), False)
        for frame, seen in enumerate(video.resident_tokens)
    ]


def _scheduled(plan: VideoPlan, frame: int) -> int:
    retention = Retention(plan.layout, plan.policy, BLOCK_SIZE)
    return len(retention.live_blocks(plan.layout.frame_start(frame + 1) - 1)) * BLOCK_SIZE


def _shown(held: Held) -> str:
    return f"{held.tokens:,.0f}{' ' if held.seen else '*'}"


def one_line(line: str) -> str:
    """The end of a line of the server's log, beside what is waited for."""
    return f"starting the server  [dim]{escape(line[-90:])}[/]"
