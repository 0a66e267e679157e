"""What an operator says of guided causal videos."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from vllm_packcache.core.grammar import LARGEST_ID

GUIDANCE_KEY = "guidance"
"""Key of a configuration that says whether requests may have a second stream, and what it is like."""

MAX_GUIDANCE = 1000.0
"""Of a causal video: far more than any model is used with."""

Scale = Annotated[float, Field(gt=0, le=MAX_GUIDANCE)]

_Own = Annotated[int, Field(ge=0, le=LARGEST_ID)] | Literal["rows", "columns"]


class GuidanceConfig(BaseModel):
    """How videos are guided that do not say it themselves.

    ``scale`` is s, see `vllm_packcache.core.plan.VideoRequest`; with 1 they are not. ``negative_prompt_ids`` is the
    condition that guidance leads away from; ``rows`` and ``columns`` stand for the digits of the request's grid, as in
    a layout's ids. Without any it is the family's own, of models that have one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    scale: Scale = 1.0
    negative_prompt_ids: Annotated[tuple[_Own, ...], Field(min_length=1)] | None = None
