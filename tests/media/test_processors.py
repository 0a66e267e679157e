"""What turns requests for videos into ids: what all of them refuse, and those that are not of a bundled model."""

from __future__ import annotations

import json
import re
import sys
import types
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from tests.media.tokenizer_files import CODES, random_video, write_text_tokenizer, write_video_tokenizer
from vllm_packcache.config.errors import ConfigError
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.config.sources import load_mapping
from vllm_packcache.core.layout import FrameLayout
from vllm_packcache.families import LUMOS, lumos
from vllm_packcache.media.processors import lumos as lumos_processor
from vllm_packcache.media.processors.base import Asked, Kept, Prepared, VideoProcessor, processor_of
from vllm_packcache.media.processors.pictures import visual_ids
from vllm_packcache.media.text_tokenizer import TextTokenizer
from vllm_packcache.media.video_tokenizer import CosmosTokenizer

WIDTH, HEIGHT = 64, 32
GRID = (4, 8)
SIZE = (WIDTH, HEIGHT)
PROMPT = "a red [bus], très vite"
FRAME = 1 + 2 * (3 + 1)
"""Tokens of a frame of the causal server below."""


def refused(sentence: str) -> pytest.RaisesExc[ValueError]:
    """A sentence of one line that contains this."""
    return pytest.raises(ValueError, match=re.compile(rf"\A[^\n]*{re.escape(sentence)}[^\n]*\Z"))


def causal(**layout: Any) -> ServerConfig:
    own = {"grid": [2, 3], "frame_start_tokens": 1, "row_end_tokens": 1, **layout}
    return ServerConfig.parse("packcache", {"layout": own})


def masked(grid: tuple[int, int] | None = None) -> ServerConfig:
    return ServerConfig.parse("packcache", {} if grid is None else {"layout": {"grid": list(grid)}}, family=LUMOS)


def kept(prepared: Prepared, frame_ids: Any) -> Kept:
    """A finished video, as it comes back from a store."""
    return Kept(
        prompt_ids=prepared.prompt_ids,
        frame_ids=np.asarray(frame_ids, np.int32).reshape(-1, prepared.tokens_per_frame),
        given=prepared.given,
        size=prepared.size,
        fps=prepared.fps,
        pictures=prepared.pictures,
        options=json.loads(json.dumps(prepared.options)),
    )


def plan(server: ServerConfig, prepared: Prepared) -> Any:
    return server.request({f"packcache_{name}": own for name, own in prepared.options.items()}, prepared.prompt_ids)


# What an operator names


class Squares:
    """Pictures of ids: a square of each."""

    size = (6, 4)

    def decode(self, ids: np.ndarray) -> np.ndarray:
        if ids.max() > 255:
            raise ValueError("a square has an id up to 255")
        return ids.astype(np.uint8).repeat(2, 0).repeat(2, 1)[..., None].repeat(3, -1)


class Reader(Squares):
    """The same, which reads text too."""

    fps = 5

    def prompt(self, text: str, picture: np.ndarray | None) -> list[int]:
        ids = [] if picture is None else picture[::2, ::2, 0].ravel().tolist()
        return [*text.encode(), *ids]


