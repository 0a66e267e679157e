"""The bundled models behind the API for videos: what the demos ask for, and the pictures that they show."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vllm_packcache.config.server import ServerConfig
from vllm_packcache.demo import run
from vllm_packcache.demo.masked import run as masked_run
from vllm_packcache.demo.masked.bundle import OPTIONS, request_options
from vllm_packcache.demo.masked.tokenizer import GRID_SHAPE, build_text_tokenizer
from vllm_packcache.demo.processor import ASSETS
from vllm_packcache.demo.tokenizer import CONDITION_TOKENS, FRAME_TOKENS, GRID, VideoTokenizer
from vllm_packcache.demo.world import make_world
from vllm_packcache.families import LUMOS, lumos
from vllm_packcache.media.pictures import read_picture, read_picture_bytes
from vllm_packcache.media.processors.base import Asked, Kept, Prepared, VideoProcessor, processor_of

SERVER = ServerConfig.parse("packcache", "demo")
MASKED_SERVER = ServerConfig.parse("packcache", "demo_masked", family=LUMOS)
PROMPT = "A red  circle moves\nright, at night <v3>"


@pytest.fixture(scope="module")
def tokenizer() -> VideoTokenizer:
    return VideoTokenizer()


@pytest.fixture(scope="module")
def demo() -> VideoProcessor:
    return processor_of("demo", role="causal", server=SERVER, max_model_len=8192)


@pytest.fixture(scope="module")
def masked() -> VideoProcessor:
    return processor_of("demo_masked", role="canvas", server=MASKED_SERVER, max_model_len=8192)


def refused(sentence: str) -> pytest.RaisesExc[ValueError]:
    return pytest.raises(ValueError, match=re.escape(sentence))


def photo(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (90, 130, 3), dtype=np.uint8)


def example(processor: VideoProcessor) -> Asked:
    """The page's example, as a client sends it."""
    (given,) = processor.about()["examples"]
    picture = base64.b64decode(given["picture"].removeprefix("data:image/png;base64,"))
    return Asked(prompt=given["prompt"], picture=read_picture_bytes(picture))


def kept(prepared: Prepared, frame_ids: np.ndarray) -> Kept:
    """A finished video, as it comes back from a store."""
    return Kept(
        prompt_ids=prepared.prompt_ids,
        frame_ids=frame_ids.astype(np.int32),
        given=prepared.given,
        size=prepared.size,
        fps=prepared.fps,
        pictures=prepared.pictures,
        options=json.loads(json.dumps(prepared.options)),
    )


def plan(server: ServerConfig, prepared: Prepared) -> Any:
    return server.request({f"packcache_{name}": own for name, own in prepared.options.items()}, prepared.prompt_ids)


def pictures_of(processor: VideoProcessor, prepared: Prepared, ids: np.ndarray) -> np.ndarray:
    decoder = processor.decoder(prepared)
    assert decoder.whole() is None
    return np.concatenate([*decoder.given(), *(decoder.add(own.tolist()) for own in ids)])


def some_frames(tokenizer: VideoTokenizer, count: int) -> np.ndarray:
    """Frames of the causal model of which some ids are wrong, the first row of the first frame among them."""
    rng = np.random.default_rng(2)
    ids = rng.integers(0, len(tokenizer.patches), (count, FRAME_TOKENS)) + tokenizer.visual_offset
    ids[rng.random(ids.shape) < 0.1] = tokenizer.pad_id
    ids[0, 1 : 1 + GRID] = tokenizer.eos_id
    return ids


def test_the_demos_example_is_the_pages(demo: VideoProcessor, tokenizer: VideoTokenizer) -> None:
    """With the given picture as the first one, one more makes the demo's frames."""
    prepared = demo.prepare(replace(example(demo), frames=run.FRAMES + 1))
    text = (ASSETS / "example_prompt.txt").read_text(encoding="utf-8")
    assert prepared.prompt_ids == tokenizer.build_prompt(text, read_picture(ASSETS / "example.png"))
    body = run._body(prepared.prompt_ids, run.CACHES[1])
    options = {f"packcache_{name}": own for name, own in (prepared.options | run.CACHES[1].options).items()}
    assert options == body["vllm_xargs"] | {"packcache_frames": run.FRAMES}
    assert prepared.sampling == {"temperature": body["temperature"]}
    assert prepared.made * prepared.tokens_per_frame == body["max_tokens"]
    assert (prepared.pictures, prepared.fps, prepared.size) == (run.FRAMES + 1, run.FRAMES_PER_SECOND, (64, 64))


