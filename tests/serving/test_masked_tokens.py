"""A masked model in the real engine, on vLLM's V2 runner: token for token equal to the published loop.

Every request's tokens hang on sums of probabilities: where the
reference came so near to another token that rounding could choose it, the request is no test, and is not used as one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from packaging.version import Version

from tests.margins import DRAWING, numbers, refuse_masked_ties
from tests.runner import needs_v2
from tests.serving.conftest import schedule_asynchronously
from tests.serving.rounding import as_the_cpu_writes, int8, to_nearest
from tests.serving.two_ranks import run_on_two_ranks
from tests.support import INSTALLED, NEXT
from vllm_packcache.config.errors import ConfigError
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.core.policies import Full
from vllm_packcache.families import LUMOS, lumos
from vllm_packcache.families.lumos import CanvasRequest
from vllm_packcache.families.schedule import computed_passes, schedule
from vllm_packcache.hooks.canvas import configure
from vllm_packcache.reference import LumosReference, QuantisedLumosReference, generate_masked, make_random_lumos

pytestmark = needs_v2

CODES = 64
BLOCK = 32
CONFIG: dict[str, Any] = {"layout": {"grid": [4, 6]}, "window": 2, "history_frames": 1, "selection": "spatial"}
CANVAS = lumos.frame_layout((4, 6)).tokens_per_frame

ROUNDED_DRAWING = 1e-4
"""As `tests.margins.DRAWING`, where a number of the cache may be rounded to the other side."""


@dataclass(frozen=True)
class Case:
    """A request: so many ids of text, frames that are given, and options."""

    text: int
    grid: tuple[int, int] = (4, 6)
    given: int = 0
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def ids(self) -> list[int]:
        random = numbers(self.text, *self.grid, self.given)
        ids = lumos.text_prompt(random.integers(1, 8000, self.text).tolist(), 2, 8)
        for _ in range(self.given):
            ids += lumos.frame_of_codes(random.integers(0, CODES, self.grid)).tolist()
        return ids

    @property
    def extra_args(self) -> dict[str, Any]:
        return {f"packcache_{name}": value for name, value in (("grid", list(self.grid)), *self.options)}

    def having(self, **options: Any) -> Case:
        """The same with other options."""
        return replace(self, options=tuple({**dict(self.options), **options}.items()))


TEXT_TO_VIDEO = Case(20).having(frames=6, steps=4, guidance=3, seed=1)
IMAGE_TO_VIDEO = Case(5, given=1).having(frames=5, steps=3, guidance=2, seed=2)
CONTINUED = Case(9, (5, 3), 3).having(frames=5, steps=5, guidance=4, seed=4, condition_frames=1)
LONG_TEXT = Case(150, (2, 7)).having(frames=4, steps=3, guidance=2, seed=5)
UNGUIDED = Case(1, (3, 3)).having(frames=7, steps=2, guidance=1, seed=6)
OTHER_WAYS = Case(3, (3, 5), 1).having(
    frames=4, steps=4, guidance=3, seed=7, reset_temperature=1, share_history=0, remask=0.5, temperature=2.5
)
CASES = [TEXT_TO_VIDEO, IMAGE_TO_VIDEO, CONTINUED, LONG_TEXT, UNGUIDED, OTHER_WAYS]


@pytest.fixture(scope="module")
def lumos_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_lumos(tmp_path_factory.mktemp("lumos"), visual_codes=CODES)


@pytest.fixture(scope="module")
def oracle(lumos_model: Path) -> Callable[..., list[int]]:
    """What the published loop makes of a case."""
    model = LumosReference.load(lumos_model)

    @cache
    def answer(case: Case, ids: tuple[int, ...], config: str) -> list[int]:
        return published(model, case, plan_of(case, config))

    return lambda case, config=CONFIG, policy="packcache": answer(case, tuple(case.ids), repr((policy, config)))


def published(
    model: LumosReference, case: Case, plan: CanvasRequest, block_size: int = BLOCK, drawing: float = DRAWING
) -> list[int]:
    """What the published loop makes of a case.

    Raises:
        Tie: rounding may turn one of these tokens.
    """
    assert plan.frames is not None
    made = generate_masked(model, case.ids, plan.frames, plan.conditional, plan.options, block_size)
    refuse_masked_ties(made, drawing)
    return made.token_ids


def plan_of(case: Case, config: str) -> CanvasRequest:
    policy, options = eval(config)
    server = ServerConfig(Full(), family=LUMOS) if policy is None else ServerConfig.parse(policy, options, family=LUMOS)
    return LUMOS.request(server, case.extra_args, case.ids)


@pytest.fixture(scope="module")
def masked_engine(engine: Callable[..., Any], lumos_model: Path) -> Callable[..., Any]:
    """``masked_engine(policy, config, **options)`` -> an `LLM` of the random checkpoint."""

    def make(policy: str | None = "packcache", config: dict[str, Any] | None = CONFIG, **options: Any) -> Any:
        defaults = {
            "model": lumos_model,
            "max_model_len": 1024,
            "max_num_batched_tokens": 4 * CANVAS,
            "max_num_seqs": 6,
        }
        return engine(policy, config, **{**defaults, "num_gpu_blocks_override": 250, **options})

    return make


def params(case: Case) -> Any:
    from vllm import SamplingParams

    return SamplingParams(detokenize=False, extra_args=case.extra_args)


def generate(llm: Any, *cases: Case) -> list[list[int]]:
    """Generated tokens of a batch."""
    prompts = [{"prompt_token_ids": case.ids} for case in cases]
    outputs = llm.generate(prompts, [params(case) for case in cases], use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def staggered(llm: Any, cases: list[Case], steps_between: int, preempted_at: Sequence[int] = ()) -> list[list[int]]:
    """Generated tokens of requests that come one after another, so many steps apart.

    Before the steps of ``preempted_at`` all are preempted.
    """
    engine, waiting, done = llm.llm_engine, list(enumerate(cases)), {}
    steps = count()
    while waiting or engine.has_unfinished_requests():
        if waiting:
            index, case = waiting.pop(0)
            engine.add_request(f"staggered-{index}", {"prompt_token_ids": case.ids}, params(case))
        for _ in range(steps_between):
            if next(steps) in preempted_at:
                assert engine.engine_core.engine_core.reset_prefix_cache(reset_running_requests=True)
            for output in engine.step():
                if output.finished:
                    done[output.request_id] = list(output.outputs[0].token_ids)
    return [done[f"staggered-{index}"] for index in range(len(cases))]


def scheduler_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


@pytest.mark.parametrize("case", CASES)
def test_alone(case: Case, masked_engine: Any, oracle: Any) -> None:
    assert generate(masked_engine(), case) == [oracle(case)]


@pytest.mark.parametrize("ahead", [False, True], ids=["sync", "async"])
def test_staggered_in_one_batch(ahead: bool, masked_engine: Any, oracle: Any, monkeypatch: Any) -> None:
    schedule_asynchronously(monkeypatch, ahead)
    llm = masked_engine(variant=ahead)
    assert type(scheduler_of(llm)).__name__ == ("CanvasAsyncScheduler" if ahead else "CanvasScheduler")
    expected = [oracle(case) for case in CASES]
    assert generate(llm, *CASES) == expected
    assert staggered(llm, CASES, 3) == expected
    pool = scheduler_of(llm).kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1


@pytest.mark.parametrize("ahead", [False, True], ids=["sync", "async"])
def test_chunked_prefill(ahead: bool, masked_engine: Any, oracle: Any, monkeypatch: Any) -> None:
    """A step has room for one frame of the largest size: text comes in chunks, and frames take turns."""
    schedule_asynchronously(monkeypatch, ahead)
    llm = masked_engine(max_num_batched_tokens=CANVAS, variant=("chunks", ahead))
    cases = [LONG_TEXT, CONTINUED, TEXT_TO_VIDEO, UNGUIDED]
    assert staggered(llm, cases, 2) == [oracle(case) for case in cases]


@pytest.mark.parametrize("ahead", [False, True], ids=["sync", "async"])
def test_preempted(ahead: bool, masked_engine: Any, oracle: Any, preemptions: list[int], monkeypatch: Any) -> None:
    """Frames that had been committed are computed again, and the frame that was being made is made again."""
    schedule_asynchronously(monkeypatch, ahead)
    llm = masked_engine(num_gpu_blocks_override=34, variant=("crowded", ahead))
    cases = [TEXT_TO_VIDEO, OTHER_WAYS, CONTINUED, IMAGE_TO_VIDEO]
    assert staggered(llm, cases, 4) == [oracle(case) for case in cases]
    assert preemptions
    pool = scheduler_of(llm).kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1


@pytest.mark.parametrize(
    ("policy", "config"),
    [
        ("packcache", {**CONFIG, "positions": "absolute"}),
        ("packcache", {**CONFIG, "window": 3, "history_frames": 2, "selection": "tail"}),
        ("packcache", {**CONFIG, "window": 3, "history_frames": 1.5, "selection": "changed", "changed_tokens": 2}),
        ("sliding_window", {"layout": CONFIG["layout"], "window": 1}),
        ("attention_sink", {"layout": CONFIG["layout"], "sink_tokens": 32, "recent_tokens": 64}),
        ("full", {"layout": CONFIG["layout"]}),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_every_policy(policy: str, config: dict[str, Any], masked_engine: Any, oracle: Any) -> None:
    cases = [TEXT_TO_VIDEO, CONTINUED]
    expected = [oracle(case, config, policy) for case in cases]
    assert generate(masked_engine(policy, config), *cases) == expected
    assert expected[0] != oracle(TEXT_TO_VIDEO)


def test_part_of_the_condition(masked_engine: Any, oracle: Any) -> None:
    """Quotas of text and of the conditioning image: the streams have different texts, and the same image."""
    config = {**CONFIG, "gamma_text": 0.4, "gamma_condition": 0.5}
    cases = [LONG_TEXT, Case(70, (5, 3), 3).having(frames=3, steps=3, guidance=2, seed=8, condition_frames=2)]
    expected = [oracle(case, config) for case in cases]
    assert [oracle(case) for case in cases] != expected
    assert generate(masked_engine("packcache", config), *cases) == expected


def test_a_budget_that_holds_all_equals_no_policy(masked_engine: Any, oracle: Any) -> None:
    cases = [TEXT_TO_VIDEO, IMAGE_TO_VIDEO, CONTINUED]
    stock = generate(masked_engine(None, None, max_num_batched_tokens=None), *cases)
    assert stock == [oracle(case, None, None) for case in cases]
    everything = {**CONFIG, "window": 8, "history_frames": 8}
    assert generate(masked_engine("packcache", everything), *cases) == stock
    assert generate(masked_engine(), *(case.having(policy="full") for case in cases)) == stock


@pytest.mark.parametrize(
    "options",
    [
        {"remask": 0},
        {"guidance": 2.5},
        {"seed": 22},
        {"steps": 5},
        {"temperature": 0},
        {"reset_temperature": 1},
        {"share_history": 0},
    ],
    ids=str,
)
def test_every_option_counts(options: dict[str, Any], masked_engine: Any, oracle: Any) -> None:
    usual = TEXT_TO_VIDEO.having(seed=24)
    case = usual.having(**options)
    expected = oracle(case)
    assert expected != oracle(usual)
    assert generate(masked_engine(), case) == [expected]


def test_history_is_compacted_once_for_all_passes_of_a_frame(masked_engine: Any, monkeypatch: Any) -> None:
    from vllm_packcache.worker.keys.rotation import KeyRotation
    from vllm_packcache.worker.passes import CanvasModelState

    entered: list[int] = []
    turned: list[int] = []
    picture, slide = CanvasModelState._picture, KeyRotation.slide
    monkeypatch.setattr(CanvasModelState, "_picture", lambda *args: entered.append(args[3]) or picture(*args))
    monkeypatch.setattr(KeyRotation, "slide", lambda *args: turned.append(args[3]) or slide(*args))
    case = TEXT_TO_VIDEO.having(steps=6)
    generate(masked_engine(), case)
    frames = dict(case.options)["frames"]
    assert entered == [frame for frame in range(frames) for _stream in range(2)]
    # The window holds two frames: from the fourth on it slides, in both streams.
    assert len(turned) == 2 * (frames - 3)


@pytest.mark.parametrize("options", [{"steps": 4}, {"steps": 6, "refresh": 3, "reuse": 0.2, "guidance_interval": 2}])
def test_history_is_written_once_a_frame_and_read_by_all_its_passes(
    options: dict[str, Any], masked_engine: Any, monkeypatch: Any
) -> None:
    """Between the passes of a frame no number of the cache changes but in its own blocks; all read the same others.

    What is shared over passes: Ca2-VDM, arXiv 2411.16375.
    """
    llm = masked_engine()
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    state, execute = runner.model_state, type(runner).execute_model
    seen: dict[int, list[Any]] = {}

    def cached() -> torch.Tensor:
        """[layers, blocks, numbers]: both streams have blocks of the same memory."""
        return torch.stack([layer.kv_cache.flatten(1) for own in state._layers for layer in own])

    def watched(*args: Any, **kwargs: Any) -> Any:
        before = cached()
        output = execute(*args, **kwargs)
        if state._batch.canvases:
            (video,) = state._videos.values()
            changed = set((before != cached()).any(2).any(0).nonzero()[:, 0].tolist())
            rows = [own for group in state._groups for own in state._batch.rows[group]]
            seen.setdefault(video.canvas.frame, []).append((changed, video.pictures, rows))
        return output

    monkeypatch.setattr(type(runner), "execute_model", watched)
    case = TEXT_TO_VIDEO.having(frames=5, **options)
    generate(llm, case)
    steps = computed_passes(plan_of(case, repr(("packcache", CONFIG))).options, case.grid)
    assert [len(passes) for passes in seen.values()] == [steps] * 5
    for frame, passes in seen.items():
        for index, (changed, pictures, rows) in enumerate(passes):
            own = {block for picture in pictures for block in (picture.slots // BLOCK).tolist()}
            history = {block for picture in pictures for block in picture.blocks.tolist()} - own
            turned = changed - own
            assert turned <= history
            # A window of two frames slides before the fourth, and turns what is kept: the one time that it is written.
            assert bool(turned) == (index == 0 and frame >= 3)
            assert rows
            for row in rows:
                assert any(row.blocks is picture.blocks for picture in pictures)
                assert row.seq_lens.tolist() in [[picture.seq_len] for picture in pictures]


BAD = [
    ({"steps": 0}, "packcache_steps must be 1 or more"),
    ({"steps": 2.5}, "packcache_steps"),
    ({"frames": 0}, "packcache_frames"),
    ({"frames": 40}, "fewer frames"),
    ({"grid": [1, 1]}, "two visual tokens"),
    ({"condition_frames": 2}, "conditioning images"),
    ({"guidance": "much"}, "packcache_guidance"),
    ({"refresh": 0}, "packcache_refresh must be 1 or more and at most 1000, not 0"),
    ({"refresh": 2.5}, "packcache_refresh"),
    ({"reuse": 2}, "packcache_reuse must lie between 0 and 1, not 2"),
    ({"guidance": 1, "guidance_interval": 2}, "packcache_guidance_interval is 2, and with a guidance of 1"),
    ({"guidance_from": 0.9}, "packcache_guidance_from .* leave none of 3 passes"),
    ({"colour": 1}, "packcache_colour is no known option"),
    ({"policy": "sliding_window"}, "the policy of this server"),
]


@pytest.mark.parametrize(("options", "sentence"), BAD, ids=str)
def test_a_bad_request_is_refused_and_harms_nobody(
    options: dict[str, Any], sentence: str, masked_engine: Any, oracle: Any
) -> None:
    from vllm.exceptions import VLLMValidationError

    llm = masked_engine()
    with pytest.raises(VLLMValidationError, match=sentence.replace("[", r"\[")):
        generate(llm, IMAGE_TO_VIDEO.having(**options))
    assert generate(llm, IMAGE_TO_VIDEO) == [oracle(IMAGE_TO_VIDEO)]


def test_what_can_never_fit_is_refused(masked_engine: Any) -> None:
    from vllm.exceptions import VLLMValidationError

    llm = masked_engine(num_gpu_blocks_override=34, variant=("crowded", False))
    with pytest.raises(VLLMValidationError, match="this video holds"):
        generate(llm, Case(900).having(frames=2))
    cut = params(Case(5))
    cut.max_tokens = 40
    with pytest.raises(VLLMValidationError, match="max_tokens is 40, and a frame has 32 tokens"):
        llm.generate([{"prompt_token_ids": Case(5).ids}], cut, use_tqdm=False)
    with pytest.raises(VLLMValidationError, match="this server makes them of 32 at most"):
        generate(llm, Case(5, (5, 6)).having(frames=1))


def test_ids_beyond_the_models_are_refused_and_harm_nobody(masked_engine: Any, oracle: Any) -> None:
    """By us; by vLLM itself as of the next version, which looks at ids also where it has no tokenizer."""
    import vllm
    from vllm.exceptions import VLLMValidationError

    beyond = [*Case(5).ids, *lumos.frame_of_codes(np.full((4, 6), CODES)).tolist()]
    vocabulary = lumos.VISUAL_BEGIN + CODES
    assert max(beyond) == vocabulary
    sentence = {
        INSTALLED: f"the prompt has ids beyond the model's {vocabulary}: its visual codes are too large",
        NEXT: f"Token id {vocabulary} is out of vocabulary",
    }[Version(vllm.__version__).public]
    llm = masked_engine()
    with pytest.raises(VLLMValidationError) as refused:
        llm.generate([{"prompt_token_ids": beyond}], params(Case(5).having(frames=1)), use_tqdm=False)
    assert refused.value.args == (sentence,)
    assert generate(llm, IMAGE_TO_VIDEO) == [oracle(IMAGE_TO_VIDEO)]


@pytest.fixture(scope="module")
def serve_on_two_ranks(
    lumos_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[dict[str, Case]], dict[str, list[int]]]:
    """``serve(cases)``: what each generates, by name. The same are served once."""

    @cache
    def answer(requests: str) -> list[list[int]]:
        return run_on_two_ranks(
            tmp_path_factory.mktemp("ranks"),
            json.loads(requests),
            model=str(lumos_model),
            max_model_len=1024,
            # For frames of more than a block.
            additional_config={
                "kv_cache_policy": "packcache",
                "kv_cache_policy_config": {**CONFIG, "layout": {"grid": [5, 9]}},
            },
        )

    def serve(cases: dict[str, Case]) -> dict[str, list[int]]:
        requests = [(case.ids, {"extra_args": case.extra_args}) for case in cases.values()]
        return dict(zip(cases, answer(json.dumps(requests)), strict=True))

    return serve


LESS = {
    "settled rows": Case(20).having(frames=3, steps=8, guidance=3, seed=11, refresh=3),
    "reused passes": Case(5, given=1).having(frames=3, steps=8, guidance=2, seed=12, reuse=0.2),
    "every third pass unguided": Case(6).having(frames=3, steps=7, guidance=4, seed=13, guidance_interval=3),
    "guidance in the middle": Case(8, (3, 5), 1).having(
        frames=2, steps=8, guidance=3, seed=14, guidance_from=0.25, guidance_until=0.75
    ),
    "all of it": Case(9, (5, 3), 3).having(
        frames=3, steps=9, guidance=4, seed=15, condition_frames=1, refresh=3, reuse=0.1, guidance_interval=2
    ),
    "without guidance": Case(1, (3, 3)).having(frames=4, steps=7, guidance=1, seed=16, refresh=8, reuse=0.15),
}
"""Requests that leave out a part of what is computed (see `vllm_packcache.families.schedule`)."""


@pytest.mark.parametrize("name", LESS)
def test_less_is_computed(name: str, masked_engine: Any, oracle: Any, monkeypatch: Any) -> None:
    """The tokens of a loop that leaves out the same; so many engine steps, and rows, as the schedule says."""
    from vllm_packcache.worker.passes import CanvasModelState

    ran: list[tuple[int, int]] = []
    prepare = CanvasModelState.prepare_inputs

    def watched(*args: Any) -> dict[str, Any]:
        inputs = prepare(*args)
        ran.append((inputs["conditional_rows"], len(inputs["input_ids"]) - inputs["conditional_rows"]))
        return inputs

    monkeypatch.setattr(CanvasModelState, "prepare_inputs", watched)
    case = LESS[name]
    assert generate(masked_engine(), case) == [oracle(case)]
    request = plan_of(case, repr(("packcache", CONFIG)))
    whole = lumos.frame_layout(case.grid).tokens_per_frame
    frame = [own.rows for own in schedule(request.options, case.grid) if own.computed]
    frame.append((whole, whole if request.options.guided else 0))
    assert request.frames is not None
    assert ran[-len(frame) * request.frames :] == frame * request.frames
    usual = case.having(refresh=1, reuse=0, guidance_interval=1, guidance_from=0, guidance_until=1)
    assert oracle(case) != oracle(usual)


@pytest.mark.parametrize("ahead", [False, True], ids=["sync", "async"])
def test_less_is_computed_in_one_batch(ahead: bool, masked_engine: Any, oracle: Any, monkeypatch: Any) -> None:
    """Beside requests that compute everything; whichever passes of the others they fall together with."""
    schedule_asynchronously(monkeypatch, ahead)
    cases = [LESS["all of it"], TEXT_TO_VIDEO, LESS["settled rows"], LESS["without guidance"], UNGUIDED]
    assert staggered(masked_engine(variant=ahead), cases, 3) == [oracle(case) for case in cases]


@pytest.mark.parametrize("ahead", [False, True], ids=["sync", "async"])
def test_what_is_left_out_after_a_preemption(
    ahead: bool, masked_engine: Any, oracle: Any, preemptions: list[int], monkeypatch: Any
) -> None:
    """The frame that was being made is made again from its first, whole pass; frames before it were committed whole."""
    schedule_asynchronously(monkeypatch, ahead)
    llm = masked_engine(variant=ahead)
    cases = [LESS["all of it"], LESS["every third pass unguided"], LESS["settled rows"]]
    assert staggered(llm, cases, 1, preempted_at=(5, 14)) == [oracle(case) for case in cases]
    assert len(preemptions) == 2 * len(cases)


ON_TWO_RANKS = {
    "text to video": TEXT_TO_VIDEO,
    "a video that is continued": CONTINUED,
    "other ways of guidance": OTHER_WAYS,
    "kept by what changed": Case(14, (5, 9), 2).having(
        frames=3, steps=2, guidance=2, seed=9, selection="changed", window=3, history_frames=1
    ),
    "less of it": LESS["all of it"],
}


@pytest.mark.parametrize("name", ON_TWO_RANKS)
def test_two_ranks(name: str, serve_on_two_ranks: Any, oracle: Any) -> None:
    """All are in one batch, and each is judged by itself."""
    assert serve_on_two_ranks(ON_TWO_RANKS)[name] == oracle(ON_TWO_RANKS[name])


def test_a_gpu_backend(backend: str, lumos_model: Path, masked_engine: Any) -> None:
    """Keys in rows, blocks of 16 tokens, and slots that the mapping of a shorter stream leaves empty."""
    if backend == "FLEX_ATTENTION":
        with pytest.raises(ConfigError, match="--attention-backend FLEX_ATTENTION"):
            masked_engine(variant=backend, block_size=16)
        return
    case = Case(1, (2, 3), 2).having(frames=1, steps=1, guidance=2, seed=3, condition_frames=1)
    llm = masked_engine(variant=backend, block_size=16)
    plan = ServerConfig.parse("packcache", CONFIG, family=LUMOS).request(case.extra_args, case.ids)
    assert generate(llm, case) == [published(LumosReference.load(lumos_model), case, plan, 16)]


@pytest.mark.parametrize("backend", ["TRITON_ATTN"], indirect=True)
def test_integers_of_eight_bits(backend: str, lumos_model: Path, masked_engine: Any) -> None:
    """A scale for every token and head; keys of the window are rounded anew at every slide."""
    case = Case(1, (2, 3), 3).having(frames=1, steps=1, guidance=2, seed=3, condition_frames=1)
    llm = masked_engine(variant=backend, block_size=16, kv_cache_dtype="int8_per_token_head")
    plan = ServerConfig.parse("packcache", CONFIG, family=LUMOS).request(case.extra_args, case.ids)
    assert generate(llm, case) == [published(rounding(lumos_model, int8, int8), case, plan, 16, ROUNDED_DRAWING)]


@pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="vLLM stores 8 bits on processors with AVX-512 only")
def test_floats_of_eight_bits(lumos_model: Path, masked_engine: Any) -> None:
    case = IMAGE_TO_VIDEO
    llm = masked_engine(kv_cache_dtype="fp8_e4m3")
    dtype = torch.float8_e4m3fn
    model = rounding(lumos_model, as_the_cpu_writes(dtype, "fp8_e4m3"), to_nearest(dtype))
    assert generate(llm, case) == [
        published(model, case, plan_of(case, repr(("packcache", CONFIG))), BLOCK, ROUNDED_DRAWING)
    ]


def rounding(folder: Path, written: Any, turned: Any) -> LumosReference:
    model = LumosReference.load(folder)
    return QuantisedLumosReference(model.config, model._weights, written, turned)


def test_an_aborted_request_leaves_nothing_behind(masked_engine: Any, oracle: Any) -> None:
    llm = masked_engine()
    engine, pool = llm.llm_engine, scheduler_of(llm).kv_cache_manager.block_pool
    for passes in (1, 3, 9):
        engine.add_request("aborted", {"prompt_token_ids": TEXT_TO_VIDEO.ids}, params(TEXT_TO_VIDEO))
        for _ in range(passes):
            engine.step()
        # vLLM tells requests of one name apart.
        engine.abort_request(list(scheduler_of(llm).requests), internal=True)
        while engine.has_unfinished_requests():
            engine.step()
        assert generate(llm, IMAGE_TO_VIDEO) == [oracle(IMAGE_TO_VIDEO)]
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1


def test_half_precision_and_the_other_name(engine: Callable[..., Any], tmp_path: Path) -> None:
    """There is no oracle for rounding: frames are frames, and the same when they are asked for again."""
    model = make_random_lumos(tmp_path, visual_codes=CODES, architecture=lumos.ARCHITECTURES[1])
    llm = engine("packcache", CONFIG, model=model, dtype="bfloat16", max_model_len=1024)
    tokens = generate(llm, TEXT_TO_VIDEO)[0]
    for start in range(0, len(tokens), CANVAS):
        assert lumos.codes_of_frame(tokens[start : start + CANVAS], (4, 6)).max() < CODES
    assert generate(llm, TEXT_TO_VIDEO)[0] == tokens


def test_vllms_warm_up_runs_and_leaves_nothing_behind(masked_engine: Any, oracle: Any) -> None:
    """On a GPU vLLM runs requests of its own before it serves, which nothing has checked."""
    from vllm.v1.worker.gpu.warmup import run_mixed_prefill_decode_warmup, warmup_kernels

    llm = masked_engine()
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    warmup_kernels(worker.model_runner, worker.execute_model, worker.sample_tokens)
    worker.model_runner.profile_run()
    worker.model_runner._dummy_run(2 * CANVAS)
    ran = run_mixed_prefill_decode_warmup(worker.model_runner, worker.execute_model, worker.sample_tokens, CANVAS)
    assert ran
    assert None not in worker.model_runner.model_state._videos.values()
    assert generate(llm, IMAGE_TO_VIDEO) == [oracle(IMAGE_TO_VIDEO)]


@pytest.fixture
def start(lumos_model: Path) -> Callable[..., Any]:
    """``start(config, **options)``: make a server's configuration; nothing is loaded."""
    from vllm.engine.arg_utils import EngineArgs

    def make(config: dict[str, Any] | str | None = None, policy: str | None = "packcache", **options: Any) -> Any:
        additional: dict[str, Any] = {} if policy is None else {"kv_cache_policy": policy}
        if config is not None:
            additional["kv_cache_policy_config"] = config
        return EngineArgs(
            model=str(lumos_model), skip_tokenizer_init=True, additional_config=additional, **options
        ).create_engine_config()

    return make


