"""A sentence, and a picture or a video, become a video: the client of a masked model's server.

What is asked for is written as the model was trained to read it: the text states size, duration and rate; a picture is
the first latent frame, the frames of a video to continue follow it. The server makes the latent frames that are left.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import httpx
import imageio.v3 as iio
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vllm_packcache import masked
from vllm_packcache.config import CONFIG_KEY, OWNER_KEY, POLICY_KEY, ConfigError, ServerConfig, load_mapping, presets
from vllm_packcache.demo.server import ServerError, client_of, serving, stream_frames
from vllm_packcache.masked import FRAMES_PER_LATENT, MaskedOptions
from vllm_packcache.media.pictures import Pixels, fit, read_picture
from vllm_packcache.policies import PackCache
from vllm_packcache.tokenizers.text import TextTokenizer
from vllm_packcache.tokenizers.video import Codes, CosmosTokenizer, VideoTokenizer

SUFFIXES = (".mp4", ".gif")

LARGEST_NUMBER = masked.MASK - masked.NUMBER_ZERO - 1
"""A prompt and a frame state numbers up to this one: the next id is the mask's."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The video that is asked for.

    Args:
        prompt: what is to be seen.
        width: of a frame, in pixels.
        height: of a frame.
        frames: of the whole video, with what is given of it.
        rate: frames a second.
        options: how it is made.
        image: picture that it begins with.
        video: video that it begins with.

    Raises:
        ConfigError: a prompt cannot state this, or both a picture and a video are given.
    """

    prompt: str
    width: int
    height: int
    frames: int
    rate: int
    options: MaskedOptions
    image: Path | None = None
    video: Path | None = None

    def __post_init__(self) -> None:
        try:
            masked.grid_of(self.width, self.height)
        except ValueError as error:
            raise ConfigError(f"--width and --height: {error}") from None
        if max(self.width, self.height) > LARGEST_NUMBER * masked.PIXELS_PER_SIZE:
            most = LARGEST_NUMBER * masked.PIXELS_PER_SIZE
            raise ConfigError(f"--width and --height are {most} at most, not {self.width} and {self.height}")
        if not 1 <= self.rate <= LARGEST_NUMBER:
            raise ConfigError(f"--fps lies between 1 and {LARGEST_NUMBER}, not {self.rate}")
        if self.frames % self.rate or not 1 <= self.seconds <= LARGEST_NUMBER:
            raise ConfigError(
                f"--frames {self.frames} at --fps {self.rate}: a prompt states whole seconds, 1 to {LARGEST_NUMBER}; "
                f"give --frames a multiple of {self.rate} up to {LARGEST_NUMBER * self.rate}"
            )
        if self.image and self.video:
            raise ConfigError("--image and --video: a video begins with one of them; leave one out")

    @property
    def seconds(self) -> int:
        """Duration."""
        return self.frames // self.rate

    @property
    def grid(self) -> masked.Grid:
        """Of the visual tokens."""
        return masked.grid_of(self.width, self.height)

    @property
    def latent_frames(self) -> int:
        """Of the whole video."""
        return masked.latent_frames(self.seconds, self.rate)


class Request(NamedTuple):
    """What a server is asked for.

    Args:
        prompt_ids: text and given frames.
        given: codes of these, [given, rows, columns].
        options: of the request, for `stream_frames`.
    """

    prompt_ids: list[int]
    given: Codes
    options: dict[str, Any]

    @property
    def frames(self) -> int:
        """Latent frames to make."""
        return self.options["frames"]


def generate(
    asked: Asked,
    out: Path,
    tokenizer: Path,
    *,
    model: Path | None = None,
    url: str | None = None,
    config: str | None = None,
) -> None:
    """Have a video made by a server that runs, or by one of our own, and write it.

    The video tokenizer runs before our server starts and after it has stopped: it has the device to itself.

    Args:
        asked: the video.
        out: its file; the log of our server lies beside it.
        tokenizer: folder of both tokenizers, of text and of video.
        model: checkpoint that our server serves.
        url: of a server that runs; either this or ``model``.
        config: of our server's policy: a preset, a file, or JSON; by default `fitting_config`.

    Raises:
        ConfigError: the options do not go together, or an input cannot be used.
        OSError: a file is missing or cannot be written; or, as `ServerError`, the server refused or failed.
    """
    if (model is None) == (url is None):
        raise ConfigError("--model and --url: give the folder of a model to serve, or the address of a server")
    if url is not None and config is not None:
        raise ConfigError("--config is of a server of your own (--model): the one at --url has its own")
    if out.suffix not in SUFFIXES:
        raise ConfigError(f"--out ends with {' or '.join(SUFFIXES)}, not {out.name!r}")
    policy = {} if model is None else server_config(asked, config)
    dtype = "auto" if model is None else precision(model)
    out.parent.mkdir(parents=True, exist_ok=True)
    console = Console()
    try:
        text, video = TextTokenizer(tokenizer), CosmosTokenizer(tokenizer)
        request = prepare(asked, text, video)
        # What cannot be decoded should be known before it is made.
        video.decode(np.zeros((1, *asked.grid), dtype=np.int64))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    running: AbstractContextManager[str] = nullcontext(str(url))
    if model is not None:
        running = _own_server(model, policy, dtype, request, asked.grid, out.with_suffix(".log"), console)
    with running as address, _client(address) as client, _progress(console) as progress:
        task = progress.add_task("latent frames", total=asked.latent_frames, completed=len(request.given))
        made = stream_frames(
            client, request.prompt_ids, asked.grid, request.options, lambda codes: progress.advance(task)
        )
    write_video(video.decode(np.concatenate([request.given, made]))[: asked.frames], out, asked.rate)
    console.print(f"wrote [bold]{escape(str(out))}[/]", soft_wrap=True)


def prepare(asked: Asked, text: TextTokenizer, video: VideoTokenizer) -> Request:
    """The request for a video.

    A picture is its first latent frame. Of a video that is to be continued the first frame is the conditioning image,
    which is kept for ever, and the others are frames as if they had been made.

    Raises:
        ValueError: an input cannot be used.
        OSError: an input cannot be read.
    """
    given = np.empty((0, *asked.grid), dtype=np.int64)
    if asked.image is not None:
        given = video.encode(fit(read_picture(asked.image), asked.width, asked.height)[None])
    elif asked.video is not None:
        given = video.encode(read_video(asked.video, asked))
    if len(given) >= asked.latent_frames:
        raise ConfigError(
            f"--frames {asked.frames} are {asked.latent_frames} latent frames, of which {len(given)} are given: "
            "ask for more frames"
        )
    ids = text.encode(masked.question(asked.prompt, asked.width, asked.height, asked.seconds, asked.rate))
    prompt = masked.text_prompt(ids, asked.seconds, asked.rate)
    for codes in given:
        prompt += masked.frame_of_codes(codes).tolist()
    options = {
        **{name: int(value) if isinstance(value, bool) else value for name, value in asdict(asked.options).items()},
        "frames": asked.latent_frames - len(given),
        "condition_frames": min(1, len(given)),
    }
    return Request(prompt, given, options)


def read_video(path: Path, asked: Asked) -> Pixels:
    """The frames of a video that can be continued: at the rate and of the size that are asked for.

    A video can be encoded if it has 1 + 4 k frames: of others the last so many are taken, where the new ones go on.

    Returns:
        uint8, [1 + 4 k, height, width, 3].

    Raises:
        ConfigError: it has as many frames as are asked for in all.
        OSError: it cannot be read.
    """
    frames: list[Pixels] = []
    try:
        for frame, end in _shown(path):
            # Times in files are rounded: a frame that begins a little late is still the one.
            while (len(frames) + Fraction(1, 4)) / asked.rate < end:
                frames.append(fit(frame, asked.width, asked.height))
                if len(frames) == asked.frames:
                    raise ConfigError(
                        f"{path} has {asked.frames} frames or more at --fps {asked.rate}, and --frames asks for as "
                        "many in all: ask for more"
                    )
    except (av.FFmpegError, OSError, LookupError) as error:
        raise OSError(f"{path} cannot be read as a video: {error}") from None
    if not frames:
        raise OSError(f"{path} cannot be read as a video: it has no frames")
    return np.stack(frames[(len(frames) - 1) % FRAMES_PER_LATENT :])


def _shown(path: Path) -> Iterator[tuple[Pixels, Fraction]]:
    """Frames of a video, each with the time at which it is no longer shown, in seconds from the first one."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        unit = stream.time_base or Fraction(1)
        first, before = 0, None
        for frame in container.decode(stream):
            if before is None:
                first = frame.pts or 0
            else:
                yield _pixels(before), ((frame.pts or 0) - first) * unit
            before = frame
        if before is not None:
            own = before.duration * unit if before.duration else 1 / (stream.average_rate or Fraction(1))
            yield _pixels(before), ((before.pts or 0) - first) * unit + own


