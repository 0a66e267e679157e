"""The KV cache spec of a layer under a policy.

vLLM asks every layer for a spec in the workers and builds the KV cache manager from it in the engine core: the
spec is what carries the server's configuration from one process to the other.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, ClassVar, Self

from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from vllm_packcache import families
from vllm_packcache.config.errors import ConfigError
from vllm_packcache.config.server import POLICY_KEY, LayoutConfig, ServerConfig, read_config
from vllm_packcache.config.videos import VideosConfig
from vllm_packcache.core.encoded import Encoding, retention_of
from vllm_packcache.core.layout import VideoLayout
from vllm_packcache.core.policies import Policy
from vllm_packcache.core.policies.base import Tokens
from vllm_packcache.core.retention import Retention


@dataclass(frozen=True, kw_only=True)
class RetentionSpec(FullAttentionSpec):
    """Full attention of which a policy frees blocks.

    Args:
        retention: the server's configuration as JSON (specs are compared and hashed); see `retaining`.
        tokens_ahead: tokens that may be scheduled before a step has been processed, which frees no blocks until then.
        frame_by_frame: a prefill chunk ends with its frame: attention has as many rows as a step has requests.
    """

    stream: ClassVar[int] = 0
    """Which of a request's streams it is of."""

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

    @property
    def encoding(self) -> Encoding | None:
        """How much room older frames take in a layer; None: as much as they took when they were new."""
        return self.server_config.encoding(self.num_kv_heads, self.head_size, self.page_size_bytes)

    def retention_of(self, layout: VideoLayout, policy: Policy, tokens: Tokens | None = None) -> Retention:
        """What a video keeps in blocks of this spec; see `Retention`."""
        return retention_of(layout, policy, self.block_size, self.encoding, tokens)

    def most_blocks(self, max_model_len: int) -> int:
        """Blocks that the pool must have room for at start: those of the longest video in the server's layout.

        Its condition is the conditioning image alone, because how long a text may be is known of a request only;
        where there is no layout, a video with every position that the model has. A request that holds more than the
        pool has is refused when it comes (see `vllm_packcache.hooks.startup`).
        """
        config, layout = self.server_config, self.usual_layout
        bounds = [cdiv(max_model_len, self.block_size)]
        if layout is not None:
            usual = self.retention_of(layout.shortest_condition(), config.policy)
            bounds.append(usual.most_of(max_model_len, self.tokens_ahead))
        if config.position_limit is not None:
            # Where the condition and the window begin and end they may share blocks with tokens that are gone.
            bounds.append(cdiv(config.position_limit + self.tokens_ahead, self.block_size) + 3)
        return min(bounds)

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes that the longest request holds at most, in both streams where it may be guided.

        It is what the pool must have room for at start.
        """
        held = self.most_blocks(vllm_config.model_config.max_model_len) * self.page_size_bytes
        most = min(super().max_memory_usage_bytes(vllm_config), held)
        return 2 * most if self.server_config.guidance else most

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """One spec for layers that share a KV cache group: streams share none."""
        first = specs[0]
        assert {spec.retention for spec in specs} == {first.retention}, "layers of one KV cache group differ in policy"
        assert {type(spec) for spec in specs} == {type(first)}, "streams have blocks of their own"
        return replace(first, **fields_of(FullAttentionSpec.merge(specs)))


@dataclass(frozen=True, kw_only=True)
class StreamSpec(RetentionSpec):
    """One of several streams, each of which is a KV cache group of its own.

    vLLM puts layers whose specs have one base into one group, with one block table. The streams of a request have
    different tokens and so different blocks: their specs are of different classes.

    Args:
        largest_frame: tokens of the largest frame that the server makes.
    """

    largest_frame: int

    @property
    def usual_layout(self) -> LayoutConfig:
        """The server's layout; where there is none, the largest frame and a conditioning image of its size."""
        return self.server_config.layout or LayoutConfig(
            tokens_per_frame=self.largest_frame, condition_image_tokens=self.largest_frame
        )


class FirstStreamSpec(StreamSpec):
    """The stream in which the engine counts a request's tokens."""


class SecondStreamSpec(StreamSpec):
    """The stream beside it."""

    stream = 1


STREAM_SPECS = (FirstStreamSpec, SecondStreamSpec)
"""By the number of the stream: as many as a request may have."""


def stream_spec(spec: AttentionSpec, vllm_config: VllmConfig, stream: int) -> AttentionSpec:
    """The spec of a layer of a stream, made of the spec that vLLM would give it.

    Raises:
        TypeError: the layer is not one of plain full attention.
    """
    if type(spec) is not FullAttentionSpec:
        raise TypeError(f"layers of several streams have full attention, not {type(spec).__name__}")
    config = read_config(vllm_config)
    assert config is not None, "a model with several streams is always on"
    assert vllm_config.diffusion_config is not None, "the canvas is set when the configuration is made"
    canvas = vllm_config.diffusion_config.canvas_length
    return STREAM_SPECS[stream](
        **fields_of(spec),
        retention=as_json(config),
        tokens_ahead=(vllm_config.max_concurrent_batches - 1) * canvas,
        frame_by_frame=True,
        largest_frame=canvas,
    )


def as_json(config: ServerConfig) -> str:
    """``config`` in a form that can be compared and hashed."""
    # What is said of videos is for API servers, and the secrets of webhooks are in no such form.
    source = replace(config, videos=VideosConfig()).as_mapping()
    arguments = {"policy": config.name, "source": source, "position_limit": config.position_limit}
    sent = {"config": arguments, "family": config.family.architectures[:1], "fingerprint": config.fingerprint()}
    return json.dumps(sent, sort_keys=True)


@cache
def of_json(text: str) -> ServerConfig:
    """The configuration that `as_json` wrote in another process.

    Raises:
        ConfigError: the policy of that name has other options, is another one, or decides otherwise here.
    """
    sent = json.loads(text)
    config = ServerConfig.parse(**sent["config"], family=families.of(sent["family"]))
    there = sent["fingerprint"]
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
