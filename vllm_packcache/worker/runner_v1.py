"""Adapter of vLLM's V1 model runner (what vLLM uses on a CPU).

The runner knows the requests of a step, the metadata builders do not: while the runner builds the attention
metadata, the step is published to `vllm_packcache.worker.attention`. Once it has, and before the model runs, cached
keys are rotated where a window slides, and new tokens get their positions. After that tokens are sampled.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from operator import is_
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_packcache.config.server import ServerConfig, config_of
from vllm_packcache.core.retention import DECISIONS
from vllm_packcache.worker.attention import HostCompaction
from vllm_packcache.worker.blocks.batch import BatchReads
from vllm_packcache.worker.keys.layout import cached_keys
from vllm_packcache.worker.keys.rotation import KeyRotation, rotary_of
from vllm_packcache.worker.step import Kept, publish

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.gpu_input_batch import CachedRequestState
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

_VIDEO = "_packcache_video"
_BATCH = "_packcache_batch"
_STEP = "_packcache_step"
_ROTATION = "_packcache_rotation"


def find_keys(initialize_kv_cache: Callable[..., None]) -> Callable[..., None]:
    """Wrap ``GPUModelRunner.initialize_kv_cache`` to learn where the keys lie and how they are rotated."""

    @wraps(initialize_kv_cache)
    def wrapper(runner: GPUModelRunner, *args: Any, **kwargs: Any) -> None:
        initialize_kv_cache(runner, *args, **kwargs)
        config = config_of(runner)
        if config is None or config.positions != "rebase":
            return
        layers = runner.compilation_config.static_forward_context
        names = [name for group in runner.kv_cache_config.kv_cache_groups for name in group.layer_names]
        rotation = KeyRotation.of(rotary_of(runner.model), (cached_keys(layers[name]) for name in names))
        setattr(runner, _ROTATION, rotation)

    return wrapper


def hear_decisions(update_states: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``GPUModelRunner._update_states``, after which the runner knows the requests of the step."""

    @wraps(update_states)
    def wrapper(runner: GPUModelRunner, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        updated = update_states(runner, scheduler_output, *args, **kwargs)
        told = getattr(scheduler_output, DECISIONS, None)
        config = config_of(runner) if told else None
        if told and config is not None:
            block_size = runner.kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
            for name, decisions in told.items():
                own = _kept(runner.requests[name], config, block_size)
                assert own is not None, "only what a video keeps is told"
                own.retention.tell(decisions)
        return updated

    return wrapper


def resume_sessions(update_streaming_request: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``GPUModelRunner._update_streaming_request``: in another turn of a session all that is kept is told anew.

    A turn's seed is of its frame alone, so that a video which is played again comes out the same.
    """

    @wraps(update_streaming_request)
    def wrapper(runner: GPUModelRunner, req_id: str, new_req_data: Any) -> CachedRequestState:
        request = update_streaming_request(runner, req_id, new_req_data)
        if getattr(request, _VIDEO, None) is not None:
            delattr(request, _VIDEO)
            setattr(runner, _BATCH, None)
        seed = None if request.sampling_params is None else request.sampling_params.seed
        if request.generator is not None and seed is not None and config_of(runner) is not None:
            request.generator.manual_seed(seed)
        return request

    return wrapper


def publish_step(build_attention_metadata: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``GPUModelRunner._build_attention_metadata`` to publish the step it builds for."""

    @wraps(build_attention_metadata)
    def wrapper(
        runner: GPUModelRunner, *args: Any, num_scheduled_tokens: dict[str, int] | None = None, **kwargs: Any
    ) -> Any:
        config = config_of(runner)
        # Warm-up and graph capture run on made-up rows and name no requests.
        batch = _begin(runner, config, num_scheduled_tokens) if config and num_scheduled_tokens else None
        setattr(runner, _STEP, batch)
        if batch is None:
            return build_attention_metadata(runner, *args, num_scheduled_tokens=num_scheduled_tokens, **kwargs)
        with publish(HostCompaction(batch)):
            return build_attention_metadata(runner, *args, num_scheduled_tokens=num_scheduled_tokens, **kwargs)

    return wrapper


def position_tokens(preprocess: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``GPUModelRunner._preprocess``, the last thing before the model runs.

    The slot mapping has been computed from the runner's positions by then. They are changed in place, where a
    captured graph reads them, and written anew in every step.
    """

    @wraps(preprocess)
    def wrapper(runner: GPUModelRunner, *args: Any, **kwargs: Any) -> Any:
        inputs = preprocess(runner, *args, **kwargs)
        batch: BatchReads | None = getattr(runner, _STEP, None)
        if batch is None:
            return inputs
        # A window slides where a frame is entered.
        for row in batch.entered:
            own, computed = batch.kept[row], int(batch.computed[row])
            if own is not None and own.positions.slides(computed):
                blocks = torch.from_numpy(batch.block_table[row])
                getattr(runner, _ROTATION).slide(own.retention, own.positions, computed, blocks)
        shifts = batch.shifts()
        if shifts is not None:
            positions = inputs[2]
            on_device = async_tensor_h2d(shifts, device=positions.device)
            positions[..., : shifts.shape[1]] += on_device if positions.dim() > 1 else on_device[0]
        return inputs

    return wrapper


def keep_noise(sample_tokens: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``GPUModelRunner.sample_tokens``: on a CPU, a token that is thrown away costs no random number.

    A chunk that does not end its prefill is sampled like any other. vLLM turns the generator of a seeded request back
    afterwards, which a generator of a CPU cannot do. Here it is not drawn from: that token comes from the common noise.
    """

    @wraps(sample_tokens)
    def wrapper(runner: GPUModelRunner, *args: Any, **kwargs: Any) -> Any:
        if config_of(runner) is None or runner.device.type != "cpu":
            return sample_tokens(runner, *args, **kwargs)
        generators = runner.input_batch.generators
        discarded = runner.discard_request_mask.np[: runner.input_batch.num_reqs]
        spared = {index: generators.pop(index) for index in list(generators) if discarded[index]}
        try:
            return sample_tokens(runner, *args, **kwargs)
        finally:
            generators.update(spared)

    return wrapper


class _Batch(NamedTuple):
    """Requests of the batch, in its order, and what they read."""

    requests: list[CachedRequestState]
    reads: BatchReads


def _begin(runner: GPUModelRunner, config: ServerConfig, num_scheduled_tokens: dict[str, int]) -> BatchReads | None:
    """The step that begins; None: no request is a video, and there is nothing to do."""
    batch, names = runner.input_batch, runner.input_batch.req_ids
    requests = [runner.requests[name] for name in names]
    known: _Batch | None = getattr(runner, _BATCH, None)
    if known is None or len(known.requests) != len(requests) or not all(map(is_, known.requests, requests)):
        block_size = runner.kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        known = _Batch(requests, BatchReads([_kept(request, config, block_size) for request in requests], block_size))
        setattr(runner, _BATCH, known)
    reads = known.reads
    if not reads.has_videos:
        return None
    computed = batch.num_computed_tokens_cpu[: len(names)].astype(np.int64)
    scheduled = np.array([num_scheduled_tokens[name] for name in names], dtype=np.int64)
    reads.begin(computed, scheduled, batch.block_table[0].get_numpy_array())
    return reads


def _kept(request: CachedRequestState, config: ServerConfig, block_size: int) -> Kept | None:
    # Kept on the runner's own record of the request, so that it lives exactly as long.
    if not hasattr(request, _VIDEO):
        made = config.request_of(request.sampling_params, request.prompt_token_ids, request.num_prompt_tokens)
        setattr(request, _VIDEO, Kept.of(made, block_size))
    return getattr(request, _VIDEO)
