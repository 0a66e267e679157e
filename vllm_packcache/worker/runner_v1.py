"""Adapter of vLLM's V1 model runner (what vLLM uses on a CPU).

The runner knows the requests of a step, the metadata builders do not: while the runner builds the attention
metadata, the step is published to `vllm_packcache.worker.attention`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

from vllm_packcache.config import ServerConfig, config_of
from vllm_packcache.retention import Retention
from vllm_packcache.worker.step import Row, Step, publish

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_input_batch import CachedRequestState
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

_ATTRIBUTE = "_packcache"


def publishing_step(build_attention_metadata: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``GPUModelRunner._build_attention_metadata`` to publish the step it builds for."""

    @wraps(build_attention_metadata)
    def wrapper(
        runner: GPUModelRunner, *args: Any, num_scheduled_tokens: dict[str, int] | None = None, **kwargs: Any
    ) -> Any:
        config = config_of(runner)
        # Warm-up and graph capture run on made-up rows and name no requests.
        step = _step(runner, config, num_scheduled_tokens) if config and num_scheduled_tokens else None
        if step is None:
            return build_attention_metadata(runner, *args, num_scheduled_tokens=num_scheduled_tokens, **kwargs)
        with publish(step):
            return build_attention_metadata(runner, *args, num_scheduled_tokens=num_scheduled_tokens, **kwargs)

    return wrapper


def _step(runner: GPUModelRunner, config: ServerConfig, num_scheduled_tokens: dict[str, int]) -> Step | None:
    """The step as rows; None when every request keeps its whole cache and there is nothing to compact."""
    batch = runner.input_batch
    block_size = runner.kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
    rows = [
        Row(
            _retention_of(runner.requests[request_id], config, block_size),
            int(batch.num_computed_tokens_cpu[index]),
            num_scheduled_tokens[request_id],
        )
        for index, request_id in enumerate(batch.req_ids)
    ]
    if all(row.retention is None for row in rows):
        return None
    return Step(rows, batch.block_table[0].get_numpy_array(), block_size)


def _retention_of(request: CachedRequestState, config: ServerConfig, block_size: int) -> Retention | None:
    # Kept on the runner's own record of the request, so that it lives exactly as long.
    if not hasattr(request, _ATTRIBUTE):
        params = request.sampling_params
        plan = config.plan(params.extra_args if params else None, request.num_prompt_tokens)
        setattr(request, _ATTRIBUTE, plan and Retention(plan.layout, plan.policy, block_size))
    return getattr(request, _ATTRIBUTE)
