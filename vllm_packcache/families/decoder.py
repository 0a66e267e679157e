"""Decoders that make a video token by token: Llama and its kin. The family of every model that no other one claims."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_packcache.core.plan import VideoRequest
from vllm_packcache.families.base import Family, Prompt, Server


class Decoder(Family):
    """One causal stream. A request is a video if it says so, with any of the options of one."""

    name = "decoder"

    def request(self, server: Server, extra_args: Mapping[str, Any] | None, prompt: Prompt) -> VideoRequest | None:
        """See `Family.request`."""
        return server.video(extra_args, prompt if isinstance(prompt, int) else len(prompt))
