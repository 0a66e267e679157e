"""Re-based positions in the engine: tokens and cached keys are those of the reference, however long the video."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.margins import CarefulReference
from tests.runner import V2, shorter
from tests.serving.conftest import check_together, check_video, generate, prompt, sampling
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.core.plan import Plan
from vllm_packcache.core.retention import Retention
from vllm_packcache.reference import make_random_llama, positions
from vllm_packcache.worker.keys.layout import cached_keys

BLOCK = 32


def plan_of(config: dict[str, Any], num_prompt_tokens: int, kind: str = "packcache", **options: Any) -> Plan:
    extra = {f"packcache_{name}": value for name, value in options.items()}
    plan = ServerConfig.parse(kind, config).plan(extra, num_prompt_tokens)
    assert plan is not None
    return plan


# --------------------------------------------------------------------------- one axis


@pytest.mark.parametrize(
    ("policy", "config"),
    [
        pytest.param("packcache", {"window": 2, "history_frames": 1.5}, id="packcache"),
        pytest.param("packcache", {"window": 1, "history_frames": 0.6, "selection": "spatial"}, id="one frame"),
        pytest.param("packcache", {"window": 3, "gamma_text": 0.4}, id="a thinned condition"),
        pytest.param("sliding_window", {"window": 2, "positions": "rebase"}, id="sliding window"),
    ],
)
@pytest.mark.parametrize(("condition", "frame"), shorter([(70, 67), (64, 64), (5, 40), (33, 9)], [(70, 67), (5, 40)]))
def test_tokens_equal_the_reference(
    engine: Any, reference: Any, policy: str, config: dict[str, Any], condition: int, frame: int
) -> None:
    ids = prompt(condition, seed=frame)
    # Frames 1 to 4 W + 1: the window slides 3 W times and fills up again after the first.
    length = (4 * config["window"] + 2) * frame + 3
    plan, absolute = (
        plan_of({**config, "positions": mode}, condition, policy, tokens_per_frame=frame)
        for mode in ("rebase", "absolute")
    )
    before, made = check_video(engine(policy, config), reference, ids, length, plan, tokens_per_frame=frame)
    # Until the window slides the two are the same, and afterwards they must not be.
    sliding = condition + (config["window"] + 1) * frame
    start = (before + made)[:sliding]
    torch.testing.assert_close(reference.logits(start, plan), reference.logits(start, absolute), rtol=0, atol=1e-6)
    assert reference.differs(before, made, absolute)


def test_absolute_positions_are_those_of_stock_vllm(engine: Any, reference: Any) -> None:
    config = {"window": 2, "history_frames": 1.5, "positions": "absolute"}
    ids = prompt(70, seed=3)
    length, frame = shorter((700, 67), (60, 12))
    made = generate(engine("packcache", config), ids, length, tokens_per_frame=frame)
    reference.check(ids, made, length, plan_of(config, 70, tokens_per_frame=frame))
    room = {"window": 20, "history_frames": 20, "positions": "absolute"}
    whole = generate(engine("packcache", room), ids, length, tokens_per_frame=frame)
    reference.check(ids, whole, length)
    assert generate(engine(), ids, length) == whole


# --------------------------------------------------------------------------- three axes

SECTIONS = {
    "contiguous": {"mrope_section": [4, 6, 6]},
    "interleaved": {"mrope_section": [6, 5, 5], "mrope_interleaved": True},
}
GRIDS = {
    "special tokens": {"grid": [5, 7], "frame_start_tokens": 3, "row_end_tokens": 1, "frame_end_tokens": 1},
    "grid only": {"grid": [6, 9]},
}


@pytest.fixture(scope="module", params=SECTIONS)
def three_axes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint of the model in mrope_llama.py."""
    from vllm import ModelRegistry

    from tests.serving.mrope_llama import MRopeLlamaForCausalLM

    # The class itself: vLLM looks at one that is only named in a process of its own, which takes its time.
    ModelRegistry.register_model("MRopeLlamaForCausalLM", MRopeLlamaForCausalLM)
    folder = make_random_llama(tmp_path_factory.mktemp("mrope"), rope=SECTIONS[request.param])
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": ["MRopeLlamaForCausalLM"]}))
    yield folder
    file.unlink()