def test_any_picture_and_text_are_those_of_the_demo(demo: VideoProcessor, tokenizer: VideoTokenizer) -> None:
    prepared = demo.prepare(Asked(prompt=PROMPT, picture=photo(), seconds=3))
    assert prepared.prompt_ids == tokenizer.build_prompt("A red circle moves right, at night <v3>", photo())
    assert (prepared.made, prepared.pictures) == (11, 12)
    codes = tokenizer.encode_image(photo()) - tokenizer.visual_offset
    np.testing.assert_array_equal(prepared.given, codes[None])
    assert demo.prepare(Asked(prompt=PROMPT, picture=photo())).pictures == run.FRAMES


def test_wrong_ids_are_mended_as_in_the_demo(demo: VideoProcessor, tokenizer: VideoTokenizer) -> None:
    prepared = demo.prepare(Asked(prompt=PROMPT, picture=photo(), frames=6))
    ids = some_frames(tokenizer, 5)
    shown = pictures_of(demo, prepared, ids)
    assert len(shown) == prepared.pictures
    np.testing.assert_array_equal(shown[0], tokenizer.decode_frames(tokenizer.encode_image(photo())[None])[0])
    mended = tokenizer.frames_from_ids(ids.ravel().tolist())
    np.testing.assert_array_equal(shown[1:], tokenizer.decode_frames(mended))
    assert (mended != ids[:, 1:].reshape(-1, GRID, GRID)).any()


def test_a_video_goes_on_as_one_long_one(demo: VideoProcessor, tokenizer: VideoTokenizer) -> None:
    asked = Asked(prompt=PROMPT, picture=photo(), options={"history_frames": 3.0})
    ids = some_frames(tokenizer, 9)
    long, part = (demo.prepare(replace(asked, frames=frames)) for frames in (10, 4))
    first = demo.extend(kept(part, ids[:3]), Asked(prompt=PROMPT, frames=2))
    second = demo.extend(kept(first, ids[3:5]), Asked(prompt="", seconds=1))
    assert second.prompt_ids == [*long.prompt_ids, *ids[:5].ravel().tolist()]
    assert second.options.items() >= {"condition_tokens": CONDITION_TOKENS, "history_frames": 3.0, "frames": 4}.items()
    assert plan(SERVER, second).streams == plan(SERVER, long).streams
    assert (second.made, second.pictures) == (4, 10)
    np.testing.assert_array_equal(pictures_of(demo, second, ids[5:]), pictures_of(demo, long, ids))


def test_another_prompt_takes_the_place_of_the_first(demo: VideoProcessor, tokenizer: VideoTokenizer) -> None:
    part = demo.prepare(Asked(prompt=PROMPT, picture=photo(), frames=3))
    ids = some_frames(tokenizer, 2)
    extended = demo.extend(kept(part, ids), Asked(prompt="a blue square", frames=1))
    expected = tokenizer.build_prompt("a blue square", photo())
    assert extended.prompt_ids == [*expected, *ids.ravel().tolist()]


def masked_ids(text: str, frames: int, picture: np.ndarray | None) -> list[int]:
    """As `run_masked_demo` makes them."""
    words = build_text_tokenizer().encode(text, add_special_tokens=False).ids
    ids = lumos.text_prompt(words[:30], frames, 4)
    return ids if picture is None else ids + lumos.frame_of_codes(picture).tolist()


def test_the_masked_demos_example_is_the_pages(masked: VideoProcessor) -> None:
    world = make_world(masked_run.EXAMPLE)
    prepared = masked.prepare(replace(example(masked), frames=masked_run.FRAMES + 1))
    assert prepared.prompt_ids == masked_ids(world.prompt, masked_run.FRAMES, world.frame_ids(0))
    options = {f"packcache_{name}": own for name, own in prepared.options.items()}
    own = {"packcache_grid": list(GRID_SHAPE), "packcache_condition_frames": 1}
    assert options == request_options(masked_run.FRAMES, OPTIONS) | own
    assert prepared.sampling == {}
    assert prepared.made == masked_run.FRAMES
    np.testing.assert_array_equal(prepared.given, world.frame_ids(0)[None])


def test_a_sentence_alone_is_enough_for_the_masked_model(masked: VideoProcessor) -> None:
    prepared = masked.prepare(Asked(prompt=PROMPT, seed=9, steps=2, guidance=3.0))
    assert prepared.prompt_ids == masked_ids(PROMPT, masked_run.FRAMES, None)
    assert (prepared.made, prepared.pictures, len(prepared.given)) == (masked_run.FRAMES, masked_run.FRAMES, 0)
    assert plan(MASKED_SERVER, prepared).options == replace(OPTIONS, seed=9, steps=2, guidance=3.0)
    assert masked.prepare(Asked(prompt=PROMPT, picture=photo())).made == masked_run.FRAMES - 1


