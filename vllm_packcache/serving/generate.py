"""A sentence, and a picture or a video, become a video: the client of a masked model's server.

What is asked for is written as the model was trained to read it: the text states size, duration and rate; a picture is
the first latent frame, the frames of a video to continue follow it. The server makes the latent frames that are left.
"""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vllm_packcache.config.errors import ConfigError
from vllm_packcache.config.server import OWNER_KEY, ServerConfig
from vllm_packcache.config.sources import load_mapping, presets
from vllm_packcache.core.policies import PackCache
from vllm_packcache.families import LUMOS, lumos
from vllm_packcache.families.lumos import MaskedOptions
from vllm_packcache.media.files import claimed
from vllm_packcache.media.pictures import fit, middle, read_picture
from vllm_packcache.media.processors.lumos import Names, Stated, prompt_of
from vllm_packcache.media.text_tokenizer import TextTokenizer
from vllm_packcache.media.video_tokenizer import Codes, CosmosTokenizer, VideoTokenizer
from vllm_packcache.media.videos import SUFFIXES, encode_video, read_video
from vllm_packcache.serving.server import ServerError, client_of, serving, stream_frames

KEY_VARIABLE = "VLLM_API_KEY"
"""Where vLLM's servers look for the key that they ask for, and their clients find it."""

