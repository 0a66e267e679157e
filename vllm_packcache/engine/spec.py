"""The KV cache spec of a layer under a policy.

vLLM asks every layer for a spec in the workers and builds the KV cache manager from it in the engine core: the
spec is what carries the server's configuration from one process to the other.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, Self

from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from vllm_packcache.config.errors import ConfigError
from vllm_packcache.config.server import POLICY_KEY, LayoutConfig, ServerConfig
from vllm_packcache.core.retention import Retention


@dataclass(frozen=True, kw_only=True)
class RetentionSpec(FullAttentionSpec):
    """Full attention of which a policy frees blocks.

    Args:
        retention: the server's configuration as JSON (specs are compared and hashed); see `retaining`.
        tokens_ahead: tokens that may be scheduled before a step has been processed, which frees no blocks until then.
        frame_by_frame: a prefill chunk ends with its frame: attention has as many rows as a step has requests.
    """

    retention: str
    tokens_ahead: int
    frame_by_frame: bool = False

    @classmethod
    def retaining(
        cls, spec: AttentionSpec, config: ServerConfig, tokens_ahead: int, frame_by_frame: bool = False
    ) -> AttentionSpec:
        """``spec`` under the policy of ``config``. Only plain full attention is changed."""
        if type(spec) is not FullAttentionSpec:
            return spec
        return cls(
            **fields_of(spec),
            retention=as_json(config),
            tokens_ahead=tokens_ahead,
            frame_by_frame=frame_by_frame,
        )

    @property
    def server_config(self) -> ServerConfig:
        """The server's configuration.

        Raises:
            ConfigError: the policy is another one here than in the process that made the spec.
        """
        return of_json(self.retention)

    @property
    def usual_layout(self) -> LayoutConfig | None:
        """The frame that the pool must have room for at start; None: the server knows of none."""
        return self.server_config.layout

    def most_blocks(self, max_model_len: int) -> int:
        """Blocks that the pool must have room for at start: those of the longest video in the server's layout.

        Its condition is the conditioning image alone, because how long a text may be is known of a request only;
        where there is no layout, a video with every position that the model has. A request that holds more than the
        pool has is refused when it comes (see `vllm_packcache.hooks.startup`).
        """
        config, layout = self.server_config, self.usual_layout
        bounds = [cdiv(max_model_len, self.block_size)]
        if layout is not None:
            usual = Retention(layout.shortest_condition(), config.policy, self.block_size)
            bound = usual.most_blocks(self.tokens_ahead)
            if bound is not None:
                bounds.append(bound)
        if config.position_limit is not None:
            # Where the condition and the window begin and end they may share blocks with tokens that are gone.
            bounds.append(cdiv(config.position_limit + self.tokens_ahead, self.block_size) + 3)
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
        return replace(first, **fields_of(FullAttentionSpec.merge(specs)))


def as_json(config: ServerConfig) -> str:
    """``config`` in a form that can be compared and hashed."""
    arguments = {"policy": config.name, "source": config.as_mapping(), "position_limit": config.position_limit}
    return json.dumps({"config": arguments, "fingerprint": config.fingerprint()}, sort_keys=True)


@cache
def of_json(text: str) -> ServerConfig:
    """The configuration that `as_json` wrote in another process.

    Raises:
        ConfigError: the policy of that name has other options, is another one, or decides otherwise here.
    """
    sent = json.loads(text)
    config, there = ServerConfig.parse(**sent["config"]), sent["fingerprint"]
    here = config.fingerprint()
    if here != there:
        raise ConfigError(
            f"{POLICY_KEY}: {config.name!r} is {there['class']} (decisions {there['decisions']}) in the workers and "
            f"{here['class']} (decisions {here['decisions']}) in the scheduler: install the same package in the "
            "same version for every process and node"
        )
    return config


def fields_of(spec: AttentionSpec) -> dict[str, Any]:
    """What ``spec`` says of full attention, by name."""
    return {field.name: getattr(spec, field.name) for field in fields(FullAttentionSpec) if field.init}
