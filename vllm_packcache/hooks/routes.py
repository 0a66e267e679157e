"""What our rooms that answer HTTP need of vLLM's front end: to be among the plugins that it asks for routes."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pkgutil import resolve_name
from typing import Any

_ROOMS = ("vllm_packcache.sessions.routes:Routes", "vllm_packcache.videos.plugin:routes")


def offer_routes(load_endpoint_plugins: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """Wrap ``load_endpoint_plugins``, which a server asks for more routes: ours are among them, named or not.

    Nobody can use them but where a policy is on, so that to ask for a policy is to ask for them. Those of videos are
    added only where a flag asks for them.
    """

    @wraps(load_endpoint_plugins)
    def wrapper(supported_tasks: Any = None) -> list[Any]:
        plugins = load_endpoint_plugins(supported_tasks)
        if "generate" not in (supported_tasks or ()):
            return plugins
        # Only a server imports what routes need; every process of vLLM's imports this.
        return [*plugins, *(resolve_name(room)() for room in _ROOMS)]

    return wrapper