@pytest.fixture(autouse=True)
def operators(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("operators_own")
    module.__dict__.update(Squares=Squares, Reader=Reader, reader=Reader(), number=3, fail=type("Fail", (), {
        "__init__": lambda self: 1 // 0
    }))  # fmt: skip
    monkeypatch.setitem(sys.modules, "operators_own", module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_tokenizer(write_video_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.mark.parametrize(
    ("name", "role", "server", "expected"),
    [
        (None, "causal", None, "ids"),
        (None, "canvas", masked(), "ids"),
        ("demo", "causal", None, "demo"),
        ("demo", "causal", ServerConfig.parse("full", "demo"), "demo"),
        ("demo_masked", "canvas", None, "demo_masked"),
        ("demo_masked", "canvas", ServerConfig.parse("packcache", "demo_masked", family=LUMOS), "demo_masked"),
        ("operators_own:Squares", "causal", causal(), "operators_own:Squares"),
        ("operators_own:reader", "causal", causal(), "operators_own:reader"),
    ],
)
def test_what_an_operator_names(name: str | None, role: Any, server: ServerConfig | None, expected: str) -> None:
    found = processor_of(name, role=role, server=server)
    assert found.name == expected
    assert found.role in (None, role)
    json.dumps(found.about(), allow_nan=False)


@pytest.mark.parametrize(
    ("name", "role", "server", "sentence"),
    [
        ("nobody", "causal", None, "'nobody': it must be demo, demo_masked, module:object, a folder with"),
        ("no.such:module", "causal", None, "cannot: ModuleNotFoundError: No module named 'no'"),
        ("operators_own:fail", "causal", None, "cannot: ZeroDivisionError: integer division or modulo by zero"),
        ("operators_own:number", "causal", None, "it must have size and decode, or all that a video processor has"),
        ("demo", "canvas", masked(), "makes videos in whole frames, as the served one does, and is of one that"),
        ("demo_masked", "causal", causal(), "makes videos token by token, as the served one does"),
        ("operators_own:Squares", "canvas", masked(), "makes videos in whole frames, as the served one does"),
        ("demo", "causal", causal(), "have 257 tokens, and the server's layout makes them of 273: give"),
        ("demo", "causal", ServerConfig.parse("full", {}), "makes them of 256: give"),
    ],
)
def test_what_an_operator_must_not_name(name: str, role: Any, server: ServerConfig | None, sentence: str) -> None:
    with refused(sentence) as raised:
        processor_of(name, role=role, server=server)
    assert isinstance(raised.value, ConfigError)
    assert str(raised.value).startswith(f"--video-tokenizer {name!r}: ")


def test_a_processor_of_an_operators_own(operators: types.ModuleType) -> None:
    own = types.SimpleNamespace(role=None, prepare=print, extend=print, decoder=print, about=print)
    operators.own = own  # type: ignore[attr-defined]
    assert processor_of("operators_own:own", role="canvas") is own


def test_a_folder_without_its_files(folder: Path, tmp_path: Path) -> None:
    with refused("must have tokenizer.json, encoder.jit, decoder.jit, and has no encoder.jit and no decoder.jit"):
        processor_of(str(write_text_tokenizer(tmp_path)), role="canvas")
    write_video_tokenizer(tmp_path)
    (tmp_path / "decoder.jit").write_bytes(b"no TorchScript")
    with refused("decoder.jit is no TorchScript") as raised:
        processor_of(str(tmp_path), role="canvas")
    assert isinstance(raised.value, ConfigError)
    with refused("makes videos token by token"):
        processor_of(str(folder), role="causal")


# What all of them refuse


def processors(folder: Path) -> dict[str, VideoProcessor]:
    return {
        "demo": processor_of("demo", role="causal", max_model_len=8192),
        "demo_masked": processor_of("demo_masked", role="canvas", max_model_len=8192),
        "lumos": processor_of(str(folder), role="canvas", max_model_len=8192),
        "reader": processor_of("operators_own:Reader", role="causal", server=causal(), max_model_len=8192),
        "ids": processor_of("ids", role="causal", server=causal(), max_model_len=8192),
        "masked_ids": processor_of(None, role="canvas", server=masked(GRID), max_model_len=8192),
    }


def least(name: str) -> Asked:
    """A request that is right."""
    match name:
        case "ids":
            return Asked(prompt="", ids=(1, 2, 3), frames=2)
        case "masked_ids":
            return Asked(prompt="", ids=tuple(lumos.text_prompt([7], 1, 8)), frames=2)
        case "demo":
            return Asked(prompt=PROMPT, picture=np.zeros((5, 9, 3), np.uint8))
        case "lumos":
            return Asked(prompt=PROMPT, size=SIZE)
    return Asked(prompt=PROMPT)


NAMES = ("demo", "demo_masked", "lumos", "reader", "ids", "masked_ids")
CAUSAL = ("demo", "reader", "ids")


@pytest.mark.parametrize("name", NAMES)
def test_the_least_request_is_served(name: str, folder: Path) -> None:
    processor = processors(folder)[name]
    prepared = processor.prepare(least(name))
    assert all(type(own) is int for own in prepared.prompt_ids)
    json.dumps([prepared.options, prepared.sampling], allow_nan=False)
    assert prepared.options["frames"] == prepared.made
    assert prepared.sampling == ({"temperature": 0.0} if name in CAUSAL else {})
    assert prepared.frames == (prepared.pictures or prepared.made)
    about = processor.about()
    # Lumos-1 is asked for a smaller size than its own.
    assert name == "lumos" or prepared.pictures in (0, about["frames"])
    assert about["frames"] <= about["most_frames"]
    assert about["size"] is None or about["size"] in about["sizes"]
    # The whole of what there is at once, as the engine makes it.
    decoder = processor.decoder(prepared)
    runs = [*decoder.given()]
    assert len(runs) == len(prepared.given)
    ids = prepared.prompt_ids[-1:] * prepared.tokens_per_frame
    if name not in CAUSAL:
        ids = lumos.frame_of_codes(np.zeros(prepared.options.get("grid", GRID), np.int64)).tolist()
    runs += [decoder.add(ids) for _ in range(prepared.made)]
    assert sum(map(len, runs)) == prepared.pictures
    if prepared.pictures:
        assert {run.shape[1:] for run in runs} == {(prepared.size[1], prepared.size[0], 3)}
    with refused(f"{prepared.tokens_per_frame} tokens"):
        decoder.add(ids[1:])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"negative_prompt": "rain"}, "negative_prompt must be left out"),
        ({"seed": -1}, "seed must lie between 0 and 2^63 - 1, not -1"),
        ({"seed": 2**63}, "seed must lie between 0 and 2^63 - 1"),
        ({"options": {"session_tokens": 3}}, "packcache_session_tokens must be left out: it is for sessions"),
        ({"options": {"forget_from": 3}}, "packcache_forget_from must be left out"),
        ({"frames": 0}, ""),
        ({"frames": 2**70}, ""),
        ({"frames": 8000}, ""),
        ({"clip": Path("a.mp4")}, "input_reference"),
        ({"size": (-3, 7)}, "size"),
    ],
    ids=str,
)
def test_what_nobody_serves(name: str, changed: dict[str, Any], sentence: str, folder: Path) -> None:
    with refused(sentence):
        processors(folder)[name].prepare(replace(least(name), **changed))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("changed", "causal_only", "sentence"),
    [
        ({"guidance": 3.0}, False, "guidance_scale must be left out: this server guides no videos; guidance: true in"),
        ({"steps": 3}, False, "num_inference_steps must be left out"),
        ({"temperature": 0.5}, True, "temperature must be left out: this model makes frames in passes"),
        ({"top_p": 0.5}, True, "top_p must be left out"),
        ({"top_k": 5}, True, "top_k must be left out"),
    ],
    ids=str,
)
def test_what_is_of_the_other_kind_of_models(
    name: str, changed: dict[str, Any], causal_only: bool, sentence: str, folder: Path
) -> None:
    processor, asked = processors(folder)[name], replace(least(name), **changed)
    if causal_only != (name in CAUSAL):
        with refused(sentence):
            processor.prepare(asked)
    elif name in CAUSAL:
        assert processor.prepare(asked).sampling == {"temperature": 0.0, **changed}
    else:
        assert processor.prepare(asked).options.items() >= changed.items()


