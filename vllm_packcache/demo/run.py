"""The demo: a picture and a sentence become a video, served by vLLM with packcache and with the full cache."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import matplotlib
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
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

from vllm_packcache.config.errors import ConfigError, shown
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.core.policies import PackCache
from vllm_packcache.demo.tokenizer import (
    CONDITION_TOKENS,
    FRAME_TOKENS,
    GRID,
    MODEL_DIR,
    TEXT_TOKENS,
    WORDS,
    VideoTokenizer,
    shapes,
)
from vllm_packcache.demo.world import World, make_world
from vllm_packcache.families import DECODER, Family
from vllm_packcache.media.pictures import Pixels, read_picture
from vllm_packcache.media.videos import SUFFIXES, encode_video
from vllm_packcache.serving.log import record_of
from vllm_packcache.serving.server import ServerError, client_of, serving, tokens_in
from vllm_packcache.tools import sequences

ASSETS = Path(__file__).parent / "assets"
PRESET = "demo"
"""Configuration of the server where nobody gives another, and of the layout of the videos."""
EXAMPLE = 10_001
"""Seed of the world whose picture and sentence the assets are."""
POLICIES = ("packcache", "full")
"""What the request is made with, one after the other."""
FRAMES = 16
BLOCK_SIZE = 32
FRAMES_PER_SECOND = 4
SCALE = 4
"""Pixels of the written pictures for each pixel of the model's."""
MOST_CHARACTERS = 80
"""That are shown of a text of the user's."""
MOST_WORDS = 8
"""That are shown of those that a model does not know."""
LOGGING = {
    "VLLM_CONFIGURE_LOGGING": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_LOGGING_CONFIG_PATH": "",
    "VLLM_LOGGING_PREFIX": "",
}
"""The server's log is read: whatever the user's other servers log, it must be there and in vLLM's own form."""


@dataclass
class Generated:
    """One generated video.

    Attributes:
        policy: what the request asked for.
        token_ids: generated tokens.
        resident_tokens: most KV-cache tokens (whole blocks) that the engine held while it made frame k.
        seconds: from the request to its last token.
    """

    policy: str
    token_ids: list[int] = field(default_factory=list)
    resident_tokens: list[int] = field(default_factory=list)
    seconds: float = 0.0


