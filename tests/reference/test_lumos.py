"""The oracle of Lumos-1: its layers and its loop against transformers' Chameleon without a cache (`chameleon.py`)."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.strategies import quick
from vllm_packcache.core.layout import CONDITION, FrameLayout, VideoLayout
from vllm_packcache.core.plan import Plan
from vllm_packcache.core.policies import AttentionSink, Full, PackCache, Policy, SlidingWindow
from vllm_packcache.core.positions import Positions
from vllm_packcache.families import lumos
from vllm_packcache.families.lumos import ARCHITECTURES, LumosConfig, MaskedOptions, StepNoise
from vllm_packcache.reference import (
    LumosReference,
    MaskedVideo,
    frame_visibility,
    generate_masked,
    make_random_lumos,
    positions,
)
from vllm_packcache.reference.masked_video import unmask

from .chameleon import ONE_AXIS, BruteForce, Chameleon, Segment, Variant, causal, published_schedule

GRID = (3, 4)
BLOCK_SIZE = 8
PACKED = PackCache(window=2, history_frames=1.0, selection="spatial")

SHAPES = {
    "as it comes": {},
    "swin_norm": {"swin_norm": True},
    "tied": {"tied": True},
    "one rank, three layers": {"model_parallel_size": 1, "layers": 3},
    "a norm for every head": {"heads": 2, "kv_heads": 2, "model_parallel_size": 2, "head_dim": 64},
    "one key-value head": {"kv_heads": 1, "model_parallel_size": 1, "rope_theta": 500_000.0},
}


def codes(number: int, grid: tuple[int, int] = GRID, seed: int = 0) -> list[int]:
    """Ids of some given frames."""
    drawn = np.random.default_rng(seed).integers(0, 64, (number, *grid))
    return [token for frame in drawn for token in lumos.frame_of_codes(frame).tolist()]


TEXT = lumos.text_prompt(list(range(100, 118)), 2, 12)
PROMPTS = {
    "text to video": (TEXT, 0),
    "image to video": (TEXT + codes(1), 1),
    "continuation": (TEXT + codes(3), 1),
    "continuation of text to video": (TEXT + codes(2), 0),
}
prompts = pytest.mark.parametrize(("prompt", "images"), PROMPTS.values(), ids=PROMPTS.keys())


def plan(prompt: list[int], policy: Policy, *, images: int = 0, rebase: bool = True) -> Plan:
    layout = lumos.video_layout(prompt, GRID, images)
    return Plan(layout, policy, Positions(layout, policy.history_window if rebase else None, (4, 8, 8)))


def options(**changed: object) -> MaskedOptions:
    return MaskedOptions(**{"steps": 4, "guidance": 3.0, "seed": 1} | changed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_random_lumos(tmp_path_factory.mktemp("lumos"))


@pytest.fixture(scope="module")
def model(folder):
    return LumosReference.load(folder)


@pytest.fixture(scope="module")
def chameleon(folder):
    return Chameleon(folder)


@pytest.fixture
def make(model):
    """``make(**options)`` -> ids of the frames made."""

    def frames(prompt=TEXT, policy=PACKED, *, count=6, images=0, rebase=True, block_size=BLOCK_SIZE, **changed):
        video = plan(prompt, policy, images=images, rebase=rebase)
        return generate_masked(model, prompt, count, video, options(**changed), block_size).frames.tolist()

    return frames


def brute(chameleon, prompt=TEXT, policy=PACKED, *, count=6, images=0, rebase=True, variant=None, **changed):
    video = plan(prompt, policy, images=images, rebase=rebase)
    loop = BruteForce(chameleon, prompt, video, options(**changed), BLOCK_SIZE, variant or Variant())
    return loop.generate(count)


# The architecture


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_logits_are_those_of_transformers(tmp_path, shape):
    """A frame of more tokens than the reference attends for at once."""
    folder = make_random_lumos(tmp_path, seed=5, **shape)
    grid = (13, 40)
    ids = TEXT + codes(1, grid, seed=3)
    text, length = len(TEXT), len(ids)
    at = torch.from_numpy(Positions(lumos.video_layout(ids, grid), scale=(4, 8, 8)).of(np.arange(length), 0))
    seen = causal(0, length, length) | (torch.arange(length) >= text)[:, None]
    model = LumosReference.load(folder)

    expected = Chameleon(folder).logits(ids, [Segment(0, length, at, seen)])
    with torch.inference_mode():
        logits = model.visual_logits(model.run(torch.tensor(ids), 0, model.new_cache(length), at, seen))

    assert logits.shape == (length, 64)
    # Rounding is in proportion to how large logits are: of tied weights they are 13 times as large.
    torch.testing.assert_close(logits, expected, atol=5e-5 * float(expected.std()), rtol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_both_architecture_names_are_read(folder, architecture):
    config = json.loads((folder / "config.json").read_text())

    read = LumosConfig.from_json(config | {"architectures": [architecture]})

    assert read == LumosConfig(
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=32,
        rope_theta=10_000.0,
        norm_eps=1e-5,
        tied=False,
        swin_norm=False,
        visual_codes=64,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["ChameleonForConditionalGeneration"]}, "supports architectures Chameleon"),
        ({"model_type": "llama"}, "supports model_type = 'chameleon' only, not 'llama'"),
        ({"mm_rope": False}, "supports mm_rope = True only, not False"),
        ({"attention_bias": True}, "supports attention_bias = False only, not True"),
        ({"mlp_bias": True}, "supports mlp_bias = False only, not True"),
        ({"hidden_act": "gelu"}, "supports hidden_act = 'silu' only, not 'gelu'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "supports rope_type = 'default' only, not 'linear'"),
        ({"hidden_size": 192}, "head_dim is 48: it must be a multiple of 32"),
        ({"vocab_size": 65_536}, "vocab_size is 65536: ids from 65536 on are the visual ones"),
    ],
)
def test_a_checkpoint_that_is_no_lumos_is_refused(folder, tmp_path, change, message):
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))

    with pytest.raises(ValueError, match=message):
        LumosReference.load(tmp_path)


def test_a_checkpoint_in_parts_with_an_image_tokenizer_reads_the_same(folder, model, tmp_path):
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file({name: weights[name] for name in names[::2]}, tmp_path / "model-00001-of-00002.safetensors")
    rest = {name: weights[name] for name in names[1::2]} | {"model.vqmodel.encoder.conv_in.weight": torch.ones(3)}
    save_file(rest, tmp_path / "model-00002-of-00002.safetensors")
    read = LumosReference.load(tmp_path)

    videos = [generate_masked(m, TEXT, 1, plan(TEXT, Full()), options(), BLOCK_SIZE) for m in (model, read)]

    assert videos[0].token_ids == videos[1].token_ids
    assert not [name for name in read._weights if "vqmodel" in name]


def test_a_folder_without_weights_is_refused(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())

    with pytest.raises(FileNotFoundError, match="has no"):
        LumosReference.load(tmp_path)


# The loop


@prompts
@pytest.mark.parametrize(
    ("policy", "rebase"),
    [
        (Full(), False),
        (PACKED, True),
        (PACKED, False),
        (PackCache(window=3, history_frames=0.9, gamma_text=0.5, gamma_condition=0.5, selection="spatial"), True),
    ],
    ids=["full", "packcache", "packcache absolute", "packcache quotas"],
)
def test_the_loop_is_that_of_computing_everything_anew_in_every_pass(make, chameleon, prompt, images, policy, rebase):
    made = make(prompt, policy, images=images, rebase=rebase)

    assert made == brute(chameleon, prompt, policy, images=images, rebase=rebase)
    assert len({tuple(frame) for frame in made}) == 6


@pytest.mark.parametrize(
    "changed",
    [
        {"guidance": 1},
        {"guidance": 15.0},
        {"steps": 1},
        {"steps": 9, "count": 3},
        {"temperature": 4.0},
        {"reset_temperature": True},
        {"share_history": False},
        {"remask": 0.4},
        {"remask": 0},
        {"policy": SlidingWindow(window=1)},
        {"policy": AttentionSink(sink_tokens=8, recent_tokens=24), "rebase": False},
    ],
    ids=str,
)
def test_every_option_does_in_the_loop_what_it_says(make, chameleon, changed):
    made = make(**changed)

    assert made == brute(chameleon, **changed)
    assert made != make(count=len(made))


LESS = {"steps": 8, "count": 3}


@pytest.mark.parametrize(
    "changed",
    [
        {"reuse": 0.25},
        {"reuse": 1.0},
        {"guidance_interval": 3},
        {"guidance_interval": 1000},
        {"guidance_from": 0.4},
        {"guidance_until": 0.5},
        {"reuse": 0.2, "guidance_interval": 2, "guidance_from": 0.25, "guidance_until": 0.9},
        {"reuse": 0.3, "guidance": 1},
    ],
    ids=str,
)
def test_less_is_computed_as_stated(make, chameleon, changed):
    """Logits that are used again are those of a pass that computed everything anew."""
    made = make(**LESS, **changed)

    assert made == brute(chameleon, **LESS, **changed)
    assert made != make(**LESS, guidance=changed.get("guidance", 3.0))


def test_in_a_single_layer_nothing_settles_late(tmp_path):
    """Its keys and values are of a token's id alone: there leaving out what is settled changes nothing."""
    model = LumosReference.load(make_random_lumos(tmp_path, layers=1))
    changes: list[dict] = [{}, {"refresh": 3}, {"refresh": 1000}]
    videos = [
        generate_masked(model, TEXT, 3, plan(TEXT, PACKED), options(steps=8, **own), BLOCK_SIZE) for own in changes
    ]

    assert videos[0].token_ids == videos[1].token_ids == videos[2].token_ids