def test_what_follows_from_the_model(start: Callable[..., Any]) -> None:
    config = start("lumos1_384p")
    assert config.diffusion_config.canvas_length == 4084
    assert config.num_speculative_tokens == 4084
    assert config.scheduler_config.scheduler_cls == "vllm_packcache.engine.scheduler.CanvasScheduler"
    assert config.model_config.enforce_eager
    assert not config.cache_config.enable_prefix_caching
    assert config.model_config.max_model_len == 1024 + 16 * 4084
    # A bit for every token of a frame and every id: 32 MiB for each request of this small vocabulary.
    assert config.scheduler_config.max_num_seqs == 2**29 // (4084 * (lumos.VISUAL_BEGIN + CODES) // 8)
    assert config.scheduler_config.max_num_batched_tokens == 4 * 4084


def test_what_is_given_is_kept(start: Callable[..., Any]) -> None:
    config = start(CONFIG, max_model_len=512, max_num_seqs=3, max_num_batched_tokens=40)
    assert config.diffusion_config.canvas_length == CANVAS
    assert config.model_config.max_model_len == 512
    assert config.scheduler_config.max_num_seqs == 3
    assert config.scheduler_config.max_num_batched_tokens == 40


def test_without_a_policy_it_is_served_too(start: Callable[..., Any]) -> None:
    config = start(None, None)
    assert config.diffusion_config.canvas_length == lumos.frame_layout((60, 96)).tokens_per_frame
    assert config.scheduler_config.scheduler_cls == "vllm_packcache.engine.scheduler.CanvasScheduler"


