"""The oracle itself: against transformers without a policy, against its own two paths with one."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2VLTextConfig, Qwen3VLTextConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

from vllm_packcache.core.layout import FrameLayout, VideoLayout
from vllm_packcache.core.plan import Plan
from vllm_packcache.core.policies import AttentionSink, Full, PackCache, Policy, SlidingWindow
from vllm_packcache.core.positions import Positions
from vllm_packcache.reference import LlamaReference, make_random_llama, positions

VOCAB = 256
BLOCK_SIZE = 32


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def plan(policy: Policy, *, tokens_per_frame: int = 100, condition: int = 70, rebase: bool = False) -> Plan:
    layout = VideoLayout(FrameLayout(tokens_per_frame), condition)
    return Plan(layout, policy, Positions(layout, policy.history_window if rebase else None))


def picture_plan(policy: Policy, *, rebase: bool) -> Plan:
    """Frames of 26 tokens with rows and columns; text of 18 tokens and an image of two frames."""
    layout = VideoLayout(FrameLayout.from_grid((4, 5), 1, 1, 1), 70, 52)
    return Plan(layout, policy, Positions(layout, policy.history_window if rebase else None, (4, 8, 8)))


AXES = {
    "contiguous": {"mrope_section": [4, 6, 6]},
    "interleaved": {"mrope_section": [6, 5, 5], "mrope_interleaved": True},
}


SHAPES = {
    "grouped heads": {"heads": 8, "kv_heads": 2, "head_dim": 16, "hidden": 128},
    "one key-value head": {"heads": 4, "kv_heads": 1, "head_dim": 16, "hidden": 64},
    "heads wider than hidden / heads": {"heads": 4, "kv_heads": 2, "head_dim": 32, "hidden": 64},
    "other theta": {"rope_theta": 500_000.0},
    "tied": {"tied": True},
    "three layers": {"layers": 3},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_random_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def reference(folder):
    return LlamaReference.load(folder)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_without_a_plan_logits_are_those_of_transformers(tmp_path, shape):
    make_random_llama(tmp_path, seed=3, **shape)
    model = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = prompt(200)

    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0]

    torch.testing.assert_close(LlamaReference.load(tmp_path).logits(tokens), expected, atol=1e-4, rtol=0)


def test_a_checkpoint_written_by_transformers_reads_the_same(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=12,
        rope_parameters={"rope_type": "default", "rope_theta": 20_000.0},
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    tokens = prompt(150)

    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0]

    torch.testing.assert_close(LlamaReference.load(tmp_path).logits(tokens), expected, atol=1e-4, rtol=0)


def test_a_config_of_earlier_transformers_reads_the_same(folder, reference, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["rope_scaling"] = None
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")

    assert LlamaReference.load(tmp_path).config == reference.config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen3"}, "supports model_type = 'llama' only, not 'qwen3'"),
        ({"attention_bias": True}, "supports attention_bias = False only, not True"),
        ({"mlp_bias": True}, "supports mlp_bias = False only, not True"),
        ({"hidden_act": "gelu"}, "supports hidden_act = 'silu' only, not 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "supports rope_type = 'default' only, not 'yarn'"),
    ],
)
def test_a_checkpoint_that_is_no_plain_llama_is_refused(folder, tmp_path, change, message):
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))

    with pytest.raises(ValueError, match=message):
        LlamaReference.load(tmp_path)


def test_without_a_plan_generation_is_that_of_transformers(folder, reference):
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = prompt(70)

    with torch.inference_mode():
        expected = model.generate(torch.tensor([tokens]), max_new_tokens=200, do_sample=False)[0, 70:]

    generated = reference.generate(tokens, 200)
    assert generated.token_ids == expected.tolist()
    assert generated.logits.shape == (200, VOCAB)


@pytest.mark.parametrize(
    ("policy", "rebase"),
    [
        (PackCache(window=4, selection="spatial"), False),
        (PackCache(window=1, selection="spatial"), True),
        (PackCache(history_frames=0.5, window=2, gamma_text=0.5, selection="spatial"), True),
        (SlidingWindow(window=1), False),
        (SlidingWindow(window=1), True),
        (AttentionSink(sink_tokens=32, recent_tokens=64), False),
    ],
    ids=[
        "packcache absolute",
        "packcache",
        "packcache quotas",
        "sliding_window",
        "sliding_window rebased",
        "attention_sink",
    ],
)
@pytest.mark.parametrize("tokens_per_frame", [100, 20], ids=["frames of 100", "frames shorter than a block"])
def test_token_by_token_and_all_at_once_agree(reference, policy, rebase, tokens_per_frame):
    video = plan(policy, tokens_per_frame=tokens_per_frame, rebase=rebase)
    # The prompt holds the condition and a part of the video.
    given = prompt(90)

    generated = reference.generate(given, 500, video, BLOCK_SIZE)
    teacher_forced = reference.logits(given + generated.token_ids[:-1], video, BLOCK_SIZE)[89:]

    assert teacher_forced.argmax(-1).tolist() == generated.token_ids
    torch.testing.assert_close(generated.logits, teacher_forced, atol=1e-4, rtol=0)


def test_a_policy_with_room_for_everything_changes_nothing(reference):
    tokens = prompt(500)
    everything = reference.logits(tokens)

    for policy in (Full(), PackCache(history_frames=8, window=8, selection="spatial"), SlidingWindow(window=8)):
        for rebase in (False, True):
            logits = reference.logits(tokens, plan(policy, rebase=rebase), BLOCK_SIZE)
            assert torch.equal(logits.argmax(-1), everything.argmax(-1))
            torch.testing.assert_close(logits, everything, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "policy", [PackCache(window=3, selection="spatial"), SlidingWindow(window=3)], ids=lambda policy: policy.name
)
def test_rebasing_changes_nothing_before_the_window_slides_and_something_after(reference, policy):
    tokens = prompt(70 + 6 * 64)
    rebased, absolute = (
        reference.logits(tokens, plan(policy, tokens_per_frame=64, rebase=rebase), BLOCK_SIZE)
        for rebase in (True, False)
    )

    # Fill and pack: the condition and the frames 0 to W.
    slides_at = 70 + 4 * 64
    assert torch.equal(rebased[:slides_at], absolute[:slides_at])
    differences = (rebased - absolute).abs().amax(-1)
    assert differences[slides_at:].min() > 1e-3


def test_without_a_condition_only_distances_count_and_rebasing_keeps_them(reference):
    tokens = prompt(12 * 40)
    rebased, absolute = (
        reference.logits(
            tokens,
            plan(PackCache(window=2, selection="spatial"), tokens_per_frame=40, condition=0, rebase=rebase),
            BLOCK_SIZE,
        )
        for rebase in (True, False)
    )

    torch.testing.assert_close(rebased, absolute, atol=1e-3, rtol=0)


@pytest.mark.parametrize("rope", AXES.values(), ids=AXES.keys())
def test_three_equal_axes_are_one(tmp_path, reference, rope):
    model = LlamaReference.load(make_random_llama(tmp_path, rope=rope))
    tokens = prompt(500)

    for video in (None, plan(PackCache(window=2, selection="spatial"), rebase=True), plan(SlidingWindow(window=1))):
        assert torch.equal(model.logits(tokens, video, BLOCK_SIZE), reference.logits(tokens, video, BLOCK_SIZE))


@pytest.mark.parametrize(
    ("name", "embedding", "config"),
    [
        ("contiguous", Qwen2VLRotaryEmbedding, Qwen2VLTextConfig),
        ("interleaved", Qwen3VLTextRotaryEmbedding, Qwen3VLTextConfig),
    ],
)
def test_three_axes_turn_as_in_transformers(tmp_path, name, embedding, config):
    """A Llama of transformers with the rotary embedding of a Qwen, at the positions of the plan."""
    folder = make_random_llama(tmp_path, rope=AXES[name])
    video = picture_plan(Full(), rebase=False)
    tokens = prompt(70 + 8 * 26)
    at = positions(video, BLOCK_SIZE, len(tokens), 0)
    assert len({tuple(place) for place in at.tolist()}) == 3

    class AtThePlansPositions(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            rope = {"rope_type": "default", "rope_theta": 10_000.0, **AXES[name]}
            self.turn = embedding(config(hidden_size=128, num_attention_heads=4, head_dim=32, rope_parameters=rope))

        def forward(self, hidden: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            del position_ids
            return self.turn(hidden, at[:, None])

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.model.rotary_emb = AtThePlansPositions()
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0]

    torch.testing.assert_close(LlamaReference.load(folder).logits(tokens, video), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("rope", AXES.values(), ids=AXES.keys())
def test_with_three_axes_token_by_token_and_all_at_once_agree_and_slides_show(tmp_path, rope):
    model = LlamaReference.load(make_random_llama(tmp_path, rope=rope))
    video = picture_plan(PackCache(window=2, selection="spatial"), rebase=True)
    given = prompt(80)

    # More than three windows of frames.
    generated = model.generate(given, 8 * 26, video, BLOCK_SIZE)
    tokens = given + generated.token_ids[:-1]
    teacher_forced = model.logits(tokens, video, BLOCK_SIZE)

    assert teacher_forced[79:].argmax(-1).tolist() == generated.token_ids
    torch.testing.assert_close(generated.logits, teacher_forced[79:], atol=1e-4, rtol=0)
    absolute = model.logits(tokens, picture_plan(PackCache(window=2, selection="spatial"), rebase=False), BLOCK_SIZE)
    slides_at = 70 + 3 * 26
    assert torch.equal(teacher_forced[:slides_at], absolute[:slides_at])
    assert (teacher_forced - absolute)[slides_at:].abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("seed", range(2))
def test_dropping_blocks_and_rebasing_change_what_is_generated_within_twelve_frames(tmp_path, seed):
    """Otherwise no comparison of generated tokens could tell one policy, or one kind of positions, from another."""
    model = LlamaReference.load(make_random_llama(tmp_path, seed=seed))
    given = prompt(70, seed)
    plans = [
        plan(policy, tokens_per_frame=64, rebase=rebase)
        for policy, rebase in (
            (Full(), False),
            (PackCache(window=4, selection="spatial"), True),
            (PackCache(window=4, selection="spatial"), False),
            (PackCache(window=3, selection="spatial"), True),
            (SlidingWindow(window=2), False),
        )
    ]

    videos = [model.generate(given, 12 * 64, video, BLOCK_SIZE) for video in plans]

    for index, video in enumerate(videos):
        for other in videos[:index]:
            different = sum(a != b for a, b in zip(video.token_ids, other.token_ids, strict=True))
            assert different > 100
        assert len(set(video.token_ids[-200:])) > 20, "a loop of few tokens would be blind to what is dropped"
        assert video.gaps.median() > 0.05


def test_gaps_are_the_distance_of_the_best_two_logits(reference):
    generated = reference.generate(prompt(20), 30)
    ranked = generated.logits.sort(descending=True).values

    assert torch.equal(generated.gaps, ranked[:, 0] - ranked[:, 1])


@pytest.mark.parametrize(("given", "max_tokens"), [([], 5), ([1], 0)])
def test_nothing_to_generate_is_refused(reference, given, max_tokens):
    with pytest.raises(ValueError, match="at least"):
        reference.generate(given, max_tokens)


def test_no_tokens_are_refused(reference):
    with pytest.raises(ValueError, match="at least one token"):
        reference.logits([])


def test_the_same_seed_writes_the_same_checkpoint(folder, tmp_path):
    again = make_random_llama(tmp_path)

    for name in ("config.json", "model.safetensors"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_attention_scores_of_a_random_checkpoint_are_as_wide_as_stated(folder):
    """The deviation of scores that decides how many keys a query reads."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    attention = model.model.layers[0].self_attn
    with torch.inference_mode():
        hidden = model.model.layers[0].input_layernorm(model.model.embed_tokens(torch.arange(VOCAB)))
        queries = attention.q_proj(hidden).unflatten(-1, (4, 32))
        keys = attention.k_proj(hidden).unflatten(-1, (2, 32)).repeat_interleave(2, dim=1)
        scores = torch.einsum("nhd,mhd->hnm", queries, keys) / 32**0.5

    assert scores.std().item() == pytest.approx(2.0, rel=0.25)