@pytest.mark.parametrize(
    ("name", "changed", "sentence"),
    [
        ("demo", {"temperature": float("nan")}, "temperature must lie between 0 and 100, not nan"),
        ("demo", {"temperature": -0.1}, "temperature must lie between"),
        ("demo", {"top_p": 0.0}, "top_p must be above 0 and at most 1, not 0.0"),
        ("demo", {"top_k": -2}, "top_k must be 1 or more"),
        ("demo_masked", {"steps": 0}, "num_inference_steps must be 1 or more and at most 1000, not 0"),
        ("demo_masked", {"guidance": float("inf")}, "guidance_scale must lie between -1000 and 1000, not inf"),
        ("lumos", {"seed": 1, "options": {"seed": 2}}, "seed and packcache_seed must not contradict each other"),
        ("lumos", {"options": {"grid": [2, 2]}}, "packcache_grid must be left out: this server's video tokenizer"),
        ("demo", {"options": {"condition_tokens": 2}}, "packcache_condition_tokens must be left out"),
        ("demo", {"ids": (1,)}, "prompt_ids is for servers that read no text"),
        ("demo", {"picture": None}, "input_reference is needed"),
        ("demo", {"frames": 1}, "num_frames must be 2 or more, not 1"),
        ("demo", {"frames": 32}, "and this server makes sequences of at most 8192: ask for fewer frames"),
        ("demo", {"size": (64, 65)}, "size must be 64x64, not 64x65: the bundled model has one size"),
        ("demo", {"fps": 24}, "fps must be 4, not 24"),
        ("demo", {"seconds": 0.3}, "seconds must be whole pictures, of which there are 4 a second, not 0.3"),
        ("demo", {"seconds": float("nan")}, "seconds must lie between 0.25 and"),
        ("demo", {"seconds": float("inf")}, "seconds must lie between 0.25 and"),
        ("demo", {"seconds": 1e300}, "seconds must lie between 0.25 and"),
        ("demo", {"seconds": 0.0}, "seconds must lie between 0.25 and"),
        ("demo_masked", {"frames": 65}, "num_frames must lie between 1 and 64, not 65"),
        ("lumos", {"fps": 0}, "fps lies between 1 and 198, not 0"),
        ("lumos", {"fps": 199}, "fps lies between 1 and 198, not 199"),
        ("lumos", {"frames": 20}, "num_frames 20 at fps 8: a prompt states whole seconds, 1 to 198; give num_frames"),
        ("lumos", {"size": (100, 32)}, "size: width and height must be multiples of 32 pixels, not 100 x 32"),
        ("lumos", {"size": (6368, 32)}, "size: sides are 6336 at most"),
        ("lumos", {"size": None}, "at most 8192: ask for fewer frames, or smaller ones"),
        ("lumos", {"prompt": "a <video>"}, "no id of text for this model"),
        ("lumos", {"picture": np.zeros((1, 1, 3), np.uint8), "clip": Path("a")}, "a picture or a video, not both"),
        ("lumos", {"clip": Path("gone.mp4")}, "input_reference cannot be read as a video: No such file or directory"),
        ("lumos", {"picture": np.zeros((1, 1, 3), np.uint8), "frames": 1, "fps": 1}, "1 latent frames, of which 1 are"),
        ("reader", {"fps": 0}, "fps must lie between 1 and 240, not 0"),
        ("reader", {"ids": ()}, "prompt_ids is needed"),
        ("reader", {"ids": (1,), "picture": np.zeros((1, 1, 3), np.uint8)}, "input_reference must be left out"),
        ("ids", {"ids": None}, "prompt_ids is needed: this server reads no text"),
        ("ids", {"ids": (1, -1)}, "prompt_ids must be token ids from 0 to 2147483647, not -1"),
        ("ids", {"frames": None}, "num_frames is needed"),
        ("ids", {"options": {"frames": 3}}, "num_frames and packcache_frames must not contradict each other"),
        ("ids", {"seconds": 3.0}, "seconds must be left out: this server has no video tokenizer"),
        ("ids", {"size": (4, 4)}, "size must be left out"),
        ("ids", {"picture": np.zeros((1, 1, 3), np.uint8)}, "input_reference must be left out"),
        ("ids", {"options": {"condition_tokens": 1}}, "must be a condition of 1 tokens and whole frames of 9, not 3"),
        ("ids", {"options": {"condition_tokens": 9}}, "packcache_condition_tokens is 9, but the prompt has 3 tokens"),
        ("ids", {"options": {"widow": 3}}, "packcache_widow"),
        ("masked_ids", {"ids": (1, 2)}, "no video begin"),
    ],
    ids=str,
)  # fmt: skip
def test_mistakes_get_a_sentence(name: str, changed: dict[str, Any], sentence: str, folder: Path) -> None:
    with refused(sentence):
        processors(folder)[name].prepare(replace(least(name), **changed))


@pytest.mark.parametrize("name", NAMES)
def test_options_of_the_request_go_to_the_engine(name: str, folder: Path) -> None:
    asked = replace(least(name), seed=7, options={"history_frames": 2.5, "policy": "full"})
    prepared = processors(folder)[name].prepare(asked)
    assert prepared.options.items() >= {"history_frames": 2.5, "policy": "full"}.items()
    assert (prepared.sampling if name in CAUSAL else prepared.options)["seed"] == 7


# Ids alone


def test_ids_alone() -> None:
    server = causal()
    processor = processor_of(None, role="causal", server=server)
    prepared = processor.prepare(Asked(prompt="", ids=(5, 6), frames=3, temperature=0.5, top_k=4, seed=1))
    assert prepared.prompt_ids == [5, 6]
    assert prepared.options == {"frames": 3}
    assert prepared.sampling == {"temperature": 0.5, "top_k": 4, "seed": 1}
    assert (prepared.tokens_per_frame, prepared.made, prepared.pictures, prepared.size) == (FRAME, 3, 0, (0, 0))
    decoder = processor.decoder(prepared)
    assert decoder.given() == []
    assert len(decoder.add(range(FRAME))) == 0
    assert decoder.whole() is None
    assert processor.prepare(Asked(prompt="", ids=(5, 6), options={"frames": 3})).made == 3
    other = processor.prepare(Asked(prompt="", ids=(5, 6), frames=3, options={"grid": [1, 1]}))
    assert other.tokens_per_frame == 3


def test_a_server_without_a_layout_needs_one_of_the_request() -> None:
    processor = processor_of(None, role="causal")
    with refused("packcache_grid or packcache_tokens_per_frame is needed"):
        processor.prepare(Asked(prompt="", ids=(5, 6), frames=3))
    with refused("packcache_grid or packcache_tokens_per_frame"):
        processor.prepare(Asked(prompt="", ids=(5, 6), options={"policy": "full"}, frames=3))
    asked = Asked(prompt="", ids=(5,), options={"tokens_per_frame": 7}, frames=3)
    assert processor.prepare(asked).tokens_per_frame == 7


