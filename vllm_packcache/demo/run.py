"""The demo: a picture and a sentence become a video, served by vLLM with packcache, and with more and less memory."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
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
from vllm_packcache.config.server import REQUEST_PREFIX, ServerConfig
from vllm_packcache.core.layout import VideoLayout
from vllm_packcache.core.policies import Full, PackCache, Policy
from vllm_packcache.core.policies.base import Int64
from vllm_packcache.core.retention import Retention
from vllm_packcache.demo.processor import ASSETS, FRAMES, FRAMES_PER_SECOND
from vllm_packcache.demo.story import Row, Story, animate, draw
from vllm_packcache.demo.tokenizer import (
    FRAME_TOKENS,
    GRID,
    MODEL_DIR,
    TEXT_TOKENS,
    TRAINED_FRAMES,
    WORDS,
    VideoTokenizer,
    readable,
    shapes,
)
from vllm_packcache.demo.world import make_world
from vllm_packcache.families import DECODER, Family
from vllm_packcache.media.pictures import Pixels, read_picture
from vllm_packcache.media.videos import SUFFIXES, encode_video
from vllm_packcache.serving.log import record_of
from vllm_packcache.serving.server import ServerError, client_of, serving, tokens_in
from vllm_packcache.tools import sequences

PRESET = "demo"
"""Preset of the videos' layout, and what the server keeps where nobody gives another configuration."""
EXAMPLE = 10_031
"""Seed of the world whose picture and sentence the assets are."""
BLOCK_SIZE = 32
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


@dataclass(frozen=True)
class Cache:
    """How much one request remembers.

    Args:
        name: of the request.
        label: for people.
        options: of the request, without prefix.
    """

    name: str
    label: str
    options: Mapping[str, Any]


CACHES = (
    Cache("full", "full cache", {"policy": "full"}),
    Cache("packcache", "packcache", {"policy": "packcache"}),
    Cache("last", "last frame only", {"policy": "packcache", "history_frames": 1, "window": 1, "episodes": 0}),
)
"""What the same video is asked for with, of one server. The second is as the server is configured."""


@dataclass
class Generated:
    """One generated video.

    Attributes:
        cache: that it was made with.
        options: of the request, as in ``vllm_xargs``.
        token_ids: generated tokens.
        resident_tokens: most KV-cache tokens (whole blocks) that the engine held while it made frame k.
        seconds: that a frame took, by the engine's record.
    """

    cache: Cache
    options: Mapping[str, Any]
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
    """Serve the bundled model, make a video with each of `CACHES`, and write what came out to ``out``.

    Args:
        image: any picture; the example's by default.
        prompt: what is to happen in it; the example's by default, which fits only the example's picture.
        out: folder for the videos (GIF, MP4), the picture (PNG) and the server's log; it is created.
        config: of packcache, with the layout of `PRESET`: a preset, a file or JSON text.

    Raises:
        ConfigError: the configuration is wrong, or for other videos.
        OSError: the picture cannot be read, or the folder not be written.
        ServerError: the server did not come up, or failed.
    """
    server = fitting(config, PRESET)
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
            videos = make_videos(console, url, log, partial(_body, ids), FRAMES, FRAME_TOKENS)
        codes = [tokenizer.frames_from_ids(video.token_ids) - tokenizer.visual_offset for video in videos]
        rows = tuple(row_of(server, ids, video, own) for video, own in zip(videos, codes, strict=True))
        given = picture - tokenizer.visual_offset
        report(console, Story(rows, given, world, TRAINED_FRAMES, tokenizer), out, PRESET)
        sequences.write_video(out / "video.json", ids + videos[1].token_ids, len(ids))


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


def shortened(text: str, most: int = MOST_CHARACTERS) -> str:
    """As much of a text as is shown."""
    return text if len(text) <= most else f"{text[: most - 4].rstrip()} ..."


