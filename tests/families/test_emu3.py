"""Emu3's family: its presets allow what the public loops allow, and a prompt states the size of its frames."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import quick
from vllm_packcache import families
from vllm_packcache.config.errors import ConfigError
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.core.grammar import VideoGrammar
from vllm_packcache.families import EMU3
from vllm_packcache.families.emu3 import stated_size
from vllm_packcache.reference import Emu3Reference, make_random_emu3
from vllm_packcache.reference.emu3 import (
    IMAGE,
    IMAGE_BEGIN,
    STAR,
    emu3_5_picture,
    emu3_picture,
    size_ids,
    univla_frames,
)

Grid = tuple[int, int]

BEGIN = 151849
grids = st.tuples(st.integers(1, 12), st.integers(1, 12))
of_two_digits = st.tuples(st.integers(10, 13), st.integers(10, 13))


def head(grid: Grid, *before: int) -> list[int]:
    return [IMAGE_BEGIN, *before, *size_ids(grid[0]), STAR, *size_ids(grid[1]), IMAGE]


def grammar(preset: str, grid: Grid, prompt: list[int], frames: int) -> VideoGrammar:
    """Of a request; what it says of conditioning images does not matter here."""
    said = {"packcache_grid": list(grid), "packcache_frames": frames, "packcache_condition_image_tokens": 0}
    made = ServerConfig.parse("packcache", preset, family=EMU3).request(said, prompt)
    assert made is not None
    assert made.grammar is not None
    return made.grammar


def check(video: VideoGrammar, prompt: list[int], frames: int, follows: Any, grid: Grid) -> list[int]:
    """Place by place what the layout allows must be what the loop does; the last id of a range is taken."""
    tokens = list(prompt)
    for place in range(len(prompt), len(prompt) + frames * video.layout.tokens_per_frame):
        may, own = follows(tokens, grid), video.allowed(place)
        assert (may.start, may.stop - 1) == own, f"token {place - len(prompt)}"
        tokens.append(own.last)
    return tokens


@quick
@given(grid=grids, text=st.integers(0, 3))
def test_a_picture_is_what_emu3s_loop_makes(grid: Grid, text: int) -> None:
    prompt = [BEGIN, *range(text), *head(grid)]
    tokens = check(grammar("emu3", grid, prompt, 1), prompt, 1, emu3_picture, grid)
    # What the loop writes behind it is fixed. (Where a row has two columns or fewer, it writes ends of lines there.)
    for closing in (151853, 151850) if grid[1] > 2 else ():
        assert emu3_picture(tokens, grid) == range(closing, closing + 1)
        tokens.append(closing)


@quick
@given(grid=of_two_digits, text=st.integers(0, 3))
def test_pictures_are_what_emu3_5s_loop_makes(grid: Grid, text: int) -> None:
    prompt = [BEGIN, *range(text), 151746]
    tokens = check(grammar("emu3_5", grid, prompt, 2), prompt, 2, emu3_5_picture, grid)
    # The first size is one that the loop lets the model write: two digits each way, the first of them no 0.
    size = tokens[len(prompt) + 1 : len(prompt) + 6]
    first, other = range(16, 25), range(15, 25)
    assert all(own in may for own, may in zip(size, (first, other, [STAR], first, other), strict=True))


@quick
@given(grid=grids, text=st.integers(0, 3), asked=st.integers(1, 9))
def test_frames_are_what_univlas_loop_makes(grid: Grid, text: int, asked: int) -> None:
    rows, columns = grid
    given = [*head(grid, 16, STAR), *[151854] * (rows * columns), 151847, 151853, *head(grid, 15 + asked, STAR)]
    prompt = [BEGIN, *range(text), *given]
    check(grammar("univla", grid, prompt, 3), prompt, 3, univla_frames, grid)


@pytest.mark.parametrize(("preset", "ids"), [("emu3", head((90, 90))), ("univla", head((32, 32), 20, STAR))])
def test_a_prompt_states_the_size_of_its_frames(preset: str, ids: list[int]) -> None:
    server = ServerConfig.parse("packcache", preset, family=EMU3)
    prompt = [BEGIN, *range(2000), *ids]
    rows, columns = server.layout.grid  # type: ignore[union-attr,misc]
    assert stated_size(prompt) == (rows, columns)
    assert server.request({"packcache_frames": 1}, prompt) is not None
    with pytest.raises(ConfigError) as refused:
        server.request({"packcache_frames": 1, "packcache_grid": [25, 24]}, prompt)
    assert str(refused.value) == (
        f"the prompt states a picture of {rows} x {columns}, and frames have 25 x 24: give packcache_grid: [{rows}, "
        f"{columns}], or state the size of the frames"
    )
    # Frames may be given too, of a size that is known by then; and a number of tokens says nothing.
    assert (
        server.request({"packcache_frames": 1, "packcache_grid": [25, 24], "packcache_guidance": 1}, len(prompt))
        is not None
    )
    assert server.request(None, prompt) is None


@pytest.mark.parametrize(
    ("prompt", "size"),
    [
        ([], None),
        ([IMAGE], None),
        ([BEGIN, 5, 6], None),
        ([IMAGE_BEGIN, 16, STAR, IMAGE], None),
        ([IMAGE_BEGIN, 16, 300, 17, IMAGE], None),
        ([IMAGE_BEGIN, *[7] * 20, 16, STAR, 17, IMAGE], None),
        ([IMAGE_BEGIN, 16, STAR, 17, IMAGE], (1, 2)),
        ([5, *head((1234, 567), 24, 15, STAR)], (1234, 567)),
        ([*head((3, 4)), *head((56, 7))], (56, 7)),
    ],
)
def test_the_size_that_a_prompt_states(prompt: list[int], size: Grid | None) -> None:
    assert stated_size(prompt) == size


@pytest.mark.parametrize(
    ("prompt", "negative"),
    [
        ([BEGIN, 70, 71, *head((4, 5))], [BEGIN, *head((4, 5))]),
        ([BEGIN, *head((4, 5))], [BEGIN, *head((4, 5))]),
        (head((4, 5)), head((4, 5))),
        # A picture that the prompt refers to stays.
        ([BEGIN, 70, *head((3, 3)), 80, *head((4, 5))], [BEGIN, *head((3, 3)), 80, *head((4, 5))]),
    ],
)
def test_guidance_leads_away_from_the_prompt_without_its_text(prompt: list[int], negative: list[int]) -> None:
    made = ServerConfig.parse("packcache", "emu3", family=EMU3).request({"packcache_grid": [4, 5]}, prompt)
    assert made is not None
    assert made.guidance == 3
    assert list(made.streams[1].condition) == negative


def test_without_a_head_there_is_no_negative_prompt_of_its_own() -> None:
    server = ServerConfig.parse("packcache", "emu3_5", family=EMU3)
    assert len(server.request({"packcache_frames": 1}, [BEGIN, 70]).streams) == 1  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=r"^packcache_negative_prompt_ids is needed: it stands in place of the condi"):
        server.request({"packcache_guidance": 3}, [BEGIN, 70])


def test_a_negative_prompt_states_the_size_of_the_frames_too() -> None:
    server = ServerConfig.parse("packcache", "emu3", family=EMU3)
    said = {"packcache_grid": [4, 5], "packcache_negative_prompt_ids": [BEGIN, *head((5, 4))]}
    with pytest.raises(
        ValueError, match=r"^the negative prompt states a picture of 5 x 4, and frames have 4 x 5: give"
    ):
        server.request(said, [BEGIN, *head((4, 5))])


def test_axes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"layout: axis_scale is for positions of three axes, and those of Emu3 have"):
        ServerConfig.parse("packcache", {"layout": {"grid": [2, 3], "axis_scale": [4, 8, 8]}}, family=EMU3)


@pytest.mark.parametrize("architecture", ["Emu3ForCausalLM", "Emu3MoE"])
def test_it_is_found_by_the_published_names(architecture: str) -> None:
    assert families.of([architecture]) == EMU3


def test_the_published_configuration_is_read_without_remote_code(tmp_path: Path) -> None:
    from transformers import AutoConfig
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    folder = make_random_emu3(tmp_path, layers=1)
    said = json.loads((folder / "config.json").read_text())
    for trusted in (False, True):
        read = AutoConfig.from_pretrained(folder, trust_remote_code=trusted)
        assert type(read).__module__ == "vllm_packcache.models.emu3_config"
        assert {name: read.to_dict()[name] for name in said if name.endswith("_id")} == {
            name: own for name, own in said.items() if name.endswith("_id")
        }
        assert read.rope_parameters == {"rope_theta": 1e6, "rope_type": "default"}
    # What is left out is what the published class has.
    (folder / "config.json").write_text('{"model_type": "Emu3"}')
    read = AutoConfig.from_pretrained(folder)
    assert (read.vocab_size, read.hidden_size, read.num_hidden_layers, read.head_dim) == (184_622, 4096, 32, 128)
    assert (read.num_key_value_heads, read.intermediate_size, read.max_position_embeddings) == (8, 14_336, 9216)
    assert (read.rope_parameters["rope_theta"], read.rms_norm_eps) == (1e6, 1e-5)


def test_norms_of_heads_tell_the_two_apart(tmp_path: Path) -> None:
    from vllm_packcache.models.emu3 import Emu3ForCausalLM, has_head_norms

    plain, normed = make_random_emu3(tmp_path / "3"), make_random_emu3(tmp_path / "3.5", head_norms=True)
    (tmp_path / "none").mkdir()
    found = [has_head_norms(SimpleNamespace(model=str(path), revision=None)) for path in (plain, normed)]  # type: ignore[arg-type]
    assert found == [False, True]
    assert not has_head_norms(SimpleNamespace(model=str(tmp_path / "none"), revision=None))  # type: ignore[arg-type]
    # Without them it is another model.
    oracle = Emu3Reference.load(normed)
    bare = Emu3Reference(oracle.config, {name: own for name, own in oracle._weights.items() if "q_norm" not in name})
    assert not torch.allclose(oracle.logits([1, 2, 3]), bare.logits([1, 2, 3]))
    experts = SimpleNamespace(model="some/model", hf_config=SimpleNamespace(action_experts=True))
    with pytest.raises(
        ValueError, match=r"^some/model has action_experts, which vllm-packcache does not know: serve a"
    ):
        Emu3ForCausalLM(vllm_config=SimpleNamespace(model_config=experts))  # type: ignore[arg-type]


def test_the_oracle_reads_no_other_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"supports model_type = 'Emu3' only, not 'llama'"):
        Emu3Reference.load(tmp_path)


def test_what_may_be_sampled_follows_from_the_length_of_a_prompt() -> None:
    """Who restricts logits is not told the ids from which it follows what guidance leads away from."""
    server = ServerConfig.parse("packcache", "emu3", family=EMU3)
    prompt = [BEGIN, 7, 8, *head((2, 3))]
    said = {"packcache_grid": [2, 3], "packcache_frames": 1}
    made = server.request(said, prompt)
    assert made is not None
    assert len(made.streams) == 2
    assert server.grammar(said, len(prompt)) == made.grammar
