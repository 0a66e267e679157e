"""Decoders that make a video token by token: Llama and its kin. The family of every model that no other one claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_packcache.core.plan import VideoRequest
from vllm_packcache.families.base import Family, Prompt, Server


class Decoder(Family):
    """One causal stream, or two of a guided video. A request is a video if it has any of the options of one."""

    name = "decoder"

    def request(self, server: Server, extra_args: Mapping[str, Any] | None, prompt: Prompt) -> VideoRequest | None:
        """See `Family.request`."""
        if isinstance(prompt, int):
            return server.video(extra_args, prompt)
        return server.video(extra_args, len(prompt), lambda tokens: self.negative_condition(prompt[:tokens]))

    def negative_condition(self, condition: Sequence[int]) -> tuple[int, ...] | None:
        """What guidance leads away from where neither client nor operator says it; None: these models have nothing.

        Args:
            condition: ids of the request's own.
        """
        del condition
        return None