@pytest.mark.parametrize("given", [0, 2])
def test_ids_go_on_as_one_long_video(given: int) -> None:
    server = causal()
    processor = processor_of(None, role="causal", server=server)
    condition, history = list(range(4)), list(range(given * FRAME))
    asked = Asked(prompt="", ids=(*condition, *history), options={"condition_tokens": 4, "window": 3})
    long = processor.prepare(replace(asked, frames=7))
    ids = np.arange(7 * FRAME).reshape(7, FRAME)
    part = processor.prepare(replace(asked, frames=2))
    first = processor.extend(kept(part, ids[:2]), Asked(prompt="x", frames=1))
    second = processor.extend(kept(first, ids[2:3]), Asked(prompt="", frames=4))
    assert second.prompt_ids == [*long.prompt_ids, *ids[:3].ravel().tolist()]
    assert second.made == 4
    assert plan(server, second).streams == plan(server, long).streams
    with refused("num_frames is needed"):
        processor.extend(kept(part, ids[:2]), Asked(prompt="x"))
    with refused("packcache_condition_tokens must be left out"):
        processor.extend(kept(part, ids[:2]), Asked(prompt="x", frames=1, options={"condition_tokens": 2}))


def test_what_a_client_gave_for_frames_is_not_given_again() -> None:
    server = causal(visual_ids=[0, 9], frame_start_ids=[[20, 29]], row_end_ids=[11])
    processor = processor_of(None, role="causal", server=server)
    first = processor.prepare(Asked(prompt="", ids=(1,), frames=2, options={"given_ids": [20, 21]}))
    ids = np.array([[own, 1, 2, 3, 11, 4, 5, 6, 11] for own in (20, 21)])
    extended = processor.extend(kept(first, ids), Asked(prompt="", frames=1))
    assert extended.options == {"frames": 1, "condition_tokens": 1}
    extended = processor.extend(kept(first, ids), Asked(prompt="", frames=1, options={"given_ids": [22]}))
    assert plan(server, extended).grammar.given == ((22,),)
    assert plan(server, extended).grammar.first_frame == 2


@pytest.mark.parametrize("images", [0, 1, 2])
def test_ids_of_masked_models_go_on_as_one_long_video(images: int) -> None:
    server = masked(GRID)
    processor = processor_of(None, role="canvas", server=server)
    codes = np.random.default_rng(0).integers(0, CODES, (7, *GRID))
    frames = [lumos.frame_of_codes(own).tolist() for own in codes]
    ids = [*lumos.text_prompt([7], 1, 8), *(id for own in frames[:images] for id in own)]
    asked = Asked(prompt="", ids=tuple(ids), seed=3, steps=2, guidance=1.5)
    long, part = (processor.prepare(replace(asked, frames=count)) for count in (5, 2))
    extended = processor.extend(kept(part, frames[2:4]), Asked(prompt="", frames=3))
    request, whole = plan(server, extended), plan(server, long)
    assert request.streams == whole.streams
    assert request.options == whole.options
    assert (request.first_frame, request.frames) == (2, 3)


# Guidance of causal models


def guiding(**own: Any) -> ServerConfig:
    layout = {"grid": [2, 3], "frame_start_tokens": 1, "row_end_tokens": 1, "condition_image_tokens": 6}
    return ServerConfig.parse("packcache", {"layout": layout, "window": 3, "guidance": own or True})


PICTURE = np.arange(6, dtype=np.uint8).reshape(2, 3).repeat(2, 0).repeat(2, 1)[..., None].repeat(3, -1)
"""As `Reader` reads it, the ids from 0 to 5."""
IMAGE = [0, 1, 2, 3, 4, 5]
READER = Asked(prompt="ab", picture=PICTURE, frames=4)
IDS = Asked(prompt="", ids=(1, 2, 3), frames=2)


def reader(**own: Any) -> tuple[ServerConfig, VideoProcessor]:
    server = guiding(**own)
    return server, processor_of("operators_own:Reader", role="causal", server=server, max_model_len=8192)


def ids_alone(**own: Any) -> tuple[ServerConfig, VideoProcessor]:
    server = guiding(**own)
    return server, processor_of("ids", role="causal", server=server, max_model_len=8192)


@pytest.mark.parametrize(
    ("own", "asked", "expected"),
    [
        ({}, READER, None),
        ({}, replace(READER, guidance=1.0), None),
        ({}, replace(READER, guidance=1.0, negative_prompt="rain"), None),
        # Without a text of its own the second stream has the picture alone.
        ({}, replace(READER, guidance=3.0), (3.0, IMAGE)),
        ({}, replace(READER, options={"guidance": 3.0}), (3.0, IMAGE)),
        ({}, replace(READER, guidance=3.0, negative_prompt="no"), (3.0, [*b"no", *IMAGE])),
        ({}, replace(READER, guidance=3.0, negative_prompt="no", picture=None), (3.0, [*b"no"])),
        ({}, replace(READER, guidance=3.0, options={"negative_prompt_ids": [7, 8]}), (3.0, [7, 8])),
        ({"scale": 2.5}, READER, (2.5, IMAGE)),
        ({"scale": 2.5}, replace(READER, negative_prompt="no"), (2.5, [*b"no", *IMAGE])),
        ({"scale": 2.5}, replace(READER, guidance=1.0), None),
        ({"scale": 2.5, "negative_prompt_ids": [9]}, READER, (2.5, [9])),
        ({"scale": 2.5, "negative_prompt_ids": [9]}, replace(READER, negative_prompt="no"), (2.5, [*b"no", *IMAGE])),
        ({}, replace(READER, picture=None, ids=(1, 2), options={"guidance": 2, "negative_prompt_ids": [3]}), (2, [3])),
    ],
)
def test_the_second_stream_has_another_text_and_the_same_picture(
    own: dict[str, Any], asked: Asked, expected: tuple[float, list[int]] | None
) -> None:
    server, processor = reader(**own)
    prepared = processor.prepare(asked)
    streams = plan(server, prepared).streams
    assert plan(server, prepared).guidance == (expected[0] if expected else asked.guidance or 1)
    assert [list(stream.condition) for stream in streams[1:]] == ([expected[1]] if expected else [])


def test_frames_behind_the_condition_are_behind_the_second_one_too() -> None:
    server = ServerConfig.parse("packcache", {"layout": {"grid": [2, 3]}, "guidance": True})
    processor = processor_of("operators_own:Reader", role="causal", server=server)
    asked = replace(READER, guidance=3.0, negative_prompt="none", options={"condition_tokens": 2})
    prepared = processor.prepare(asked)
    assert prepared.prompt_ids == [*b"ab", *IMAGE]
    assert plan(server, prepared).streams[1].ids(prepared.prompt_ids, 0, 99) == [*b"none", *IMAGE]


