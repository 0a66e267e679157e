"""Masked generation's pure parts: in numbers, against literal loops, and against another Philox."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import quick
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.core.layout import FrameLayout, VideoLayout
from vllm_packcache.core.positions import Positions, mm_rope_axes
from vllm_packcache.families import lumos
from vllm_packcache.families.lumos import MaskedOptions

grids = st.tuples(st.integers(1, 12), st.integers(1, 12))

PUBLISHED_SIZES = {(448, 256): 1_828, (672, 384): 4_084, (768, 480): 5_824}


# Sequences


@pytest.mark.parametrize(("size", "tokens"), PUBLISHED_SIZES.items(), ids=str)
def test_tokens_of_the_published_sizes(size, tokens):
    width, height = size
    grid = lumos.grid_of(width, height)

    assert grid == (height // 8, width // 8)
    assert lumos.frame_layout(grid).tokens_per_frame == tokens
    ids = lumos.masked_frame(grid).tolist()
    assert ids[:3] == [8197, 8804 + height // 32, 8804 + width // 32]
    assert ids[-1] == 8196
    assert ids[3:-1] == ([9003] * (width // 8) + [8803]) * (height // 8)


def test_a_layout_is_recognised_by_its_special_tokens_and_its_axes():
    frame = lumos.frame_layout((3, 4))
    assert lumos.describes(frame, (4, 8, 8))
    assert lumos.describes(frame, [4, 8, 8])
    assert not lumos.describes(frame, None)
    assert not lumos.describes(frame, (4, 8, 4))
    assert not lumos.describes(FrameLayout.from_grid((3, 4), 3, 1, 0), (4, 8, 8))
    assert not lumos.describes(FrameLayout(frame.tokens_per_frame), (4, 8, 8))
    assert len(lumos.text_prompt([], 0, 0)) == lumos.LEAST_TEXT_TOKENS


@pytest.mark.parametrize("size", [(440, 256), (448, 250), (0, 256), (448, 0)])
def test_a_size_that_a_frame_cannot_state_is_refused(size):
    with pytest.raises(ValueError, match="multiples of 32 pixels"):
        lumos.grid_of(*size)


@pytest.mark.parametrize(("seconds", "rate", "latent"), [(2, 12, 7), (4, 12, 13), (1, 1, 1), (1, 2, 2), (1, 5, 2)])
def test_latent_frames(seconds, rate, latent):
    assert lumos.latent_frames(seconds, rate) == latent


def test_thirteen_frames_at_384p_are_53_092_tokens():
    assert lumos.latent_frames(4, 12) * PUBLISHED_SIZES[672, 384] == 53_092


def test_a_prompt_states_duration_and_rate_after_its_text():
    assert lumos.text_prompt([7, 8], 2, 12) == [0, 7, 8, 8710, 9004, 8806, 8816]
    assert lumos.question("a cat", 672, 384, 2, 12) == (
        "Generate a video with a resolution of 672x384, consisting of 24 frames at 12 frames per second, according to "
        "the following prompt:\n a cat"
    )


@quick
@given(grid=grids, data=st.data())
def test_a_frame_is_its_codes(grid, data):
    codes = np.array(data.draw(st.lists(st.integers(0, 63_999), min_size=math.prod(grid), max_size=math.prod(grid))))
    ids = lumos.frame_of_codes(codes.reshape(grid))

    rows, columns = grid
    expected = [8197, 8804 + rows // 4, 8804 + columns // 4]
    for row in range(rows):
        expected += [65_536 + int(code) for code in codes.reshape(grid)[row]] + [8803]
    assert ids.tolist() == [*expected, 8196]
    assert (ids[lumos.visual_offsets(grid)] == 65_536 + codes).all()
    assert (lumos.codes_of_frame(ids, grid) == codes.reshape(grid)).all()


def test_what_is_no_finished_frame_has_no_codes():
    whole = lumos.frame_of_codes([[1, 2], [3, 4]])

    for wrong in (whole[:-1], lumos.masked_frame((2, 2)), np.where(whole == 8803, 8804, whole)):
        with pytest.raises(ValueError, match="frame"):
            lumos.codes_of_frame(wrong, (2, 2))


def test_layouts_of_both_streams():
    text = lumos.text_prompt([5] * 20, 2, 12)
    pictures = lumos.frame_of_codes(np.zeros((3, 2, 4), dtype=int)[0]).tolist() * 3
    frame = lumos.frame_layout((2, 4))

    layout = lumos.video_layout(text, (2, 4))
    assert layout == VideoLayout(frame, 25, 0)
    assert lumos.unconditional_layout(layout) == VideoLayout(frame, 3, 0)
    assert lumos.given_frames(text, layout) == 0
    assert lumos.given_frames(text + pictures, layout) == 3

    layout = lumos.video_layout(text + pictures, (2, 4), condition_frames=1)
    assert layout == VideoLayout(frame, 25 + 14, 14)
    assert lumos.unconditional_layout(layout) == VideoLayout(frame, 3 + 14, 14)
    assert lumos.given_frames(text + pictures, layout) == 2


def test_prompts_that_fit_no_layout_are_refused():
    text = lumos.text_prompt([5], 2, 12)
    layout = lumos.video_layout(text, (2, 2))

    with pytest.raises(ValueError, match="no video begin"):
        lumos.video_layout([1, 2, 3], (2, 2))
    with pytest.raises(ValueError, match="1 conditioning images of 10 tokens need 16"):
        lumos.video_layout(text, (2, 2), condition_frames=1)
    with pytest.raises(ValueError, match="whole frames of 10"):
        lumos.given_frames([*text, 1, 2], layout)
    with pytest.raises(ValueError, match="whole frames of 10"):
        lumos.given_frames(text[:-1], layout)
    for shifted in ([0, *text], text[1:], [0] * 6):
        with pytest.raises(ValueError, match="before the first picture"):
            lumos.given_frames(shifted, layout)


# Positions


@quick
@given(grid=grids, text=st.integers(0, 9), images=st.integers(0, 2))
def test_mm_rope_positions_are_those_of_walking_the_sequence(grid, text, images):
    """As the model's code walks it: from token to token, a size read wherever a frame begins."""
    rows, columns = grid
    prompt = lumos.text_prompt([5] * text, 2, 12)
    sequence = prompt + lumos.masked_frame(grid).tolist() * (images + 3)
    layout = lumos.video_layout(sequence, grid, images)
    expected = []
    picture, first_content = -1, None
    while len(expected) < len(sequence):
        index = len(expected)
        expected.append((index,) * 3)
        if sequence[index] != lumos.FRAME_BEGIN:
            continue
        picture += 1
        expected += [(index + 1,) * 3, (index + 2,) * 3]
        first_content = index + 3 if first_content is None else first_content
        for row in range(rows):
            for column in range(columns + 1):
                expected.append((first_content + 4 * picture, first_content + 8 * row, first_content + 8 * column))

    at = Positions(layout, scale=lumos.MM_ROPE_SCALE).of(np.arange(len(sequence)), 0)

    assert [tuple(place) for place in at.T.tolist()] == expected


