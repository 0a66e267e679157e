"""Whole steps of vLLM: the plan's sizes, what is judged, and the measurement itself at a small size on a CPU."""

from __future__ import annotations

import dataclasses
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.engine_process import EngineFailed
from benchmarks.gpu import engine as gpu_engine
from benchmarks.gpu import kernels as gpu
from benchmarks.gpu.engine import FLOOR, LUMOS, Run
from benchmarks.model import ModelShape

THREE = ("full", "packcache", "as_if_short")
VIDEO = gpu.KernelPlan(
    geometry=gpu.Geometry(layers=2, heads=4, kv_heads=2, head_size=32, block_size=32, dtype=torch.float32),
    condition_tokens=40,
    tokens_per_frame=131,
    frames=6,
    batches=(),
    rounds=2,
)
TINY = gpu_engine.EnginePlan(
    video=VIDEO,
    model=ModelShape(
        layers=2,
        heads=4,
        kv_heads=2,
        head_size=32,
        hidden=64,
        intermediate=96,
        vocab=256,
        dtype="float32",
        bytes_per_element=4,
    ),
    # Those of the condition and of the five frames that re-based positions range over, and of no sixth.
    positions=40 + 5 * 131,
    chunk=256,
    burst=4,
    rounds=2,
    runs={
        "short": Run(engines=THREE, batch=2, frames=(0, 4)),
        "long": Run(engines=("packcache",), batch=1, frames=(9,)),
        "large": Run(engines=THREE, batch=200, frames=(4,)),
    },
    device="cpu",
)
BANDWIDTH = 1e9


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    environment = dict(os.environ)
    free = max(TINY.bytes_needed(run) for name, run in TINY.runs.items() if name != "large")
    section = gpu_engine.measure(TINY, BANDWIDTH, free)
    assert os.environ == environment
    return section


def test_every_engine_is_timed_in_every_frame(measured):
    run = measured["runs"]["short"]
    assert run["measured"] is True, run
    assert set(run["timed_frames"]) == {"0", "4"}
    for frame in run["timed_frames"].values():
        assert set(frame["seconds_per_step"]) == set(THREE)
        assert all(len(own) == TINY.rounds and min(own) > 0 for own in frame["seconds_per_step"].values())
        assert set(frame["ratios"]) == {"full / packcache", "packcache / as_if_short"}
    assert measured["runs"]["long"]["measured"] is True, measured["runs"]["long"]
    assert set(measured["runs"]["long"]["engines"]) == {"packcache"}


