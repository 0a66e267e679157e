"""What `benchmarks.long_video` does: engines that are asked about videos."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import ExitStack
from functools import partial
from multiprocessing.sharedctypes import SynchronizedArray
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
from rich.console import Console

from benchmarks.engine_process import child_environment, engine_environment
from benchmarks.long_video.plan import BLOCK_SIZE, CHUNK, FORCED, GENERATED, MEASUREMENTS, OPTIONS, LongVideoPlan
from vllm_packcache.demo.scores import sequence, true_frames
from vllm_packcache.demo.tokenizer import CONDITION_TOKENS, FRAME_TOKENS, MODEL_DIR, VideoTokenizer, world_prompt
from vllm_packcache.demo.world import World, make_world
from vllm_packcache.tools.progress import counting

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.llm_engine import LLMEngine

Int64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

PROCESSES = 2
"""Engines that compute at the same time, one thread each. Quality does not depend on it."""


class Answers(NamedTuple):
    """What an engine said of one variant.

    Args:
        likeliest: whether each true token was the most likely one, [V, T, 257].
        generated: token ids, [V, T * 257]; None: not asked for.
    """

    likeliest: Bools
    generated: Int64 | None


def ask_all(plan: LongVideoPlan, console: Console) -> dict[str, Answers]:
    """The answers of all variants, by name: each from an engine in a process of its own."""
    context = multiprocessing.get_context("spawn")
    counters: _Counters = {measurement: context.Array("l", len(plan.variants)) for measurement in MEASUREMENTS}
    # Compiling the function that ranks tokens takes longer than it runs.
    own = {"VLLM_LOGGING_LEVEL": "ERROR", "TORCH_COMPILE_DISABLE": "1"}
    with ExitStack() as stack:
        stack.enter_context(child_environment(engine_environment(1, plugin=True) | own))
        pool = stack.enter_context(
            ProcessPoolExecutor(PROCESSES, context, _begin_process, (counters,), max_tasks_per_child=1)
        )
        progress = stack.enter_context(counting(console, "{task.fields[unit]}"))
        bars = {
            (measurement, number): progress.add_task(
                f"{variant.name}: {measurement.replace('_', '-')}",
                start=False,
                total=plan.videos if measurement == FORCED else plan.frames,
                unit="videos" if measurement == FORCED else "frames",
            )
            for number, variant in enumerate(plan.variants)
            for measurement in variant.measurements
        }
        futures: list[Future[Answers]] = [pool.submit(_ask, plan, number) for number in range(len(plan.variants))]
        waiting: set[Future[Answers]] = set(futures)
        while waiting:
            finished, waiting = wait(waiting, timeout=0.5)
            for (measurement, number), bar in bars.items():
                if done := counters[measurement][number]:
                    progress.start_task(bar)
                    progress.update(bar, completed=done)
            for future in finished:
                if future.exception() is not None:
                    pool.shutdown(wait=False, cancel_futures=True)
                    future.result()
    return {variant.name: future.result() for variant, future in zip(plan.variants, futures, strict=True)}


_Counters = dict[str, "SynchronizedArray[int]"]
"""By measurement, how much of it is done for each variant: videos or frames. Shared by all processes."""

_counters: _Counters


def _begin_process(counters: _Counters) -> None:
    """First thing in a process: keep the shared counters, and what vLLM prints away from the progress bars."""
    global _counters
    _counters = counters
    descriptor = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(descriptor, stream.fileno())


def _ask(plan: LongVideoPlan, number: int) -> Answers:
    """Body of a process: measure variant ``number``."""
    from vllm import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    variant = plan.variants[number]
    # A multiple of the block, with room for the token that is sampled after a video.
    length = (plan.tokens // BLOCK_SIZE + 2) * BLOCK_SIZE
    args = EngineArgs(
        str(MODEL_DIR),
        skip_tokenizer_init=True,
        dtype="float32",
        seed=0,
        block_size=BLOCK_SIZE,
        max_model_len=length,
        max_num_batched_tokens=CHUNK,
        max_num_seqs=plan.videos,
        # Admission counts a whole video; beside it the other videos hold a window each.
        num_gpu_blocks_override=length // BLOCK_SIZE + 60 * plan.videos,
        kv_cache_memory_bytes=2**30,
        hf_overrides={"max_position_embeddings": length},
        enforce_eager=True,
        disable_log_stats=True,
        use_tqdm_on_load=False,
        additional_config={"kv_cache_policy": variant.policy, "kv_cache_policy_config": variant.config},
    )
    engine = LLMEngine.from_engine_args(args)
    tokenizer = VideoTokenizer()
    worlds = [make_world(seed) for seed in plan.seeds]

    def telling(measurement: str) -> Callable[[int], None]:
        return partial(_counters[measurement].__setitem__, number)

    likeliest = likeliest_tokens(engine, tokenizer, worlds, plan.frames, telling(FORCED))
    ids = generate(engine, tokenizer, worlds, plan.frames, telling(GENERATED)) if variant.generates else None
    return Answers(likeliest, ids)


def likeliest_tokens(
    engine: LLMEngine, tokenizer: VideoTokenizer, worlds: Sequence[World], frames: int, tell: Callable[[int], None]
) -> Bools:
    """Whether each token of the true videos is the most likely one after the true tokens before it.

    Args:
        engine: of the demo model.
        tokenizer: the demo's.
        worlds: V worlds.
        frames: T.
        tell: is told how many videos are done.

    Returns:
        [V, T, 257].
    """
    found = np.zeros((len(worlds), frames * FRAME_TOKENS), dtype=np.bool_)
    for number, world in enumerate(worlds):
        truth = sequence(tokenizer, true_frames(tokenizer, world, frames)[1:]).tolist()
        (output,) = _run(engine, [[*world_prompt(tokenizer, world), *truth]], _greedy(1, prompt_logprobs=0))
        assert output.prompt_logprobs is not None
        after = output.prompt_logprobs[CONDITION_TOKENS:]
        found[number] = [of_place[token].rank == 1 for of_place, token in zip(after, truth, strict=True)]
        tell(number + 1)
    return found.reshape(len(worlds), frames, FRAME_TOKENS)


def generate(
    engine: LLMEngine, tokenizer: VideoTokenizer, worlds: Sequence[World], frames: int, tell: Callable[[int], None]
) -> Int64:
    """The videos that the model makes of the worlds' conditions, all in one batch.

    Args:
        engine: of the demo model.
        tokenizer: the demo's.
        worlds: V worlds.
        frames: T.
        tell: is told how many frames are done.

    Returns:
        Token ids, [V, T * 257].
    """
    prompts = [world_prompt(tokenizer, world) for world in worlds]
    outputs = _run(engine, prompts, _greedy(frames * FRAME_TOKENS), lambda steps: tell(steps // FRAME_TOKENS))
    return np.array([output.outputs[0].token_ids for output in outputs])


def _greedy(max_tokens: int, prompt_logprobs: int | None = None) -> SamplingParams:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=0,
        max_tokens=max_tokens,
        ignore_eos=True,
        detokenize=False,
        prompt_logprobs=prompt_logprobs,
        # A list of all tokens so far with every step would take longer than the step.
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args=OPTIONS,
    )


def _run(
    engine: LLMEngine,
    prompts: Sequence[list[int]],
    params: SamplingParams,
    tell: Callable[[int], None] = lambda steps: None,
) -> list[RequestOutput]:
    """Outputs of a batch of requests in their order; ``tell`` is told how many steps were run."""
    for i, ids in enumerate(prompts):
        engine.add_request(str(i), {"prompt_token_ids": ids}, params)
    outputs: dict[str, RequestOutput] = {}
    steps = 0
    while engine.has_unfinished_requests():
        outputs |= {output.request_id: output for output in engine.step()}
        steps += 1
        tell(steps)
    return [outputs[str(i)] for i in range(len(prompts))]