@pytest.mark.parametrize("picture", [None, photo()], ids=["text", "picture"])
def test_a_masked_video_goes_on_as_one_long_one(
    picture: np.ndarray | None, masked: VideoProcessor, tokenizer: VideoTokenizer
) -> None:
    part = masked.prepare(Asked(prompt=PROMPT, picture=picture, frames=5, seed=4, options={"window": 3}))
    codes = np.random.default_rng(3).integers(0, len(tokenizer.patches), (part.made + 5, *GRID_SHAPE))
    ids = np.stack([lumos.frame_of_codes(own) for own in codes])
    first = masked.extend(kept(part, ids[: part.made]), Asked(prompt=PROMPT, frames=2))
    second = masked.extend(kept(first, ids[part.made :][:2]), Asked(prompt="", frames=3))
    assert second.prompt_ids == [*part.prompt_ids, *ids[: part.made + 2].ravel().tolist()]
    assert second.options == {**part.options, "frames": 3}
    request = plan(MASKED_SERVER, second)
    assert request.streams == plan(MASKED_SERVER, part).streams
    assert request.first_frame == part.made + 2
    assert second.pictures == 10
    shown = pictures_of(masked, second, ids[part.made + 2 :])
    assert len(shown) == 10
    start = len(part.given)
    np.testing.assert_array_equal(shown[start:], tokenizer.decode_frames(codes + tokenizer.visual_offset))
    other = masked.extend(kept(part, ids[: part.made]), Asked(prompt="a blue square", frames=2))
    images = None if picture is None else part.given[0]
    assert other.prompt_ids[: len(other.prompt_ids) - ids[: part.made].size] == masked_ids(
        "a blue square", part.made, images
    )


def test_a_page_shows_what_is_there(demo: VideoProcessor, masked: VideoProcessor) -> None:
    assert demo.about().items() >= {"picture": "required", "text": True, "size": "64x64", "most_frames": 31}.items()
    assert masked.about().items() >= {"picture": "optional", "frames": 16, "most_frames": 29}.items()
    assert masked.about()["options"]["num_inference_steps"]["default"] == OPTIONS.steps
    assert masked.about()["options"]["guidance_scale"]["default"] == OPTIONS.guidance
    for processor in (demo, masked):
        most = processor.about()["most_frames"]
        made = processor.prepare(replace(example(processor), frames=most))
        assert made.pictures == most


@pytest.mark.parametrize("negative", [None, "a blue square"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_guided_video_leads_away_from_the_same_picture(
    negative: str | None, scale: float, tokenizer: VideoTokenizer
) -> None:
    """Given or by default of the server, and when it goes on, with what it has or with more."""
    said = {"scale": scale} if scale != 1 else True
    server = ServerConfig.parse("packcache", {"layout": "demo", "guidance": said})
    processor = processor_of("demo", role="causal", server=server, max_model_len=8192)
    asked = Asked(prompt=PROMPT, picture=photo(), guidance=None if scale != 1 else 3.0, negative_prompt=negative)
    long, part = (processor.prepare(replace(asked, frames=frames)) for frames in (6, 3))
    condition = tuple(tokenizer.build_prompt(negative or "", photo()))
    assert plan(server, long).guidance == 3
    assert [stream.condition for stream in plan(server, long).streams] == [(), condition]
    ids = some_frames(tokenizer, 2)
    extended = processor.extend(kept(part, ids), Asked(prompt="", frames=3))
    assert plan(server, extended).streams == plan(server, long).streams
    assert plan(server, extended).guidance == 3
    other = processor.extend(kept(part, ids), Asked(prompt="", frames=3, negative_prompt="night"))
    assert plan(server, other).streams[1].condition == tuple(tokenizer.build_prompt("night", photo()))
    plain = processor.prepare(replace(asked, guidance=1.0, negative_prompt=None, frames=3))
    assert len(plan(server, plain).streams) == 1
    with refused("negative_prompt is for guided videos: give guidance_scale too"):
        processor.extend(kept(plain, ids), Asked(prompt="", frames=3, negative_prompt="night"))
    guided = processor.extend(kept(plain, ids), Asked(prompt="", frames=3, guidance=2.0))
    assert plan(server, guided).streams[1].condition == tuple(tokenizer.build_prompt("", photo()))


def test_the_example_is_a_file(demo: VideoProcessor, masked: VideoProcessor) -> None:
    for processor in (demo, masked):
        data = processor.about()["examples"][0]["picture"].partition(",")[2]
        assert Image.open(io.BytesIO(base64.b64decode(data))).format == "PNG"