def _pixels(frame: av.VideoFrame) -> Pixels:
    return frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)


def write_video(frames: Pixels, path: Path, rate: int) -> None:
    """Write frames [T, H, W, 3] in the format of the path's suffix, one of `SUFFIXES`."""
    if path.suffix == ".gif":
        iio.imwrite(path, frames, duration=1000 / rate, loop=0)
    else:
        iio.imwrite(path, frames, plugin="pyav", codec="libx264", fps=rate)


def server_config(asked: Asked, config: str | None) -> dict[str, Any]:
    """The configuration of our server's policy; its layout is of the asked size where it gives none.

    Raises:
        ConfigError: it is wrong, or its frames are smaller than those that are asked for.
    """
    mapping = load_mapping(fitting_config(asked.grid) if config is None else config)
    mapping = {**mapping, "layout": mapping.get("layout") or {"grid": list(asked.grid)}}
    layout = ServerConfig.of_masked_model({POLICY_KEY: policy_of(mapping), CONFIG_KEY: mapping}).layout
    assert layout is not None
    assert layout.grid is not None
    own, wanted = (masked.frame_layout(grid).tokens_per_frame for grid in (layout.grid, asked.grid))
    if own < wanted:
        raise ConfigError(
            f"--config: its layout's grid {list(layout.grid)} makes frames of {own} tokens, and those of "
            f"{asked.width} x {asked.height} pixels have {wanted}: give grid: {list(asked.grid)}, or no layout"
        )
    return mapping


