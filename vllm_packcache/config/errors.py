"""Errors that a person can act on."""

from __future__ import annotations

from vllm_packcache.core.shown import SHOWN_CHARACTERS as SHOWN_CHARACTERS
from vllm_packcache.core.shown import named as named
from vllm_packcache.core.shown import shown as shown
from vllm_packcache.core.shown import shown_path as shown_path


class ConfigError(ValueError):
    """A configuration or request option is wrong. The message names the option and the remedy."""
