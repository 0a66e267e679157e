"""Videos as a part of vLLM's server: on where the operator names a store."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from vllm_packcache.config.server import config_of
from vllm_packcache.engine.metrics import on_admitted
from vllm_packcache.videos.jobs import Jobs
from vllm_packcache.videos.routes import Routes


def routes() -> Routes:
    """The routes, which are added when a server is found to have a store."""
    return Routes(opened)


async def opened(engine_client: Any, args: Namespace) -> Jobs | None:
    """The jobs of a server; None: it makes no videos."""
    del args
    config = config_of(engine_client)
    if config is None or config.videos.store is None:
        return None
    jobs = Jobs(engine_client, config, engine_client.vllm_config.model_config.served_model_name)
    on_admitted(jobs.admitted)
    await jobs.start()
    return jobs
