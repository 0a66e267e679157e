"""What serving a model takes, by how its family makes frames: one class a role, looked up by the model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm_packcache.config.server import ServerConfig, family_of
from vllm_packcache.core.encoded import Encoding, retention_of
from vllm_packcache.core.plan import Role, Stream

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import ModelConfig, VllmConfig
    from vllm.v1.engine import EngineCoreRequest


class Serving(ABC):
    """What of a server differs from role to role."""

    every_request: bool = False
    """Whether every request is a video, also one without any of our options."""

    def longest(self, max_model_len: int | None) -> int | None:
        """Tokens of the longest sequence, where the model's configuration does not say it; None: it does."""
        del max_model_len
        return None

    def finish(self, vllm_config: VllmConfig) -> None:
        """Set what is to be set when vLLM has made an engine's configuration.

        Raises:
            ConfigError: the operator has chosen something else.
        """
        del vllm_config

    def check_model(self, vllm_config: VllmConfig, config: ServerConfig) -> None:
        """Refuse a model that cannot be right under a policy.

        Raises:
            ConfigError: naming the property of the model, and the remedy.
        """
        del vllm_config, config

    def check_backend(self, name: str) -> None:
        """Refuse an attention backend that cannot serve such a model.

        Raises:
            ConfigError: naming those that can.
        """
        del name

    @abstractmethod
    def backend(self, backend: Any, vllm_config: VllmConfig, config: ServerConfig) -> Any:
        """The attention backend of a layer under a policy, made of the one that vLLM has chosen."""

    @abstractmethod
    def model_state(self, state: Any, config: ServerConfig) -> Any:
        """The model state of the V2 runner under a policy, made of the model's own."""

    def check_sampling(self, params: SamplingParams) -> None:
        """Refuse sampling parameters that would have no effect on a video.

        Raises:
            ConfigError: naming the parameter.
        """
        del params

    @abstractmethod
    def check_request(
        self, request: EngineCoreRequest, config: ServerConfig, vllm_config: VllmConfig, *, length_given: bool
    ) -> None:
        """Check what is sent to the engine, and set what its options imply for vLLM.

        Args:
            request: its sampling parameters are set.
            config: of the server.
            vllm_config: of the engine.
            length_given: whether the request's ``max_tokens`` is the client's.

        Raises:
            ConfigError: an option is wrong, or the request needs more than there is.
        """


def serving_of(model_config: ModelConfig | None) -> Serving:
    """How a model is served; a configuration without any has the usual role."""
    from vllm_packcache.hooks.canvas import CanvasServing
    from vllm_packcache.hooks.causal import CausalServing

    by_role: dict[Role, type[Serving]] = {"causal": CausalServing, "canvas": CanvasServing}
    return by_role[family_of(model_config).role]()


def steps_ahead(vllm_config: VllmConfig) -> int:
    """Steps that may be scheduled before the one in flight has been processed."""
    return vllm_config.max_concurrent_batches - 1


def encoding_in(vllm_config: VllmConfig, config: ServerConfig) -> Encoding | None:
    """How much room older frames take in a layer of a rank; None: as much as when they were new."""
    if not config.precision.encodes:
        return None
    model = vllm_config.model_config
    heads, channels = model.get_num_kv_heads(vllm_config.parallel_config), model.get_head_size()
    page = vllm_config.cache_config.block_size * heads * 2 * channels * model.dtype.itemsize
    return config.encoding(heads, channels, page)


def held_blocks(
    streams: Sequence[Stream], total: int, block_size: int, ahead: int, encoding: Encoding | None = None
) -> int:
    """Blocks that a request of ``total`` tokens holds at most, in all its streams.

    Args:
        streams: of the request.
        total: tokens of the request.
        block_size: tokens of a KV-cache block.
        ahead: tokens that may be scheduled before a step has been processed.
        encoding: how much room older frames take; None: as much as when they were new.
    """
    return sum(
        retention_of(own.plan.layout, own.plan.policy, block_size, encoding).most_of(own.own_tokens(total), ahead)
        for own in streams
    )


def pool_blocks(vllm_config: VllmConfig) -> int | None:
    """Blocks that one engine can give to requests; None: no engine has said yet."""
    blocks = vllm_config.cache_config.num_gpu_blocks
    if not blocks:
        return None
    parallel = vllm_config.parallel_config
    engines = parallel.data_parallel_size_local if parallel.local_engines_only else parallel.data_parallel_size
    if parallel.data_parallel_rank_local is not None:
        engines = 1
    # A front end adds up what its engines report, and one block of each is the null block.
    return blocks // engines - 1
