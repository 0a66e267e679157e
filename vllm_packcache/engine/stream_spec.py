"""KV cache specs of a masked model: one for each of its two streams, so that each is a KV cache group of its own.

vLLM puts layers whose specs have one base into one group, with one block table. The streams of a request have different
tokens and so different blocks: their specs are of different classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from vllm_packcache.config.server import LayoutConfig, ServerConfig
from vllm_packcache.engine.spec import RetentionSpec, as_json, fields_of


@dataclass(frozen=True, kw_only=True)
class StreamSpec(RetentionSpec):
    """One stream of a masked model.

    Args:
        canvas: tokens of the largest frame that the server makes.
    """

    canvas: int

    @property
    def usual_layout(self) -> LayoutConfig:
        """The server's layout; where there is none, the largest frame and a conditioning image of its size."""
        return self.server_config.layout or LayoutConfig(
            tokens_per_frame=self.canvas, condition_image_tokens=self.canvas
        )

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """One spec for layers that share a KV cache group: the streams share none."""
        assert len({type(spec) for spec in specs}) == 1, "the streams of a masked model have blocks of their own"
        return super().merge(specs)


class ConditionalSpec(StreamSpec):
    """The stream of the whole prompt."""


class UnconditionalSpec(StreamSpec):
    """The stream that begins with the video."""


def stream_spec(spec: AttentionSpec, vllm_config: VllmConfig, conditional: bool) -> AttentionSpec:
    """The spec of a layer of a stream, made of the spec that vLLM would give it.

    Raises:
        TypeError: the layer is not one of plain full attention.
    """
    if type(spec) is not FullAttentionSpec:
        raise TypeError(f"the layers of a masked model have full attention, not {type(spec).__name__}")
    assert vllm_config.diffusion_config is not None, "a masked model's canvas is set when the configuration is made"
    canvas = vllm_config.diffusion_config.canvas_length
    return (ConditionalSpec if conditional else UnconditionalSpec)(
        **fields_of(spec),
        retention=as_json(ServerConfig.of_masked_model(vllm_config.additional_config)),
        tokens_ahead=(vllm_config.max_concurrent_batches - 1) * canvas,
        frame_by_frame=True,
        canvas=canvas,
    )