def test_settled_rows_show(make):
    assert make(**LESS, refresh=8) != make(**LESS)


@pytest.mark.parametrize("changed", [{}, {"reuse": 0.2, "guidance_interval": 2}], ids=str)
def test_what_is_computed_is_what_is_masked_or_was_when_it_was_computed_last(model, monkeypatch, changed):
    ran: list[tuple] = []
    run = LumosReference.run

    def watched(self, ids, start, cache, at, mask, some=None):
        rows = list(range(len(ids))) if some is None else some.tolist()
        ran.append((cache.data_ptr(), start, ids.tolist(), rows))
        return run(self, ids, start, cache, at, mask, some)

    monkeypatch.setattr(LumosReference, "run", watched)
    asked = options(steps=8, refresh=3, **changed)
    video = MaskedVideo(model, TEXT, 1, plan(TEXT, Full()), asked, BLOCK_SIZE)
    ran.clear()
    ids, _ = video.make(0)
    video.commit(0, ids)

    for stream in {cache for cache, *_ in ran}:
        *passes, commit = [(ids, rows) for cache, _, ids, rows in ran if cache == stream]
        assert len(commit[1]) == 19
        own = len([other for other in ran if other[0] == stream])
        assert len([rows for _, rows in passes if len(rows) == 19]) >= (own - 1) // 3
        assert len(passes[0][1]) == 19
        for (before, _), (ids, rows) in pairwise(passes):
            if len(rows) < 19:
                assert rows == [place for place, id in enumerate(before) if id == lumos.MASK]
                assert {place for place, id in enumerate(ids) if id == lumos.MASK} < set(rows)


