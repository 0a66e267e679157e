"""Emu3 and UniVLA over HTTP: prompts as the public code writes them, pictures as their tokenizer makes them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tokenizers import Tokenizer

from tests.media.emu3_files import CODES, make_vision_tokenizer, write_published, write_text_tokenizer
from tests.media.test_processors import folder as folder
from tests.media.test_processors import kept, refused
from vllm_packcache.config.errors import ConfigError
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.config.sources import presets
from vllm_packcache.families import EMU3
from vllm_packcache.families.emu3 import NEGATIVE_PROMPT
from vllm_packcache.media.emu3_tokenizer import Emu3Tokenizer
from vllm_packcache.media.pictures import fit
from vllm_packcache.media.processors.base import Asked, Prepared, VideoProcessor, processor_of
from vllm_packcache.reference.emu3 import emu3_picture, univla_frames

GRID = (3, 5)
SIZE = (40, 24)
OTHER, OTHER_SIZE = (12, 2), (16, 96)
PROMPT = "a red [bus] 90*7, tre\u0300s vite"
COMPOSED = "a red [bus] 90*7, tr\u00e8s vite"
BEGIN, STARTS, IMAGE, FRAME_END, IMAGE_END = (
    f"<|{name}|>" for name in ("extra_203", "image start", "image token", "extra_201", "image end")
)


def server(preset: str, guidance: Any = None, **layout: Any) -> ServerConfig:
    """Of a preset, with few codes and a small grid."""
    said = yaml.safe_load(presets()[preset].read_text())
    own = {**said["layout"], "grid": list(GRID), "visual_ids": [151854, 151853 + CODES], **layout}
    return ServerConfig.parse("packcache", {"layout": own, "guidance": guidance or False}, family=EMU3)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_tokenizer(write_published(tmp_path_factory.mktemp("emu3"), make_vision_tokenizer()))


@pytest.fixture(scope="module")
def tokenizer(published: Path) -> Emu3Tokenizer:
    return Emu3Tokenizer(published)


@pytest.fixture(scope="module")
def read(published: Path) -> Callable[[str], list[int]]:
    """Ids of a text with special tokens, by the library: as the public code makes all of a prompt."""
    return lambda text: Tokenizer.from_file(str(published / "tokenizer.json")).encode(text).ids


def made(published: Path, preset: str, guidance: Any = None, most: int | None = 8192) -> VideoProcessor:
    return processor_of(str(published), role="causal", server=server(preset, guidance), max_model_len=most)


PICTURE = np.random.default_rng(0).integers(0, 256, (24, 40, 3)).astype(np.uint8)


def least(preset: str) -> Asked:
    return Asked(prompt=PROMPT, picture=PICTURE if preset == "univla" else None)


def codes_of_prompt(codes: np.ndarray) -> str:
    return "".join(f"<|visual token {code:0>6d}|>" for code in codes.ravel())


def frames(preset: str, prepared: Prepared, seed: int = 0) -> tuple[list[list[int]], np.ndarray]:
    """Frames that the model could make, by the public loop, and their codes."""
    grid = prepared.size[1] // 8, prepared.size[0] // 8
    codes = np.random.default_rng(seed).integers(0, CODES, (prepared.made, *grid))
    own, tokens = list(prepared.prompt_ids), iter(codes.ravel().tolist())
    follows = univla_frames if preset == "univla" else emu3_picture
    for _ in range(prepared.made * prepared.tokens_per_frame):
        may = follows(own, grid)
        own.append(may.start if len(may) == 1 else may.start + next(tokens))
    assert next(tokens, None) is None
    return np.array(own[len(prepared.prompt_ids) :]).reshape(prepared.made, -1).tolist(), codes


def plan(preset: str, prepared: Prepared, guidance: Any = None) -> Any:
    options = {f"packcache_{name}": own for name, own in prepared.options.items()}
    return server(preset, guidance).request(options, prepared.prompt_ids)


@pytest.mark.parametrize(("size", "grid"), [(None, GRID), (OTHER_SIZE, OTHER)])
def test_emu3_makes_a_picture_of_a_text(
    size: Any, grid: Any, published: Path, tokenizer: Emu3Tokenizer, read: Callable[[str], list[int]]
) -> None:
    processor = made(published, "emu3")
    prepared = processor.prepare(replace(least("emu3"), size=size))
    assert prepared.prompt_ids == read(f"{BEGIN}{COMPOSED}{STARTS}{grid[0]}*{grid[1]}{IMAGE}")
    assert prepared.options == {"grid": list(grid), "frames": 1, "condition_image_tokens": 0}
    assert prepared.sampling == {"temperature": 1.0, "top_k": 2048}
    assert (prepared.made, prepared.pictures, len(prepared.given), prepared.fps) == (1, 1, 0, 1)
    assert prepared.size == (grid[1] * 8, grid[0] * 8)
    request = plan("emu3", prepared)
    assert request.streams[0].plan.layout.tokens_per_frame == prepared.tokens_per_frame == grid[0] * (grid[1] + 1) + 1
    (ids,), codes = frames("emu3", prepared)
    assert request.grammar.first_wrong([*prepared.prompt_ids, *ids]) is None
    decoder = processor.decoder(prepared)
    assert [*decoder.given()] == []
    picture = decoder.add(ids)
    np.testing.assert_array_equal(picture, tokenizer.decode(codes))
    assert picture.shape == (1, prepared.size[1], prepared.size[0], 3)
    assert decoder.whole() is None


@pytest.mark.parametrize(("size", "grid", "count"), [(None, GRID, 4), (OTHER_SIZE, OTHER, 13)])
def test_univla_goes_on_from_a_picture(
    size: Any, grid: Any, count: int, published: Path, tokenizer: Emu3Tokenizer, read: Callable[[str], list[int]]
) -> None:
    processor = made(published, "univla")
    picture = np.random.default_rng(3).integers(0, 256, (50, 70, 3)).astype(np.uint8)
    prepared = processor.prepare(Asked(prompt=PROMPT, picture=picture, size=size, frames=count, fps=3))
    given = tokenizer.encode(fit(picture, grid[1] * 8, grid[0] * 8)[None])
    stated = f"{grid[0]}*{grid[1]}"
    opening = (
        f"{STARTS}1*{stated}{IMAGE}{codes_of_prompt(given)}{FRAME_END}{IMAGE_END}{STARTS}{count - 1}*{stated}{IMAGE}"
    )
    assert prepared.prompt_ids == read(f"{BEGIN}{COMPOSED}{opening}")
    assert prepared.options == {
        "grid": list(grid), "frames": count - 1, "condition_image_tokens": len(read(opening))
    }  # fmt: skip
    assert (prepared.made, prepared.pictures, prepared.fps) == (count - 1, count, 3)
    np.testing.assert_array_equal(prepared.given, given)
    part = "70 x 42" if size is None else "8 x 50"
    wide, high = prepared.size
    assert prepared.notes == (f"picture: the middle {part} of 70 x 50 pixels, as {wide} x {high}",)
    request = plan("univla", prepared)
    layout = request.streams[0].plan.layout
    assert (layout.tokens_per_frame, layout.condition_tokens) == (prepared.tokens_per_frame, len(prepared.prompt_ids))
    ids, codes = frames("univla", prepared)
    assert request.grammar.first_wrong([*prepared.prompt_ids, *np.ravel(ids).tolist()]) is None
    decoder = processor.decoder(prepared)
    runs = [*decoder.given(), *(decoder.add(own) for own in ids)]
    np.testing.assert_array_equal(np.concatenate(runs), tokenizer.decode(np.concatenate([given, codes])))


def test_a_video_goes_on_as_if_it_had_been_longer(published: Path, tokenizer: Emu3Tokenizer) -> None:
    processor = made(published, "univla")
    first = processor.prepare(replace(least("univla"), frames=3, size=OTHER_SIZE, options={"history_frames": 2}))
    ids, codes = frames("univla", first)
    more = processor.extend(kept(first, ids), Asked(prompt=" ", frames=2, seed=4))
    assert more.prompt_ids == [*first.prompt_ids, *np.ravel(ids).tolist()]
    assert more.options == {
        **first.options, "frames": 2, "condition_tokens": len(first.prompt_ids)
    }  # fmt: skip
    assert more.sampling == {"temperature": 1.0, "top_k": 2048, "seed": 4}
    assert (more.made, more.pictures, more.size, more.fps) == (2, 5, OTHER_SIZE, first.fps)
    np.testing.assert_array_equal(more.given, np.concatenate([first.given, codes]))
    request = plan("univla", more)
    assert request.streams[0].plan.layout.condition_tokens == len(first.prompt_ids)
    assert request.grammar.first_wrong(more.prompt_ids) is None
    np.testing.assert_array_equal(np.concatenate(processor.decoder(more).given()), tokenizer.decode(more.given))
    # Once more, with another prompt before the same picture: the frames stay, and the same one changes nothing.
    others, _ = frames("univla", more, seed=1)
    again = kept(more, others)
    assert processor.extend(again, Asked(prompt=PROMPT, frames=1)).prompt_ids == [
        *more.prompt_ids, *np.ravel(others).tolist()
    ]  # fmt: skip
    other = processor.extend(again, Asked(prompt="a bee", frames=1))
    fresh = processor.prepare(replace(least("univla"), prompt="a bee", frames=3, size=OTHER_SIZE))
    assert other.options["condition_tokens"] == len(fresh.prompt_ids)
    assert other.prompt_ids == [*fresh.prompt_ids, *np.ravel(ids).tolist(), *np.ravel(others).tolist()]
    assert plan("univla", other).grammar.first_wrong(other.prompt_ids) is None


GUIDED = {"scale": 3.0}


def test_emu3_is_guided_away_from_the_published_faults(published: Path, read: Callable[[str], list[int]]) -> None:
    processor = made(published, "emu3", GUIDED)
    head = f"{STARTS}12*2{IMAGE}"
    for asked, scale, text in (
        ({}, 3.0, NEGATIVE_PROMPT),
        ({"negative_prompt": "re\u0301d"}, 3.0, "r\u00e9d"),
        ({"guidance": 5.0}, 5.0, NEGATIVE_PROMPT),
        ({"guidance": 2, "negative_prompt": "rain"}, 2, "rain"),
    ):
        prepared = processor.prepare(replace(least("emu3"), size=OTHER_SIZE, **asked))
        assert prepared.options["guidance"] == scale
        assert prepared.options["negative_prompt_ids"] == read(f"{BEGIN}{text}{head}")
        request = plan("emu3", prepared, GUIDED)
        assert (request.guidance, len(request.streams)) == (scale, 2)
        assert list(request.streams[1].condition) == prepared.options["negative_prompt_ids"]
    prepared = processor.prepare(replace(least("emu3"), guidance=1))
    assert "negative_prompt_ids" not in prepared.options
    # What the operator says counts before what was published.
    own = made(published, "emu3", {**GUIDED, "negative_prompt_ids": [151849, 7, *read(f"{STARTS}3*5{IMAGE}")]})
    assert "negative_prompt_ids" not in own.prepare(least("emu3")).options
    assert own.about()["options"]["guidance_scale"]["default"] == 3.0
    with refused("negative_prompt must be left out: this server guides no videos"):
        made(published, "emu3").prepare(replace(least("emu3"), negative_prompt="rain"))


def test_univla_is_guided_away_from_the_same_picture(published: Path, read: Callable[[str], list[int]]) -> None:
    processor = made(published, "univla", True)
    asked = replace(least("univla"), frames=3)
    plain = processor.prepare(asked)
    assert "negative_prompt_ids" not in plain.options
    text = len(read(f"{BEGIN}{COMPOSED}"))
    for negative, words in ((None, ""), ("rain", "rain")):
        prepared = processor.prepare(replace(asked, guidance=2.0, negative_prompt=negative))
        assert prepared.options["negative_prompt_ids"] == [*read(f"{BEGIN}{words}"), *plain.prompt_ids[text:]]
    ids, _ = frames("univla", prepared)
    more = processor.extend(kept(prepared, ids), Asked(prompt="", frames=1))
    assert more.options["negative_prompt_ids"] == prepared.options["negative_prompt_ids"]
    assert more.options["guidance"] == 2.0
    assert len(plan("univla", more, True).streams) == 2
    other = processor.extend(kept(prepared, ids), Asked(prompt="", frames=1, negative_prompt="snow"))
    assert other.options["negative_prompt_ids"] == [*read(f"{BEGIN}snow"), *plain.prompt_ids[text:]]


@pytest.mark.parametrize("preset", ["emu3", "univla"])
def test_what_a_page_is_told(preset: str, published: Path) -> None:
    about = made(published, preset).about()
    json.dumps(about, allow_nan=False)
    assert about["size"] == about["sizes"][0] == "40x24"
    assert about["options"]["temperature"]["default"] == 1
    prepared = made(published, preset).prepare(least(preset))
    assert prepared.pictures == about["frames"] == (6 if preset == "univla" else 1)
    assert (about["picture"], about["frames_step"], about["fps"]) == (
        ("required", 1, 5) if preset == "univla" else ("none", 1, 1)
    )
    if preset == "emu3":
        assert about["sizes"][1:] == ["512x512"]
        # As many positions as Emu3 has.
        assert made(published, preset, most=9216).about()["sizes"][1:] == [
            "720x720", "960x544", "544x960", "512x512"
        ]  # fmt: skip
        assert about["most_frames"] == 1
        return
    assert about["sizes"][1:] == ["256x256", "200x200", "240x192"]
    # What it says fits, with an empty text.
    most = about["most_frames"]
    fits = made(published, preset).prepare(Asked(prompt=".", picture=PICTURE, frames=most - 1))
    assert len(fits.prompt_ids) + fits.made * fits.tokens_per_frame <= 8192
    with refused("sequences of at most 8192: ask for fewer frames, or smaller ones"):
        made(published, preset).prepare(Asked(prompt="", picture=PICTURE, frames=most + 1))
    small = made(published, preset, most=700).about()
    assert small["sizes"] == ["40x24"]


@pytest.mark.parametrize(
    ("preset", "changed", "sentence"),
    [
        ("emu3", {"frames": 2}, "num_frames must be 1, not 2: this server makes pictures"),
        ("emu3", {"seconds": 2.0}, "num_frames must be 1, not 2"),
        ("emu3", {"picture": PICTURE}, "input_reference must be left out: this model makes a picture of a text alone"),
        ("univla", {"picture": None}, "input_reference is needed: this model goes on from a picture"),
        ("univla", {"frames": 1}, "num_frames must be 2 or more, not 1: the given picture is the first one"),
        ("univla", {"fps": 0}, "fps must lie between 1 and 240, not 0"),
        *(
            (preset, changed, sentence)
            for preset in ("emu3", "univla")
            for changed, sentence in (
                ({"clip": Path("a.mp4")}, "input_reference must be a picture, not a video"),
                ({"size": (44, 24)}, "size must have sides that are multiples of 8, not 44x24"),
                ({"size": (40, 20)}, "size must have sides that are multiples of 8, not 40x20"),
                ({"size": (-8, 8)}, "size must have sides that are multiples of 8, not -8x8"),
                ({"size": (80000, 80000)}, "size: grid of 10000 x 10000 makes frames of"),
                ({"size": (800, 800)}, "this server makes sequences of at most 8192: ask for fewer frames, or smaller"),
                ({"prompt": "a <|image start|> b"}, "makes 151852 of '<|image start|>', no id of text for this model"),
                ({"prompt": "a <|visual token 000003|>"}, "makes 151857 of"),
                ({"ids": (1, 2)}, "prompt_ids is for servers that read no text"),
                ({"options": {"grid": [2, 2]}}, "packcache_grid must be left out: this server's video tokenizer sets"),
                ({"options": {"condition_image_tokens": 2}}, "packcache_condition_image_tokens must be left out"),
                ({"steps": 3}, "num_inference_steps must be left out"),
                ({"guidance": 3.0}, "guidance_scale must be left out: this server guides no videos"),
                ({"temperature": -1}, "temperature must lie between 0 and 100, not -1"),
            )
        ),
    ],
    ids=lambda value: " ".join(str(value).split())[:60],
)  # fmt: skip
def test_what_is_refused(preset: str, changed: dict[str, Any], sentence: str, published: Path) -> None:
    with refused(sentence):
        made(published, preset).prepare(replace(least(preset), **changed))


def test_what_a_client_says_of_sampling_counts(published: Path) -> None:
    asked = replace(least("emu3"), temperature=0.7, top_k=1024, top_p=0.9, seed=3)
    assert made(published, "emu3").prepare(asked).sampling == {
        "temperature": 0.7, "top_k": 1024, "top_p": 0.9, "seed": 3
    }  # fmt: skip


def test_extensions_that_are_refused(published: Path) -> None:
    picture = made(published, "emu3")
    prepared = picture.prepare(least("emu3"))
    with refused("video must be one that can go on, and this model makes single pictures"):
        picture.extend(kept(prepared, frames("emu3", prepared)[0]), Asked(prompt="", frames=1))
    video = made(published, "univla")
    first = video.prepare(replace(least("univla"), frames=2))
    done = kept(first, frames("univla", first)[0])
    for changed, sentence in (
        ({"picture": PICTURE}, "input_reference must be left out: the video that is extended is what is given"),
        ({"size": OTHER_SIZE}, "size must be 40x24, not 16x96: an extension has the size of its video"),
        ({"fps": 3}, "fps must be 5, not 3"),
        ({"frames": None}, "seconds or num_frames is needed"),
        ({"frames": 4000}, "sequences of at most 8192"),
    ):
        with refused(sentence):
            video.extend(done, replace(Asked(prompt="", frames=1), **changed))


def test_ids_that_are_no_frame(published: Path) -> None:
    processor = made(published, "emu3")
    prepared = processor.prepare(least("emu3"))
    (ids,), _ = frames("emu3", prepared)
    decoder = processor.decoder(prepared)
    with refused("a frame must have 19 tokens, not 18"):
        decoder.add(ids[1:])
    for wrong in (151853, 151854 + CODES):
        with refused("a frame must have visual ids from 151854 to 151917, and has others"):
            decoder.add([wrong, *ids[1:]])


def test_a_tokenizer_that_fails_is_the_servers_matter(
    published: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    processor = made(published, "emu3")

    def full(*_: Any) -> None:
        raise RuntimeError("no memory for it")

    monkeypatch.setattr("transformers.models.emu3.modeling_emu3.Emu3VQVAEUpBlock.forward", full)
    # Before anything is made that nobody could look at.
    with refused("the server's video tokenizer failed, and its log says why: ask for a smaller size"):
        processor.prepare(least("emu3"))
    assert any("no memory for it" in line for line in logged)


# What an operator names


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (None, "the server's layout is another: give --kv-cache-policy-config with layout: emu3 or univla"),
        (ServerConfig.parse("full", {}, family=EMU3), "the server's layout is another"),
        (ServerConfig.parse("packcache", {"layout": {"grid": [2, 3], "row_end_tokens": 1}}), "layout is another"),
        (ServerConfig.parse("packcache", {"layout": "emu3_5"}, family=EMU3), "the server's layout is another"),
        (server("univla", digit_ids=[*range(16, 26)]), "the server's layout is another"),
        (server("emu3", frame_start_tokens=1), "the server's layout is another"),
        (ServerConfig.parse("packcache", {"layout": "emu3"}, family=EMU3), "it has 64 codes, for visual_ids [151854"),
    ],
)
def test_servers_of_other_frames(config: ServerConfig | None, sentence: str, published: Path) -> None:
    with refused(sentence) as raised:
        processor_of(str(published), role="causal", server=config)
    assert isinstance(raised.value, ConfigError)


def test_folders_that_lack_something(published: Path, folder: Path, tmp_path: Path) -> None:
    def named(role: Any = "causal") -> None:
        processor_of(str(tmp_path), role=role, server=server("emu3"))

    with refused(
        "must have tokenizer.json, config.json, *.safetensors, and has no tokenizer.json and no config.json and no"
    ):
        named()
    with refused("must have tokenizer.json, encoder.jit, decoder.jit, and has no"):
        named("canvas")
    (tmp_path / "emu3.tiktoken").write_text("")
    with refused("the folder has the text tokenizer as emu3.tiktoken alone, which only code of the model's own reads"):
        named()
    shutil.copy(published / "tokenizer.json", tmp_path)
    with refused("has no config.json and no *.safetensors"):
        named()
    shutil.copy(published / "config.json", tmp_path)
    with refused("and has no *.safetensors"):
        named()
    # It is of the other models, and nothing of it is read.
    with refused("must be of a model that makes videos in whole frames, as the served one does"):
        named("canvas")
    shutil.copy(published / "model.safetensors", tmp_path)
    named()
    with refused("must be of a model that makes videos token by token, as the served one does"):
        processor_of(str(folder), role="causal", server=server("emu3"))
    # A folder may hold the tokenizers of both.
    for name in ("encoder.jit", "decoder.jit"):
        shutil.copy(folder / name, tmp_path)
    named()
    assert re.match("lumos", processor_of(str(tmp_path), role="canvas").name)
