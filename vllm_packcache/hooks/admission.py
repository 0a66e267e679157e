"""What vLLM sets aside for the longest sequence that there may be, for every request, whatever requests hold.

A policy bounds what a request holds, so `--max-model-len` may be as long as a video gets. vLLM's own tables have an
entry for every block that a request has ever had. Ours are as long as what a request can hold.
"""

from __future__ import annotations

import logging
import os
from typing import NamedTuple

from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.utils.math_utils import cdiv
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_packcache.config.errors import ConfigError

logger = logging.getLogger("vllm.packcache")

_WORTH_A_WORD = 2**30
"""Bytes from which on it is logged."""

_ID, _IS_ID, _AXES = 4, 1, 3
"""Bytes of a token or block id, and of the flag beside it; axes of positions that have several."""


class SetAside(NamedTuple):
    """Bytes of one worker.

    Attributes:
        device: beside the KV cache, of which vLLM has taken what it was allowed by then.
        host: of memory that is really taken, not only reserved.
    """

    device: int
    host: int


def set_aside(vllm_config: VllmConfig, groups: int = 1) -> SetAside:
    """What vLLM's tables take.

    Args:
        vllm_config: a server's.
        groups: KV cache groups.
    """
    model, scheduler = vllm_config.model_config, vllm_config.scheduler_config
    tokens = scheduler.max_num_seqs * model.max_model_len
    pages = cdiv(model.max_model_len, vllm_config.cache_config.block_size) * groups
    table = scheduler.max_num_seqs * pages * _ID
    if vllm_config.use_v2_model_runner:
        # A table of slots and one of the step; token ids, and positions if they have axes.
        device, host = 2 * table, tokens * _ID * (1 + _AXES * model.uses_mrope)
    else:
        # It makes its table before it measures what is left for the KV cache, and a copy on the host.
        device, host = 0, table + tokens * (_ID + _IS_ID)
    backend = vllm_config.attention_config.backend
    if backend is AttentionBackendEnum.FLASHINFER:
        device += table
    elif backend is AttentionBackendEnum.FLEX_ATTENTION:
        device += scheduler.max_num_batched_tokens * pages * _ID
    if current_platform.is_cpu():
        # The table of the V1 runner is made twice there, too.
        return SetAside(0, host + (device or table))
    return SetAside(device, host)


def check_tables(vllm_config: VllmConfig, groups: int = 1) -> None:
    """Refuse sequences so long that their tables do not fit into memory, which would only show when they are made.

    Raises:
        ConfigError: naming the options and the bytes.
    """
    needed = set_aside(vllm_config, groups)
    given = (
        f"--max-model-len {vllm_config.model_config.max_model_len} and --max-num-seqs "
        f"{vllm_config.scheduler_config.max_num_seqs}"
    )
    cache, rooms = vllm_config.cache_config, []
    if current_platform.is_cuda_alike():
        left = current_platform.get_device_total_memory() * (1 - cache.gpu_memory_utilization)
        whose = f"--gpu-memory-utilization {cache.gpu_memory_utilization:g} leaves"
        rooms.append((needed.device, "GPU memory for block tables", left, whose, "one of the three"))
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    rooms.append((needed.host, "memory for token ids and block tables", total, "this machine has", "one of them"))
    for wanted, what, room, whose, remedy in rooms:
        if wanted > room:
            raise ConfigError(
                f"{given} need {_gib(wanted)} of {what}, because vLLM sets it aside for the longest sequence, and "
                f"{whose} {_gib(room)}: lower {remedy}"
            )
        if wanted >= _WORTH_A_WORD:
            logger.info("%s: vLLM sets aside %s of %s", given, _gib(wanted), what)


def _gib(count: float) -> str:
    return f"{count / 2**30:,.1f} GiB"