@pytest.mark.parametrize("variant", [Variant(causal_commit=True), Variant(unconditional_text=True)], ids=str)
def test_a_loop_that_is_not_the_published_one_makes_another_video(make, chameleon, variant):
    made = make()

    assert made == brute(chameleon)
    assert made != brute(chameleon, variant=variant)


def test_one_axis_for_all_channels_makes_another_video(make, folder):
    assert make() != brute(Chameleon(folder, ONE_AXIS))


def test_a_conditioning_image_is_committed_as_it_is(make, chameleon):
    image = {"prompt": TEXT + codes(1), "images": 1}

    assert make(**image) == brute(chameleon, **image)
    assert make(**image) != brute(chameleon, **image, variant=Variant(masked_image=True))
    # With nothing but the image to see, the re-masking of frames plays no part.
    assert make(**image, count=1) == make(**image, count=1, remask=0)


@prompts
@pytest.mark.parametrize(
    "policy",
    [PackCache(history_frames=8, window=8, selection="spatial"), SlidingWindow(window=8)],
    ids=lambda policy: policy.name,
)
def test_a_budget_that_holds_everything_changes_nothing(make, prompt, images, policy):
    everything = make(prompt, Full(), images=images)

    assert make(prompt, policy, images=images) == everything
    assert make(prompt, policy, images=images, rebase=False, block_size=32) == everything


@pytest.mark.parametrize("seed", range(3))
def test_what_is_dropped_and_where_it_is_seen_shows(make, seed):
    """Otherwise no comparison of generated tokens could tell one policy, or one kind of positions, from another."""
    videos = [
        make(policy=policy, rebase=rebase, seed=seed, count=8)
        for policy, rebase in ((Full(), False), (PACKED, True), (PACKED, False), (SlidingWindow(window=1), True))
    ]

    for index, video in enumerate(videos):
        for other in videos[:index]:
            # Of 12 visual tokens a frame; the first frame sees the condition only.
            assert video[0] == other[0]
            assert (np.array(video) != np.array(other)).sum() > 20
    # Frames 0 to W = 2 are in the window from its start.
    assert videos[1][:3] == videos[2][:3]