def policy_of(mapping: Mapping[str, Any]) -> str:
    """The policy whose options a configuration holds."""
    return mapping.get(OWNER_KEY) or PackCache.name


def fitting_config(grid: masked.Grid) -> str:
    """Name of the preset with this grid for models of this kind, or JSON with the grid alone."""
    for name in presets():
        layout = load_mapping(name).get("layout", {})
        if name.startswith("lumos1_") and layout["grid"] == list(grid):
            return name
    return json.dumps({"layout": {"grid": list(grid)}})


def precision(model: Path) -> str:
    """In which precision our server serves a checkpoint, for ``--dtype``.

    Left alone, vLLM serves float32 as half precision: on a GPU only that is fast, on a CPU nothing is gained.

    Raises:
        ConfigError: the folder holds no checkpoint of a masked model.
    """
    import torch

    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model {model}: its config.json cannot be read: {error}") from None
    found = config.get("architectures") or []
    if not set(found) & set(masked.ARCHITECTURES):
        raise ConfigError(
            f"--model {model} is of architecture {', '.join(found) or 'unknown'}: generate is for "
            f"{' and '.join(masked.ARCHITECTURES)}"
        )
    return "auto" if torch.cuda.is_available() else config.get("dtype") or config.get("torch_dtype") or "auto"


@contextmanager
def _own_server(
    model: Path,
    policy: dict[str, Any],
    dtype: str,
    request: Request,
    grid: masked.Grid,
    log: Path,
    console: Console,
) -> Iterator[str]:
    import torch

    total = len(request.prompt_ids) + request.frames * masked.frame_layout(grid).tokens_per_frame
    arguments = [
        *("--kv-cache-policy", policy_of(policy), "--kv-cache-policy-config", json.dumps(policy)),
        *("--max-model-len", str(total), "--max-num-seqs", "1", "--dtype", dtype, "--skip-tokenizer-init"),
    ]
    console.print(f"[bold]vllm serve[/] {escape(shlex.join([str(model), *arguments]))}", soft_wrap=True)
    with (
        console.status("starting the server") as status,
        serving(
            model,
            arguments,
            log,
            lambda line: status.update(f"starting the server  [dim]{escape(line[-90:])}[/]"),
            interpreted=not torch.cuda.is_available(),
        ) as address,
    ):
        status.stop()
        try:
            yield address
        except ServerError as error:
            raise ServerError(f"{error}; its log is {log}") from None


@contextmanager
def _client(address: str) -> Iterator[httpx.Client]:
    """A client of a server that is there. It waits for a frame as long as that takes.

    Raises:
        ServerError: there is no such server.
    """
    try:
        client = client_of(address, httpx.Timeout(60, read=None))
        client.get("/health", timeout=60)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ServerError(f"the server at {address} does not answer: {error}") from None
    with client:
        yield client


def _progress(console: Console) -> Progress:
    columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console)