@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_mm_rope_turns_each_channel_with_its_axis(head_dim):
    """The published lists name channels; both channels of a pair are in the same one."""
    listed = {0: {0, 1, 2, 3}, 1: {4, 5, 8, 9, 12, 13}, 2: {6, 7, 10, 11, 14, 15}}
    axes = mm_rope_axes(head_dim // 2)

    for channel in range(head_dim):
        assert channel % 16 in listed[axes[channel % (head_dim // 2)]]


@pytest.mark.parametrize(
    ("preset", "size"), [("lumos1_256p", (448, 256)), ("lumos1_384p", (672, 384)), ("lumos1_480p", (768, 480))]
)
def test_presets_are_the_layouts_of_the_published_sizes(preset, size):
    layout = ServerConfig.parse("packcache", preset).layout

    assert layout.frame_layout() == lumos.frame_layout(lumos.grid_of(*size))
    assert layout.axis_scale == lumos.MM_ROPE_SCALE
    assert layout.condition_image_tokens == PUBLISHED_SIZES[size]


# Steps


def test_the_schedule_in_numbers():
    assert [lumos.still_masked(step, 8, 100, 100) for step in range(8)] == [98, 92, 83, 70, 55, 38, 19, 1]
    # 50 steps of a frame at 384p.
    schedule = [lumos.still_masked(step, 50, 4032, 4032) for step in range(50)]
    assert schedule[:4] == [4030, 4024, 4014, 4000]
    assert schedule[-4:] == [379, 253, 126, 1]
    # Where the cosine is 1/2, float32 falls short of it.
    assert lumos.still_masked(2, 4, 10, 10) == math.floor(10 * math.cos(math.pi * 3 / 8))
    assert lumos.still_masked(11, 18, 4032, 4032) == 2015


@quick
@given(steps=st.integers(1, 60), tokens=st.integers(2, 5000), data=st.data())
def test_every_step_reveals_one_token_at_least_and_leaves_one(steps, tokens, data):
    step = data.draw(st.integers(0, steps - 1))
    unknown = data.draw(st.integers(1, tokens))
    left = lumos.still_masked(step, steps, tokens, unknown)

    assert 1 <= left <= max(1, unknown - 1)
    exact = tokens * math.cos(math.pi / 2 * (step + 1) / steps)
    if unknown == tokens and 1 < exact < tokens - 1:
        # In float32 a number that is all but whole is on either side of it.
        assert left in {math.floor(exact - 1e-3), math.floor(exact + 1e-3)}


def test_temperature_decays_to_nothing_over_the_first_frame_and_is_not_reset():
    options = MaskedOptions(steps=4, temperature=2.0)
    first = [2 * 3 / 4, 2 * 3 / 4 * 2 / 4, 2 * 3 / 4 * 2 / 4 * 1 / 4, 0.0]

    assert [lumos.temperature(options, 0, step) for step in range(4)] == first
    for frame in (1, 2, 7):
        assert [lumos.temperature(options, frame, step) for step in range(4)] == [0.0] * 4
    again = MaskedOptions(steps=4, temperature=2.0, reset_temperature=True)
    for frame in (0, 1, 7):
        assert [lumos.temperature(again, frame, step) for step in range(4)] == first


# Noise


def philox(key: tuple[int, int], counter: tuple[int, int, int, int]) -> list[int]:
    """Philox4x64-10 as its paper writes it, with Python's integers."""
    low, high = key
    x0, x1, x2, x3 = counter
    for _ in range(10):
        product0, product2 = 0xD2E7470EE14C6C93 * x0, 0xCA5A826395121157 * x2
        x0, x1, x2, x3 = (
            (product2 >> 64) ^ x1 ^ low,
            product2 % 2**64,
            (product0 >> 64) ^ x3 ^ high,
            product0 % 2**64,
        )
        low, high = (low + 0x9E3779B97F4A7C15) % 2**64, (high + 0xBB67AE8584CAA73B) % 2**64
    return [x0, x1, x2, x3]


@quick
@given(seed=st.integers(0, 2**64 - 1), frame=st.integers(0, 500), step=st.integers(0, 60), tokens=st.integers(1, 9))
def test_noise_is_philox_at_the_stated_counters(seed, frame, step, tokens):
    numbers = [number for i in range(1, 6) for number in philox((seed, 0), (i, 0, step, frame))]
    noise = lumos.step_noise(seed, frame, step, tokens)

    assert noise.uniform.tolist() == [(number >> 11) / 2**53 for number in numbers[:tokens]]
    coarse = [max((number >> 40) / 2**24, 1e-20) for number in numbers[tokens : 2 * tokens]]
    expected = [-math.log(max(-math.log(u), 1e-20)) for u in coarse]
    np.testing.assert_allclose(noise.gumbel, expected, rtol=1e-6, atol=1e-6)
    assert (noise.uniform.dtype, noise.gumbel.dtype) == (np.float64, np.float32)


def test_noise_of_other_seeds_frames_and_steps_is_other_noise():
    drawn = [lumos.step_noise(*place, 50) for place in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]]

    for index, noise in enumerate(drawn):
        for other in drawn[:index]:
            assert not set(noise.uniform.tolist()) & set(other.uniform.tolist())
    again = lumos.step_noise(0, 1, 0, 50)
    assert (again.uniform == drawn[2].uniform).all()
    assert (again.gumbel == drawn[2].gumbel).all()


def test_noise_is_distributed_as_stated():
    noise = lumos.step_noise(3, 2, 1, 20_000)

    assert noise.uniform.mean() == pytest.approx(0.5, abs=0.01)
    # The mean and the deviation of a Gumbel distribution.
    assert noise.gumbel.mean() == pytest.approx(0.5772, abs=0.03)
    assert noise.gumbel.std() == pytest.approx(math.pi / math.sqrt(6), abs=0.03)


# Commit


def test_the_pattern_of_384p_and_480p_keeps_2_5_8():
    for content in (48 * 85, 60 * 97):
        kept = set(range(content)) - set(lumos.remasked(content, 0.7).tolist())
        assert kept == {index for index in range(content) if index % 10 in {2, 5, 8}}


def test_the_pattern_of_256p_is_no_round_period():
    masked_tokens = lumos.remasked(32 * 57, 0.7)

    assert len(masked_tokens) == 1_277
    kept = sorted(set(range(1_824)) - set(masked_tokens.tolist()))
    assert kept[:6] == [2, 5, 8, 12, 15, 18]
    assert {index % 10 for index in kept} > {2, 5, 8}


@quick
@given(content=st.integers(2, 6000), share=st.floats(0.001, 1))
def test_the_pattern_masks_the_stated_share_and_is_spread_evenly(content, share):
    found = lumos.remasked(content, share)
    count = max(1, round(share * content))

    assert len(set(found.tolist())) == len(found) == count
    assert 0 <= found.min() <= found.max() < content
    for i, index in enumerate(found.tolist()):
        # float32 puts the product off by a part in 2^23.
        assert abs(index - Fraction(i * content, count)) <= Fraction(1, 2) + Fraction(content, 2**22)


def test_newlines_are_masked_like_visual_tokens_and_special_tokens_never():
    ids = lumos.frame_of_codes(np.arange(20).reshape(4, 5))
    content = lumos.remasked(24, 0.7).tolist()

    found = lumos.committed(ids, 0.7)

    assert [i - 3 for i in range(28) if found[i] == 9003] == content
    kept = [i for i in range(28) if i - 3 not in content]
    assert (found[kept] == ids[kept]).all()
    assert {(i + 1) % 6 == 0 for i in content} == {True, False}
    assert (ids == lumos.frame_of_codes(np.arange(20).reshape(4, 5))).all()
    assert (lumos.committed(ids, 0) == ids).all()


# Options


def test_the_defaults_are_the_published_ones():
    assert MaskedOptions() == MaskedOptions(
        seed=0, steps=50, guidance=15.0, temperature=1.0, remask=0.7, reset_temperature=False, share_history=True,
        refresh=1, reuse=0.0, guidance_interval=1, guidance_from=0.0, guidance_until=1.0,
    )  # fmt: skip
    assert MaskedOptions().guided
    assert not MaskedOptions(guidance=1).guided


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("seed", -1),
        ("seed", 2**64),
        ("steps", 0),
        ("guidance", math.inf),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("remask", 1.1),
        ("remask", math.nan),
    ],
)
def test_an_impossible_option_is_named(option, value):
    with pytest.raises(ValueError, match=f"^{option} must"):
        MaskedOptions(**{option: value})


@pytest.mark.parametrize(
    ("ids", "sentence"),
    [
        ([0, 7, 8710, 9004, 8806, 8816], None),
        ([0, 8710, 9004, 8804, 9002], None),
        ([0, 7, 9003, 8710, 9004, 8806, 8816], "holds 9003"),
        ([0, 7, 8710, 7, 8710, 9004, 8806, 8816], "holds 8710"),
        ([0, 8197, 8710, 9004, 8806, 8816], "holds 8197"),
        ([0, 7, 0, 8710, 9004, 8806, 8816], "holds 0"),
        ([0, 65_536, 8710, 9004, 8806, 8816], "holds 65536"),
        ([0, -1, 8710, 9004, 8806, 8816], "holds -1"),
        ([0, 7, 9004, 8806, 8816], "a separator"),
        ([7, 8710, 9004, 8806, 8816], "the begin of the sequence"),
        ([8710, 9004, 8806, 8816], "the begin of the sequence"),
        ([0, 7, 8710, 9004, 9003, 8816], "not 9003"),
        ([0, 7, 8710, 9004, 8806, 5], "not 5"),
        ([0, 7, 8710], "has no video begin"),
    ],
)
def test_structure_stands_where_the_grammar_has_it(ids, sentence):
    if sentence is None:
        lumos.check_text(ids)
        return
    with pytest.raises(ValueError, match=sentence):
        lumos.check_text(ids)