@pytest.mark.parametrize("image", [0, 1], ids=["text", "conditioning image"])
@pytest.mark.parametrize("grid", GRIDS)
def test_three_axes_equal_the_reference(engine: Any, three_axes: Path, grid: str, image: int) -> None:
    layout = {**GRIDS[grid], "axis_scale": [4, 8, 8]}
    config = {"window": 2, "history_frames": 1.5, "layout": layout}
    llm = engine("packcache", config, model=three_axes)
    frame = ServerConfig.parse("packcache", config).layout.frame_layout().tokens_per_frame
    ids = prompt(29 + image * frame, seed=1)
    options = {"condition_image_tokens": image * frame}
    length = 10 * frame + 5
    reference = CarefulReference.load(three_axes)
    before, made = check_video(llm, reference, ids, length, plan_of(config, len(ids), **options), **options)
    assert reference.differs(before, made, plan_of({**config, "positions": "absolute"}, len(ids), **options))
    # A prompt that holds the frames gives the same; on V2 there was one.
    given = shorter(6 * frame + 11, 10)
    options["condition_tokens"] = len(ids)
    assert generate(llm, before + made[:given], len(made) - given, **options) == made[given:]


def test_three_axes_without_rebasing_equal_the_reference(engine: Any, three_axes: Path) -> None:
    config = {"window": 2, "positions": "absolute", "layout": {"grid": [5, 7], "axis_scale": [2, 3, 1]}}
    llm = engine("packcache", config, model=three_axes)
    reference = CarefulReference.load(three_axes)
    ids = prompt(40, seed=2)
    for options in ({"condition_image_tokens": 35}, {"condition_image_tokens": 0, "policy": "full"}):
        plan = plan_of(config, len(ids), **options)
        length = shorter(300, 40)
        reference.check(ids, generate(llm, ids, length, **options), length, plan)
    # Text has the model's own positions.
    reference.check(ids, generate(llm, ids, length), length)


def test_without_a_scale_all_axes_move_together(engine: Any, three_axes: Path) -> None:
    config = {"window": 2, "history_frames": 1.5}
    llm = engine("packcache", config, model=three_axes)
    ids = prompt(40, seed=3)
    plan = plan_of(config, len(ids), tokens_per_frame=35)
    check_video(llm, CarefulReference.load(three_axes), ids, 400, plan, tokens_per_frame=35)


def test_a_picture_is_shared_only_with_who_positions_it_alike(engine: Any, three_axes: Path) -> None:
    layout = {"grid": [6, 9], "axis_scale": [4, 8, 8], "condition_image_tokens": 54}
    llm = engine("packcache", {"layout": layout}, model=three_axes, enable_prefix_caching=True)
    reference = CarefulReference.load(three_axes)
    ids = prompt(40 + 108, seed=4)
    for options in ({}, {"condition_image_tokens": 54}, {"grid": [9, 6]}, {"condition_image_tokens": 108}):
        plan = plan_of({"layout": layout}, len(ids), **options) if options else None
        length = shorter(60, 20)
        reference.check(ids, generate(llm, ids, length, **options), length, plan)


# --------------------------------------------------------------------------- keys


def logical_blocks(llm: Any) -> dict[int, int]:
    """Logical block -> physical block of the one request that runs."""
    (core,) = [llm.llm_engine.engine_core.engine_core]
    manager = core.scheduler.kv_cache_manager.coordinator.single_type_managers[0]
    (blocks,) = manager.req_to_blocks.values()
    return {index: block.block_id for index, block in enumerate(blocks) if not block.is_null}


@pytest.mark.parametrize("chunk", [512, 45])
@pytest.mark.parametrize("given", shorter([0, 9], [9]))
def test_cached_keys_are_the_references(engine: Any, reference: Any, chunk: int, given: int) -> None:
    condition, frame, frames = 50, 41, given + 5 if V2 else 14
    config = {"window": 3, "history_frames": 1.5, "selection": "spatial"}
    llm = engine("packcache", config, max_num_batched_tokens=chunk, max_num_seqs=2, enable_prefix_caching=False)
    plan = plan_of(config, condition, tokens_per_frame=frame)
    before = prompt(condition + given * frame, seed=6)
    params = sampling((frames - given) * frame, tokens_per_frame=frame, condition_tokens=condition)
    llm.llm_engine.add_request("video", {"prompt_token_ids": before}, params)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    layers = runner.compilation_config.static_forward_context
    compared = 0
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
        # What the step has computed: it samples one token more, which is in nobody's cache.
        requests = runner.req_states.req_id_to_index if V2 else runner.requests
        computed = runner.req_states.num_computed_tokens_np if V2 else runner.input_batch.num_computed_tokens_cpu
        computed = int(computed[next(iter(requests.values())) if V2 else 0]) if requests else 0
        if computed < condition + 5 * frame or (computed - condition) % frame not in (1, 30):
            continue
        current = plan.layout.frame_of(computed - 1)
        at = positions(plan, BLOCK, computed, current)
        (request,) = scheduler.requests.values()
        unrotated = reference.unrotated_keys(list(request.all_token_ids)[:computed], plan, BLOCK)
        blocks = logical_blocks(llm)
        for layer, name in enumerate(layers):
            keys = cached_keys(layers[name])
            expected = reference.rotate(unrotated[layer], at)
            for logical in Retention(plan.layout, plan.policy, BLOCK).live_blocks(computed - 1).tolist():
                tokens = slice(logical * BLOCK, min((logical + 1) * BLOCK, computed))
                flat = keys.memory[blocks[logical]].flatten(1)
                stored = flat[:, keys.order[: tokens.stop - tokens.start]].transpose(0, 1)
                # An angle of p radians is known to p x 2^-24, p below 256, and keys are as long as 10.
                torch.testing.assert_close(stored, expected[tokens], rtol=0, atol=256 * 2**-24 * 10)
                compared += 1
    assert compared >= 80