def progress_bars(console: Console) -> Progress:
    """Bars for `stream_video`."""
    return Progress(
        TextColumn("[bold]{task.description:15}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tokens, {task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def _body(ids: list[int], cache: Cache) -> dict[str, Any]:
    options = {"grid": [GRID, GRID], **cache.options}
    return {
        "prompt": ids,
        "max_tokens": FRAMES * FRAME_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "vllm_xargs": {f"{REQUEST_PREFIX}{name}": value for name, value in options.items()},
    }


def make_videos(
    console: Console,
    url: str,
    log: Path,
    body: Callable[[Cache], dict[str, Any]],
    frames: int,
    frame_tokens: int,
) -> list[Generated]:
    """Make a video with each of `CACHES`.

    Args:
        console: for the progress.
        url: of the server.
        log: of the server.
        body: of the request with a cache, with its ``max_tokens``.
        frames: of the video.
        frame_tokens: tokens of each.

    Raises:
        ServerError: the server refused a request, or did not make all frames.
    """
    with client_of(url) as client, progress_bars(console) as progress:
        # One after the other. Together they would be sooner done, but share their steps: a frame would take as long
        # with each cache.
        return [stream_video(client, body(cache), cache, frames, frame_tokens, log, progress) for cache in CACHES]


def stream_video(
    client: httpx.Client,
    body: dict[str, Any],
    cache: Cache,
    frames: int,
    frame_tokens: int,
    log: Path,
    progress: Progress,
) -> Generated:
    """Stream one video, and read in the server's log what the engine held while it made it.

    Args:
        client: of the server.
        body: of the request, with its ``max_tokens``.
        cache: that the body asks for.
        frames: of the video.
        frame_tokens: tokens of each.
        log: of the server.
        progress: of `progress_bars`.

    Raises:
        ServerError: the server refused the request, or did not make all frames.
    """
    task = progress.add_task(cache.label, total=frames * frame_tokens, note="frame 1")
    video = Generated(cache, body["vllm_xargs"])
    body = {"model": "demo", "stream": True, "return_token_ids": True, "request_id": cache.name, **body}
    with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != httpx.codes.OK:
            raise ServerError(f"the server refused the request: {response.read().decode(errors='replace')}")
        for line in response.iter_lines():
            video.token_ids += tokens_in(line)
            frame = min(len(video.token_ids) // frame_tokens + 1, frames)
            progress.update(task, completed=len(video.token_ids), note=f"frame {frame}")
    if len(video.token_ids) != frames * frame_tokens:
        raise ServerError(f"the server ended the video after {len(video.token_ids)} of {frames * frame_tokens} tokens")
    record = record_of(log, f"cmpl-{cache.name}-")
    video.resident_tokens, video.seconds = record["peak_tokens_by_frame"], record["seconds_per_frame"]
    return video


def row_of(server: ServerConfig, prompt: list[int], video: Generated, codes: Int64) -> Row:
    """A video as a row of a story.

    Args:
        server: its configuration.
        prompt: token ids that the video follows.
        video: as it was made.
        codes: codewords of its frames, [T, 16, 16].

    Raises:
        ServerError: the engine held less than the plan says, so nobody knows what.
    """
    request = server.request(video.options, prompt)
    assert request is not None
    ids, frames = np.array([*prompt, *video.token_ids]), len(codes)
    lives = []
    for stream in request.streams:
        layout, policy = stream.plan.layout, stream.plan.policy
        retention = Retention(layout, policy, BLOCK_SIZE, sequences.lookup(ids[stream.start :]))
        lives.append(retention.live_blocks(layout.frame_start(frames) - 1))
    planned, held = BLOCK_SIZE * sum(map(len, lives)), video.resident_tokens[-1]
    # It may hold more for a moment, where steps are scheduled ahead.
    if held < planned:
        raise ServerError(f"{video.cache.label}: the engine held {held} tokens with the last frame, not {planned}")
    # Both streams of a guided video drop the same frames: one picture is enough.
    plan = request.streams[0].plan
    places = visual_places(plan.layout, frames) // BLOCK_SIZE
    return Row(
        video.cache.label, kept(plan.policy), codes, np.isin(places, lives[0]), video.resident_tokens, video.seconds
    )


def visual_places(layout: VideoLayout, frames: int) -> Int64:
    """Where in a sequence visual tokens are, [T + 1, rows, columns]: of the given picture, then of the frames.

    That picture ends where the condition does, as a frame of its own. Where there is none, its places say nothing.
    """
    frame = layout.frame
    assert frame.grid is not None
    rows, columns = frame.grid
    inside = np.arange(rows)[:, None] * (columns + frame.row_end_tokens) + np.arange(columns)
    starts = layout.frame_start(0) + np.arange(-1, frames) * layout.tokens_per_frame + frame.frame_start_tokens
    return starts[:, None, None] + inside


def kept(policy: Policy) -> str:
    """What a policy keeps of the history, in a few words."""
    if isinstance(policy, Full):
        return "every frame"
    assert isinstance(policy, PackCache)
    if policy.window == 1:
        return "one frame"
    if policy.selection == "changed":
        return f"one frame, and what changed in {policy.window}"
    return f"less and less of the last {policy.window} frames"


def report(console: Console, story: Story, out: Path, model: str) -> None:
    """Write the story of a demo, and say so, and what to do next.

    Args:
        console: to say it on.
        story: with packcache in its second row.
        out: folder.
        model: name of the bundled one.
    """
    draw(story, out / "story.png")
    write_video(animate(story), out / "story")
    write_video(story.pictures(story.rows[1].codes), out / "video")

    table = Table()
    table.add_column("")
    for heading in ("tokens held", "share", "seconds a frame", "objects right"):
        table.add_column(heading, justify="right")
    for row in story.rows:
        share = row.tokens[-1] / story.rows[0].tokens[-1]
        count = story.objects(row)
        right = "not known" if count is None else f"{count[0]} of {count[1]}"
        table.add_row(row.label, f"{row.tokens[-1]:,}", f"{share:.0%}", f"{row.seconds:.2f}", right)
    console.print(table)
    console.print(story.sentence)
    for name, what in (
        ("story.png", "all of it in one picture"),
        ("story.gif", "the videos side by side (story.mp4: the same)"),
        ("video.gif", "packcache's video alone (video.mp4: the same)"),
        ("video.json", "its token ids, for vllm-packcache explain --sequence"),
    ):
        console.print(f"  [bold]{escape(str(out / name))}[/]  {what}", soft_wrap=True)
    words = "make playground" if model == PRESET else f"make playground PLAYGROUND={model}"
    console.print(f"[bold]{words}[/]: make videos like these in a browser", soft_wrap=True)


def write_video(frames: Pixels, stem: Path) -> None:
    """Write ``frames`` [T, H, W, 3] as ``stem``.gif and ``stem``.mp4 (H.264)."""
    for suffix in SUFFIXES:
        stem.with_suffix(suffix).write_bytes(encode_video(frames, suffix, FRAMES_PER_SECOND))


def one_line(line: str) -> str:
    """The end of a line of the server's log, beside what is waited for."""
    return f"starting the server  [dim]{escape(line[-90:])}[/]"