def test_more_requests_than_there_is_room_for_are_said(start: Callable[..., Any], logged: list[str]) -> None:
    start("lumos1_384p", max_num_seqs=256)
    assert any("--max-num-seqs is lowered from 256 to 16: for each request vLLM sets aside" in line for line in logged)


@pytest.mark.parametrize(
    ("config", "options", "sentence"),
    [
        (CONFIG, {"max_num_batched_tokens": 31}, "--max-num-batched-tokens is 31, and a frame of 32 tokens"),
        (CONFIG, {"long_prefill_token_threshold": 8}, "--long-prefill-token-threshold is 8"),
        (CONFIG, {"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "--scheduler-cls"),
        (CONFIG, {"diffusion_config": {"canvas_length": 16}}, "canvas_length is 16, and a frame has 32 tokens"),
        (CONFIG, {"override_generation_config": {"temperature": 0.5}}, "--override-generation-config has no effect"),
        (CONFIG, {"logits_processors": ["a.b:C"]}, "--logits-processors has no effect on .*: leave it out"),
        ({"layout": {"tokens_per_frame": 32}}, {}, "give grid"),
        ({"layout": {"grid": [4, 6], "frame_start_tokens": 1}}, {}, "frame_start_tokens: 3"),
        ({"layout": {"grid": [4, 6], "axis_scale": [1, 1, 1]}}, {}, r"axis_scale of this model is \[4, 8, 8\]"),
        ({"layout": {"grid": [4, 6]}, "positions": "rebase"}, {"kv_cache_dtype": "nvfp4"}, "turns cached keys"),
    ],
    ids=str,
)
def test_what_cannot_be_right_is_refused_before_the_model_loads(
    config: dict[str, Any], options: dict[str, Any], sentence: str, start: Callable[..., Any]
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        start(config, **options)


def test_the_other_runner_is_refused() -> None:
    config = SimpleNamespace(use_v2_model_runner=False, model_config=SimpleNamespace(model="lumos"))
    with pytest.raises(ConfigError, match=r"vllm_packcache\.tools\.interpreted serve"):
        configure(config)


@pytest.mark.parametrize("frames", [2, pytest.param(13, marks=[pytest.mark.long, pytest.mark.timeout(3600)])])
def test_the_published_grid(frames: int, engine: Callable[..., Any], tmp_path: Path) -> None:
    """672 x 384 pixels, frames of 4,084 tokens. Few codes, because each of so many draws may be near a tie."""
    model = make_random_lumos(tmp_path, visual_codes=4, layers=1)
    llm = engine("packcache", "lumos1_384p", model=model, max_model_len=60_000, max_num_batched_tokens=4084,
                 num_gpu_blocks_override=2500, max_num_seqs=1)  # fmt: skip
    case = Case(20, (48, 84)).having(frames=frames, steps=1, guidance=2, seed=1)
    plan = ServerConfig.parse("packcache", "lumos1_384p", family=LUMOS).request(case.extra_args, case.ids)
    drawing = DRAWING if frames == 2 else DRAWING / 3
    assert generate(llm, case) == [published(LumosReference.load(model), case, plan, drawing=drawing)]


CHANGED: dict[str, Any] = {
    "layout": {"grid": [7, 12]}, "selection": "changed", "window": 3, "history_frames": 1.5, "changed_tokens": 2
}  # fmt: skip
"""Frames of several blocks, of which some are kept."""


@pytest.mark.parametrize("ahead", [False, True], ids=["sync", "async"])
def test_blocks_are_kept_by_what_changed(
    ahead: bool, masked_engine: Any, oracle: Any, preemptions: list[int], monkeypatch: Any
) -> None:
    """In both streams, whatever is in flight; after a preemption the same are kept again."""
    schedule_asynchronously(monkeypatch, ahead)
    cases = [
        Case(20, (7, 12)).having(frames=5, steps=2, guidance=3, seed=1),
        Case(9, (7, 12), 3).having(frames=3, steps=3, guidance=4, seed=4, condition_frames=1),
        Case(30, (5, 9), 4).having(frames=3, steps=2, guidance=1, seed=5, window=2, history_frames=1),
        # A model that nobody trained cuts with every frame: some anchors are older than the window.
        Case(11, (7, 12)).having(frames=5, steps=2, guidance=3, seed=6, window=2, history_frames=2, episodes=1),
    ]
    expected = [oracle(case, CHANGED) for case in cases]
    assert expected[0] != oracle(cases[0].having(selection="spatial", changed_tokens=1), CHANGED)
    llm = masked_engine("packcache", CHANGED, variant=ahead)
    core, done = llm.llm_engine.engine_core.engine_core, {}
    for index, case in enumerate(cases):
        llm.llm_engine.add_request(str(index), {"prompt_token_ids": case.ids}, params(case))
    step = 0
    while llm.llm_engine.has_unfinished_requests():
        done |= {output.request_id: output.outputs[0].token_ids for output in llm.llm_engine.step()}
        step += 1
        if step in (6, 17):
            assert core.reset_prefix_cache(reset_running_requests=True)
    assert [list(done[str(index)]) for index in range(len(cases))] == expected
    assert len(preemptions) == 2 * len(cases)
