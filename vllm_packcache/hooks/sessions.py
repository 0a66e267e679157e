"""What sessions need of vLLM's front end: routes, and lists that do not grow with every turn."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pkgutil import resolve_name
from typing import Any

from vllm_packcache.config.server import REQUEST_PREFIX


def offer_routes(load_endpoint_plugins: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """Wrap ``load_endpoint_plugins``, which a server asks for more routes: ours are among them, named or not.

    Nobody can use them but where a policy is on, so that to ask for a policy is to ask for them.
    """

    @wraps(load_endpoint_plugins)
    def wrapper(supported_tasks: Any = None) -> list[Any]:
        plugins = load_endpoint_plugins(supported_tasks)
        if "generate" not in (supported_tasks or ()):
            return plugins
        # Only a server imports what routes need; every process of vLLM's imports this.
        return [*plugins, resolve_name("vllm_packcache.sessions.routes:Routes")()]

    return wrapper


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
