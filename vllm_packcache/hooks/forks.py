"""Videos of one request (``n``): vLLM makes a request of each, and each gets a seed of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING

from vllm_packcache.config.server import REQUEST_PREFIX
from vllm_packcache.core.forks import FORK_OPTION

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.v1.engine.parallel_sampling import ParentRequest

SEED = f"{REQUEST_PREFIX}seed"


def seed_forks(get_child_sampling_params: Callable[..., SamplingParams]) -> Callable[..., SamplingParams]:
    """Wrap ``ParentRequest._get_child_sampling_params``: seeds count up from that of the request.

    A request that is none of ours, or whose model has seeds of vLLM's, is not changed.
    """

    @wraps(get_child_sampling_params)
    def wrapper(parent: ParentRequest, index: int) -> SamplingParams:
        params = get_child_sampling_params(parent, index)
        options = params.extra_args or {}
        if FORK_OPTION not in options:
            return params
        params = copy.copy(params)
        params.extra_args = {**options, FORK_OPTION: parent.request_id, SEED: options.get(SEED, 0) + index}
        return params

    return wrapper