@pytest.mark.parametrize("scale", [0.5, 7.0])
def test_ids_are_guided_by_ids(scale: float) -> None:
    server, processor = ids_alone()
    asked = replace(IDS, guidance=scale, options={"negative_prompt_ids": [9, 9]})
    made = plan(server, processor.prepare(asked))
    assert (made.guidance, made.streams[1].condition) == (scale, (9, 9))
    server, processor = ids_alone(scale=scale, negative_prompt_ids=[4, 4, 4, 4])
    made = plan(server, processor.prepare(IDS))
    assert (made.guidance, made.streams[1].condition) == (scale, (4, 4, 4, 4))


@pytest.mark.parametrize(
    ("make", "own", "asked", "sentence"),
    [
        (reader, {}, {"guidance": 0.0}, "guidance_scale must be above 0 and at most 1000, not 0.0"),
        (reader, {}, {"guidance": 1000.5}, "guidance_scale must be above 0 and at most 1000, not 1000.5"),
        (reader, {}, {"guidance": float("nan")}, "guidance_scale must be above 0 and at most 1000, not nan"),
        (reader, {}, {"guidance": 2.0, "options": {"guidance": 3.0}}, "guidance_scale and packcache_guidance must not"),
        (reader, {}, {"negative_prompt": "no"}, "negative_prompt is for guided videos: give guidance_scale too"),
        (
            reader,
            {"scale": 2.0},
            {"negative_prompt": "no", "options": {"negative_prompt_ids": [1]}},
            "negative_prompt and packcache_negative_prompt_ids are the same: leave one out",
        ),
        (
            reader,
            {},
            {"guidance": 2.0, "picture": None},
            "negative_prompt is needed: without a text the prompt of this",
        ),
        (ids_alone, {}, {"guidance": 2.0}, "packcache_negative_prompt_ids is needed"),
        (ids_alone, {}, {"guidance": 2.0, "negative_prompt": "no"}, "so give packcache_negative_prompt_ids"),
        (
            ids_alone,
            {},
            {"options": {"negative_prompt_ids": [1]}},
            "packcache_negative_prompt_ids is for guided videos",
        ),
    ],
)
def test_what_cannot_be_guided(make: Any, own: dict[str, Any], asked: dict[str, Any], sentence: str) -> None:
    _, processor = make(**own)
    with refused(sentence):
        processor.prepare(replace(READER if make is reader else IDS, **asked))


@pytest.mark.parametrize("name", CAUSAL)
def test_a_scale_of_one_is_no_guidance_on_any_server(name: str, folder: Path) -> None:
    prepared = processors(folder)[name].prepare(replace(least(name), guidance=1.0))
    assert prepared.options == processors(folder)[name].prepare(least(name)).options


@pytest.mark.parametrize("make", [reader, ids_alone])
def test_a_guided_video_goes_on_guided(make: Any) -> None:
    server, processor = make()
    asked = replace(READER, guidance=3.0, negative_prompt="no", fps=1)
    if make is ids_alone:
        asked = replace(IDS, guidance=3.0, options={"negative_prompt_ids": [9] * 8})
    long, part = (processor.prepare(replace(asked, frames=frames)) for frames in (8, 4))
    ids = np.arange(8 * FRAME).reshape(8, FRAME) % 200
    extended = processor.extend(kept(part, ids[: part.made]), Asked(prompt="", frames=4))
    assert plan(server, extended).streams == plan(server, long).streams
    assert plan(server, extended).guidance == 3
    other = processor.extend(kept(part, ids[: part.made]), Asked(prompt="", frames=4, guidance=2.0))
    assert plan(server, other).streams == plan(server, long).streams
    assert plan(server, other).guidance == 2
    one = processor.extend(kept(part, ids[: part.made]), Asked(prompt="", frames=4, guidance=1.0))
    assert plan(server, one).streams == plan(server, long).streams[:1]
    plain = processor.prepare(replace(asked, guidance=None, negative_prompt=None, options={}))
    with refused("packcache_negative_prompt_ids is needed"):
        processor.extend(kept(plain, ids[: plain.made]), Asked(prompt="", frames=4, guidance=2.0))
    with refused("negative_prompt must be left out"):
        processor.extend(kept(part, ids[: part.made]), Asked(prompt="", frames=4, negative_prompt="rain"))


def test_a_video_of_a_server_that_guides_by_itself_goes_on_so() -> None:
    server, processor = ids_alone(scale=2.0, negative_prompt_ids=[4])
    part, long = (processor.prepare(replace(IDS, frames=frames)) for frames in (2, 5))
    ids = np.arange(2 * FRAME).reshape(2, FRAME)
    extended = processor.extend(kept(part, ids), Asked(prompt="", frames=3))
    assert plan(server, extended).streams == plan(server, long).streams
    assert plan(server, extended).guidance == 2


def test_a_page_offers_guidance_where_there_is_any(folder: Path) -> None:
    for name, processor in processors(folder).items():
        options = processor.about()["options"]
        assert ("guidance_scale" in options) == (name not in CAUSAL)
        assert "negative_prompt" not in options
    options = reader(scale=0.5)[1].about()["options"]
    assert options["guidance_scale"] == {"default": 0.5, "least": 0.5, "most": 30}
    assert options["negative_prompt"] == {"default": ""}
    options = ids_alone()[1].about()["options"]
    assert options["guidance_scale"]["default"] == 1
    assert "packcache_negative_prompt_ids" in options
    assert "negative_prompt" not in options


