"""A sentence, and a picture or a video, become a video: a client of ``/v1/videos``.

The server writes the prompt, makes the frames and decodes them. What can be checked of a video of Lumos-1 is checked
here, before a server is started or sent anything; of other models the server checks it. The frames that are made are
counted, and the finished file is fetched.
"""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vllm_packcache.config.errors import ConfigError
from vllm_packcache.config.server import CONFIG_FLAG, OWNER_KEY, POLICY_FLAG, REQUEST_PREFIX, ServerConfig
from vllm_packcache.config.sources import load_mapping, presets
from vllm_packcache.config.videos import STORE_FLAG, TOKENIZER_FLAG
from vllm_packcache.core.policies import PackCache
from vllm_packcache.families import LUMOS, lumos
from vllm_packcache.families.lumos import MaskedOptions
from vllm_packcache.media.files import claimed
from vllm_packcache.media.pictures import read_picture_bytes
from vllm_packcache.media.processors.base import COSMOS_FILES
from vllm_packcache.media.processors.lumos import Names, Stated
from vllm_packcache.media.text_tokenizer import TextTokenizer
from vllm_packcache.media.videos import SUFFIXES, as_gif, read_video
from vllm_packcache.serving.server import ServerError, client_of, error_message, serving, terminating_on_sigterm
from vllm_packcache.videos.request import LARGEST_BODY, clip_suffix

KEY_VARIABLE = "VLLM_API_KEY"
"""Where vLLM's servers look for the key that they ask for, and their clients find it."""

FLAGS = Names("--width and --height", "--frames", "--fps")
"""What the options of a video are called on the command line."""

WIDTH, HEIGHT, FRAMES, RATE = 672, 384, 48, 8
"""Of a Lumos-1's video, where nobody says."""

LARGEST_FILE = LARGEST_BODY - 2**20
"""Bytes of a picture or a video: a request has other fields."""

PATH = "/v1/videos"

ABOUT = "/v1/playground"
"""Where a server says what it can be asked for."""

STEPS = "num_inference_steps"
"""Its option by which a server's model makes frames in passes: of those that serve videos, a Lumos-1."""

OF_PASSES = ("steps", "refresh", "reuse", "guidance_interval", "guidance_from", "guidance_until")
"""Of `MaskedOptions`, what means nothing to other models. Only the first has a name that clients know."""

_QUICK = 60.0
"""Seconds for an answer that needs no work."""

_LEAVING = 10.0
"""Seconds for the last that is asked."""

_SILENCE = httpx.Timeout(_QUICK, read=300)
"""For events: where nothing happens, a server gives signs of life that come far more often."""

_WAITS = (0.5, 1.0, 2.0, 4.0)
"""Seconds before a connection that was lost is made again, time after time, until it has told something."""


