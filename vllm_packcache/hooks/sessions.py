"""What sessions need of vLLM's front end: lists that do not grow with every turn."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm_packcache.config.server import REQUEST_PREFIX


def forget_turns(update_streaming_request_state: Callable[..., None]) -> Callable[..., None]:
    """Wrap ``OutputProcessor._update_streaming_request_state``: lists of a session do not grow with its turns.

    A turn begins when the one before has ended, and all that this made has been handed out.
    """

    @wraps(update_streaming_request_state)
    def wrapper(processor: Any, req_state: Any, request: Any, prompt: Any) -> None:
        params = request.sampling_params
        options = (params.extra_args if params is not None else None) or {}
        if f"{REQUEST_PREFIX}session_tokens" in options and req_state.input_chunk_queue is None:
            req_state.prompt_token_ids = []
            req_state.sent_tokens_offset = 0
            req_state.detokenizer.token_ids.clear()
        update_streaming_request_state(processor, req_state, request, prompt)

    return wrapper