# --------------------------------------------------------------------------- video without end


@pytest.fixture(scope="module")
def short_table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with positions for a condition of 20 tokens and 16 frames of 12."""
    return make_random_llama(tmp_path_factory.mktemp("short"), max_positions=20 + 16 * 12, seed=5)


def test_200_frames_with_positions_for_16(engine: Any, short_table: Path) -> None:
    condition, frame, frames = 20, 12, shorter(200, 18)
    config = {"window": 4, "layout": {"tokens_per_frame": frame}}
    llm = engine(
        "packcache",
        config,
        model=short_table,
        max_model_len=condition + frames * frame,
        max_num_batched_tokens=64,
        num_gpu_blocks_override=16,
    )
    core = llm.llm_engine.engine_core.engine_core
    pool = core.scheduler.kv_cache_manager.block_pool
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    ids = prompt(condition, seed=7)
    free = pool.get_num_free_blocks()
    llm.llm_engine.add_request("video", {"prompt_token_ids": ids}, sampling(frames * frame, condition_tokens=condition))
    held, highest, tokens = 0, 0, []
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            tokens = list(output.outputs[0].token_ids)
        held = max(held, free - pool.get_num_free_blocks())
        positions_of_step = runner.model_state._positions if V2 else runner.positions
        highest = max(highest, int(positions_of_step[0]))
    assert len(tokens) == frames * frame
    assert highest == condition + 5 * frame - 1, "the last position of W + 1 frames"
    assert held <= -(-(condition + 5 * frame) // BLOCK) + 1
    plan = plan_of(config, condition, condition_tokens=condition)
    CarefulReference.load(short_table).check(ids, tokens, frames * frame, plan)


def test_what_is_not_rebased_ends_at_the_table(engine: Any, short_table: Path) -> None:
    from vllm.exceptions import VLLMValidationError

    layout = {"tokens_per_frame": 12}
    config = {"layout": layout, "window": 4}
    llm = engine("packcache", config, model=short_table, max_model_len=4000, num_gpu_blocks_override=40)
    limit = 20 + 16 * 12
    own = CarefulReference.load(short_table)
    for options in ({}, {"policy": "full", "condition_tokens": 20}):
        ids = prompt(shorter(20, limit - 30), seed=8)
        own.check(ids, generate(llm, ids, 3000, **options), limit - len(ids))
        with pytest.raises(VLLMValidationError, match=f"the prompt has {limit} tokens, and the model has {limit}"):
            generate(llm, prompt(limit), 5, **options)
    with pytest.raises(VLLMValidationError, match="this video needs 240 positions, and the model has 212: lower"):
        generate(llm, prompt(20), 3000, tokens_per_frame=44)
    # A short one of such frames fits.
    given = shorter(0, 4 * 44 - 10)
    fits = generate(llm, prompt(20 + given), 4 * 44 - given, tokens_per_frame=44, condition_tokens=20)
    assert len(fits) == 4 * 44 - given


def test_company_of_other_windows_changes_nothing(engine: Any, reference: Any) -> None:
    config = {"window": 3, "history_frames": 1.5}
    llm = engine("packcache", config, max_num_batched_tokens=128)
    requests = [
        (prompt(70, seed=5), sampling(shorter(500, 50), tokens_per_frame=shorter(33, 9))),
        (prompt(130, seed=6), sampling(shorter(200, 30))),
        (prompt(20, seed=7), sampling(shorter(600, 50), tokens_per_frame=shorter(57, 15), window=1, history_frames=1)),
        (prompt(420, seed=8), sampling(shorter(300, 30), tokens_per_frame=40, condition_tokens=30)),
        (prompt(70, seed=5), sampling(shorter(300, 20), tokens_per_frame=67, policy="full")),
    ]
    check_together(llm, reference, "packcache", config, requests)
