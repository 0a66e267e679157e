"""The KV cache spec of a layer under a policy.

vLLM asks every layer for a spec in the workers and builds the KV cache manager from it in the engine core: the
spec is what carries the server's configuration from one process to the other.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Self

from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from vllm_packcache.config import ServerConfig


@dataclass(frozen=True, kw_only=True)
class RetentionSpec(FullAttentionSpec):
    """Full attention of which a policy frees blocks.

    Args:
        retention: the server's configuration as JSON (specs are compared and hashed); see `retaining`.
    """

    retention: str

    @classmethod
    def retaining(cls, spec: AttentionSpec, config: ServerConfig) -> AttentionSpec:
        """``spec`` under the policy of ``config``. Only plain full attention is changed."""
        if type(spec) is not FullAttentionSpec:
            return spec
        retention = json.dumps({"policy": config.policy.name, "options": config.as_mapping()}, sort_keys=True)
        return cls(**_fields_of(spec), retention=retention)

    @property
    def server_config(self) -> ServerConfig:
        """The server's configuration."""
        retention = json.loads(self.retention)
        return ServerConfig.parse(retention["policy"], retention["options"])

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """One spec for layers that share a KV cache group."""
        retentions = {spec.retention for spec in specs}
        assert len(retentions) == 1, f"layers of one KV cache group have different policies: {retentions}"
        return cls(**_fields_of(FullAttentionSpec.merge(specs)), retention=retentions.pop())


def _fields_of(spec: AttentionSpec) -> dict[str, object]:
    return {field.name: getattr(spec, field.name) for field in fields(FullAttentionSpec) if field.init}
