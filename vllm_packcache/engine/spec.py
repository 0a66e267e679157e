"""The KV cache spec of a layer under a policy.

vLLM asks every layer for a spec in the workers and builds the KV cache manager from it in the engine core: the
spec is what carries the server's configuration from one process to the other.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from typing import Any, Self

from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from vllm_packcache.config import ServerConfig


@dataclass(frozen=True, kw_only=True)
class RetentionSpec(FullAttentionSpec):
    """Full attention of which a policy frees blocks.

    Args:
        retention: the server's configuration as JSON (specs are compared and hashed); see `retaining`.
        max_in_flight_tokens: tokens that may be scheduled and not yet processed; their blocks are still held.
    """

    retention: str
    max_in_flight_tokens: int

    @classmethod
    def retaining(cls, spec: AttentionSpec, config: ServerConfig, max_in_flight_tokens: int) -> AttentionSpec:
        """``spec`` under the policy of ``config``. Only plain full attention is changed."""
        if type(spec) is not FullAttentionSpec:
            return spec
        retention = json.dumps(
            {
                "policy": config.policy.name,
                "source": config.as_mapping(),
                "position_limit": config.position_limit,
            },
            sort_keys=True,
        )
        return cls(**_fields_of(spec), retention=retention, max_in_flight_tokens=max_in_flight_tokens)

    @property
    def server_config(self) -> ServerConfig:
        """The server's configuration."""
        return ServerConfig.parse(**json.loads(self.retention))

    @property
    def max_blocks_per_request(self) -> int | None:
        """Blocks that a request holds at most, whatever its length; None: as many as its length takes.

        With a position limit P the condition and W + 1 frames of a video, and any text, are at most P tokens (see
        `vllm_packcache.plugin`). Where the condition and the window begin and end they may share blocks with
        tokens that are gone: three blocks more.
        """
        limit = self.server_config.position_limit
        return None if limit is None else cdiv(limit + self.max_in_flight_tokens, self.block_size) + 3

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes that the longest request holds at most: what the pool must have room for at start."""
        whole = super().max_memory_usage_bytes(vllm_config)
        blocks = self.max_blocks_per_request
        return whole if blocks is None else min(whole, blocks * self.page_size_bytes)

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """One spec for layers that share a KV cache group."""
        first = specs[0]
        assert {spec.retention for spec in specs} == {first.retention}, "layers of one KV cache group differ in policy"
        return replace(first, **_fields_of(FullAttentionSpec.merge(specs)))


def _fields_of(spec: AttentionSpec) -> dict[str, Any]:
    return {field.name: getattr(spec, field.name) for field in fields(FullAttentionSpec) if field.init}
