"""The masked demo: a picture and a sentence become a video, frame by frame and each frame in a few passes."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console

from vllm_packcache.demo.masked.bundle import OPTIONS, PRESET, TRAINED_FRAMES, request_options, write_checkpoint
from vllm_packcache.demo.masked.processor import EXAMPLE, FRAMES
from vllm_packcache.demo.masked.tokenizer import FRAME, GRID_SHAPE, RATE, build_text_tokenizer
from vllm_packcache.demo.run import (
    BLOCK_SIZE,
    LOGGING,
    Cache,
    Generated,
    claimed,
    fitting,
    make_videos,
    one_line,
    report,
    row_of,
    tell,
)
from vllm_packcache.demo.story import Story
from vllm_packcache.demo.tokenizer import TEXT_TOKENS, VideoTokenizer, readable
from vllm_packcache.demo.world import World, make_world
from vllm_packcache.families import LUMOS, lumos
from vllm_packcache.media.pictures import read_picture
from vllm_packcache.serving.server import serving
from vllm_packcache.tools import sequences


class _Asked(NamedTuple):
    """What is to be shown, and the world in which it is true, if there is one.

    Args:
        text: the sentence.
        picture: codes of the conditioning image, int64 [16, 16]; None: there is none.
        what: where the picture is from.
        world: in which the true continuation is known.
    """

    text: str
    picture: lumos.Int64 | None
    what: str
    world: World | None


def run_masked_demo(image: Path | None, text: str | None, out: Path, config: str = PRESET) -> None:
    """Serve the bundled masked model, make a video with each cache of the demo, and write what came out to ``out``.

    Args:
        image: any picture. Without one and without a text there is an example; without one, the text alone is used.
        text: what is to happen; the example's by default, which fits only the example's picture.
        out: folder for the videos (GIF, MP4), the picture (PNG) and the server's log; it is created.
        config: of packcache, with the layout of `PRESET`: a preset, a file or JSON text.

    Raises:
        ConfigError: the configuration is wrong, or for other videos.
        OSError: the picture cannot be read, or the folder not be written.
        ServerError: the server did not come up.
    """
    server = fitting(config, PRESET, LUMOS)
    console = Console()
    tokenizer = VideoTokenizer()
    asked = _asked(image, text, tokenizer)
    words = build_text_tokenizer()

    def encode(text: str) -> list[int]:
        return words.encode(text, add_special_tokens=False).ids

    (unknown,) = words.encode("<unk>", add_special_tokens=False).ids
    tell(console, asked.what, asked.text, encode, unknown, asked.picture)
    ids = lumos.text_prompt(encode(asked.text)[:TEXT_TOKENS], FRAMES, RATE)
    if asked.picture is not None:
        ids += lumos.frame_of_codes(asked.picture).tolist()
    console.print(
        f"{FRAMES} frames of {FRAME.tokens_per_frame} tokens, {OPTIONS.steps} passes and a commit each, "
        f"guidance {OPTIONS.guidance:g}"
    )

    def body(cache: Cache) -> dict[str, Any]:
        return {
            "prompt": ids,
            "max_tokens": FRAMES * FRAME.tokens_per_frame,
            "vllm_xargs": request_options(FRAMES, OPTIONS, **cache.options),
        }

    arguments = [
        *("--kv-cache-policy", "packcache", "--kv-cache-policy-config", config),
        *("--served-model-name", "demo", "--dtype", "float32"),
        *("--max-model-len", "8192", "--block-size", str(BLOCK_SIZE), "--max-num-seqs", "2"),
        *("--distributed-executor-backend", "uni"),
    ]
    with claimed(out) as log, TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(folder)
        console.print(f"[bold]vllm serve[/] {checkpoint} {' '.join(arguments)}", soft_wrap=True)
        with (
            console.status("starting the server") as status,
            serving(
                checkpoint,
                arguments,
                log,
                lambda line: status.update(one_line(line)),
                interpreted=not torch.cuda.is_available(),
                environment=LOGGING,
            ) as url,
        ):
            status.stop()
            videos = make_videos(console, url, log, body, FRAMES, FRAME.tokens_per_frame)
        rows = tuple(row_of(server, ids, video, _codes(video)) for video in videos)
        report(console, Story(rows, asked.picture, asked.world, TRAINED_FRAMES, tokenizer), out, PRESET)
        sequences.write_video(out / "video.json", ids + videos[1].token_ids, len(ids))


def _asked(image: Path | None, text: str | None, tokenizer: VideoTokenizer) -> _Asked:
    example = make_world(EXAMPLE)
    if image is None and text is None:
        return _Asked(example.prompt, example.frame_ids(0), "the example's", example)
    if image is None:
        assert text is not None
        return _Asked(readable(text), None, "none: the text alone", None)
    codes = tokenizer.encode_image(read_picture(image)) - tokenizer.visual_offset
    return _Asked(example.prompt if text is None else readable(text), codes, str(image), None)


def _codes(video: Generated) -> lumos.Int64:
    """Codes of a video's frames, int64 [T, 16, 16]."""
    frames = np.array(video.token_ids).reshape(-1, FRAME.tokens_per_frame)
    return np.stack([lumos.codes_of_frame(ids, GRID_SHAPE) for ids in frames])