def test_engines_hold_what_they_should(measured):
    """Of each sequence packcache holds as many blocks as the engine that is as long as what it reads."""
    late = measured["runs"]["short"]["timed_frames"]["4"]
    held = late["blocks_at_the_end"]
    assert late["prompt_tokens"] == 40 + 4 * 131 + 65
    retention = TINY.retention
    first, last = retention.live_tokens(late["prompt_tokens"]), retention.live_tokens(late["prompt_tokens"] + 65)
    assert 2 * -(-first // 32) <= held["packcache"] <= 2 * -(-last // 32) < held["full"]
    assert abs(held["packcache"] - held["as_if_short"]) <= 1
    assert late["keys"]["packcache"] == late["keys"]["as_if_short"] < late["keys"]["full"]


def test_what_vllm_has_chosen_is_written_down(measured):
    engines = measured["runs"]["short"]["engines"]
    for name in THREE:
        assert engines[name] == {
            "runner": "V1",
            "attention": ["CPU_ATTN"],
            "cudagraph_mode": "NONE",
            "async_scheduling": False,
            "kv_cache_blocks": 2 * TINY.blocks(name, TINY.runs["short"]) + 1,
        }


def test_the_rest_follows_from_the_samples(measured):
    run = measured["runs"]["short"]
    late = run["timed_frames"]["4"]
    for name, samples in late["seconds_per_step"].items():
        middle = sum(samples) / 2
        assert late["seconds_per_frame"][name] == pytest.approx(131 * middle)
        floor = (TINY.model.step_weight_bytes + 2 * late["keys"][name] * 2 * 2 * 2 * 32 * 4) / BANDWIDTH
        assert late["floor_seconds_per_step"][name] == pytest.approx(floor)
        assert late[FLOOR][name] == pytest.approx(middle / floor)
    assert run["seconds_per_video"]["full"] == pytest.approx(
        2.5 * sum(frame["seconds_per_frame"]["full"] for frame in run["timed_frames"].values())
    )
    assert measured["runs"]["long"]["seconds_per_video"] == {"packcache": None}


def test_the_short_form_has_everything_that_is_judged():
    judged = {name: run for name, run in LUMOS.runs.items() if gpu_engine.SHORT in run.engines}
    assert set(gpu_engine.QUICK.runs) == set(judged)
    for name, run in gpu_engine.QUICK.runs.items():
        assert (run.engines, run.batch, run.frames) == (judged[name].engines, judged[name].batch, (12,))
    assert gpu_engine.QUICK.rounds < LUMOS.rounds


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_engines_are_vllms_default():
    video = dataclasses.replace(VIDEO, geometry=dataclasses.replace(VIDEO.geometry, dtype=torch.bfloat16))
    model = dataclasses.replace(TINY.model, dtype="bfloat16", bytes_per_element=2)
    runs = {"short": TINY.runs["short"]}
    plan = dataclasses.replace(TINY, video=video, model=model, runs=runs, device="cuda")
    run = gpu_engine.measure(plan, BANDWIDTH, torch.cuda.mem_get_info()[0])["runs"]["short"]
    assert run["measured"] is True, run
    for about in run["engines"].values():
        assert about["runner"] == "V2"
        assert about["cudagraph_mode"].startswith("FULL")
        assert about["async_scheduling"] is True
        assert about["attention"] == run["engines"]["full"]["attention"]


def test_what_does_not_fit_is_left_out(measured):
    large = measured["runs"]["large"]
    assert large["measured"] is False
    assert large["reason"].startswith("not measured: it needs about ")
    assert "failed" not in large


def test_what_was_measured_is_judged_and_printed(measured):
    judged = gpu_engine.targets(measured)
    assert [target["ratio"] for target in judged] == ["whole step, short: packcache / as_if_short"]
    printed = "\n".join(gpu_engine.lines(measured))
    assert "whole steps, short, frame 5:" in printed
    assert "whole steps, long, frame 10:" in printed
    assert "whole steps, large: not measured: it needs about" in printed


def test_a_run_whose_engine_fails_is_told_and_the_others_are_kept(monkeypatch):
    def fails(plan: gpu_engine.EnginePlan, run: Run, *rest: Any) -> dict[str, Any]:
        if run.batch == 1:
            return {}
        raise EngineFailed("engine 'full' died: out of memory")

    monkeypatch.setattr(gpu_engine, "_measure_run", fails)
    runs = gpu_engine.measure(TINY, BANDWIDTH, 2**60)["runs"]
    assert {name: own["measured"] for name, own in runs.items()} == {"short": False, "long": True, "large": False}
    assert runs["short"]["failed"] == "engine 'full' died: out of memory"


def test_the_papers_sizes():
    run = LUMOS.runs["13 frames, batch 1"]
    assert LUMOS.prompt(12) == 272 + 12 * 4084 + 2042
    assert LUMOS.longest("full", run) == 272 + 13 * 4084 == LUMOS.longest("packcache", run)
    assert LUMOS.longest("as_if_short", run) == LUMOS.retention.live_tokens(272 + 12 * 4084) + 4084
    assert LUMOS.longest("packcache", LUMOS.runs["100 frames, batch 1"]) == 272 + 100 * 4084 > LUMOS.positions
    assert LUMOS.model.kv_bytes_per_token == 28 * gpu.LUMOS.geometry.bytes_of(1) == 114_688
    # Some 6.1 GB of keys and values of a whole sequence, 16 times; the weights are 3.2 and 0.4 billion numbers.
    full = LUMOS.runs["13 frames, batch 16, full"]
    assert LUMOS.cache_bytes("full", full) == (16 * 3336 + 1) * 16 * 114_688
    assert LUMOS.model.step_weight_bytes == pytest.approx(2 * 3.21e9, rel=0.01)
    assert LUMOS.model.weight_bytes - LUMOS.model.step_weight_bytes == 2 * 128_256 * 3072


@pytest.mark.parametrize("plan", [LUMOS, TINY], ids=["paper", "tiny"])
def test_all_bursts_lie_in_one_frame(plan):
    for run in plan.runs.values():
        if run.batch > 16:
            continue
        # Prefilled a frame at a time, and a frame in chunks; while it is, those before it decode.
        steps = 1 + max(run.frames) + 1
        lead = run.batch * steps * -(-plan.video.tokens_per_frame // plan.chunk)
        assert lead + (plan.rounds + 1) * plan.burst <= plan.room


def test_samples_come_in_every_order_equally_often():
    assert all(LUMOS.rounds % len(run.engines) == 0 for run in LUMOS.runs.values())


def test_weights_are_those_of_the_model():
    shape = TINY.model
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=256,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert shape.weight_bytes == 4 * sum(own.numel() for own in model.parameters())
    assert shape.step_weight_bytes == shape.weight_bytes - 4 * model.get_input_embeddings().weight.numel()


def test_a_gpu_engine_is_as_vllm_would_have_it(tmp_path):
    settings = LUMOS.settings("packcache", LUMOS.runs["13 frames, batch 16"], tmp_path)
    arguments = settings.engine_args()
    assert "enforce_eager" not in arguments
    assert arguments["max_num_seqs"] == 16
    assert arguments["load_format"] == "dummy"
    assert settings.environment()["VLLM_USE_V2_MODEL_RUNNER"] is None
    on_a_cpu = dataclasses.replace(settings, device="cpu")
    assert on_a_cpu.engine_args()["enforce_eager"] is True
    assert "gpu_memory_utilization" not in on_a_cpu.engine_args()
    assert on_a_cpu.environment()["VLLM_USE_V2_MODEL_RUNNER"] == "0"


def test_a_frame_between_two_timed_ones_is_interpolated():
    assert gpu_engine.video_seconds((0, 2, 4), [1.0, 3.0, 3.0], TINY) == 131 * (1 + 2 + 3 + 3 + 3)
    assert gpu_engine.video_seconds((4,), [1.0], TINY) is None


def test_the_last_frame_is_judged():
    def run(batch: int, engines: tuple[str, ...], ratio: float, floor: float) -> dict[str, Any]:
        def frame(ratio: float, floor: float) -> dict[str, Any]:
            return {"ratios": {"packcache / as_if_short": {"median": ratio}}, FLOOR: {"packcache": floor}}

        last = frame(ratio, floor) if "as_if_short" in engines else {"ratios": {}, FLOOR: {"packcache": 9}}
        timed = {"0": frame(9, 9), "12": last}
        return {"measured": True, "engines": engines, "batch": batch, "frames": (0, 12), "timed_frames": timed}

    judged = gpu_engine.targets(
        {
            "runs": {
                "a": run(1, THREE, 1.02, 9),
                "b": run(16, THREE[1:], 1.03, 1.5),
                "c": run(16, THREE[:2], 9, 9),
                "d": {"measured": False, "engines": THREE, "reason": "not measured"},
            }
        }
    )
    assert [(target["ratio"], target["met"]) for target in judged] == [
        ("whole step, a: packcache / as_if_short", True),
        ("whole step, b: packcache / as_if_short", False),
        ("whole step, b: step / byte floor", True),
    ]


@pytest.mark.parametrize(
    ("missing", "reason"),
    [("vllm", "not measured: vLLM is not installed here"), ("vllm-packcache", "run `pip install --no-deps -e .`")],
)
def test_without_vllm_nothing_is_invented(monkeypatch, missing, reason):
    monkeypatch.setattr(gpu, "find_spec", lambda name: None if name == missing else SimpleNamespace())
    monkeypatch.setattr(gpu, "_version", lambda name: None if name == missing else "1")
    section, judged = gpu._measure_engines(BANDWIDTH, torch.device("cpu"))
    assert section["measured"] is False
    assert reason in section["reason"]
    assert judged == []