@pytest.mark.parametrize("name", ["demo_masked", "lumos", "masked_ids"])
def test_how_a_server_makes_frames_is_what_a_page_begins_with(name: str, folder: Path) -> None:
    layout = load_mapping("demo_masked")["layout"] if name == "demo_masked" else {"grid": list(GRID)}
    passes = {"steps": 600, "guidance": 31.25, "refresh": 4, "guidance_interval": 300}
    plain, said = (
        ServerConfig.parse("packcache", {"layout": layout, **own}, family=LUMOS) for own in ({}, {"passes": passes})
    )
    tokenizer = {"demo_masked": "demo_masked", "lumos": str(folder), "masked_ids": None}[name]
    for server in (plain, said):
        processor = processor_of(tokenizer, role="canvas", server=server, max_model_len=8192)
        options = processor.about()["options"]
        shown = {
            name.removeprefix("packcache_"): options[name]["default"]
            for name in ("packcache_refresh", "packcache_reuse", "packcache_guidance_interval")
        } | {"steps": options["num_inference_steps"]["default"], "guidance": options["guidance_scale"]["default"]}
        made = plan(server, processor.prepare(least(name))).options
        # A browser refuses a form whose numbers are out of bounds.
        for own in options.values():
            assert own["least"] <= own["default"] <= own["most"]
            assert "step" not in own or (own["default"] - own["least"]) % own["step"] == 0
        assert shown == {own: getattr(made, own) for own in shown}
        # What was not asked for is as the server says, and as usual where it says nothing.
        assert ({own: shown[own] for own in passes} == passes) == (server is said)
        unguided = plan(server, processor.prepare(replace(least(name), guidance=1.0))).options
        assert (unguided.guided, unguided.refresh) == (False, made.refresh)


# Pictures that an operator names


def test_pictures_of_ids() -> None:
    server = causal()
    processor = processor_of("operators_own:Squares", role="causal", server=server)
    assert processor.about().items() >= {"text": False, "picture": "none", "sizes": ["6x4"], "fps": 8}.items()
    prepared = processor.prepare(Asked(prompt="not read", ids=(5, 6), frames=3, fps=2))
    assert (prepared.made, prepared.pictures, prepared.fps, prepared.size) == (3, 3, 2, (6, 4))
    decoder = processor.decoder(prepared)
    frame = [99, 10, 20, 30, 98, 40, 50, 60, 98]
    (picture,) = decoder.add(frame)
    np.testing.assert_array_equal(picture[::2, ::2, 1], [[10, 20, 30], [40, 50, 60]])
    assert picture.shape == (4, 6, 3)
    with refused("a square has an id up to 255"):
        decoder.add([256] * FRAME)
    assert processor.prepare(Asked(prompt="", ids=(5,), seconds=1.5)).made == 12


@pytest.mark.parametrize("whole_frame", [False, True])
def test_the_picture_of_a_condition_is_the_first_of_the_video(whole_frame: bool) -> None:
    """As visual ids alone, or as a frame with its special tokens."""
    server = causal(condition_image_tokens=FRAME if whole_frame else 6)
    processor = processor_of("operators_own:Squares", role="causal", server=server)
    frame = [99, 10, 20, 30, 98, 40, 50, 60, 98]
    image = frame if whole_frame else [10, 20, 30, 40, 50, 60]
    later = [99, 1, 2, 3, 98, 4, 5, 6, 98]
    options = {"condition_tokens": 2 + len(image)}
    prepared = processor.prepare(Asked(prompt="", ids=(7, 8, *image, *later), frames=5, options=options))
    assert prepared.given.tolist() == [[[10, 20, 30], [40, 50, 60]], [[1, 2, 3], [4, 5, 6]]]
    assert (prepared.made, prepared.pictures) == (3, 5)
    first, second = processor.decoder(prepared).given()
    assert (first[0, 0, 0, 0], second[0, 0, 0, 0]) == (10, 1)
    with refused("num_frames must be more than the 2 pictures that are given, not 2"):
        processor.prepare(Asked(prompt="", ids=(7, 8, *image, *later), frames=2, options=options))
    # A prompt that is shorter than that has no picture.
    assert len(processor.prepare(Asked(prompt="", ids=(7, 8), frames=1)).given) == 0


def test_pictures_of_a_reader() -> None:
    processor = processor_of("operators_own:Reader", role="causal", server=causal(condition_image_tokens=6))
    assert processor.about().items() >= {"text": True, "picture": "optional", "fps": 5}.items()
    picture = np.arange(6, dtype=np.uint8).reshape(2, 3).repeat(2, 0).repeat(2, 1)[..., None].repeat(3, -1)
    prepared = processor.prepare(Asked(prompt="ab", picture=picture, seconds=1))
    assert prepared.prompt_ids == [97, 98, 0, 1, 2, 3, 4, 5]
    assert (prepared.made, prepared.pictures) == (4, 5)
    np.testing.assert_array_equal(processor.decoder(prepared).given()[0][0], picture)


def test_pictures_go_on_as_one_long_video() -> None:
    server = causal(condition_image_tokens=6)
    processor = processor_of("operators_own:Squares", role="causal", server=server)
    asked = Asked(prompt="", ids=tuple(range(10)), fps=3, options={"window": 3})
    ids = np.random.default_rng(0).integers(0, 256, (6, FRAME))
    long, part = (processor.prepare(replace(asked, frames=count)) for count in (7, 3))
    extended = processor.extend(kept(part, ids[:2]), Asked(prompt="", frames=4))
    assert extended.prompt_ids == [*range(10), *ids[:2].ravel().tolist()]
    assert plan(server, extended).streams == plan(server, long).streams
    assert (extended.made, extended.pictures, extended.fps) == (4, 7, 3)
    assert pictures_of(processor, extended, ids[2:]) == pictures_of(processor, long, ids)
    for changed, sentence in (
        ({"size": (4, 4)}, "size must be 6x4, not 4x4"),
        ({"fps": 4}, "fps must be 3, not 4"),
        ({"ids": (1,)}, "prompt_ids is for servers that read no text"),
        ({"picture": np.zeros((1, 1, 3), np.uint8)}, "input_reference must be left out: the video that is extended"),
        ({"frames": None}, "seconds or num_frames is needed"),
    ):
        with refused(sentence):
            processor.extend(kept(part, ids[:2]), replace(Asked(prompt="", frames=1), **changed))


def pictures_of(processor: VideoProcessor, prepared: Prepared, ids: np.ndarray) -> list[bytes]:
    """All pictures of a video that is made of these ids, as they are seen while it is."""
    decoder = processor.decoder(prepared)
    runs = [*decoder.given(), *(decoder.add(own.tolist()) for own in ids)]
    return [picture.tobytes() for run in runs for picture in run]