def _flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What somebody says of a video; None: nothing.

    Args:
        prompt: what is to be seen.
        width: of a frame, in pixels.
        height: of a frame.
        frames: of the whole video, with what is given of it.
        rate: frames a second.
        seed: of all that is random.
        steps: passes of a frame; this and the next five of models that make frames in passes.
        refresh: computed passes of a frame from one that computes all of it to the next.
        reuse: share of a frame's tokens that must have become known for a pass to be computed.
        guidance_interval: computed passes from one with the unconditional stream to the next.
        guidance_from: share of a frame's passes before which there is no guidance.
        guidance_until: share of a frame's passes from which on there is none.
        guidance: how much the prompt counts.
        negative: what is not to be seen.
        image: picture that it begins with.
        video: video that it begins with.

    Raises:
        ConfigError: both a picture and a video are given, or one half of a size.
    """

    prompt: str
    width: int | None = None
    height: int | None = None
    frames: int | None = None
    rate: int | None = None
    seed: int | None = None
    steps: int | None = None
    refresh: int | None = None
    reuse: float | None = None
    guidance_interval: int | None = None
    guidance_from: float | None = None
    guidance_until: float | None = None
    guidance: float | None = None
    negative: str | None = None
    image: Path | None = None
    video: Path | None = None

    def __post_init__(self) -> None:
        if self.image and self.video:
            raise ConfigError("--image and --video: a video begins with one of them; leave one out")

    def masked(self) -> Asked:
        """The same of a Lumos-1, which the published options complete.

        Raises:
            ConfigError: it makes no such video.
        """
        if self.negative:
            raise ConfigError("--negative-prompt is of models that make one token after the other: leave it out")
        said = {name: getattr(self, name) for name in ("seed", "guidance", *OF_PASSES)}
        try:
            options = MaskedOptions(**{name: value for name, value in said.items() if value is not None})
        except ValueError as error:
            name, rest = str(error).split(" ", 1)
            raise ConfigError(f"{_flag(name)} {rest}") from None
        return Asked(
            prompt=self.prompt,
            width=WIDTH if self.width is None else self.width,
            height=HEIGHT if self.height is None else self.height,
            frames=FRAMES if self.frames is None else self.frames,
            rate=RATE if self.rate is None else self.rate,
            options=options,
            image=self.image,
            video=self.video,
        )

    @property
    def fields(self) -> dict[str, str]:
        """Of a request to a server of a causal model, which checks and completes them.

        Raises:
            ConfigError: half of a size is said, or what such models have not.
        """
        for name in OF_PASSES:
            if getattr(self, name) is not None:
                raise ConfigError(
                    f"{_flag(name)} is of models that make frames in passes, as this server's does not: leave it out"
                )
        if (self.width is None) != (self.height is None):
            raise ConfigError("--width and --height: give both, or leave both to the server")
        fields = {
            "prompt": _text(self.prompt),
            "width": self.width,
            "height": self.height,
            "num_frames": self.frames,
            "fps": self.rate,
            "seed": self.seed,
            "guidance_scale": self.guidance,
            "negative_prompt": None if self.negative is None else _text(self.negative),
        }
        return {name: str(value) for name, value in fields.items() if value is not None}

    def reference(self) -> bytes | None:
        """The file that it begins with; None: there is none.

        Raises:
            ConfigError: it is too large, or no picture.
            OSError: it cannot be read.
        """
        if (path := self.image or self.video) is None:
            return None
        flag = "--image" if self.image else "--video"
        data = _file(path, flag)
        if self.image:
            try:
                _check_picture(data)
            except ValueError as error:
                raise ConfigError(f"{flag} {path}: {error}") from None
        return data


@dataclass(frozen=True)
class _Ready:
    """What is sent.

    Args:
        fields: of a request, without what the video begins with.
        reference: that, as a file.
        unit: what frames of an event are.
    """

    fields: Mapping[str, str]
    reference: bytes | None
    unit: str


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A video of a Lumos-1 that is asked for.

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
        ConfigError: a prompt cannot state this.
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

    @property
    def stated(self) -> Stated:
        """What a prompt states of it."""
        return Stated(self.width, self.height, self.frames, self.rate, FLAGS)

    @property
    def fields(self) -> dict[str, str]:
        """Of a request, without what it begins with."""
        return {
            "prompt": _text(self.prompt),
            "size": f"{self.width}x{self.height}",
            "num_frames": str(self.frames),
            "fps": str(self.rate),
            "seed": str(self.options.seed),
            STEPS: str(self.options.steps),
            "guidance_scale": str(self.options.guidance),
            **{f"{REQUEST_PREFIX}{name}": str(getattr(self.options, name)) for name in self._left_out},
        }

    @property
    def _left_out(self) -> list[str]:
        """Options by which less is computed than is published, and which nobody sends otherwise."""
        usual = MaskedOptions()
        return [name for name in OF_PASSES[1:] if getattr(self.options, name) != getattr(usual, name)]

    def reference(self) -> bytes | None:
        """The file that it begins with, which a server will be able to use; None: there is none.

        Raises:
            ConfigError: it will not.
            OSError: it cannot be read.
        """
        path = self.image or self.video
        if path is None:
            return None
        flag = "--image" if self.image else "--video"
        data = _file(path, flag)
        try:
            if self.image:
                _check_picture(data)
                self.stated.left(1)
            else:
                self._check_clip(path, data)
        except ValueError as error:
            raise ConfigError(f"{flag} {path}: {error}") from None
        return data

    def _check_clip(self, path: Path, data: bytes) -> None:
        known = clip_suffix(data) is not None
        clip = read_video(path, self.width, self.height, self.rate, self.frames, of_client=known)
        if not known:
            raise ValueError("a server reads MP4, WebM and GIF: convert it, such as with ffmpeg")
        self.stated.used(clip, "it")


def _text(text: str) -> str:
    """A text; what is none in it, as half a character is, is marked."""
    return text.encode("utf-8", "replace").decode()


def _file(path: Path, flag: str) -> bytes:
    """A file that a server takes.

    Raises:
        ConfigError: it is too large.
        OSError: it cannot be read.
    """
    try:
        size = path.stat().st_size
        data = path.read_bytes() if size <= LARGEST_FILE else b""
    except OSError as error:
        raise OSError(f"{flag} {path} cannot be read: {error.strerror}") from None
    if size > LARGEST_FILE:
        raise ConfigError(f"{flag} {path} has {size:,} bytes, and a server takes {LARGEST_FILE:,}: give less of it")
    return data


def _check_picture(data: bytes) -> None:
    if clip_suffix(data) is not None:
        raise ValueError("a server takes this for a video: give a PNG, JPEG or WebP file, or give it as --video")
    read_picture_bytes(data)


def generate(
    wanted: Wanted,
    out: Path,
    *,
    model: Path | None = None,
    tokenizer: Path | None = None,
    url: str | None = None,
    config: str | None = None,
    api_key: str | None = None,
) -> None:
    """Have a video made by a server that runs, or by one of our own, and write it.

    Args:
        wanted: the video.
        out: its file; the log of our server lies beside it.
        model: checkpoint that our server serves.
        tokenizer: folder of both tokenizers, of text and of video, for our server.
        url: of a server that runs; either this or ``model``.
        config: of our server's policy: a preset, a file, or JSON; by default `fitting_config`.
        api_key: of the server at ``url``; by default `KEY_VARIABLE` of the environment.

    Raises:
        ConfigError: the options do not go together, or an input cannot be used.
        OSError: a file is missing or cannot be written; or, as `ServerError`, the server refused or failed.
    """
    if (model is None) == (url is None):
        raise ConfigError("--model and --url: give the folder of a model to serve, or the address of a server")
    if url is not None:
        for flag, given in (("--config", config), ("--tokenizer", tokenizer)):
            if given is not None:
                raise ConfigError(f"{flag} is of a server of your own (--model): the one at --url has its own")
    elif api_key is not None:
        raise ConfigError("--api-key is of a server that runs (--url): one of your own (--model) answers you alone")
    if out.suffix not in SUFFIXES:
        raise ConfigError(f"--out ends with {' or '.join(SUFFIXES)}, not {out.name[-80:]!r}")
    key = api_key or os.environ.get(KEY_VARIABLE) if url is not None else None
    ready, arguments = None, []
    if model is not None:
        asked = wanted.masked()
        arguments = own_arguments(asked, model, tokenizer, config)
        ready = _ready(asked)
    console = Console()
    with claimed(out) as put, terminating_on_sigterm():
        watch = _Watch()
        running: AbstractContextManager[str] = nullcontext(str(url))
        if model is not None:
            running = _own_server(model, arguments, out.with_suffix(".log"), console)
        with running as address, closing(_client(address, key)) as client:
            if model is not None:
                watch.lap("server")
            # Before a file is sent to a server that would not read it.
            options = _about(client, address)
            if ready is None:
                ready = _ready(wanted.masked() if STEPS in options else wanted)
            video, data = _made(client, ready, console, watch)
        frames, rate = video["frames"], video["fps"]
        put(as_gif(data, rate) if out.suffix == ".gif" else data)
        watch.lap("writing")
    console.print(f"wrote [bold]{escape(str(out))}[/], {frames} frames at {rate} a second", soft_wrap=True)
    console.print(f"took {watch}", soft_wrap=True)


def _ready(asked: Asked | Wanted) -> _Ready:
    unit = "latent frames" if isinstance(asked, Asked) else "frames"
    return _Ready(asked.fields, asked.reference(), unit)


# A server of our own


def own_arguments(asked: Asked, model: Path, tokenizer: Path | None, config: str | None) -> list[str]:
    """Flags of our server besides those of its store, for a video that it will take.

    Raises:
        ConfigError: model, tokenizer or configuration cannot be used, or the prompt cannot be read.
        OSError: a file of the tokenizer is missing.
    """
    import torch

    policy = server_config(asked, config)
    dtype = precision(model)
    if tokenizer is None:
        raise ConfigError(f"--tokenizer is needed with --model: give a folder with {', '.join(COSMOS_FILES)}")
    for name in COSMOS_FILES:
        if not (tokenizer / name).is_file():
            raise OSError(f"--tokenizer {tokenizer}: {name} is missing: it must have {', '.join(COSMOS_FILES)}")
    stated = asked.stated
    try:
        text = stated.text(TextTokenizer(tokenizer), asked.prompt)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    total = len(text) + stated.latent_frames * lumos.frame_layout(stated.grid).tokens_per_frame
    return [
        *(POLICY_FLAG, policy_of(policy), CONFIG_FLAG, json.dumps(policy)),
        # Whatever the folder is called, it is not the name of a bundled one.
        *(TOKENIZER_FLAG, str(tokenizer.resolve())),
        *("--max-model-len", str(total), "--max-num-seqs", "1", "--dtype", dtype),
        # The video tokenizer runs beside the engine, which would leave it next to nothing.
        *(("--gpu-memory-utilization", "0.8") if torch.cuda.is_available() else ()),
    ]


def server_config(asked: Asked, config: str | None) -> dict[str, Any]:
    """The configuration of our server's policy; its layout is of the asked size where it gives none.

    Raises:
        ConfigError: it is wrong, or its frames are smaller than those that are asked for.
    """
    grid = asked.stated.grid
    mapping = load_mapping(fitting_config(grid) if config is None else config)
    mapping = {**mapping, "layout": mapping.get("layout") or {"grid": list(grid)}}
    layout = ServerConfig.parse(policy_of(mapping), mapping, family=LUMOS).layout
    assert layout is not None
    assert layout.grid is not None
    own, wanted = (lumos.frame_layout(own).tokens_per_frame for own in (layout.grid, grid))
    if own < wanted:
        raise ConfigError(
            f"--config: its layout's grid {list(layout.grid)} makes frames of {own} tokens, and those of "
            f"{asked.width} x {asked.height} pixels have {wanted}: give grid: {list(grid)}, or no layout"
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
def _own_server(model: Path, arguments: list[str], log: Path, console: Console) -> Iterator[str]:
    import torch

    with TemporaryDirectory(prefix="packcache_videos_") as store:
        arguments = [*arguments, STORE_FLAG, store, "--skip-tokenizer-init"]
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


# What is asked of a server


def _client(address: str, key: str | None) -> httpx.Client:
    """A client of a server.

    Args:
        address: of the server.
        key: that it asks for, if it does.

    Raises:
        ServerError: this is no address.
    """
    try:
        client = client_of(address, _QUICK)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ServerError(f"the server at {address} does not answer: {error}") from None
    if key:
        client.headers["Authorization"] = f"Bearer {key}"
    return client


def _about(client: httpx.Client, address: str) -> Mapping[str, Any]:
    """What a server can be asked for.

    Raises:
        ServerError: there is no such server, it makes no videos, or it asks for another key.
    """
    try:
        answer = client.get(ABOUT)
    except httpx.HTTPError as error:
        raise ServerError(f"the server at {address} does not answer: {error}") from None
    if answer.status_code == httpx.codes.UNAUTHORIZED:
        had = "does not take this API key" if "Authorization" in client.headers else "asks for an API key"
        raise ServerError(f"the server at {address} {had}: give its own with --api-key, or in {KEY_VARIABLE}")
    none = f"the server at {address} makes no videos: start it with {STORE_FLAG} and {TOKENIZER_FLAG}"
    if answer.status_code in (httpx.codes.NOT_FOUND, httpx.codes.NOT_IMPLEMENTED):
        raise ServerError(none)
    try:
        options: Mapping[str, Any] = _checked(answer).json()["tokenizer"]["options"]
    except (ValueError, LookupError, TypeError):
        raise ServerError(none) from None
    return options


def _made(client: httpx.Client, ready: _Ready, console: Console, watch: _Watch) -> tuple[Mapping[str, Any], bytes]:
    """Have a video made.

    Returns:
        What the server says of it, and its file, MP4.

    Raises:
        ServerError: the server refuses it, fails it, or is not there any more.
    """
    parts: dict[str, Any] = {name: (None, value) for name, value in ready.fields.items()}
    if ready.reference is not None:
        parts["input_reference"] = ("input_reference", ready.reference, "application/octet-stream")
    try:
        # What it begins with is encoded before the answer, on a CPU for minutes.
        video = _checked(client.post(PATH, files=parts, timeout=httpx.Timeout(_QUICK, read=None))).json()
        with _stopped_with(client, video["id"]):
            for note in video.get("notes", []):
                console.print(escape(note), soft_wrap=True)
            made = 0
            with _progress(console) as progress:
                task = progress.add_task(ready.unit, total=None)

                def seen(frame: Mapping[str, Any]) -> None:
                    nonlocal made
                    made += not frame["given"]
                    done = frame["frame"] + 1
                    progress.update(task, completed=done, total=frame["frames"])
                    if done == frame["frames"]:
                        watch.lap(f"{made} {ready.unit}")
                        progress.update(task, description="decoding")

                _follow(client, video["id"], seen)
            watch.lap("decoding")
            return video, _checked(client.get(f"{PATH}/{video['id']}/content")).content
    except httpx.HTTPError as error:
        raise ServerError(f"the server at {client.base_url} does not answer: {_said_of(error)}") from None


@contextmanager
def _stopped_with(client: httpx.Client, video: str) -> Iterator[None]:
    """A video that is not made any more when this process is to end."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        with suppress(httpx.HTTPError):
            client.delete(f"{PATH}/{video}", timeout=_LEAVING)
        raise


