"""Guided videos of a causal model in the real engine, on vLLM's V2 runner: token for token equal to two sequences.

Every request's tokens are those of the plain PyTorch loop, float32: a second sequence with the negative condition, fed
the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.margins import TIE, CarefulReference, Tie
from tests.runner import needs_v2
from tests.serving.conftest import PAPERS, generate, prompt, run, sampling, schedule_asynchronously
from tests.serving.drawing import draw, noise
from tests.serving.test_graphs import Replaying
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.media.processors.base import Asked, Kept
from vllm_packcache.media.processors.ids import IdsProcessor
from vllm_packcache.reference.guided import GuidedVideo

pytestmark = needs_v2

BLOCK = 32


@dataclass(frozen=True)
class Case:
    """A request: tokens of the condition and of the negative one, of a frame, of what is given, and to make."""

    condition: int
    negative: int
    frame: int
    given: int
    make: int
    scale: float = 3.0
    seed: int = 0
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def ids(self) -> list[int]:
        return prompt(self.condition + self.given, seed=self.seed)

    @property
    def negative_ids(self) -> list[int]:
        return prompt(self.negative, seed=1000 + self.seed)

    @property
    def params(self) -> Any:
        return sampling(
            self.make,
            tokens_per_frame=self.frame,
            condition_tokens=self.condition,
            guidance=self.scale,
            negative_prompt_ids=self.negative_ids,
            **dict(self.options),
        )

    def video(self, policy: str, config: dict[str, Any]) -> GuidedVideo:
        server = ServerConfig.parse(policy, {**config, "guidance": True})
        made = server.request(self.params.extra_args, self.ids)
        assert made is not None
        first, second = (stream.plan for stream in made.streams)
        return GuidedVideo(self.condition, self.negative_ids, self.scale, first, second, BLOCK)


def check(reference: CarefulReference, case: Case, tokens: list[int], video: GuidedVideo) -> None:
    """Assert that ``tokens`` are the loop's.

    Raises:
        Tie: another token is as good as one of these.
    """
    assert len(tokens) == case.make
    assert not (wrong := _wrong(reference, case, tokens, video)), f"tokens {wrong} are not the reference's"


def differs(reference: CarefulReference, case: Case, tokens: list[int], video: GuidedVideo) -> bool:
    """Whether the loop would make others of another video; what is checked would show nothing otherwise."""
    return bool(_wrong(reference, case, tokens, video, ties=True))


def _wrong(
    reference: CarefulReference, case: Case, tokens: list[int], video: GuidedVideo, ties: bool = False
) -> list[int]:
    logits = video.logits(reference, [*case.ids, *tokens[:-1]])[-len(tokens) :]
    best = logits.topk(2).values
    gaps = best[:, 0] - best[:, 1]
    least = TIE * max(1, 2 * abs(case.scale))
    wrong = (logits.argmax(-1) != torch.tensor(tokens)) & (gaps >= least)
    if not ties and not wrong.any() and gaps.min() < least:
        raise Tie(f"token {int(gaps.argmin())} is ahead by {float(gaps.min()):.1e}")
    return [int(number) for number in wrong.nonzero().flatten()]


@pytest.fixture(scope="module")
def guiding(engine: Callable[..., Any]) -> Callable[..., Any]:
    """``guiding(policy, config, **options)`` -> an `LLM` whose videos may be guided."""
    return lambda policy="packcache", config=PAPERS, **options: engine(policy, {**config, "guidance": True}, **options)


SHORTER = Case(70, 20, 40, 6 * 40 + 25, 30)
LONGER = Case(21, 90, 33, 5 * 33 + 20, 28, scale=1.7, seed=1)
FROM_TEXT = Case(45, 12, 9, 0, 60, scale=5.0, seed=2)
SAME = Case(50, 50, 20, 7 * 20, 25, scale=0.5, seed=3)
BARE = Case(40, 1, 16, 3, 40, scale=2, seed=4)
CASES = [SHORTER, LONGER, FROM_TEXT, SAME, BARE]


@pytest.mark.parametrize("case", CASES)
def test_alone(case: Case, guiding: Any, reference: CarefulReference) -> None:
    (tokens,) = run(guiding(), [case.ids], [case.params])
    video = case.video("packcache", PAPERS)
    check(reference, case, tokens, video)
    assert reference.differs(case.ids, tokens, video.plan), "guidance changed nothing: the comparison shows nothing"


def test_the_comparison_shows_differences(guiding: Any, reference: CarefulReference) -> None:
    """What is similar and wrong makes other tokens."""
    case = replace(SHORTER, make=40)
    (tokens,) = run(guiding(), [case.ids], [case.params])
    video = case.video("packcache", PAPERS)
    check(reference, case, tokens, video)
    others = {
        "another scale": video._replace(scale=2.0),
        "another negative condition": video._replace(negative_ids=video.negative_ids[::-1]),
        "nothing of the second stream is dropped": video._replace(negative_plan=None),
        "nothing of the first stream is dropped": video._replace(plan=None),
        "the streams the other way round": video._replace(scale=1 - case.scale),
    }
    assert [name for name, other in others.items() if not differs(reference, case, tokens, other)] == []


POLICIES = [
    pytest.param("packcache", {}, id="what changed"),
    pytest.param(
        "packcache", {"decay": 0.8, "window": 3, "history_frames": 1.5, "positions": "absolute"}, id="absolute"
    ),
    pytest.param(
        "packcache", {"gamma_text": 0.5, "gamma_condition": 0.3, "layout": {"tokens_per_frame": 40}}, id="quotas"
    ),
    pytest.param("sliding_window", {"window": 2}, id="window"),
    pytest.param("full", {}, id="everything"),
]


@pytest.mark.parametrize(("policy", "config"), POLICIES)
def test_policies(policy: str, config: dict[str, Any], guiding: Any, reference: CarefulReference) -> None:
    cases = [SHORTER, LONGER]
    for case, tokens in zip(cases, run(guiding(policy, config), *_requests(cases)), strict=True):
        check(reference, case, tokens, case.video(policy, config))


@pytest.mark.parametrize("ahead", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("chunk", [32, 512])
def test_in_one_batch_with_what_is_not_guided(
    ahead: bool, chunk: int, guiding: Any, reference: CarefulReference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts come in chunks, and a negative one may be longer than a chunk."""
    schedule_asynchronously(monkeypatch, ahead)
    llm = guiding(max_num_batched_tokens=chunk, max_num_seqs=8, variant=("batch", ahead))
    text, video = prompt(60, seed=90), prompt(90, seed=91)
    others = [(text, sampling(30)), (video, sampling(35, tokens_per_frame=21, condition_tokens=30))]
    prompts, params = _requests(CASES)
    tokens = _staggered(llm, [*zip(prompts, params, strict=True), *others], 3)
    assert type(_scheduler(llm)).__name__ == ("AsyncScheduler" if ahead else "Scheduler")
    pool = _scheduler(llm).kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    for case, own in zip(CASES, tokens, strict=False):
        check(reference, case, own, case.video("packcache", PAPERS))
    reference.check(text, tokens[-2], 30)
    plan = ServerConfig.parse("packcache", PAPERS).plan(others[1][1].extra_args, len(video))
    reference.check(video, tokens[-1], 35, plan)