def test_pictures_that_are_none() -> None:
    class Wrong(Squares):
        def decode(self, ids: np.ndarray) -> np.ndarray:
            return np.zeros((4, 6), np.uint8)

    module = sys.modules["operators_own"]
    module.Wrong = Wrong  # type: ignore[attr-defined]
    processor = processor_of("operators_own:Wrong", role="causal", server=causal())
    decoder = processor.decoder(processor.prepare(Asked(prompt="", ids=(1,), frames=1)))
    with refused("must make pictures uint8 [4, 6, 3], not uint8 [4, 6]"):
        decoder.add([0] * FRAME)


def test_where_visual_tokens_are() -> None:
    frame = FrameLayout.from_grid((2, 3), 2, 1, 1)
    assert visual_ids(frame, list(range(11))).tolist() == [[2, 3, 4], [6, 7, 8]]
    with refused("packcache_grid is needed"):
        visual_ids(FrameLayout(5), list(range(5)))


# Lumos-1


@pytest.fixture
def processor(folder: Path) -> VideoProcessor:
    return processor_of(str(folder), role="canvas", server=masked(GRID), max_model_len=4000)


def text(folder: Path, seconds: int, rate: int = 8, caption: str = PROMPT) -> list[int]:
    question = lumos.question(caption, WIDTH, HEIGHT, seconds, rate)
    return lumos.text_prompt(TextTokenizer(folder).encode(question), seconds, rate)


def frames_of(codes: np.ndarray) -> np.ndarray:
    return np.stack([lumos.frame_of_codes(own) for own in codes])


def random_codes(count: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, CODES, (count, *GRID))


def write_lossless(path: Path, frames: np.ndarray) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264rgb", rate=8, options={"crf": "0", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "rgb24"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def test_text_to_video(processor: VideoProcessor, folder: Path) -> None:
    prepared = processor.prepare(Asked(prompt=PROMPT, frames=24, seed=5, steps=9, guidance=3.0))
    assert prepared.prompt_ids == text(folder, 3)
    expected = {"grid": [4, 8], "frames": 7, "condition_frames": 0, "seed": 5, "steps": 9, "guidance": 3.0}
    assert prepared.options == expected
    assert plan(masked(GRID), prepared).options == lumos.MaskedOptions(seed=5, steps=9, guidance=3)
    assert (prepared.made, prepared.pictures, prepared.fps, prepared.size) == (7, 24, 8, SIZE)
    assert prepared.tokens_per_frame == 40
    codes = random_codes(7)
    decoder = processor.decoder(prepared)
    runs = [decoder.add(ids.tolist()) for ids in frames_of(codes)]
    assert [len(run) for run in runs] == [1, 4, 4, 4, 4, 4, 3]
    whole = CosmosTokenizer(folder).decode(codes)[:24]
    np.testing.assert_array_equal(np.concatenate(runs), whole)
    shown = decoder.whole()
    assert shown is not None
    np.testing.assert_array_equal(np.concatenate(list(shown)), whole)


def test_the_server_has_a_size(folder: Path) -> None:
    found = processor_of(str(folder), role="canvas", server=masked((32, 56)))
    assert found.about().items() >= {"size": "448x256", "sizes": ["448x256"], "frames": 48, "frames_step": 8}.items()
    with refused("size: frames of 672x384 have 4084 tokens, and this server makes them of 1828 at most"):
        found.prepare(Asked(prompt=PROMPT, size=(672, 384)))
    assert processor_of(str(folder), role="canvas").about()["sizes"] == ["448x256", "672x384", "768x480"]
    most = processor_of(str(folder), role="canvas", server=masked(GRID), max_model_len=500).about()["most_frames"]
    assert most == 40, "twelve latent frames are 45 pictures"


def test_a_picture_is_the_first_latent_frame(processor: VideoProcessor, folder: Path) -> None:
    picture = random_video(1, *GRID)[0]
    prepared = processor.prepare(Asked(prompt=PROMPT, frames=8, picture=picture.repeat(3, 0).repeat(3, 1)))
    codes = CosmosTokenizer(folder).encode(picture[None])
    np.testing.assert_array_equal(prepared.given, codes)
    assert prepared.prompt_ids == text(folder, 1) + frames_of(codes)[0].tolist()
    assert prepared.options.items() >= {"frames": 2, "condition_frames": 1}.items()
    (run,) = processor.decoder(prepared).given()
    np.testing.assert_array_equal(run, picture[None])


def test_a_video_is_continued(processor: VideoProcessor, folder: Path, tmp_path: Path) -> None:
    """Of 11 frames the last 9 are used: 3 latent frames."""
    video = random_video(9, *GRID)
    source = np.concatenate([random_video(1, *GRID, seed=7).repeat(2, 0), video])
    clip = tmp_path / "old.mp4"
    write_lossless(clip, source)
    prepared = processor.prepare(Asked(prompt=PROMPT, frames=16, clip=clip))
    given = CosmosTokenizer(folder).encode(video)
    np.testing.assert_array_equal(prepared.given, given)
    assert prepared.prompt_ids == text(folder, 2) + frames_of(given).ravel().tolist()
    assert prepared.options.items() >= {"frames": 2, "condition_frames": 1}.items()
    assert [len(run) for run in processor.decoder(prepared).given()] == [1, 4, 4]
    with refused("input_reference has 11 frames at fps 8 (1.4 s), and num_frames asks for 8 in all: ask for more"):
        processor.prepare(Asked(prompt=PROMPT, frames=8, clip=clip))


def test_the_path_of_a_clients_file_is_not_told(processor: VideoProcessor, tmp_path: Path) -> None:
    clip = tmp_path / "upload.bin"
    clip.write_bytes(b"no video")
    with refused("input_reference cannot be read as a video") as raised:
        processor.prepare(Asked(prompt=PROMPT, clip=clip))
    assert str(tmp_path) not in str(raised.value)