def _follow(client: httpx.Client, video: str, seen: Callable[[Mapping[str, Any]], None]) -> None:
    """Wait for the end of a video; a connection that is lost on the way is made again.

    Args:
        client: of its server.
        video: id.
        seen: is told of every frame, once.

    Raises:
        ServerError: the server fails it, or is not there any more.
    """
    last, lost = "0", 0
    while True:
        try:
            for number, kind, data in _events(client, video, last):
                if kind == "completed":
                    return
                if kind == "failed":
                    raise ServerError(f"the server could not make this video: {error_message(data)}")
                if kind == "frame":
                    seen(data)
                last, lost = number or last, 0
            why = "it ended the connection"
        except httpx.HTTPError as error:
            why = _said_of(error)
        if lost == len(_WAITS):
            raise ServerError(f"the server at {client.base_url} does not answer any more, asked for {video}: {why}")
        time.sleep(_WAITS[lost])
        lost += 1


def _events(client: httpx.Client, video: str, last: str) -> Iterator[tuple[str, str, Any]]:
    """Events of a video behind one of them as they come: number, kind, data; of a sign of life these are empty.

    Raises:
        ServerError: there are none, and will be none.
        httpx.HTTPError: the connection was lost, or the server asks to come again.
    """
    headers = {"Last-Event-ID": last}
    with client.stream("GET", f"{PATH}/{video}/events", headers=headers, timeout=_SILENCE) as answer:
        if answer.is_error:
            answer.read()
        if answer.is_server_error:
            raise httpx.ReadError(str(_refused(answer)))
        _checked(answer)
        fields: dict[str, str] = {}
        for line in answer.iter_lines():
            if line:
                name, _, value = line.partition(":")
                fields[name] = value.removeprefix(" ")
                continue
            kind, data = fields.get("event", ""), json.loads(fields.get("data", "null"))
            if kind == "error":
                why = error_message(data)
                if data["error"]["type"] == "server_error":
                    raise httpx.ReadError(why)
                raise ServerError(f"the server does not make this video any more: {why}")
            yield fields.get("id", ""), kind, data
            fields = {}


def _checked(answer: httpx.Response) -> httpx.Response:
    """An answer that is none that refuses.

    Raises:
        ServerError: it refuses.
    """
    if answer.status_code != httpx.codes.OK:
        raise _refused(answer)
    return answer


def _refused(answer: httpx.Response) -> ServerError:
    """What an answer says that refuses a request: the message of an error, or all of it."""
    try:
        said = error_message(answer.json())
    except (ValueError, LookupError, TypeError):
        said = answer.text[:400]
    return ServerError(f"the server refused the request: {' '.join(said.split()) or answer.status_code}")


def _said_of(error: httpx.HTTPError) -> str:
    return str(error) or type(error).__name__


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


def _progress(console: Console) -> Progress:
    columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console)