def test_only_visual_tokens_are_made(make):
    for frame in make():
        ids = np.array(frame)
        codes_made = lumos.codes_of_frame(ids, GRID)
        assert codes_made.max() < 64


def test_a_guidance_of_one_is_the_conditional_stream_alone(model, make):
    video = MaskedVideo(model, TEXT, 1, plan(TEXT, Full()), options(guidance=1), BLOCK_SIZE)

    assert video._unconditional is None
    # Close by, the unconditional stream is computed and matters little.
    ids = make(guidance=1, count=1, temperature=0)
    assert ids == make(guidance=1 + 1e-9, count=1, temperature=0)
    assert ids != make(guidance=2, count=1, temperature=0)


# Requests


def test_a_seed_decides_and_other_requests_do_not(model, make):
    alone = [make(seed=seed) for seed in (0, 1)]
    assert alone[0] != alone[1]
    assert alone[0] == make(seed=0)

    other = plan(TEXT + codes(1), PACKED, images=1)
    videos = [
        MaskedVideo(model, TEXT, 6, plan(TEXT, PACKED), options(seed=0), BLOCK_SIZE),
        MaskedVideo(model, TEXT + codes(1), 6, other, options(seed=7, guidance=5.0), BLOCK_SIZE),
        MaskedVideo(model, TEXT, 6, plan(TEXT, PACKED), options(seed=1), BLOCK_SIZE),
    ]
    together: list[list] = [[], [], []]
    for frame in range(6):
        for video, made in zip(videos, together, strict=True):
            ids, _ = video.make(frame)
            video.commit(frame, ids)
            made.append(ids.tolist())
    assert [together[0], together[2]] == alone


def test_a_frame_that_is_made_again_is_the_same(model, make):
    made = make()
    video = MaskedVideo(model, TEXT, 6, plan(TEXT, PACKED), options(), BLOCK_SIZE)

    # As after a preemption: a new cache, frames that were already made are committed from their tokens.
    for frame in range(4):
        video.commit(frame, torch.tensor(made[frame]))
    assert video.make(4)[0].tolist() == made[4]
    video.commit(4, torch.tensor(made[4]))
    assert video.make(5)[0].tolist() == made[5]
    # The cache is cut back: what the passes of later frames and of this one have written is written over.
    assert video.make(3)[0].tolist() == made[3]
    video.commit(3, torch.tensor(made[3]))
    video.commit(4, torch.tensor(made[4]))
    assert video.make(5)[0].tolist() == made[5]


def test_continuing_a_video_is_not_replaying_it(make):
    """Given frames are committed as they are, and the first frame made is the one that has noise."""
    made = make(count=4)
    assert make(TEXT + made[0] + made[1], count=2) != made[2:]

    plain = make(count=4, remask=0, temperature=0)
    assert make(TEXT + plain[0] + plain[1], count=2, remask=0, temperature=0) == plain[2:]


def test_margins_say_how_near_a_step_came_to_another_token(model):
    video = generate_masked(model, TEXT, 3, plan(TEXT, PACKED), options(), BLOCK_SIZE)

    assert video.token_ids == video.frames.flatten().tolist()
    assert video.margins.shape == (3, 4, 2)
    assert (video.margins > 0).all()
    assert (video.margins[:, :-1, 1] < math.inf).all()
    assert (video.margins[:, -1, 1] == math.inf).all()


@pytest.mark.parametrize("count", [0, -1])
def test_no_frames_are_refused(model, count):
    with pytest.raises(ValueError, match="frames must be 1 or more"):
        generate_masked(model, TEXT, count, plan(TEXT, Full()), options())


