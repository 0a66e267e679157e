"""The masked demo: a picture and a sentence become a video, frame by frame and each frame in a few passes."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import httpx
import numpy as np
import torch
from rich.console import Console
from rich.markup import escape

from vllm_packcache import masked
from vllm_packcache.config import ServerConfig
from vllm_packcache.demo.evaluate import score_objects
from vllm_packcache.demo.masked.bundle import OPTIONS, PRESET, request_options, write_checkpoint
from vllm_packcache.demo.masked.tokenizer import FRAME, GRID_SHAPE, build_text_tokenizer, prompt, world_frame
from vllm_packcache.demo.run import (
    BLOCK_SIZE,
    POLICIES,
    Video,
    one_line,
    progress_bars,
    report,
    stream_video,
)
from vllm_packcache.demo.server import serving
from vllm_packcache.demo.tokenizer import VideoTokenizer
from vllm_packcache.demo.world import World, make_world
from vllm_packcache.media.pictures import read_picture

FRAMES = 12
EXAMPLE = 10_003
"""Seed of the world that is shown when nobody gives a picture or a sentence: the first that evaluation uses without a
pillar, behind which this model loses things."""


class _Asked(NamedTuple):
    """What is to be shown, and the world in which it is true, if there is one."""

    text: str
    image: list[int]
    what: str
    world: World | None


def run_masked_demo(image: Path | None, text: str | None, out: Path) -> None:
    """Serve the bundled masked model, make a video twice, and write what came out to ``out``.

    Args:
        image: any picture. Without one and without a text there is an example; without one, the text alone is used.
        text: what is to happen; the example's by default, which fits only the example's picture.
        out: folder for the videos (GIF, MP4), the pictures (PNG) and the server's log; it is created.

    Raises:
        OSError: the picture cannot be read, or the folder not be written.
        ServerError: the server did not come up.
    """
    console = Console()
    tokenizer = VideoTokenizer()
    asked = _asked(image, text, tokenizer)
    out.mkdir(parents=True, exist_ok=True)
    ids = prompt(asked.text, FRAMES, build_text_tokenizer()) + asked.image
    console.print(f"[bold]picture[/] {escape(asked.what)}   [bold]prompt[/] {escape(asked.text)}", soft_wrap=True)
    words = build_text_tokenizer()
    unknown = [word for word in asked.text.split() if "<unk>" in words.encode(word, add_special_tokens=False).tokens]
    if unknown:
        console.print(f"[yellow]the model does not know[/] {escape(', '.join(unknown))}")
    console.print(
        f"{FRAMES} frames of {FRAME.tokens_per_frame} tokens, {OPTIONS.steps} passes and a commit each, "
        f"guidance {OPTIONS.guidance:g}"
    )

    arguments = [
        *("--kv-cache-policy", "packcache", "--kv-cache-policy-config", PRESET),
        *("--served-model-name", "demo", "--dtype", "float32"),
        *("--max-model-len", "4096", "--block-size", str(BLOCK_SIZE), "--max-num-seqs", "2"),
        *("--distributed-executor-backend", "uni"),
    ]
    with TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(folder)
        console.print(f"[bold]vllm serve[/] {checkpoint} {' '.join(arguments)}", soft_wrap=True)
        with (
            console.status("starting the server") as status,
            serving(
                checkpoint,
                arguments,
                out / "server.log",
                lambda line: status.update(one_line(line)),
                interpreted=not torch.cuda.is_available(),
            ) as url,
        ):
            status.stop()
            with httpx.Client(base_url=url, timeout=600) as client, progress_bars(console) as progress:
                videos = [
                    stream_video(
                        client,
                        {
                            "prompt": ids,
                            "max_tokens": FRAMES * FRAME.tokens_per_frame,
                            "vllm_xargs": request_options(FRAMES, policy, OPTIONS),
                        },
                        policy,
                        FRAMES,
                        FRAME.tokens_per_frame,
                        progress,
                    )
                    for policy in POLICIES
                ]
    codes = {video.policy: _codes(video) for video in videos}
    server = ServerConfig.parse("packcache", PRESET)
    report(
        console,
        videos,
        {policy: _pictures(tokenizer, own) for policy, own in codes.items()},
        {p: server.masked_plan(request_options(FRAMES, p, OPTIONS), ids).streams for p in POLICIES},
        out,
        also={} if asked.world is None else {"true": _pictures(tokenizer, _true(asked.world))},
    )
    if asked.world is not None:
        for policy, own in codes.items():
            console.print(f"{policy}: {_quality(asked.world, own)}")


def _asked(image: Path | None, text: str | None, tokenizer: VideoTokenizer) -> _Asked:
    example = make_world(EXAMPLE)
    if image is None and text is None:
        return _Asked(example.prompt, world_frame(example, 0).tolist(), "the example's", example)
    if image is None:
        assert text is not None
        return _Asked(text, [], "none: the text alone", None)
    codes = tokenizer.encode_image(read_picture(image)) - tokenizer.visual_offset
    text = example.prompt if text is None else text
    return _Asked(text, masked.frame_of_codes(codes).tolist(), str(image), None)


def _codes(video: Video) -> np.ndarray:
    """Codes of a video's frames, int64 [T, 16, 16]."""
    frames = np.array(video.token_ids).reshape(-1, FRAME.tokens_per_frame)
    return np.stack([masked.codes_of_frame(ids, GRID_SHAPE) for ids in frames])


def _pictures(tokenizer: VideoTokenizer, codes: np.ndarray) -> np.ndarray:
    return tokenizer.decode_frames(codes + tokenizer.visual_offset)


def _true(world: World) -> np.ndarray:
    return np.stack([world.frame_ids(k) for k in range(1, FRAMES + 1)])


def _quality(world: World, codes: np.ndarray) -> str:
    """How near a video is to the true one, in words."""
    true = _true(world)
    changed = true != np.stack([world.frame_ids(k) for k in range(FRAMES)])
    score = score_objects(world, codes)
    return (
        f"{(codes == true).mean():.1%} of the tokens are true, {(codes == true)[changed].mean():.1%} of those that "
        f"change; {score.right} of {score.seen} times an object is wholly right and in its place"
    )