@contextmanager
def claimed(out: Path) -> Iterator[Path]:
    """A folder for what a run writes, created; nobody else writes to it while the context lasts.

    Yields:
        The file for the server's log.

    Raises:
        OSError: it is a file, cannot be written to, or another run writes to it.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise OSError(f"--out {out}: it, or a folder that it lies in, is a file: name a folder") from None
    log = out / "server.log"
    # The log is open for as long as anything of a run lives, a server that outlives it included.
    with log.open("a", encoding="utf-8") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(f"--out {out}: another run writes to this folder: name another one, or wait") from None
        yield log


def run_demo(image: Path | None, prompt: str | None, out: Path, config: str = PRESET) -> None:
    """Serve the bundled model, make a video twice, and write what came out to ``out``.

    Args:
        image: any picture; the example's by default.
        prompt: what is to happen in it; the example's by default, which fits only the example's picture.
        out: folder for the videos (GIF, MP4), the pictures (PNG) and the server's log; it is created.
        config: of packcache, with the layout of `PRESET`: a preset, a file or JSON text.

    Raises:
        ConfigError: the configuration is wrong, or for other videos.
        OSError: the picture cannot be read, or the folder not be written.
        ServerError: the server did not come up, or failed.
    """
    fitting(config, PRESET)
    console = Console()
    world = make_world(EXAMPLE) if image is None and prompt is None else None
    prompt = readable((ASSETS / "example_prompt.txt").read_text(encoding="utf-8") if prompt is None else prompt)
    image = image if image is not None else ASSETS / "example.png"
    tokenizer = VideoTokenizer()
    picture = tokenizer.encode_image(read_picture(image))
    ids = tokenizer.build_prompt_from_ids(prompt, picture)
    tell(console, str(image), prompt, tokenizer.encode_text, tokenizer.unk_id, picture - tokenizer.visual_offset)

    arguments = [
        *("--kv-cache-policy", "packcache", "--kv-cache-policy-config", config),
        *("--served-model-name", "demo", "--dtype", "float32", "--enforce-eager"),
        *("--max-model-len", "8192", "--block-size", str(BLOCK_SIZE), "--max-num-seqs", "4"),
        # A message a token, or a worker process that spins beside the engine, would take the engine's time on a small
        # machine.
        *("--stream-interval", "16", "--distributed-executor-backend", "uni"),
    ]
    with claimed(out) as log:
        console.print(f"[bold]vllm serve[/] {MODEL_DIR} {' '.join(arguments)}", soft_wrap=True)
        with (
            console.status("starting the server") as status,
            serving(MODEL_DIR, arguments, log, lambda line: status.update(one_line(line)), environment=LOGGING) as url,
        ):
            status.stop()
            with client_of(url) as client, progress_bars(console) as progress:
                videos = [
                    stream_video(client, _body(ids, policy), policy, FRAMES, FRAME_TOKENS, log, progress)
                    for policy in POLICIES
                ]
        codes = {v.policy: tokenizer.frames_from_ids(v.token_ids) - tokenizer.visual_offset for v in videos}
        report(console, videos, codes, tokenizer, ids, CONDITION_TOKENS, out, world)


def fitting(config: str, preset: str, family: Family = DECODER) -> ServerConfig:
    """What a configuration says, if it is one of packcache for the videos of a preset.

    Raises:
        ConfigError: it is not.
    """
    server, own = (ServerConfig.parse(PackCache.name, source, family=family) for source in (config, preset))
    if server.layout != own.layout:
        raise ConfigError(
            f"--config: {shown(config)} has not the layout of the bundled model's videos: give a configuration with "
            f"layout: {preset}"
        )
    return server


def tell(
    console: Console,
    picture: str,
    prompt: str,
    encode: Callable[[str], list[int]],
    unknown: int,
    codes: npt.NDArray[np.int64] | None,
) -> None:
    """Say what a model is asked, and what of that it cannot know.

    Args:
        console: to say it on.
        picture: where it is from.
        prompt: the sentence.
        encode: it, into ids.
        unknown: the id of a word that the model does not know.
        codes: codewords of the picture; None: there is none.
    """
    console.print(
        f"[bold]picture[/] {escape(picture)}   [bold]prompt[/] {escape(shortened(prompt)) or 'none'}", soft_wrap=True
    )
    without = "nothing" if codes is None else "only the picture"
    for remark in [*_about_prompt(prompt, encode, unknown, without), *([] if codes is None else _about_picture(codes))]:
        console.print(f"[yellow]note:[/] {escape(remark)}", soft_wrap=True)


def _about_prompt(prompt: str, encode: Callable[[str], list[int]], unknown: int, without: str) -> Iterator[str]:
    words = prompt.split()
    # Of a word in letters that it does not know, the tokenizer leaves nothing.
    strange = [
        word
        for word in dict.fromkeys(words)
        if unknown in encode(word) or (not encode(word) and any(map(str.isalnum, word)))
    ]
    if not any(encode(word) for word in words if word not in strange):
        yield f"the model finds no word in this prompt that it knows: it has {without} to go by"
    if strange:
        more = f" and {len(strange) - MOST_WORDS} more" if len(strange) > MOST_WORDS else ""
        shown = ", ".join(shortened(word, 20) for word in strange[:MOST_WORDS])
        yield f"the model does not know {shown}{more}; its words are {', '.join(WORDS)}"
    beyond = len(encode(prompt)) - TEXT_TOKENS
    if beyond > 0:
        yield f"the model reads {TEXT_TOKENS} words: the last {beyond} of the prompt are left out"


def _about_picture(codes: npt.NDArray[np.int64]) -> Iterator[str]:
    plain, known = shapes(codes)
    if plain:
        yield (
            f"the model was trained on drawings of a toy world: it sees plain colours in {plain:.0%} of this picture, "
            + ("and shapes that it knows in the rest" if known else "and no shape that it knows how to move")
        )
    elif not known:
        yield "there is no shape in this picture that the model knows how to move"


def readable(text: str) -> str:
    """A text of the user's on one line, and what is no text in it marked."""
    return " ".join(text.encode("utf-8", "replace").decode().split())