@pytest.mark.parametrize("ahead", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("config", [PAPERS, {}], ids=["papers", "what changed"])
def test_preempted(
    ahead: bool,
    config: dict[str, Any],
    guiding: Any,
    reference: CarefulReference,
    preemptions: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both streams are computed again, with the ids that had been sampled."""
    schedule_asynchronously(monkeypatch, ahead)
    llm = guiding(config=config, num_gpu_blocks_override=44, max_model_len=600, variant=("crowded", ahead))
    cases = [
        replace(case, make=70, given=case.frame * 2 + 5, seed=20 + place)
        for place, case in enumerate([SHORTER, LONGER, SHORTER, FROM_TEXT])
    ]
    tokens = _staggered(llm, list(zip(*_requests(cases), strict=True)), 5)
    assert any(preemptions), "no video was preempted that had made anything"
    for case, own in zip(cases, tokens, strict=True):
        check(reference, case, own, case.video("packcache", config))
    pool = _scheduler(llm).kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1


@pytest.fixture
def second_tokens(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Tokens ``[start, stop)`` of second streams that are run, in the order in which they are."""
    from vllm_packcache.worker import guidance

    run_so_far: list[tuple[int, int]] = []
    passes = guidance.passes

    def noting(seconds: Any, most: int) -> Any:
        run_so_far.extend((row.computed, row.computed + row.scheduled) for row in (own.row for own in seconds))
        return passes(seconds, most)

    monkeypatch.setattr(guidance, "passes", noting)
    return run_so_far


def test_samples_share_both_conditions(
    guiding: Any, reference: CarefulReference, second_tokens: list[tuple[int, int]]
) -> None:
    """Whole blocks of them are found again, each condition by its own ids; the last token of each is computed."""
    llm = guiding(enable_prefix_caching=True)
    for condition, cached, negative, found in ((96, 64, 80, 64), (100, 96, 128, 96), (40, 32, 20, 0)):
        case = Case(condition, negative, 21, 50, 8, seed=condition)
        prompts, params = _requests([case])
        del second_tokens[:]
        first = run(llm, prompts, params)[0]
        assert second_tokens[0] == (0, negative)
        del second_tokens[:]
        (output,) = llm.generate([{"prompt_token_ids": prompts[0]}], params, use_tqdm=False)
        assert output.num_cached_tokens == cached
        assert second_tokens[0] == (found, negative)
        assert list(output.outputs[0].token_ids) == first
        check(reference, case, first, case.video("packcache", PAPERS))
        # One that is not guided finds all of its condition, and nothing of another's negative one.
        for ids, own in ((case.ids, condition // 32 * 32), ([*case.negative_ids, *prompt(40, seed=7)], 0)):
            (output,) = llm.generate(
                [{"prompt_token_ids": ids}],
                sampling(1, tokens_per_frame=21, condition_tokens=min(condition, len(ids))),
                use_tqdm=False,
            )
            assert output.num_cached_tokens == own


def test_samples_that_begin_together_share_both_conditions(
    guiding: Any, reference: CarefulReference, second_tokens: list[tuple[int, int]]
) -> None:
    """What one finds is computed by another in the same step, in which there are several passes.

    Those that find something have fewer tokens of their first stream to compute, and come first in the batch.
    """
    llm = guiding(enable_prefix_caching=True, max_num_batched_tokens=128, variant="together")
    case = Case(70, 300, 21, 30, 5, seed=33)
    other = replace(case, seed=34)
    salted = {"prompt_token_ids": case.ids, "cache_salt": "another's"}
    prompts = [*({"prompt_token_ids": own.ids} for own in (case, case, other, case)), salted]
    params = [own.params for own in (case, case, other, case, case)]
    # Of another attempt, with other data.
    del second_tokens[:]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert sorted(start for start, _ in second_tokens if start in (0, 288)) == [0, 0, 0, 288, 288]
    for own, output in zip((case, case, other, case, case), outputs, strict=True):
        check(reference, own, list(output.outputs[0].token_ids), own.video("packcache", PAPERS))
    pool = _scheduler(llm).kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1


@pytest.mark.parametrize("case", [SHORTER, LONGER])
def test_a_video_that_goes_on_equals_a_longer_one(case: Case, guiding: Any, reference: CarefulReference) -> None:
    """As ``/v1/videos`` asks for it: the second condition goes on with the first one."""
    layout = {"tokens_per_frame": case.frame}
    server = ServerConfig.parse("packcache", {**PAPERS, "layout": layout, "guidance": True})
    processor = IdsProcessor(server)
    options = {"condition_tokens": case.condition, "negative_prompt_ids": case.negative_ids}
    ids = case.ids[: case.condition + 2 * case.frame]
    asked = Asked(prompt="", ids=tuple(ids), frames=2, guidance=case.scale, options=options)
    llm, prepared, tokens = guiding(config={**PAPERS, "layout": layout}), processor.prepare(asked), []
    for added in (3, 1, 0):
        made = prepared.made * case.frame
        (own,) = run(llm, [prepared.prompt_ids], [sampling(made, **prepared.options)])
        assert prepared.prompt_ids == ids + tokens
        tokens += own
        frames = np.array(own).reshape(-1, case.frame)
        kept = Kept(
            prompt_ids=prepared.prompt_ids,
            frame_ids=frames,
            given=prepared.given,
            size=prepared.size,
            fps=prepared.fps,
            pictures=prepared.pictures,
            options=prepared.options,
        )
        if added:
            prepared = processor.extend(kept, Asked(prompt="", frames=added))
    long = replace(case, given=2 * case.frame, make=len(tokens))
    assert len(tokens) == 6 * case.frame
    check(reference, long, tokens, long.video("packcache", PAPERS))


def test_guidance_of_one_is_none(guiding: Any, engine: Any) -> None:
    """Token for token, and in the number of blocks."""
    llm, ids = guiding(), prompt(100, seed=5)
    options = {"tokens_per_frame": 20, "condition_tokens": 50}
    without = generate(engine("packcache", PAPERS), ids, 40, **options)
    assert generate(llm, ids, 40, **options) == without
    one = {**options, "guidance": 1, "negative_prompt_ids": prompt(30, seed=6)}
    held = _most_blocks(llm, ids, sampling(40, **one))
    assert generate(llm, ids, 40, **one) == without
    assert held == _most_blocks(llm, ids, sampling(40, **options))
    assert held < _most_blocks(llm, ids, sampling(40, **{**one, "guidance": 1.5}))


def test_sampling_of_a_request_follows_guidance(guiding: Any, reference: CarefulReference) -> None:
    """Ids that are allowed, a bias, a least length, and penalties are applied to guided logits.

    A penalty divides what is above 0 and multiplies what is below: of logits that are combined as they are, and not as
    logarithms of probabilities, it makes something else.
    """
    case = replace(FROM_TEXT, make=30)
    params = case.params
    params.allowed_token_ids = list(range(0, 256, 3))
    params.logit_bias = {3: 4.0}
    params.repetition_penalty = 1.3
    params.frequency_penalty = 0.2
    params.min_tokens, params.stop_token_ids = 20, [3]
    params = params.clone()
    tokens = run(guiding(), [case.ids], [params])[0]
    assert len(tokens) >= 20
    assert 3 not in tokens[:-1]
    video, seen = case.video("packcache", PAPERS), list(case.ids)
    forbidden, combined_before = torch.tensor([token % 3 != 0 for token in range(256)]), []

    def sampled(logits: torch.Tensor) -> tuple[int, float]:
        """The token, and by how much it is ahead."""
        logits = logits.masked_fill(forbidden, float("-inf"))
        logits[3] += 4
        made = torch.tensor(seen[len(case.ids) :], dtype=torch.int64)
        if len(made) < 20:
            logits[3] = float("-inf")
        known = torch.tensor(sorted(set(seen)))
        logits[known] = torch.where(logits[known] > 0, logits[known] / 1.3, logits[known] * 1.3)
        logits -= 0.2 * torch.bincount(made, minlength=256)
        best = logits.topk(2)
        return int(best.indices[0]), float(best.values[0] - best.values[1])

    for token in tokens:
        expected, ahead = sampled(video.logits(reference, seen)[-1])
        if ahead < 10 * TIE:
            raise Tie("a token that is penalised")
        assert token == expected
        own, other = (
            reference.logits(ids, plan, BLOCK)[-1]
            for ids, plan in ((seen, video.plan), (video.negative(seen), video.negative_plan))
        )
        combined_before.append(sampled(other + case.scale * (own - other))[0])
        seen.append(token)
    assert combined_before != tokens


def test_samples_are_drawn_from_guided_logits(
    guiding: Any, reference: CarefulReference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several of one request, each of a seed of its own, and the same seeds make the same: see `tests.serving.drawing`.

    Nor can vLLM's kernel for top-k and top-p be interpreted: here a bias stands for what comes between.
    """
    draw(monkeypatch)
    llm, case = guiding(), replace(SHORTER, make=12, given=2 * 40 + 30)
    params = case.params
    params.temperature, params.seed, params.n, params.logit_bias = 1.0, 5, 3, {7: 2.0}
    video = case.video("packcache", PAPERS)

    def samples() -> list[list[int]]:
        (output,) = llm.generate([{"prompt_token_ids": case.ids}], params.clone(), use_tqdm=False)
        return [list(sample.token_ids) for sample in output.outputs]

    made = samples()
    assert len({tuple(tokens) for tokens in made}) == 3
    for number, tokens in enumerate(made):
        ids = [*case.ids, *tokens]
        logits = video.logits(reference, ids[:-1])[-len(tokens) :]
        logits[:, 7] += 2
        for place, (row, token) in enumerate(zip(logits, tokens, strict=True), len(case.ids) - 1):
            best = (row + noise(5 + number, place, 256)).topk(2)
            if best.values[0] - best.values[1] < 10 * TIE:
                raise Tie("a token that is drawn")
            assert token == int(best.indices[0])
    assert samples() == made


def test_ids_of_frames_are_those_of_the_grammar(guiding: Any, reference: CarefulReference) -> None:
    """What may stand where is applied to guided logits."""
    config = {
        **PAPERS,
        "layout": {"grid": [3, 4], "frame_end_tokens": 2, "visual_ids": [100, 180], "frame_end_ids": [7, 8]},
    }
    case = Case(30, 44, 14, 0, 0, seed=7)
    params = sampling(3 * 14, guidance=3, negative_prompt_ids=case.negative_ids)
    made = ServerConfig.parse("packcache", {**config, "guidance": True}).request(params.extra_args, case.ids)
    assert made is not None
    assert made.grammar is not None
    plans = [stream.plan for stream in made.streams]
    video = GuidedVideo(case.condition, case.negative_ids, 3, *plans)
    tokens, seen = run(guiding(config=config), [case.ids], [params])[0], list(case.ids)
    for token in tokens:
        allowed = made.grammar.allowed(len(seen))
        logits = video.logits(reference, seen)[-1][allowed.first : allowed.last + 1]
        best = logits.topk(min(2, len(logits)))
        if len(logits) > 1 and best.values[0] - best.values[1] < 10 * TIE:
            raise Tie("a token of a frame")
        assert token == allowed.first + int(best.indices[0])
        seen.append(token)
    assert tokens[12:14] == [7, 8]


def test_decode_steps_from_captured_graphs(guiding: Any, reference: CarefulReference) -> None:
    """The first streams' rows are replayed, the second ones' are not."""
    llm = guiding(variant="graphs", max_num_seqs=4)
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    runner.cudagraph_manager = graphs = Replaying(runner)
    cases, text = [SHORTER, replace(LONGER, make=20)], prompt(50, seed=92)
    *tokens, own = run(llm, *_with(_requests(cases), (text, sampling(25))))
    for case, made in zip(cases, tokens, strict=True):
        check(reference, case, made, case.video("packcache", PAPERS))
    reference.check(text, own, 25)
    assert {(4, 3), (1, 1)} <= set(graphs.replayed)


def test_a_gpu_backend(guiding: Any, reference: CarefulReference, backend: str) -> None:
    """Keys in rows, blocks of 16 tokens, builders with memory of their own."""
    case = Case(20, 31, 20, 50, 8, seed=8)
    llm = guiding(
        variant=backend, block_size=16, max_model_len=160, max_num_batched_tokens=64, max_num_seqs=2,
        num_gpu_blocks_override=48,
    )  # fmt: skip
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    assert runner.attn_groups[0][0].backend.get_name() == backend
    text = prompt(30, seed=93)
    tokens, own = run(llm, *_with(_requests([case]), (text, sampling(6))))
    check(reference, case, tokens, case.video("packcache", PAPERS)._replace(block_size=16))
    reference.check(text, own, 6)


def test_what_an_engine_cannot_guide_is_refused(guiding: Any) -> None:
    from vllm.exceptions import VLLMValidationError

    llm, case = guiding(), FROM_TEXT

    def refusal(**changed: Any) -> str:
        params = case.params
        for name, value in changed.pop("sampling", {}).items():
            setattr(params, name, value)
        params.extra_args = {**params.extra_args, **{f"packcache_{name}": value for name, value in changed.items()}}
        with pytest.raises(VLLMValidationError) as refused:
            run(llm, [case.ids], [params])
        return str(refused.value)

    assert "negative_prompt_ids has id 256, and the model has 256" in refusal(negative_prompt_ids=[1, 256])
    assert "tokens with its negative prompt, and the server takes 8192" in refusal(negative_prompt_ids=[1] * 8190)
    assert "cannot be combined with prompt_logprobs" in refusal(sampling={"prompt_logprobs": 1})


def _with(requests: tuple[list[list[int]], list[Any]], other: tuple[list[int], Any]) -> tuple[list[Any], list[Any]]:
    prompts, params = requests
    return [*prompts, other[0]], [*params, other[1]]


def _requests(cases: list[Case]) -> tuple[list[list[int]], list[Any]]:
    return [case.ids for case in cases], [case.params for case in cases]


def _scheduler(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


def _staggered(llm: Any, requests: list[tuple[list[int], Any]], steps_between: int) -> list[list[int]]:
    """Generated tokens of requests that come one after another, so many steps apart."""
    engine, waiting, done = llm.llm_engine, list(enumerate(requests)), {}
    while waiting or engine.has_unfinished_requests():
        if waiting:
            number, (ids, params) = waiting.pop(0)
            engine.add_request(f"staggered-{number}", {"prompt_token_ids": ids}, params)
        for _ in range(steps_between):
            for output in engine.step():
                if output.finished:
                    done[output.request_id] = list(output.outputs[0].token_ids)
    return [done[f"staggered-{number}"] for number in range(len(requests))]


def _most_blocks(llm: Any, ids: list[int], params: Any) -> int:
    engine, pool = llm.llm_engine, _scheduler(llm).kv_cache_manager.block_pool
    free = pool.get_num_free_blocks()
    engine.add_request("held", {"prompt_token_ids": ids}, params)
    held = 0
    while engine.has_unfinished_requests():
        engine.step()
        held = max(held, free - pool.get_num_free_blocks())
    return held