FLAGS = Names("--width and --height", "--frames", "--fps")
"""What the options of a video are called on the command line."""


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
            self.stated  # noqa: B018
        except ValueError as error:
            raise ConfigError(str(error)) from None
        if self.image and self.video:
            raise ConfigError("--image and --video: a video begins with one of them; leave one out")

    @property
    def stated(self) -> Stated:
        """What a prompt states of it."""
        return Stated(self.width, self.height, self.frames, self.rate, FLAGS)

    @property
    def grid(self) -> lumos.Grid:
        """Of the visual tokens."""
        return self.stated.grid

    @property
    def latent_frames(self) -> int:
        """Of the whole video."""
        return self.stated.latent_frames


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
    api_key: str | None = None,
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
        api_key: of the server at ``url``; by default `KEY_VARIABLE` of the environment.

    Raises:
        ConfigError: the options do not go together, or an input cannot be used.
        OSError: a file is missing or cannot be written; or, as `ServerError`, the server refused or failed.
    """
    if (model is None) == (url is None):
        raise ConfigError("--model and --url: give the folder of a model to serve, or the address of a server")
    if url is not None and config is not None:
        raise ConfigError("--config is of a server of your own (--model): the one at --url has its own")
    if url is None and api_key is not None:
        raise ConfigError("--api-key is of a server that runs (--url): one of your own (--model) answers you alone")
    if out.suffix not in SUFFIXES:
        raise ConfigError(f"--out ends with {' or '.join(SUFFIXES)}, not {out.name[-80:]!r}")
    policy = {} if model is None else server_config(asked, config)
    dtype = "auto" if model is None else precision(model)
    key = api_key or os.environ.get(KEY_VARIABLE) if url is not None else None
    console = Console()
    with claimed(out) as put:
        if url is not None:
            _client(url, key).close()
        watch = _Watch()
        try:
            text, video = TextTokenizer(tokenizer), CosmosTokenizer(tokenizer)
            request = prepare(asked, text, video, lambda told: console.print(escape(told), soft_wrap=True))
            # What cannot be decoded should be known before it is made.
            video.decode(np.zeros((1, *asked.grid), dtype=np.int64))
        except ValueError as error:
            raise ConfigError(str(error)) from None
        watch.lap("tokenizers")
        running: AbstractContextManager[str] = nullcontext(str(url))
        if model is not None:
            running = _own_server(model, policy, dtype, request, asked.grid, out.with_suffix(".log"), console)
        with running as address, closing(_client(address, key)) as client, _progress(console) as progress:
            watch.lap("server")
            task = progress.add_task("latent frames", total=asked.latent_frames, completed=len(request.given))
            made = stream_frames(
                client, request.prompt_ids, asked.grid, request.options, lambda codes: progress.advance(task)
            )
            watch.lap(f"{len(made)} latent frames")
        frames = video.decode(np.concatenate([request.given, made]))[: asked.frames]
        watch.lap("decoding")
        put(encode_video(frames, out.suffix, asked.rate))
        watch.lap("writing")
    console.print(f"wrote [bold]{escape(str(out))}[/], {len(frames)} frames at {asked.rate} a second", soft_wrap=True)
    console.print(f"took {watch}", soft_wrap=True)


def prepare(
    asked: Asked, text: TextTokenizer, video: VideoTokenizer, tell: Callable[[str], None] = lambda told: None
) -> Request:
    """The request for a video.

    A picture is its first latent frame. Of a video that is to be continued the first frame is the conditioning image,
    which is kept for ever, and the others are frames as if they had been made. A video can be encoded if it has 1 + 4 k
    frames: of others the last so many are taken, where the new ones go on.

    Args:
        asked: the video.
        text: its tokenizer.
        video: its tokenizer.
        tell: is told what of a picture or a video is used.

    Raises:
        ValueError: an input cannot be used.
        OSError: an input cannot be read.
    """
    stated = asked.stated
    given = np.empty((0, *asked.grid), dtype=np.int64)
    if asked.image is not None:
        picture = read_picture(asked.image)
        tell(f"picture {asked.image}: {_cut(picture.shape[1], picture.shape[0], asked)}")
        given = video.encode(fit(picture, asked.width, asked.height)[None])
    elif asked.video is not None:
        clip = read_video(asked.video, asked.width, asked.height, asked.rate, asked.frames)
        used = stated.used(clip, str(asked.video))
        which = "all" if len(used) == clip.total else f"the last {len(used)} of"
        cut = _cut(*clip.size, asked)
        used_in_words = f"{which} {clip.total} frames at {asked.rate} a second, {cut}"
        tell(f"video {asked.video}: {', '.join(clip.notes)}; used: {used_in_words}")
        given = video.encode(used)
    options = {
        **{name: int(value) if isinstance(value, bool) else value for name, value in asdict(asked.options).items()},
        "frames": stated.left(given),
        "condition_frames": min(1, len(given)),
    }
    return Request(prompt_of(stated.text(text, asked.prompt), given), given, options)


def server_config(asked: Asked, config: str | None) -> dict[str, Any]:
    """The configuration of our server's policy; its layout is of the asked size where it gives none.

    Raises:
        ConfigError: it is wrong, or its frames are smaller than those that are asked for.
    """
    mapping = load_mapping(fitting_config(asked.grid) if config is None else config)
    mapping = {**mapping, "layout": mapping.get("layout") or {"grid": list(asked.grid)}}
    layout = ServerConfig.parse(policy_of(mapping), mapping, family=LUMOS).layout
    assert layout is not None
    assert layout.grid is not None
    own, wanted = (lumos.frame_layout(grid).tokens_per_frame for grid in (layout.grid, asked.grid))
    if own < wanted:
        raise ConfigError(
            f"--config: its layout's grid {list(layout.grid)} makes frames of {own} tokens, and those of "
            f"{asked.width} x {asked.height} pixels have {wanted}: give grid: {list(asked.grid)}, or no layout"
        )
    return mapping


def policy_of(mapping: Mapping[str, Any]) -> str:
    """The policy whose options a configuration holds."""
    return mapping.get(OWNER_KEY) or PackCache.name


def fitting_config(grid: lumos.Grid) -> str:
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
    if not set(found) & set(lumos.ARCHITECTURES):
        raise ConfigError(
            f"--model {model} is of architecture {', '.join(found) or 'unknown'}: generate is for "
            f"{' and '.join(lumos.ARCHITECTURES)}"
        )
    return "auto" if torch.cuda.is_available() else config.get("dtype") or config.get("torch_dtype") or "auto"


@contextmanager
def _own_server(
    model: Path,
    policy: dict[str, Any],
    dtype: str,
    request: Request,
    grid: lumos.Grid,
    log: Path,
    console: Console,
) -> Iterator[str]:
    import torch

    total = len(request.prompt_ids) + request.frames * lumos.frame_layout(grid).tokens_per_frame
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


def _cut(width: int, height: int, asked: Asked) -> str:
    """What of a picture of this size is used, in words."""
    across, down = (round(side) for side in middle(width, height, asked.width, asked.height))
    part = "all" if (across, down) == (width, height) else f"the middle {across} x {down}"
    return f"{part} of {width} x {height} pixels, as {asked.width} x {asked.height}"


class _Watch:
    """How long what took."""

    def __init__(self) -> None:
        self._laps: list[tuple[str, float]] = []
        self._began = self._last = time.monotonic()

    def lap(self, what: str) -> None:
        """What has just ended."""
        now = time.monotonic()
        self._laps.append((what, now - self._last))
        self._last = now

    def __str__(self) -> str:
        laps = ", ".join(f"{what} {seconds:.1f} s" for what, seconds in self._laps)
        return f"{self._last - self._began:.1f} s: {laps}"


def _client(address: str, key: str | None) -> httpx.Client:
    """A client of a server that is there. It waits for a frame as long as that takes.

    Args:
        address: of the server.
        key: that it asks for, if it does.

    Raises:
        ServerError: there is no such server, or it asks for another key.
    """
    try:
        client = client_of(address, httpx.Timeout(60, read=None))
        if key:
            client.headers["Authorization"] = f"Bearer {key}"
        answer = client.get("/v1/models", timeout=60)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ServerError(f"the server at {address} does not answer: {error}") from None
    if answer.status_code == httpx.codes.UNAUTHORIZED:
        had = "does not take this API key" if key else "asks for an API key"
        raise ServerError(f"the server at {address} {had}: give its own with --api-key, or in {KEY_VARIABLE}")
    return client


def _progress(console: Console) -> Progress:
    columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console)