def test_layouts_that_cannot_be_are_refused(model):
    def refused(layout: VideoLayout, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            MaskedVideo(model, TEXT, 1, Plan(layout, Full(), Positions(layout)), options())

    condition = len(TEXT)
    refused(VideoLayout(FrameLayout(19), condition), "grid is needed")
    refused(VideoLayout(FrameLayout.from_grid(GRID, 3, 1, 0), condition), "special tokens")
    refused(VideoLayout(lumos.frame_layout((1, 1)), condition), "two visual tokens")
    refused(VideoLayout(lumos.frame_layout(GRID), condition - 1), "before the first picture")


# Who sees what


@pytest.mark.parametrize("block_size", [4, 8, 32])
def test_a_frame_sees_all_of_itself_and_what_the_policy_kept(block_size):
    video = plan(TEXT, PACKED)
    layout = video.layout

    for frame in range(6):
        seen = frame_visibility(video, block_size, frame)
        start = layout.frame_start(frame)
        assert len(seen) == layout.frame_start(frame + 1)
        assert seen[start:].all()
        assert seen[: layout.condition_tokens].all()
        if frame <= 1:
            assert seen.all()
        else:
            # The budget is one frame, and the blocks at the edges of frames are whole.
            assert seen[layout.condition_tokens : start].sum() <= 19 + 4 * block_size
        if frame > 2 and block_size == 4:
            assert not seen[layout.frame_start(0) + 4 : layout.frame_start(frame - 2) - 4].any()


def test_both_streams_drop_the_same_frames(model):
    video = MaskedVideo(model, TEXT, 6, plan(TEXT, PACKED), options(), 4)
    streams = [stream._plan for stream in (video._conditional, video._unconditional)]
    assert [stream.layout.condition_tokens for stream in streams] == [len(TEXT), 3]

    for frame in range(6):
        alive = []
        for stream in streams:
            seen = frame_visibility(stream, 4, frame)
            starts = [stream.layout.frame_start(k) for k in range(frame + 1)]
            # Blocks at the edges of a frame may be the condition's, or the next frame's.
            alive.append([bool(seen[first + 3 : last - 3].any()) for first, last in pairwise(starts)])
        assert alive[0] == alive[1] == [frame - k <= 2 for k in range(frame)]


def test_specials_of_a_frame_move_with_all_axes_and_content_with_time():
    video = plan(TEXT, PACKED)
    start, length = video.layout.frame_start(5), 19
    moved = (positions(video, 4, start + length, 5) - positions(video, 4, start + length, CONDITION))[:, start:]

    # Frame 5 stands where frame 2 would.
    special = [0, 1, 2, length - 1]
    assert moved[:, special].T.tolist() == [[-3 * length] * 3] * 4
    content = [offset for offset in range(length) if offset not in special]
    assert moved[:, content].T.tolist() == [[-3 * 4, 0, 0]] * (length - 4)


# A step


def noise(uniform: list[float], gumbel: list[float] | None = None) -> StepNoise:
    gumbels = np.array(gumbel or [0.0] * len(uniform), dtype=np.float32)
    return StepNoise(np.array(uniform), gumbels)


def logits(*probabilities: list[float]) -> torch.Tensor:
    return torch.tensor(probabilities).log()


def test_a_step_in_numbers():
    thirds = logits([0.25, 0.25, 0.5], [0.1, 0.8, 0.1], [0.6, 0.3, 0.1], [0.2, 0.2, 0.6])
    unknown = torch.tensor([9003, 9003, 9003, 65536])

    done = unmask(thirds, unknown, noise([0.3, 0.89, 0.0, 0.5]), 0, 4, 0.0)
    # Drawn: 1 (0.25), 1 (0.8), 0 (0.6); floor(4 cos(pi/8)) = 3 would stay masked, but one must be revealed.
    assert done.ids.tolist() == [9003, 65537, 9003, 65536]
    assert done.drawing_margin == pytest.approx(0.0, abs=1e-9)
    assert done.masking_margin == pytest.approx(math.log(0.8 / 0.6), abs=1e-6)

    done = unmask(thirds, unknown, noise([0.3, 0.89, 0.2, 0.5]), 3, 4, 0.0)
    assert done.ids.tolist() == [65537, 65537, 65536, 65536]
    assert done.drawing_margin == pytest.approx(0.01, abs=1e-6)
    assert done.masking_margin == math.inf


def test_noise_of_the_confidence_counts_by_its_temperature():
    even = logits([0.5, 0.5], [0.6, 0.4], [0.7, 0.3], [0.8, 0.2])
    unknown = torch.tensor([9003] * 4)
    drawn = noise([0.1] * 4, [1.0, 0.0, 0.0, 0.0])

    assert unmask(even, unknown, drawn, 2, 4, 0.0).ids.tolist() == [9003, 65536, 65536, 65536]
    assert unmask(even, unknown, drawn, 2, 4, 2.0).ids.tolist() == [65536, 9003, 65536, 65536]


def test_ties_with_the_token_that_cuts_are_revealed():
    even = logits([0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [0.9, 0.1])
    unknown = torch.tensor([9003] * 4)

    assert unmask(even, unknown, noise([0.1] * 4), 0, 4, 0.0).ids.tolist() == [9003] * 3 + [65536]
    # Two were to stay masked, but all three are as confident as the one that cuts.
    assert unmask(even, unknown, noise([0.1] * 4), 1, 4, 0.0).ids.tolist() == [65536] * 4
    # None is unknown: nothing happens without noise, with noise the least confident one is masked, as published.
    known = torch.tensor([65536] * 4)
    assert unmask(even, known, noise([0.1] * 4), 2, 4, 0.0).ids.tolist() == [65536] * 4
    assert unmask(even, known, noise([0.1] * 4, [0, -1, 0, 0]), 2, 4, 1.0).ids.tolist() == [65536, 9003, 65536, 65536]


@quick
@given(data=st.data(), tokens=st.integers(2, 40), steps=st.integers(2, 12))
def test_a_step_reveals_as_many_as_scheduled_and_never_masks_a_known_token(data, tokens, steps):
    seed = data.draw(st.integers(0, 1000))
    step = data.draw(st.integers(0, steps - 1))
    known = data.draw(st.integers(0, tokens - 1))
    tau = data.draw(st.sampled_from([0.0, 0.3, 5.0]))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(tokens, 7, generator=generator) * 3
    current = torch.where(torch.randperm(tokens, generator=generator) < known, 65536 + 3, 9003)

    done = unmask(drawn, current, lumos.step_noise(seed, 0, step, tokens), step, steps, tau)

    assert (done.ids[current != 9003] == 65536 + 3).all()
    left = 0 if step == steps - 1 else lumos.still_masked(step, steps, tokens, tokens - known)
    assert int((done.ids == 9003).sum()) == left
    assert ((done.ids == 9003) | ((done.ids >= 65536) & (done.ids < 65536 + 7))).all()


@pytest.mark.parametrize("steps", [3, 18, 50])
def test_the_schedule_is_that_of_torch_in_float32(steps):
    for tokens in (*range(2, 60), 1_792, 4_032, 5_760):
        for step in range(steps - 1):
            scheduled = int((tokens * published_schedule(step, steps)).floor())
            assert lumos.still_masked(step, steps, tokens, tokens) == max(1, min(tokens - 1, scheduled))


def test_tokens_are_drawn_with_their_probabilities():
    shares = [0.5, 0.0, 0.3, 0.2]
    count = 20_000
    current = torch.full((count,), 9003)

    done = unmask(logits(shares).expand(count, -1), current, lumos.step_noise(5, 1, 2, count), 3, 4, 0.0)

    found = (done.ids - 65536).bincount(minlength=4) / count
    assert found.tolist() == pytest.approx(shares, abs=0.01)
    assert found[1] == 0


# Random checkpoints


def test_the_same_seed_writes_the_same_checkpoint_with_the_published_names(folder, tmp_path):
    again = make_random_lumos(tmp_path)

    for name in ("config.json", "model.safetensors"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()
    names = set(load_file(folder / "model.safetensors"))
    layer = {
        *(f"self_attn.{part}_proj.weight" for part in "qkvo"),
        *(f"self_attn.{part}_norm.{kind}" for part in "qk" for kind in ("weight", "bias")),
        *(f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
    }
    assert names == {f"model.layers.{number}.{name}" for number in (0, 1) for name in layer} | {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    }


def test_attention_scores_of_a_random_checkpoint_are_as_wide_as_stated(model, chameleon):
    """The deviation of scores that decides how many keys a query reads."""
    attention = chameleon.layers[0].self_attn
    with torch.inference_mode():
        hidden = chameleon.layers[0].input_layernorm(chameleon.embedding[65536:])
        queries = attention.q_norm(attention.q_proj(hidden).unflatten(-1, (4, 32)))
        keys = attention.k_norm(attention.k_proj(hidden).unflatten(-1, (2, 32))).repeat_interleave(2, dim=1)
        scores = torch.einsum("nhd,mhd->hnm", queries, keys) / 32**0.5

    assert scores.std().item() == pytest.approx(2.0, rel=0.25)