@pytest.mark.parametrize("picture", [False, True])
def test_it_goes_on_as_one_long_video(picture: bool, processor: VideoProcessor) -> None:
    """With the same prompt; but the text states the duration that it stated at first."""
    given = random_video(1, *GRID)[0] if picture else None
    first = processor.prepare(Asked(prompt=PROMPT, frames=24, picture=given, seed=3))
    codes = random_codes(first.made + 5)
    frames = frames_of(codes)
    again = processor.extend(kept(first, frames[: first.made]), Asked(prompt=PROMPT, seconds=1))
    assert (again.made, again.pictures) == (2, 32)
    assert again.prompt_ids == [*first.prompt_ids, *frames[: first.made].ravel().tolist()]
    assert again.options == {**first.options, "frames": 2}
    third = processor.extend(kept(again, frames[first.made :][:2]), Asked(prompt="", frames=10))
    assert (third.made, third.pictures) == (3, 42)
    assert third.prompt_ids == [*first.prompt_ids, *frames[: first.made + 2].ravel().tolist()]
    server = masked(GRID)
    assert plan(server, third).streams == plan(server, first).streams
    assert plan(server, third).first_frame == plan(server, first).first_frame + first.made + 2
    # Pictures are those of one video: the one that was cut off at first is there.
    shown = pictures_of(processor, third, frames[first.made + 2 :])
    assert len(shown) == 42
    long = replace(first, made=first.made + 5, pictures=42)
    assert shown == pictures_of(processor, long, frames)


def test_another_prompt_states_the_whole_duration(processor: VideoProcessor, folder: Path) -> None:
    first = processor.prepare(Asked(prompt=PROMPT, frames=8))
    frames = frames_of(random_codes(3))
    extended = processor.extend(kept(first, frames), Asked(prompt="it stops", frames=16))
    assert extended.prompt_ids == [*text(folder, 3, caption="it stops"), *frames.ravel().tolist()]
    with refused("num_frames 12 at fps 8: a prompt states whole seconds"):
        processor.extend(kept(first, frames), Asked(prompt="it stops", frames=4))
    assert processor.extend(kept(first, frames), Asked(prompt=PROMPT, frames=4)).pictures == 12


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"size": (32, 64)}, "size must be 64x32, not 32x64: an extension has the size of its video"),
        ({"fps": 4}, "fps must be 8, not 4: an extension has the rate of its video"),
        ({"frames": None}, "seconds or num_frames is needed"),
        ({"frames": 1}, "seconds must add a latent frame, of 4 pictures, to the 8 pictures"),
        ({"frames": 1000}, "the video has 10"),
        ({"clip": Path("a.mp4")}, "input_reference must be left out"),
        ({"temperature": 1.0}, "temperature must be left out"),
    ],
)
def test_extensions_that_are_refused(changed: dict[str, Any], sentence: str, processor: VideoProcessor) -> None:
    first = processor.prepare(Asked(prompt=PROMPT, frames=8))
    with refused(sentence):
        processor.extend(kept(first, frames_of(random_codes(3))), replace(Asked(prompt=PROMPT, frames=8), **changed))


def test_how_it_is_made_may_change_in_an_extension(processor: VideoProcessor) -> None:
    first = processor.prepare(Asked(prompt=PROMPT, frames=8, seed=3, options={"window": 3}))
    changed = Asked(prompt=PROMPT, frames=8, seed=4, options={"policy": "full"})
    extended = processor.extend(kept(first, frames_of(random_codes(3))), changed)
    assert extended.options.items() >= {"seed": 4, "window": 3, "policy": "full"}.items()


def test_long_videos_are_decoded_in_runs(
    processor: VideoProcessor, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lumos_processor, "LONGEST_RUN", 6)
    monkeypatch.setattr(lumos_processor, "RUN_CONTEXT", 2)
    prepared = processor.prepare(Asked(prompt=PROMPT, frames=64))
    decoder = processor.decoder(prepared)
    codes = random_codes(prepared.made)
    for ids in frames_of(codes):
        decoder.add(ids.tolist())
    lengths: list[int] = []
    decode = CosmosTokenizer.decode
    monkeypatch.setattr(
        CosmosTokenizer, "decode", lambda self, codes: (lengths.append(len(codes)), decode(self, codes))[1]
    )
    runs = decoder.whole()
    assert runs is not None
    found = [next(runs)]
    assert lengths == [6], "one is decoded when it is asked for"
    found += runs
    assert lengths == [6, 6, 6, 5]
    assert [len(run) for run in found] == [21, 16, 16, 11]
    np.testing.assert_array_equal(np.concatenate(found), CosmosTokenizer(folder).decode(codes)[:64])


def test_given_frames_are_decoded_when_they_are_looked_at(
    processor: VideoProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = processor.prepare(Asked(prompt=PROMPT, frames=24))
    extended = processor.extend(kept(first, frames_of(random_codes(7))), Asked(prompt=PROMPT, frames=8))
    lengths: list[int] = []
    decode = CosmosTokenizer.decode
    monkeypatch.setattr(
        CosmosTokenizer, "decode", lambda self, codes: (lengths.append(len(codes)), decode(self, codes))[1]
    )
    given = processor.decoder(extended).given()
    assert (len(given), lengths) == (7, [])
    assert [len(run) for run in given] == [1, 4, 4, 4, 4, 4, 4]
    assert max(lengths) == lumos_processor.PREVIEW_RUN
    np.testing.assert_array_equal(given[-1], given[6])
    assert [len(run) for run in given[:2]] == [1, 4]
    with pytest.raises(IndexError):
        given[7]


def test_a_tokenizer_that_fails_tells_the_log(folder: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]) -> None:
    def fail(self: CosmosTokenizer, codes: np.ndarray) -> np.ndarray:
        raise RuntimeError(f"no {folder}")

    broken = processor_of(str(folder), role="canvas", server=masked(GRID))
    monkeypatch.setattr(CosmosTokenizer, "decode", fail)
    with refused("the server's video tokenizer failed, and its log says why") as raised:
        broken.prepare(Asked(prompt=PROMPT))
    assert str(folder) not in str(raised.value)
    assert f"--video-tokenizer: no {folder}" in logged


def test_half_a_character_is_marked(processor: VideoProcessor, folder: Path) -> None:
    prepared = processor.prepare(Asked(prompt="caf\ud83d", frames=8))
    assert prepared.prompt_ids == text(folder, 1, caption="caf?")


def test_what_is_asked_and_prepared_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Asked(prompt="").prompt = "x"  # type: ignore[misc]
    assert asdict(Asked(prompt="")) == {
        **dict.fromkeys(asdict(Asked(prompt=""))),
        **{"prompt": "", "options": {}},
    }
