"""What an operator says of the bits that older frames are held in."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

PRECISION_KEY = "precision"
"""Key of a configuration that says in how many bits a video is held."""


class PrecisionConfig(BaseModel):
    """In how many bits keys and values of older frames are held, by models that make frames in passes.

    ``history`` is a format of `vllm_packcache.core.packing`, or ``auto``: as written. The condition, the newest frame
    and the one being made are always as written.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    history: Literal["auto", "int8", "int4", "int2"] = "auto"

    @property
    def encodes(self) -> bool:
        """Whether older frames are encoded."""
        return self.history != "auto"
