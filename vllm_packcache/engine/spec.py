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
from vllm_packcache.retention import Retention


@dataclass(frozen=True, kw_only=True)
class RetentionSpec(FullAttentionSpec):
    """Full attention of which a policy frees blocks.

    Args:
        retention: the server's configuration as JSON (specs are compared and hashed); see `retaining`.
        steps_ahead: steps that may be scheduled before one has been processed, which frees no blocks until then.
    """

    retention: str
    steps_ahead: int

    @classmethod
    def retaining(cls, spec: AttentionSpec, config: ServerConfig, steps_ahead: int) -> AttentionSpec:
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
        return cls(**_fields_of(spec), retention=retention, steps_ahead=steps_ahead)

    @property
    def server_config(self) -> ServerConfig:
        """The server's configuration."""
        return ServerConfig.parse(**json.loads(self.retention))

    def most_blocks(self, max_model_len: int) -> int:
        """Blocks that the pool must have room for at start: those of the longest video in the server's layout.

        Its condition is the conditioning image alone, because how long a text may be is known of a request only;
        where there is no layout, a video with every position that the model has. A request that holds more than the
        pool has is refused when it comes (see `vllm_packcache.plugin`).
        """
        config = self.server_config
        bounds = [cdiv(max_model_len, self.block_size)]
        if config.layout is not None:
            usual = Retention(config.layout.shortest_condition(), config.policy, self.block_size)
            bound = usual.most_blocks(self.steps_ahead)
            if bound is not None:
                bounds.append(bound)
        if config.position_limit is not None:
            # Where the condition and the window begin and end they may share blocks with tokens that are gone.
            bounds.append(cdiv(config.position_limit + self.steps_ahead, self.block_size) + 3)
        return min(bounds)

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes that the longest request holds at most: what the pool must have room for at start."""
        held = self.most_blocks(vllm_config.model_config.max_model_len) * self.page_size_bytes
        return min(super().max_memory_usage_bytes(vllm_config), held)

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """One spec for layers that share a KV cache group."""
        first = specs[0]
        assert {spec.retention for spec in specs} == {first.retention}, "layers of one KV cache group differ in policy"
        return replace(first, **_fields_of(FullAttentionSpec.merge(specs)))


def _fields_of(spec: AttentionSpec) -> dict[str, Any]:
    return {field.name: getattr(spec, field.name) for field in fields(FullAttentionSpec) if field.init}