def shortened(text: str, most: int = MOST_CHARACTERS) -> str:
    """As much of a text as is shown."""
    return text if len(text) <= most else f"{text[: most - 4].rstrip()} ..."


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
    client: httpx.Client,
    body: dict[str, Any],
    policy: str,
    frames: int,
    frame_tokens: int,
    log: Path,
    progress: Progress,
) -> Generated:
    """Stream one video, and read in the server's log what the engine held while it made it.

    Args:
        client: of the server.
        body: of the request, with its ``max_tokens``.
        policy: what the body asks for.
        frames: of the video.
        frame_tokens: tokens of each.
        log: of the server.
        progress: of `progress_bars`.

    Raises:
        ServerError: the server refused the request, or did not make all frames.
    """
    task = progress.add_task(policy, total=frames * frame_tokens, note="frame 0")
    video = Generated(policy)
    body = {"model": "demo", "stream": True, "return_token_ids": True, "request_id": policy, **body}
    began = time.monotonic()
    with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != httpx.codes.OK:
            raise ServerError(f"the server refused the request: {response.read().decode(errors='replace')}")
        for line in response.iter_lines():
            video.token_ids += tokens_in(line)
            frame = min(len(video.token_ids) // frame_tokens, frames - 1)
            progress.update(task, completed=len(video.token_ids), note=f"frame {frame}")
    video.seconds = time.monotonic() - began
    if len(video.token_ids) != frames * frame_tokens:
        raise ServerError(f"the server ended the video after {len(video.token_ids)} of {frames * frame_tokens} tokens")
    video.resident_tokens = record_of(log, f"cmpl-{policy}-")["peak_tokens_by_frame"]
    return video


def report(
    console: Console,
    videos: Sequence[Generated],
    codes: Mapping[str, npt.NDArray[np.int64]],
    tokenizer: VideoTokenizer,
    prompt: list[int],
    condition: int,
    out: Path,
    world: World | None,
) -> None:
    """Write both videos, their frames and what the engine held, and say so.

    Args:
        console: to say it on.
        videos: made with packcache and with the full cache.
        codes: codewords of each, by its policy, [T, 16, 16].
        tokenizer: of the pictures.
        prompt: token ids that both videos follow.
        condition: tokens before the first frame: of one sequence or, with guidance, of two.
        out: folder.
        world: in which the true continuation is known; None: there is none.
    """
    packed, full = videos
    shown = dict(codes) if world is None else {**codes, "the truth": truth(world, len(codes["full"]))}
    pictures = {name: enlarged(tokenizer.decode_frames(own + tokenizer.visual_offset)) for name, own in shown.items()}
    write_video(pictures["packcache"], out / "video")
    write_video(pictures["full"], out / "full")
    sequences.write_video(out / "video.json", prompt + packed.token_ids, len(prompt))
    contact_sheet(pictures, out / "frames.png")
    draw_resident(packed.resident_tokens, full.resident_tokens, condition, out / "resident.png")

    table = Table(title="most KV-cache tokens that the engine held while it made a frame")
    for heading in ("frame", "full cache", "packcache", "share"):
        table.add_column(heading, justify="right")
    for frame, (most, least) in enumerate(zip(full.resident_tokens, packed.resident_tokens, strict=True)):
        table.add_row(str(frame), f"{most:,}", f"{least:,}", f"{least / most:.0%}")
    console.print(table)
    same = np.mean(np.array(packed.token_ids) == np.array(full.token_ids))
    console.print(f"{same:.1%} of the tokens are those of the full cache.")
    if world is not None:
        for policy, own in codes.items():
            console.print(f"{policy}: {likeness(world, own)}")
    console.print(f"packcache {packed.seconds:.1f} s, full cache {full.seconds:.1f} s (a small model: little to gain).")
    for name, what in (
        ("video.gif", "the video (video.mp4: the same)"),
        ("full.gif", "the same request with its whole cache kept (full.mp4: the same)"),
        ("frames.png", "all frames of both, side by side" + ("" if world is None else ", and the true ones")),
        ("resident.png", "the table above as a picture"),
        ("video.json", "the video's token ids, for vllm-packcache explain --sequence"),
    ):
        console.print(f"  [bold]{escape(str(out / name))}[/]  {what}", soft_wrap=True)


def truth(world: World, frames: int) -> npt.NDArray[np.int64]:
    """Codewords of what follows a world's first picture, [frames, 16, 16]."""
    return np.stack([world.frame_ids(k) for k in range(1, frames + 1)])


def likeness(world: World, codes: npt.NDArray[np.int64]) -> str:
    """How near a video is to the true one, in words."""
    true = truth(world, len(codes))
    changed = true != np.stack([world.frame_ids(k) for k in range(len(codes))])
    return (
        f"{(codes == true).mean():.1%} of the visual tokens are true, {(codes == true)[changed].mean():.1%} of those "
        "that change"
    )


def write_video(frames: Pixels, stem: Path) -> None:
    """Write ``frames`` [T, H, W, 3] as ``stem``.gif and ``stem``.mp4 (H.264)."""
    for suffix in SUFFIXES:
        stem.with_suffix(suffix).write_bytes(encode_video(frames, suffix, FRAMES_PER_SECOND))


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


def draw_resident(packed: Sequence[int], full: Sequence[int], condition: int, path: Path) -> None:
    """Draw resident tokens per frame, packcache beside full."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for shift, colour, label, held in ((-0.2, "#b0b7c3", "full cache", full), (0.2, "#2f6fde", "packcache", packed)):
        axes.bar([frame + shift for frame in range(len(held))], held, 0.4, color=colour, label=label)
    axes.axhline(condition, color="#d1495b", linewidth=1, linestyle="--", label="condition (kept for ever)")
    axes.set(xlabel="frame being made", ylabel="most KV-cache tokens held", xticks=range(len(full)))
    axes.set_title("KV cache held by one video, as the engine recorded it")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def enlarged(frames: Pixels) -> Pixels:
    """Frames [T, H, W, 3] as they are written, `SCALE` times as large."""
    return frames.repeat(SCALE, axis=1).repeat(SCALE, axis=2)


def one_line(line: str) -> str:
    """The end of a line of the server's log, beside what is waited for."""
    return f"starting the server  [dim]{escape(line[-90:])}[/]"
